"""A thin interface to Unicorn: one emulator instance, and callbacks without the layers of its Python package.

The wrapper of the ``unicorn`` package builds Python objects around every callback. The TLB callback is our nested
page walk and runs once per page per cycle, so it is registered here directly: it gets plain integers and fills the
entry in place. Callbacks must never raise: an exception cannot cross the emulator's frames.
"""

import ctypes
import threading
from functools import cache
from typing import Any

import unicorn
from unicorn import unicorn_const as const
from unicorn import x86_const as x86
from unicorn.unicorn_py3.unicorn import uclib

from pageferry.core.errors import VmError
from pageferry.hypervisor.countdown import Countdown
from pageferry.hypervisor.unicorn_cpu import Cpu

_binding: Any = unicorn  # the package's annotations are incomplete

TLB_FILL = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p
)
INTERRUPT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)
CPUID = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
SYSTEM_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
PORT_IN = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p)
PORT_OUT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p)
MMIO_READ = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_void_p)
MMIO_WRITE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint64, ctypes.c_void_p)

READ, WRITE, EXECUTE = const.UC_PROT_READ, const.UC_PROT_WRITE, const.UC_PROT_EXEC
ACCESS_READ, ACCESS_WRITE, ACCESS_FETCH = const.UC_MEM_READ, const.UC_MEM_WRITE, const.UC_MEM_FETCH


_NO_LIMIT, _NO_COUNT = ctypes.c_uint64(0), ctypes.c_size_t(0)


class TlbEntry(ctypes.Structure):
    """``struct uc_tlb_entry``: what the fill callback answers."""

    _fields_ = (("paddr", ctypes.c_uint64), ("perms", ctypes.c_uint32))


class Engine:
    """One x86-64 emulator over machine memory, with our MMU behind its TLB.

    ``cpu`` is its CPU, as it is in memory.

    Args:
        hva: host address of machine address 0.
        size_bytes: how much machine memory there is. The caller keeps it mapped as long as this object lives.
    """

    def __init__(self, hva: int, size_bytes: int) -> None:
        self._uc = _binding.Uc(const.UC_ARCH_X86, const.UC_MODE_64)
        self.handle = self._uc._uch
        # SAFETY: the emulator borrows the machine's host mapping; the vCPU holds it and outlives this object.
        self._uc.mem_map_ptr(0, size_bytes, const.UC_PROT_ALL, hva)
        self._uc.ctl_set_tlb_mode(const.UC_TLB_VIRTUAL)
        self._uc.ctl_exits_enabled(True)  # else "until" would be compiled into the code that is found at that address
        self._callbacks: list[Any] = []
        self.cpu = Cpu(self.handle.value)
        self._countdown = Countdown(self.cpu)
        self._rflags = ctypes.c_uint32()
        self._rflags_at = ctypes.byref(self._rflags)
        self.hook(const.UC_HOOK_BLOCK, self._countdown.callback, data=self._countdown.address)

    def hook(
        self,
        kind: int,
        callback: Any,  # noqa: ANN401
        *extra: int,
        data: int | None = None,
    ) -> None:
        """Register a C callback for all addresses; ``data`` is what it is given of its own."""
        self._callbacks.append(callback)
        handle = ctypes.c_size_t()
        code = uclib.uc_hook_add(
            self.handle,
            ctypes.byref(handle),
            kind,
            ctypes.cast(callback, ctypes.c_void_p),
            ctypes.c_void_p(data),
            ctypes.c_uint64(1),
            ctypes.c_uint64(0),
            *(ctypes.c_int(value) for value in extra),
        )
        if code:
            raise VmError(f"the CPU emulator refused a callback: {_binding.UcError(code)}")

    def hook_instruction(self, callback: Any, instruction: int) -> None:  # noqa: ANN401
        """Register a C callback for an instruction (``x86.UC_X86_INS_*``)."""
        self.hook(const.UC_HOOK_INSN, callback, instruction)

    def mmio_map(
        self,
        maddr: int,
        size_bytes: int,
        read: Any,  # noqa: ANN401
        write: Any,  # noqa: ANN401
        *,
        data: int | None = None,
    ) -> None:
        """Let accesses to a range of machine addresses call back, with the offset into it; ``data`` as for ``hook``."""
        self._callbacks += (read, write)
        code = uclib.uc_mmio_map(
            self.handle,
            maddr,
            size_bytes,
            ctypes.cast(read, ctypes.c_void_p),
            ctypes.c_void_p(data),
            ctypes.cast(write, ctypes.c_void_p),
            ctypes.c_void_p(data),
        )
        if code:
            raise VmError(f"the CPU emulator refused a device window: {_binding.UcError(code)}")

    def map_private(self, maddr: int, data: bytes) -> None:
        """Put a page of the emulator's own at a machine address."""
        self._uc.mem_map(maddr, 0x1000)
        self._uc.mem_write(maddr, data)

    def run(self, blocks: int, *, interrupt: bool = False) -> int:
        """Run from where the CPU is, without the interpreter lock; return Unicorn's error number, 0 for none.

        It ends at a HLT, after so many blocks of code, or when a callback calls ``stop``; always between instructions.
        With ``interrupt`` it ends before the first block at which the guest takes interrupts.
        """
        self._countdown.start(blocks, interrupt=interrupt)
        code: int = uclib.uc_emu_start(
            self.handle, ctypes.c_uint64(self.cpu.fields.eip), _NO_LIMIT, _NO_LIMIT, _NO_COUNT
        )
        return code

    @property
    def out_of_blocks(self) -> bool:
        """Whether ``run`` has ended before a block: the blocks were over, an interrupt came, or :meth:`hurry`."""
        return self._countdown.stopped

    def ready(self) -> None:
        """Let what others ask by :meth:`hurry` from now on end the next ``run``."""
        self._countdown.ready()

    def hurry(self) -> None:
        """Have ``run`` end before the next block, at the latest the first one of the next ``run``; any thread."""
        self._countdown.hurry()

    def interrupt(self) -> None:
        """Have ``run`` end once the guest takes interrupts; any thread. Lost if it has not begun yet."""
        self._countdown.interrupt()

    def stop(self) -> None:
        """Have ``run`` end: at this instruction where it has raised an exception, else behind its block.

        From a callback only.
        """
        uclib.uc_emu_stop(self.handle)

    def flush_tlb(self) -> None:
        """Forget every translation; the code cache stays. The vCPU's own thread, outside the guest."""
        self._uc.ctl(const.UC_CTL_TLB_FLUSH, const.UC_CTL_IO_WRITE)

    def flush_code(self, gva: int, size_bytes: int) -> None:
        """Forget the translated code of what is at ``gva`` now; the vCPU's own thread, outside the guest."""
        self._uc.ctl_remove_cache(gva, gva + size_bytes)

    def get(self, register: int) -> Any:  # noqa: ANN401
        """Read a register (``x86.UC_X86_REG_*``)."""
        return self._uc.reg_read(register)

    def set(self, register: int, value: Any) -> None:  # noqa: ANN401
        """Write a register."""
        self._uc.reg_write(register, value)

    @property
    def rflags(self) -> int:
        """RFLAGS, with the arithmetic flags, which the CPU keeps in a form of its own."""
        uclib.uc_reg_read(self.handle, x86.UC_X86_REG_EFLAGS, self._rflags_at)
        return self._rflags.value

    @rflags.setter
    def rflags(self, value: int) -> None:
        self._rflags.value = value
        uclib.uc_reg_write(self.handle, x86.UC_X86_REG_EFLAGS, self._rflags_at)

    def read_msr(self, index: int) -> int:
        """Read an MSR; 0 for one that the CPU has not."""
        value: int = self._uc.msr_read(index)
        return value


def host_ticks() -> int:
    """Return the time-stamp counter of the host as the guests of this process have it; they add their offset."""
    with _ticks_lock:
        engine = _tick_engine()
        engine.emu_start(0, len(_RDTSC))
        low, high = (engine.reg_read(register) for register in (x86.UC_X86_REG_RAX, x86.UC_X86_REG_RDX))
    ticks: int = high << 32 | low
    return ticks


_RDTSC = bytes.fromhex("0f31")
_ticks_lock = threading.Lock()


@cache
def _tick_engine() -> Any:  # noqa: ANN401
    engine = _binding.Uc(const.UC_ARCH_X86, const.UC_MODE_64)
    engine.mem_map(0, 0x1000)
    engine.mem_write(0, _RDTSC)
    return engine
