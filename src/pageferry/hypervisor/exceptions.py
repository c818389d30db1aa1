"""Exceptions and interrupts: through the guest's IDT into its handler, as the processor delivers them in long mode.

::

    IDT gate -> code segment (GDT, LDT) -> stack: that of the TSS (IST, or RSPn when the privilege rises), or the same
             -> SS RSP RFLAGS CS RIP [error code] pushed -> RIP of the gate, IF off for an interrupt gate

Nothing of the CPU changes before all of that has succeeded. What fails on the way is an exception of its own, with EXT
set in its error code; two that cannot be told apart are a double fault, and an exception in delivering that is a triple
fault, which ends the guest::

    first          second: benign   contributory (0, 10 to 13)   page fault
    benign         second           second                       second
    contributory   second           double fault                 second
    page fault     second           double fault                 double fault
    double fault   triple fault     triple fault                 triple fault

RF is set in the pushed flags of a fault other than #DB, so that the instruction is not taken for a breakpoint again.

Simplified: outside long mode nothing is delivered: an exception in 32-bit protected mode is a triple fault.

Source: AMD APM volume 2, 8.4 (priorities), 8.5 (the double fault's table), 8.7 (selector error codes), 8.9 (long mode).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Protocol

from pageferry.core.errors import GuestCrash
from pageferry.hypervisor.guest_walk import GuestPageFault
from pageferry.hypervisor.registers import (
    CPL_MASK,
    CR0_PE,
    CS,
    DPL_SHIFT,
    EFER_LMA,
    FLAG_BIG,
    FLAG_CODE_OR_DATA,
    FLAG_LONG,
    FLAG_PRESENT,
    HFLAG2_NMI,
    RFLAGS_IF,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VM,
    RSP,
    SS,
    enter_64_bit_code,
    set_segment,
)
from pageferry.hypervisor.unicorn_api import Engine

DIVIDE_ERROR, DEBUG, NMI, BREAKPOINT, OVERFLOW, INVALID_OPCODE = 0, 1, 2, 3, 4, 6
DOUBLE_FAULT, SEGMENT_NOT_PRESENT, STACK_FAULT, GENERAL_PROTECTION, PAGE_FAULT = 8, 11, 12, 13, 14
_INVALID_TSS, _ALIGNMENT_CHECK, _MACHINE_CHECK = 10, 17, 18

_CONTRIBUTORY = frozenset({DIVIDE_ERROR, *range(_INVALID_TSS, GENERAL_PROTECTION + 1)})
_WITH_ERROR_CODE = frozenset({DOUBLE_FAULT, *range(_INVALID_TSS, PAGE_FAULT + 1), _ALIGNMENT_CHECK})
_NO_FAULTS = frozenset({DEBUG, BREAKPOINT, OVERFLOW, DOUBLE_FAULT, _MACHINE_CHECK})

_NAMES = {
    0: "divide error",
    1: "debug trap",
    2: "NMI",
    3: "breakpoint",
    4: "overflow",
    5: "bound range exceeded",
    6: "invalid instruction",
    7: "no FPU",
    8: "double fault",
    10: "invalid TSS",
    11: "segment not present",
    12: "stack fault",
    13: "general protection fault",
    14: "page fault",
    16: "x87 error",
    17: "alignment check",
    19: "SIMD error",
}

_EXT, _IDT = 1, 2
_GATE_BYTES, _DESCRIPTOR_BYTES = 16, 8
_INTERRUPT_GATE, _TRAP_GATE = 0xE, 0xF
_TYPE_SHIFT, _CODE, _CONFORMING, _ACCESSED = 8, 1 << 11, 1 << 10, 1 << 8
_TSS_RSP, _TSS_IST = 4, 36  # RSP0 to RSP2; IST1 to IST7
_LOCAL = 4  # a selector's table indicator: the LDT
_U64 = (1 << 64) - 1


class Kind(Enum):
    """Where an event comes from."""

    EXCEPTION = auto()
    SOFTWARE = auto()
    """INT n, INT3, INTO: the gate must allow it."""
    EXTERNAL = auto()
    """An interrupt, or an NMI."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An exception or interrupt on its way to the guest.

    ``return_rip``: where its handler returns to, None: to where the CPU is. ``cr2``: what a page fault puts there;
    ``dr6``: what is set there besides what is. ``detail``: what a crash message says in place of its name.
    """

    vector: int
    kind: Kind = Kind.EXCEPTION
    error_code: int | None = None
    cr2: int | None = None
    dr6: int | None = None
    return_rip: int | None = None
    detail: str = ""

    def describe(self) -> str:
        """Return what to call it in a crash message."""
        return self.detail or _NAMES.get(self.vector, f"exception {self.vector}")


def page_fault(fault: GuestPageFault, gva: int) -> Event:
    """Return the event of a walk that the guest's tables refused, for an access to ``gva``."""
    if fault.error_code is None:
        return Event(vector=GENERAL_PROTECTION, error_code=0, detail=fault.describe())
    return Event(vector=PAGE_FAULT, error_code=fault.error_code, cr2=gva, detail=fault.describe())


class _Refused(Exception):
    """An exception raised by the delivery of another."""

    def __init__(self, vector: int, error_code: int) -> None:
        super().__init__()
        self.event = Event(vector=vector, error_code=error_code)


class SystemMemory(Protocol):
    """Guest memory as the processor itself sees it: at gvas, as a supervisor. Both raise GuestPageFault."""

    def read(self, gva: int, size: int) -> int:
        """Return a little-endian number."""

    def write(self, gva: int, size: int, value: int) -> None:
        """Store one."""


class Delivery:
    """Delivers events to one vCPU, which is outside the guest.

    Args:
        memory: the guest's, for descriptors and stacks.
        failed: what to do with the first of a chain of events that no handler can take; raises.
    """

    def __init__(self, memory: SystemMemory, failed: Callable[[Event], None]) -> None:
        self._memory = memory
        self._failed = failed

    def deliver(self, engine: Engine, event: Event) -> None:
        """Have the guest go on in its handler, or in that of a double fault; else the guest has ended."""
        first: Event = event
        if not engine.cpu.fields.efer & EFER_LMA:
            mode = "32-bit" if engine.cpu.fields.cr[0] & CR0_PE else "real"
            detail = f"{first.describe()} in {mode} mode, where the software machine delivers no exceptions"
            self._failed(replace(first, detail=detail))
            return
        while True:
            if event.cr2 is not None:
                engine.cpu.fields.cr[2] = event.cr2
            if event.dr6 is not None:
                engine.cpu.events.dr[6] |= event.dr6
            try:
                self._enter(engine, event)
            except _Refused as refused:
                second = refused.event
            except GuestPageFault as fault:
                second = page_fault(fault, fault.gva)
            else:
                return
            worse = _combine(event, second)
            if worse is None:
                self._failed(first)
                return
            event = worse

    def _enter(self, engine: Engine, event: Event) -> None:
        fields, memory = engine.cpu.fields, self._memory
        cpl = fields.hflags & CPL_MASK
        external = 0 if event.kind is Kind.SOFTWARE else _EXT
        low, high = self._gate(engine, event, cpl, external)
        selector = low >> 16 & 0xFFFF
        new_cpl, code_flags = self._code_segment(engine, selector, cpl, external)
        ist = low >> 32 & 7
        if ist:
            rsp = memory.read(fields.tr.base + _TSS_IST + 8 * (ist - 1), 8)
        elif new_cpl < cpl:
            rsp = memory.read(fields.tr.base + _TSS_RSP + 8 * new_cpl, 8)
        else:
            rsp = fields.regs[RSP]
        rflags = engine.rflags
        is_fault = event.kind is Kind.EXCEPTION and event.vector not in _NO_FAULTS
        rip = fields.eip if event.return_rip is None else event.return_rip
        frame = [fields.segs[SS].selector, fields.regs[RSP], rflags | (RFLAGS_RF if is_fault else 0)]
        frame += [fields.segs[CS].selector, rip]
        if event.kind is Kind.EXCEPTION and event.vector in _WITH_ERROR_CODE:
            frame.append(event.error_code or 0)
        rsp &= -16
        for value in frame:
            rsp = rsp - 8 & _U64
            memory.write(rsp, 8, value)
        # From here on nothing can fail.
        fields.regs[RSP] = rsp
        fields.eip = (low & 0xFFFF) | (low >> 48 & 0xFFFF) << 16 | (high & 0xFFFF_FFFF) << 32
        set_segment(fields.segs[CS], selector & ~CPL_MASK | new_cpl, 0, 0xFFFF_FFFF, code_flags)
        if new_cpl != cpl:
            set_segment(fields.segs[SS], new_cpl, 0, 0, new_cpl << DPL_SHIFT)
        cleared = RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM
        if low >> 32 + _TYPE_SHIFT & 0xF == _INTERRUPT_GATE:
            cleared |= RFLAGS_IF
        engine.rflags = rflags & ~cleared
        enter_64_bit_code(fields, new_cpl)
        if event.kind is Kind.EXTERNAL and event.vector == NMI:
            fields.hflags2 |= HFLAG2_NMI

    def _gate(self, engine: Engine, event: Event, cpl: int, external: int) -> tuple[int, int]:
        """Return the two words of an event's gate, once it may be used."""
        idt, error_code = engine.cpu.fields.idt, event.vector * 8 | _IDT | external
        at = event.vector * _GATE_BYTES
        if at + _GATE_BYTES - 1 > idt.limit:
            raise _Refused(GENERAL_PROTECTION, error_code)
        low, high = (self._memory.read(idt.base + at + half, 8) for half in (0, 8))
        flags = low >> 32
        if flags >> _TYPE_SHIFT & 0x1F not in (_INTERRUPT_GATE, _TRAP_GATE):
            raise _Refused(GENERAL_PROTECTION, error_code)
        if event.kind is Kind.SOFTWARE and flags >> DPL_SHIFT & 3 < cpl:
            raise _Refused(GENERAL_PROTECTION, error_code)
        if not flags & FLAG_PRESENT:
            raise _Refused(SEGMENT_NOT_PRESENT, error_code)
        return low, high

    def _code_segment(self, engine: Engine, selector: int, cpl: int, external: int) -> tuple[int, int]:
        """Return the new privilege level and the flags of a gate's code segment, marked accessed."""
        fields, error_code = engine.cpu.fields, selector & ~3 | external
        if not selector & ~3:
            raise _Refused(GENERAL_PROTECTION, external)
        table = fields.ldt if selector & _LOCAL else fields.gdt
        at = selector & ~7
        if at + _DESCRIPTOR_BYTES - 1 > table.limit:
            raise _Refused(GENERAL_PROTECTION, error_code)
        flags = self._memory.read(table.base + at + 4, 4)
        dpl = flags >> DPL_SHIFT & 3
        is_code = flags & FLAG_CODE_OR_DATA and flags & _CODE
        if not is_code or dpl > cpl or flags & (FLAG_LONG | FLAG_BIG) != FLAG_LONG:
            raise _Refused(GENERAL_PROTECTION, error_code)
        if not flags & FLAG_PRESENT:
            raise _Refused(SEGMENT_NOT_PRESENT, error_code)
        if not flags & _ACCESSED:
            flags |= _ACCESSED
            self._memory.write(table.base + at + 4, 4, flags)
        return cpl if flags & _CONFORMING else dpl, flags & 0x00F0_FF00


def _combine(first: Event, second: Event) -> Event | None:
    """Return what two exceptions come to, of which the second arose in delivering the first; None: a triple fault."""
    if first.kind is not Kind.EXCEPTION:
        return second
    if first.vector == DOUBLE_FAULT:
        return None
    if second.vector in _CONTRIBUTORY and (first.vector in _CONTRIBUTORY or first.vector == PAGE_FAULT):
        return Event(vector=DOUBLE_FAULT, error_code=0)
    if first.vector == PAGE_FAULT == second.vector:
        return replace(second, vector=DOUBLE_FAULT, error_code=0)  # CR2 is the second's
    return second


def crash(event: Event, where: str) -> GuestCrash:
    """Return the end of a guest by a triple fault that began with ``event``."""
    return GuestCrash(event.describe() + where)
