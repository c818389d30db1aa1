"""Unicorn, as thinly as it goes: one emulator instance, and callbacks without the wrapper's layers.

The wrapper of the ``unicorn`` package builds Python objects around every callback. The TLB callback is our nested
page walk and runs once per page per cycle, so it is registered here directly: it gets plain integers and fills the
entry in place. Callbacks must never raise: an exception cannot cross the emulator's frames.
"""

import ctypes
from typing import Any

import unicorn
from unicorn import unicorn_const as const
from unicorn.unicorn_py3.unicorn import uclib

from pageferry.core.errors import VmError

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
ACCESS_WRITE, ACCESS_FETCH = const.UC_MEM_WRITE, const.UC_MEM_FETCH


class TlbEntry(ctypes.Structure):
    """``struct uc_tlb_entry``: what the fill callback answers."""

    _fields_ = (("paddr", ctypes.c_uint64), ("perms", ctypes.c_uint32))


class Engine:
    """One x86-64 emulator over machine memory, with our MMU behind its TLB.

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
        self._callbacks: list[Any] = []

    def hook(self, kind: int, callback: Any, begin: int = 1, end: int = 0, *extra: int) -> None:  # noqa: ANN401
        """Register a C callback for an address range (all addresses when ``begin > end``)."""
        self._callbacks.append(callback)
        handle = ctypes.c_size_t()
        more = [ctypes.c_int(value) for value in extra]
        code = uclib.uc_hook_add(
            self.handle,
            ctypes.byref(handle),
            kind,
            ctypes.cast(callback, ctypes.c_void_p),
            None,
            ctypes.c_uint64(begin),
            ctypes.c_uint64(end),
            *more,
        )
        if code:
            raise VmError(f"the CPU emulator refused a callback: {_binding.UcError(code)}")

    def mmio_map(self, maddr: int, size_bytes: int, read: Any, write: Any) -> None:  # noqa: ANN401
        """Let accesses to a range of machine addresses call back, with the offset into it."""
        self._callbacks += (read, write)
        code = uclib.uc_mmio_map(
            self.handle,
            maddr,
            size_bytes,
            ctypes.cast(read, ctypes.c_void_p),
            None,
            ctypes.cast(write, ctypes.c_void_p),
            None,
        )
        if code:
            raise VmError(f"the CPU emulator refused a device window: {_binding.UcError(code)}")

    def map_private(self, maddr: int, data: bytes) -> None:
        """Put a page of the emulator's own at a machine address."""
        self._uc.mem_map(maddr, 0x1000)
        self._uc.mem_write(maddr, data)

    def start(self, rip: int, count: int = 0, until: int = 0) -> int:
        """Run from ``rip``, without the interpreter lock; return Unicorn's error number, 0 for none.

        It ends after ``count`` instructions (0: never), at the address ``until``, or when a callback calls ``stop``.
        """
        no_timeout = ctypes.c_uint64(0)
        code: int = uclib.uc_emu_start(
            self.handle, ctypes.c_uint64(rip), ctypes.c_uint64(until), no_timeout, ctypes.c_size_t(count)
        )
        return code

    def ignore_until(self) -> None:
        """From now on ``until`` means nothing (it would otherwise be compiled into the code found there)."""
        self._uc.ctl_exits_enabled(True)

    def stop(self) -> None:
        """Have ``start`` return at this instruction; from a callback only."""
        uclib.uc_emu_stop(self.handle)

    def flush_tlb(self) -> None:
        """Forget every translation; the code cache stays. The vCPU's own thread, outside the guest."""
        self._uc.ctl(const.UC_CTL_TLB_FLUSH, const.UC_CTL_IO_WRITE)

    def flush_code(self) -> None:
        """Forget every translated block; the vCPU's own thread, outside the guest."""
        self._uc.ctl_flush_tb()

    def get(self, register: int) -> Any:  # noqa: ANN401
        """Read a register (``x86.UC_X86_REG_*``)."""
        return self._uc.reg_read(register)

    def set(self, register: int, value: Any) -> None:  # noqa: ANN401
        """Write a register."""
        self._uc.reg_write(register, value)
