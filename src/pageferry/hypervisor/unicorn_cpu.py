"""The emulator's CPU itself: the fields that Unicorn's interface leaves out, read and written where they lie.

An operating system's CPU has more than registers that can be read by name: the privilege level, the hidden parts of
segments, the error code of an exception, the exact address of a page fault, the offset of the time-stamp counter.
Unicorn keeps them in one structure for each engine and offers no call for them.

Where that structure is depends on the build, so it is *found by its content*, once for each process: a trial engine is
given registers that no memory holds by chance, and its memory is searched for them. Within the structure the order of
fields is Unicorn 2's. A build where the search fails is refused, and nothing is read by guess.

Source: Unicorn 2.1, the layout of the x86 CPU's state; measured.
"""

import ctypes
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import unicorn
from unicorn import unicorn_const as const
from unicorn import x86_const as x86

from pageferry.core.errors import UnsupportedError

_binding: Any = unicorn  # the package's annotations are incomplete
_u32, _u64, _i32 = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32


class SegmentFields(ctypes.Structure):
    """A segment register. ``flags`` is the second word of its descriptor without base and limit."""

    _fields_ = (("selector", _u32), ("base", _u64), ("limit", _u32), ("flags", _u32))


class CpuFields(ctypes.Structure):
    """What every instruction looks at. ``regs`` in the order of their numbers; ``segs``: ES CS SS DS FS GS.

    Arithmetic flags are not in ``eflags`` but in the ``cc`` fields and ``df``; all others are. ``hflags`` repeats what
    decides how code is translated (:mod:`.registers`).
    """

    _fields_ = (
        ("regs", _u64 * 16),
        ("eip", _u64),
        ("eflags", _u64),
        ("cc_dst", _u64),
        ("cc_src", _u64),
        ("cc_src2", _u64),
        ("cc_op", _u32),
        ("df", _i32),
        ("hflags", _u32),
        ("hflags2", _u32),
        ("segs", SegmentFields * 6),
        ("ldt", SegmentFields),
        ("tr", SegmentFields),
        ("gdt", SegmentFields),
        ("idt", SegmentFields),
        ("cr", _u64 * 9),
        ("a20_mask", _i32),
        ("bounds", _u64 * 11),
        ("efer", _u64),
    )


class MsrFields(ctypes.Structure):
    """The MSRs of the ways into a kernel, and TSC_AUX."""

    _fields_ = (
        ("sysenter_cs", _u32),
        ("sysenter_esp", _u64),
        ("sysenter_eip", _u64),
        ("star", _u64),
        ("vm_hsave", _u64),
        ("lstar", _u64),
        ("cstar", _u64),
        ("fmask", _u64),
        ("kernel_gs_base", _u64),
        ("tsc", _u64),
        ("tsc_adjust", _u64),
        ("tsc_deadline", _u64),
        ("tsc_aux", _u64),
    )


class EventFields(ctypes.Structure):
    """The last exception, debug registers, and what is added to the host's time-stamp counter.

    ``old_exception`` is the exception that the emulator believes to be still delivering; -1: none.
    """

    _fields_ = (
        ("error_code", _i32),
        ("is_software", _i32),
        ("next_eip", _u64),
        ("dr", _u64 * 8),
        ("breakpoints", _u64 * 4),
        ("old_exception", _i32),
        ("vmcb", _u64),
        ("tsc_offset", _u64),
    )


# Indices into CpuFields seen as u64s, and (HFLAGS) as u32s: for what looks at a few fields a million times a second.
EFLAGS = CpuFields.eflags.offset // 8
CR0, CR3, CR4 = (CpuFields.cr.offset // 8 + n for n in (0, 3, 4))
EFER = CpuFields.efer.offset // 8
HFLAGS = CpuFields.hflags.offset // 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where things are: ``cpu`` and ``fault_address`` in the engine, ``fields`` in what ``cpu`` points to.

    ``msrs`` and ``events`` count from ``fields``.
    """

    cpu: int
    fault_address: int
    fields: int
    msrs: int
    events: int


class Cpu:
    """The CPU of one engine, as it is in memory.

    ``words`` and ``halves`` show ``fields`` as u64s and u32s.

    Args:
        handle: the engine's, which has memory already: before that Unicorn makes no CPU. The caller keeps the engine
            open as long as this object is used.

    Raises:
        UnsupportedError: this build of Unicorn lays its CPU out in another way.
    """

    def __init__(self, handle: int) -> None:
        layout = _layout()
        at = _u64.from_address(handle + layout.cpu).value + layout.fields
        # SAFETY: the engine's own structure; the caller keeps the engine open. The same for all that follows.
        self.fields = CpuFields.from_address(at)
        self.msrs = MsrFields.from_address(at + layout.msrs)
        self.events = EventFields.from_address(at + layout.events)
        self._fault_address = _u64.from_address(handle + layout.fault_address)
        whole = memoryview(self.fields).cast("B")
        self.words = whole.cast("Q")
        self.halves = whole.cast("I")

    @property
    def fault_address(self) -> int:
        """The virtual address of the last access that the TLB callback refused, to the byte."""
        return self._fault_address.value


_GENERAL = (
    *("RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI"),
    *(f"R{number}" for number in range(8, 16)),
)
_SIGNATURE = 0x7E57_C0DE_0000_0000
_NOWHERE = 0x5E57_C0DE_1003
_ENGINE_BYTES, _CPU_BYTES = 1 << 14, 1 << 16
_CODE_GPA, _LOAD = 0x1000, bytes.fromhex("488b03")  # mov rax, [rbx]
_MSR_STAR, _MSR_KERNEL_GS_BASE = 0xC000_0081, 0xC000_0102


@cache
def _layout() -> _Layout:
    uc = _binding.Uc(const.UC_ARCH_X86, const.UC_MODE_64)
    handle: int = uc._uch.value
    general, debug, star, gs_base = (_SIGNATURE | n << 16 for n in range(1, 5))
    for number, name in enumerate(_GENERAL):
        uc.reg_write(getattr(x86, f"UC_X86_REG_{name}"), general | number)
    for number in range(4):
        uc.reg_write(x86.UC_X86_REG_DR0 + number, debug | number)
    uc.reg_write(x86.UC_X86_REG_MSR, (_MSR_STAR, star))
    uc.reg_write(x86.UC_X86_REG_MSR, (_MSR_KERNEL_GS_BASE, gs_base))
    for cpu, content in _pointed_to(handle):
        fields = content.find(struct.pack("<16Q", *(general | number for number in range(16))))
        if fields < 0:
            continue
        events = content.find(struct.pack("<4Q", *(debug | number for number in range(4))), fields)
        msrs = content.find(struct.pack("<Q", star), fields)
        kernel_gs_base = content.find(struct.pack("<Q", gs_base), fields)
        if min(events, msrs) >= 0 and kernel_gs_base - msrs == MsrFields.kernel_gs_base.offset - MsrFields.star.offset:
            return _Layout(
                cpu=cpu,
                fault_address=_find_fault_address(uc, handle),
                fields=fields,
                msrs=msrs - MsrFields.star.offset - fields,
                events=events - EventFields.dr.offset - fields,
            )
    raise _unknown("its registers were not found")


def _pointed_to(handle: int) -> Iterator[tuple[int, bytes]]:
    """Yield what each pointer in the engine points to, with the place of the pointer."""
    engine = _read(handle, _ENGINE_BYTES)
    for at in range(0, len(engine) - 7, 8):
        (pointer,) = struct.unpack_from("<Q", engine, at)
        if pointer % 8 == 0 and 1 << 16 < pointer < 1 << 56:
            yield at, _read(pointer, _CPU_BYTES)


def _find_fault_address(uc: Any, handle: int) -> int:  # noqa: ANN401
    uc.mem_map(_CODE_GPA, 0x1000)
    uc.mem_write(_CODE_GPA, _LOAD)
    uc.reg_write(x86.UC_X86_REG_RBX, _NOWHERE)
    try:
        uc.emu_start(_CODE_GPA, _CODE_GPA + len(_LOAD))
    except _binding.UcError:  # no memory there: that is the point
        at = _read(handle, _ENGINE_BYTES).find(struct.pack("<Q", _NOWHERE))
        if at >= 0:
            return at
    raise _unknown("the address of a fault was not found")


def _read(hva: int, size_bytes: int) -> bytes:
    """Read our own memory, as far as it is mapped; nothing is assumed to be."""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        try:
            return os.pread(memory.fileno(), size_bytes, hva)
        except OSError:
            return b""


def _unknown(what: str) -> UnsupportedError:
    return UnsupportedError(
        "unicorn",
        f"Unicorn {_binding.__version__} lays its CPU out in an unknown way: {what}",
        hint="install unicorn 2.1.4, or use --accel kvm",
    )
