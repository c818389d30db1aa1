"""SYSCALL and SYSENTER: the emulator stops at them and leaves the rest to us.

Both enter ring 0 by MSRs alone, without memory: flat segments, RIP from LSTAR (CSTAR from 32-bit code) or
SYSENTER_EIP. The ways back (SYSRET, SYSEXIT, IRET) the emulator goes by itself.

Simplified: outside long mode SYSCALL is an invalid instruction.

Source: AMD APM volume 3, SYSCALL, SYSENTER; volume 2, 6.1 (Fast System Call and Return).
"""

from pageferry.hypervisor.exceptions import GENERAL_PROTECTION, INVALID_OPCODE, Event
from pageferry.hypervisor.registers import (
    CS,
    DPL_SHIFT,
    EFER_LMA,
    EFER_SCE,
    FLAG_BIG,
    FLAG_CODE_OR_DATA,
    FLAG_LONG,
    FLAG_PRESENT,
    HFLAG_CS64,
    R11,
    RCX,
    RFLAGS_IF,
    RFLAGS_RF,
    RFLAGS_VM,
    RSP,
    SS,
    enter_64_bit_code,
    mode_flags,
    set_segment,
)
from pageferry.hypervisor.unicorn_api import Engine

_GRANULARITY, _CODE, _READ_WRITE, _ACCESSED = 1 << 23, 1 << 11, 1 << 9, 1 << 8
_FLAT = _GRANULARITY | FLAG_PRESENT | FLAG_CODE_OR_DATA | _READ_WRITE | _ACCESSED
_RING_0_DATA = _FLAT | FLAG_BIG
_RING_0_CODE_64 = _FLAT | _CODE | FLAG_LONG
_RING_0_CODE_32 = _FLAT | _CODE | FLAG_BIG


def system_call(engine: Engine) -> Event | None:
    """Perform SYSCALL; RIP is behind it. Return the exception that it is instead."""
    fields, msrs = engine.cpu.fields, engine.cpu.msrs
    if not (fields.efer & EFER_SCE and fields.efer & EFER_LMA):
        return Event(vector=INVALID_OPCODE, detail="system call without a kernel")
    rflags = engine.rflags & ~RFLAGS_RF
    fields.regs[RCX], fields.regs[R11] = fields.eip, rflags
    fields.eip = msrs.lstar if fields.hflags & HFLAG_CS64 else msrs.cstar
    engine.rflags = rflags & ~msrs.fmask
    _enter_ring_0(engine, msrs.star >> 32 & 0xFFFC, _RING_0_CODE_64)
    return None


def system_enter(engine: Engine) -> Event | None:
    """Perform SYSENTER; RIP is behind it. Return the exception that it is instead."""
    fields, msrs = engine.cpu.fields, engine.cpu.msrs
    if not msrs.sysenter_cs & 0xFFFC:
        return Event(vector=GENERAL_PROTECTION, error_code=0, detail="system call without a kernel")
    long_mode = fields.efer & EFER_LMA
    fields.eip = msrs.sysenter_eip if long_mode else msrs.sysenter_eip & 0xFFFF_FFFF
    fields.regs[RSP] = msrs.sysenter_esp if long_mode else msrs.sysenter_esp & 0xFFFF_FFFF
    engine.rflags &= ~(RFLAGS_IF | RFLAGS_RF | RFLAGS_VM)
    _enter_ring_0(engine, msrs.sysenter_cs & 0xFFFC, _RING_0_CODE_64 if long_mode else _RING_0_CODE_32)
    return None


def _enter_ring_0(engine: Engine, selector: int, code: int) -> None:
    fields = engine.cpu.fields
    set_segment(fields.segs[CS], selector, 0, 0xFFFF_FFFF, code)
    set_segment(fields.segs[SS], selector + 8, 0, 0xFFFF_FFFF, _RING_0_DATA & ~(3 << DPL_SHIFT))
    if code & FLAG_LONG:
        enter_64_bit_code(fields, 0)
    else:
        fields.hflags = mode_flags(fields, 0)
