"""Port I/O of one vCPU: permission, the devices, and an exact stop behind an access.

The emulator performs IN and OUT at any privilege and goes on to the end of its block whatever a callback says. An
access that has an effect (exit, wait, sync, reset), or that is refused, must be the last thing that happens. For that
the CPU has I/O *breakpoints*: a debug register that names a port traps (#DB) right behind the access, RIP behind it.
Code is always translated to look for them; only between our callback and the trap is one set, and the guest gets its
debug registers back as they were. A guest that has written DR7 in the same slice stops at the end of the block instead:
its writing has the CPU translate code without that look.

In ring 3 with IOPL below it, the bitmap in the TSS decides about each port. A refused IN gives RAX back; a refused INS
has written to its destination in memory.

Source: AMD APM volume 2, 12.2.4 (I/O-Permission Bitmap), 13.1.1 (DR7: R/W 10b is I/O).
"""

from collections.abc import Callable

from unicorn import x86_const as x86

from pageferry.core.run import Effect
from pageferry.devices.bus import DeviceBus
from pageferry.hypervisor.exceptions import GENERAL_PROTECTION, Event, SystemMemory, page_fault
from pageferry.hypervisor.guest_walk import GuestPageFault
from pageferry.hypervisor.registers import CPL_MASK, HFLAG_IOBPT, RAX
from pageferry.hypervisor.unicorn_api import PORT_IN, PORT_OUT, Engine
from pageferry.hypervisor.unicorn_cpu import EFLAGS, HFLAGS, Cpu

_IOPL_SHIFT = 12
_TSS_TYPES, _TSS_BITMAP_BASE = (0x9, 0xB), 0x66
# Breakpoint 0: enabled, I/O, 1 byte; that DR7 has no other.
_BREAK_ON_IO = 0x400 | 1 << 1 | 0b10 << 16


class PortIo:
    """The IN and OUT of one vCPU.

    Args:
        bus: the devices.
        memory: the guest's, for the TSS.
        failed: takes an exception that must not travel through the emulator.
    """

    def __init__(self, bus: DeviceBus, memory: SystemMemory, failed: Callable[[BaseException], None]) -> None:
        self._bus = bus
        self._memory = memory
        self._failed = failed
        self._engine: Engine | None = None
        self._callbacks = (PORT_IN(self._in), PORT_OUT(self._out))
        self._effect: Effect | None = None
        self._refusal: Event | None = None
        self._before: tuple[int, int] | None = None  # RIP and RAX of the access that is to be the last
        self._saved_debug: tuple[int, int, int] | None = None

    def attach(self, engine: Engine) -> None:
        """Answer the accesses of one engine; this object must outlive it."""
        for callback, instruction in zip(self._callbacks, (x86.UC_X86_INS_IN, x86.UC_X86_INS_OUT), strict=True):
            engine.hook_instruction(callback, instruction)
        self._engine = engine
        self._effect = self._refusal = self._before = self._saved_debug = None

    @property
    def stopped(self) -> bool:
        """Whether an access was the last thing that the CPU did."""
        return self._before is not None

    def take(self, engine: Engine) -> tuple[Effect | None, Event | None]:
        """End such a stop, outside the guest: return the access's effect, or the exception that it is instead."""
        assert self._before is not None
        rip, rax = self._before
        effect, refusal = self._effect, self._refusal
        self._effect = self._refusal = self._before = None
        if self._saved_debug is not None:
            dr = engine.cpu.events.dr
            dr[0], dr[6], dr[7] = self._saved_debug
            self._saved_debug = None
        if refusal is not None:
            engine.cpu.fields.eip, engine.cpu.fields.regs[RAX] = rip, rax
        return effect, refusal

    def _in(self, _engine: int, port: int, size: int, _data: int) -> int:
        try:
            return self._bus.port_read(port, size) if self._may(port, size) else 0
        except BaseException as error:
            self._failed(error)
            return 0

    def _out(self, _engine: int, port: int, size: int, value: int, _data: int) -> None:
        try:
            if self._may(port, size):
                effect = self._bus.port_write(port, size, value & (1 << 8 * size) - 1)
                if effect is not None and not self.stopped:
                    self._effect = effect
                    self._stop(port)
        except BaseException as error:
            self._failed(error)

    def _may(self, port: int, size: int) -> bool:
        """Tell whether the access is allowed; if not, it is the last and an exception."""
        assert self._engine is not None
        cpu = self._engine.cpu
        cpl = cpu.halves[HFLAGS] & CPL_MASK
        if cpl <= cpu.words[EFLAGS] >> _IOPL_SHIFT & 3:
            return True
        try:
            allowed = self._bitmap_allows(cpu, port, size)
        except GuestPageFault as fault:
            self._refuse(page_fault(fault, fault.gva), port)
            return False
        if not allowed:
            self._refuse(Event(vector=GENERAL_PROTECTION, error_code=0), port)
        return allowed

    def _bitmap_allows(self, cpu: Cpu, port: int, size: int) -> bool:
        tss = cpu.fields.tr
        if tss.flags >> 8 & 0x1F not in _TSS_TYPES or tss.limit < _TSS_BITMAP_BASE + 1:
            return False
        at = self._memory.read(tss.base + _TSS_BITMAP_BASE, 2) + (port >> 3)
        if at + 1 > tss.limit:
            return False
        bits = self._memory.read(tss.base + at, 2) >> (port & 7)
        return not bits & (1 << size) - 1

    def _refuse(self, event: Event, port: int) -> None:
        if not self.stopped:
            self._refusal = event
            self._stop(port)

    def _stop(self, port: int) -> None:
        assert self._engine is not None
        cpu = self._engine.cpu
        self._before = cpu.fields.eip, cpu.fields.regs[RAX]
        if cpu.fields.hflags & HFLAG_IOBPT:
            dr = cpu.events.dr
            self._saved_debug = dr[0], dr[6], dr[7]
            dr[0], dr[7] = port, _BREAK_ON_IO
        else:
            self._engine.stop()
