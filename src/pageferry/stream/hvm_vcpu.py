"""What a vCPU has besides its CPU entry: MSRs, events, XSAVE, the local APIC; each an entry of its own.

An entry is written only if it says something: without it the vCPU has what a fresh ``VcpuState`` has. CPU_XSAVE, LAPIC,
LAPIC_REGS and CPU_MSR have Xen's layout and codes; CPU_EVENTS and CPU_EXCEPTION are ours.

Source: docs/reference/stream.md, part 1, "HVM context".
"""

import itertools
from collections.abc import Callable, Mapping
from struct import Struct
from struct import error as StructError
from typing import Any

from pageferry.core.errors import LocalStreamError
from pageferry.core.state import ExtendedState, LapicState, MpState, PendingException, VcpuState
from pageferry.core.xsave import EXTENDED_OFFSET, FP_SSE, FXSAVE_BYTES, HEADER_BYTES
from pageferry.stream.hvm_entries import Entry, Typecode

#: count u32, reserved u32; then index u32, reserved u32, value u64 for each.
MSR_HEAD = Struct("<II")
MSR_ENTRY = Struct("<IIQ")
MAX_MSRS = 4096
#: CPU_EVENTS: interrupt shadow, NMI pending, NMI masked, triple fault pending, MP state; 3 reserved.
EVENTS_BODY = Struct("<5B3s")
#: CPU_EXCEPTION: vector, flags, reserved, error code, payload.
EXCEPTION_BODY = Struct("<BBHIQ")
EXCEPTION_HAS_ERROR, EXCEPTION_HAS_PAYLOAD = 1 << 0, 1 << 1
#: CPU_XSAVE: xfeature_mask (ignored), xcr0, xcr0_accum; then the area: FXSAVE image, XSTATE_BV, 7 reserved u64, rest.
XSAVE_HEAD = Struct("<QQQ")
MAX_XSAVE_AREA_BYTES = 64 << 10
#: LAPIC: base MSR, disabled, timer divisor, TSC deadline MSR.
LAPIC_BODY = Struct("<QIIQ")
LAPIC_REGISTER_BYTES = 1024

# field -> highest value, in the order of the body
_EVENTS = {
    "interrupt_shadow": 3,
    "nmi_pending": 1,
    "nmi_masked": 1,
    "triple_fault_pending": 1,
    "mp_state": max(MpState),
}
_MAX_EXCEPTION = 31
_APIC_ENABLED, _APIC_SOFTWARE_ENABLED = 1 << 11, 1 << 8
_SPURIOUS_VECTOR, _TIMER_DIVIDE = 0xF0, 0x3E0


def encode_vcpu_entries(index: int, vcpu: VcpuState) -> list[Entry]:
    """Return the entries of a vCPU, each type once at the most.

    Raises:
        LocalStreamError: a value does not fit its field.
    """
    entries = []
    for typecode, encode in _ENCODERS.items():
        try:
            body = encode(vcpu)
        except StructError as error:
            raise LocalStreamError("a value does not fit its width", record=f"HVM_CONTEXT {typecode.name}") from error
        if body is not None:
            entries.append(Entry(typecode=typecode, instance=index, body=body))
    return entries


def decode_vcpu_entries(entries: Mapping[Typecode, Entry], fpu_regs: bytes) -> dict[str, Any]:
    """Return the fields of ``VcpuState`` that a vCPU's entries hold.

    Args:
        entries: its entries but CPU, each of one of ``VCPU_TYPECODES``.
        fpu_regs: what its CPU entry has for the FXSAVE image.

    Raises:
        RecordError: an entry is malformed, or contradicts another one.
    """
    fields: dict[str, Any] = {}
    if (entry := entries.get(Typecode.CPU_MSR)) is not None:
        fields["msrs"] = _decode_msrs(entry)
    if (entry := entries.get(Typecode.CPU_EVENTS)) is not None:
        fields |= _decode_events(entry)
    if (entry := entries.get(Typecode.CPU_EXCEPTION)) is not None:
        fields["pending_exception"] = _decode_exception(entry)
    if (entry := entries.get(Typecode.CPU_XSAVE)) is not None:
        fields["extended"] = _decode_xsave(entry, fpu_regs)
    lapic, registers = entries.get(Typecode.LAPIC), entries.get(Typecode.LAPIC_REGS)
    if lapic is not None and registers is not None:
        fields["lapic"] = _decode_lapic(lapic, registers)
    elif (entry := lapic or registers) is not None:
        raise entry.refusal("LAPIC and LAPIC_REGS come together or not at all")
    return fields


def _expect_size(entry: Entry, size: int) -> None:
    if len(entry.body) != size:
        raise entry.refusal(f"a body of {len(entry.body)} bytes, not {size}")


def _encode_msrs(vcpu: VcpuState) -> bytes | None:
    if not vcpu.msrs:
        return None
    return MSR_HEAD.pack(len(vcpu.msrs), 0) + b"".join(MSR_ENTRY.pack(index, 0, value) for index, value in vcpu.msrs)


def _decode_msrs(entry: Entry) -> tuple[tuple[int, int], ...]:
    if len(entry.body) < MSR_HEAD.size:
        raise entry.refusal("its head is cut")
    count, reserved = MSR_HEAD.unpack_from(entry.body)
    rest = entry.body[MSR_HEAD.size :]
    if not 0 < count <= MAX_MSRS or len(rest) != count * MSR_ENTRY.size:
        raise entry.refusal(f"{count} MSRs in {len(entry.body)} bytes")
    rows = list(MSR_ENTRY.iter_unpack(rest))
    if reserved or any(row[1] for row in rows):
        raise entry.refusal("a reserved field is not 0")
    if any(row[0] >= after[0] for row, after in itertools.pairwise(rows)):
        raise entry.refusal("the MSRs do not ascend")
    return tuple((index, value) for index, _, value in rows)


def _encode_events(vcpu: VcpuState) -> bytes | None:
    values = [getattr(vcpu, name) for name in _EVENTS]
    return EVENTS_BODY.pack(*values, b"") if any(values) else None


def _decode_events(entry: Entry) -> dict[str, Any]:
    _expect_size(entry, EVENTS_BODY.size)
    *values, reserved = EVENTS_BODY.unpack(entry.body)
    if any(reserved):
        raise entry.refusal("a reserved field is not 0")
    for (name, most), value in zip(_EVENTS.items(), values, strict=True):
        if value > most:
            raise entry.refusal(f"{name} is {value}, more than {most}")
    shadow, nmi_pending, nmi_masked, triple_fault, mp_state = values
    return {
        "interrupt_shadow": shadow,
        "nmi_pending": bool(nmi_pending),
        "nmi_masked": bool(nmi_masked),
        "triple_fault_pending": bool(triple_fault),
        "mp_state": MpState(mp_state),
    }


def _encode_exception(vcpu: VcpuState) -> bytes | None:
    exception = vcpu.pending_exception
    if exception is None:
        return None
    flags = 0 if exception.error_code is None else EXCEPTION_HAS_ERROR
    flags |= 0 if exception.payload is None else EXCEPTION_HAS_PAYLOAD
    return EXCEPTION_BODY.pack(exception.vector, flags, 0, exception.error_code or 0, exception.payload or 0)


def _decode_exception(entry: Entry) -> PendingException:
    _expect_size(entry, EXCEPTION_BODY.size)
    vector, flags, reserved, error_code, payload = EXCEPTION_BODY.unpack(entry.body)
    if vector > _MAX_EXCEPTION:
        raise entry.refusal(f"vector {vector} is not an exception")
    has_error, has_payload = bool(flags & EXCEPTION_HAS_ERROR), bool(flags & EXCEPTION_HAS_PAYLOAD)
    if reserved or flags & ~(EXCEPTION_HAS_ERROR | EXCEPTION_HAS_PAYLOAD):
        raise entry.refusal("a reserved field is not 0")
    if (error_code and not has_error) or (payload and not has_payload):
        raise entry.refusal("it has an error code or payload that its flags deny")
    return PendingException(
        vector=vector, error_code=error_code if has_error else None, payload=payload if has_payload else None
    )


def _encode_xsave(vcpu: VcpuState) -> bytes | None:
    extended = vcpu.extended
    if extended is None:
        return None
    bits = extended.in_use | FP_SSE
    head = XSAVE_HEAD.pack(0, extended.xcr0, extended.xcr0 | bits)
    return head + vcpu.fpu_regs + bits.to_bytes(8, "little") + bytes(HEADER_BYTES - 8) + extended.area


def _decode_xsave(entry: Entry, fpu_regs: bytes) -> ExtendedState:
    area = entry.body[XSAVE_HEAD.size :]
    if not EXTENDED_OFFSET <= len(area) <= MAX_XSAVE_AREA_BYTES:
        raise entry.refusal(f"an area of {len(area)} bytes, not {EXTENDED_OFFSET} to {MAX_XSAVE_AREA_BYTES}")
    _, xcr0, accumulated = XSAVE_HEAD.unpack_from(entry.body)
    if area[:FXSAVE_BYTES] != fpu_regs:
        raise entry.refusal("its FXSAVE image is not that of the CPU entry")
    bits = int.from_bytes(area[FXSAVE_BYTES : FXSAVE_BYTES + 8], "little")
    if any(area[FXSAVE_BYTES + 8 : EXTENDED_OFFSET]):
        raise entry.refusal("XCOMP_BV or a reserved field is not 0")
    if not xcr0 & 1 or bits & FP_SSE != FP_SSE or (xcr0 | bits) & ~accumulated:
        raise entry.refusal(f"XCR0 {xcr0:#x}, all of it ever {accumulated:#x}, and XSTATE_BV {bits:#x} do not agree")
    if (bits == FP_SSE) != (len(area) == EXTENDED_OFFSET):
        raise entry.refusal(f"an area of {len(area)} bytes for XSTATE_BV {bits:#x}")
    return ExtendedState(xcr0=xcr0, in_use=bits & ~FP_SSE, area=area[EXTENDED_OFFSET:])


def _encode_lapic(vcpu: VcpuState) -> bytes | None:
    lapic = vcpu.lapic
    if lapic is None:
        return None
    return LAPIC_BODY.pack(lapic.base, *_lapic_summary(lapic.base, lapic.registers), lapic.tsc_deadline)


def _encode_lapic_registers(vcpu: VcpuState) -> bytes | None:
    return vcpu.lapic.registers if vcpu.lapic else None


def _lapic_summary(base: int, registers: bytes) -> tuple[int, int]:
    """Return what Xen repeats of base and registers: how it is disabled (1 hardware, 2 software); the divisor."""
    disabled = 0 if base & _APIC_ENABLED else 1
    if not int.from_bytes(registers[_SPURIOUS_VECTOR : _SPURIOUS_VECTOR + 4], "little") & _APIC_SOFTWARE_ENABLED:
        disabled |= 2
    divide = int.from_bytes(registers[_TIMER_DIVIDE : _TIMER_DIVIDE + 1], "little")
    return disabled, 1 << ((divide & 3 | (divide & 8) >> 1) + 1 & 7)


def _decode_lapic(entry: Entry, registers: Entry) -> LapicState:
    _expect_size(entry, LAPIC_BODY.size)
    _expect_size(registers, LAPIC_REGISTER_BYTES)
    base, disabled, divisor, deadline = LAPIC_BODY.unpack(entry.body)
    if (disabled, divisor) != _lapic_summary(base, registers.body):
        raise entry.refusal("disabled or the timer's divisor is not as the registers say")
    return LapicState(base=base, registers=registers.body, tsc_deadline=deadline)


_ENCODERS: dict[Typecode, Callable[[VcpuState], bytes | None]] = {
    Typecode.CPU_MSR: _encode_msrs,
    Typecode.CPU_EVENTS: _encode_events,
    Typecode.CPU_EXCEPTION: _encode_exception,
    Typecode.CPU_XSAVE: _encode_xsave,
    Typecode.LAPIC: _encode_lapic,
    Typecode.LAPIC_REGS: _encode_lapic_registers,
}
#: The entries of a vCPU besides CPU.
VCPU_TYPECODES = tuple(_ENCODERS)
