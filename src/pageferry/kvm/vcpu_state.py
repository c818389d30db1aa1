"""A KVM vCPU's registers as a ``VcpuState``, and back.

**Order of restoring**, and why:

1. CPUID was set when the vCPU was made: it decides which bits the rest may hold.
2. special registers: they put the vCPU into its mode (EFER, CR0, CR4) and the rest is checked against that;
3. general registers (which also drops a pending exception), debug registers, FPU and SSE;
4. MSRs, after EFER; the TSC last of them, so that the least time passes unseen;
5. events at the end (what is pending, the interrupt shadow, NMIs): steps 2 and 3 would have changed them.

Saving reads pending events first: reading them makes KVM settle an exception's payload into CR2 and DR6.

**Which MSRs** travel in ``msrs``: see :mod:`pageferry.kvm.msrs`.

**Sealed in ring 3.** Some KVMs (seen: ``kvm_pvm``) run ring 3 with IOPL 0 whatever RFLAGS said, report it so, and then
look into the TSS for the right to do port I/O. A vCPU that was loaded into ring 3 with no way out of it (no IDT, no
GDT, no SYSCALL, no SYSENTER) cannot change IOPL or TR: so what was loaded is still true and is what ``save`` gives, and
KVM gets a TSS at linear address 0, where a page of zeros permits every port. Where IOPL is kept nobody looks there.
(An LDT does not count as a way out, though a guest could build a gate in it: a reset CPU has one, and none is used.)

**The TSC** goes on from the saved value. Some KVMs (``kvm_pvm`` again) accept that and go on showing the host's;
``KvmSupport.tsc_offset`` tells, and loading does not fail for it: a guest that needs monotonic time has the clock port.

Left out: the multiprocessing state (without an APIC in the kernel it is always "runnable"), and XSAVE components other
than x87 and SSE: our CPUID shows none of them, and saving refuses a vCPU that has one in use.

Source: kernel ``api.rst``: KVM_SET_SREGS, KVM_SET_REGS, KVM_SET_XSAVE, KVM_SET_MSRS, KVM_SET_VCPU_EVENTS;
``devices/vcpu.rst``, KVM_VCPU_TSC_CTRL; AMD APM volume 2, 15.20 (the layout of ``pending_event``).
"""

import ctypes
from dataclasses import dataclass, replace
from typing import Any

from pageferry.core.errors import KvmError, VmError
from pageferry.core.state import DescriptorTable, Segment, VcpuState
from pageferry.kvm import uapi
from pageferry.kvm.fds import VcpuFd
from pageferry.kvm.msrs import MSR_FIELDS, MSR_IA32_TSC, MSR_TSC_AUX, OtherMsrs, read_msrs, write_msrs

_GENERAL = tuple(field[0] for field in uapi.KvmRegs._fields_)
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr")  # LDTR and the tables have other names in the kernel
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")

_XSTATE_FP_SSE = 3
_COMPONENTS = {2: "AVX", 5: "AVX-512 masks", 6: "AVX-512 (ZMM0-15)", 7: "AVX-512 (ZMM16-31)", 9: "PKRU"}
_MXCSR_MASK = (0xFFFF).to_bytes(4, "little")
_FXSAVE_BYTES, _FXSAVE_USED = 512, 416  # the rest is reserved, and free for software
_U64 = (1 << 64) - 1

# pending_event: vector 7..0, kind 10..8, error code valid 11, valid 31
_EVENT_VALID, _EVENT_HAS_ERROR = 1 << 31, 1 << 11
_EXTERNAL, _NMI, _EXCEPTION, _SOFTWARE = 0, 2, 3, 4
_ATTRIBUTE_PRESENT = 1 << 7
_BUSY_TSS = 0x8B  # present, system, type 11
_RFLAGS_IOPL = 3 << 12
_EFER_SCE = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """What a vCPU that cannot leave ring 3 cannot change; see the module's text."""

    iopl: int
    tr: Segment


def _sealed(state: VcpuState) -> Sealed | None:
    doors = (state.idtr.limit, state.gdtr.limit, state.efer & _EFER_SCE, state.sysenter_cs)
    if state.cs.selector & 3 != 3 or any(doors):
        return None
    return Sealed(iopl=state.rflags & _RFLAGS_IOPL, tr=state.tr)


def _tsc(fd: VcpuFd) -> int:
    return read_msrs(fd, (MSR_IA32_TSC,)).get(MSR_IA32_TSC, 0)


def _tsc_offset(fd: VcpuFd, request: int, value: int = 0) -> int:
    # SAFETY: the kernel reads or writes `cell` during the call only; this frame holds it.
    cell = ctypes.c_uint64(value)
    attribute = uapi.KvmDeviceAttr(
        group=uapi.KVM_VCPU_TSC_CTRL, attr=uapi.KVM_VCPU_TSC_OFFSET, addr=ctypes.addressof(cell)
    )
    fd.ioctl(request, attribute)
    return cell.value


def host_tsc(fd: VcpuFd) -> int | None:
    """Return the host's TSC now (scaled as the guest's), or None when KVM does not tell the vCPU's offset.

    One reading serves all vCPUs of a guest, so that their counters keep their distances.
    """
    try:
        offset = _tsc_offset(fd, uapi.KVM_GET_DEVICE_ATTR)
    except KvmError:
        return None
    return (_tsc(fd) - offset) & _U64


def can_offset_tsc(fd: VcpuFd) -> bool:
    """Tell, by setting it to something else, whether a vCPU's TSC can be set at all."""
    before, wanted = _tsc(fd), 1 << 60
    write_msrs(fd, {MSR_IA32_TSC: wanted})
    after = _tsc(fd)
    write_msrs(fd, {MSR_IA32_TSC: before})
    return after >= wanted > before


def _segment(raw: Any) -> Segment:  # noqa: ANN401  # a ctypes structure
    present = raw.present and not raw.unusable
    bits = (raw.type, 0), (raw.s, 4), (raw.dpl, 5), (present, 7), (raw.avl, 8), (raw.l, 9), (raw.db, 10), (raw.g, 11)
    attributes = sum(int(value) << shift for value, shift in bits)
    return Segment(selector=raw.selector, base=raw.base, limit=raw.limit, attributes=attributes)


def _kvm_segment(segment: Segment) -> uapi.KvmSegment:
    bits = segment.attributes
    return uapi.KvmSegment(
        base=segment.base,
        limit=segment.limit,
        selector=segment.selector,
        type=bits & 15,
        s=bits >> 4 & 1,
        dpl=bits >> 5 & 3,
        present=bits >> 7 & 1,
        avl=bits >> 8 & 1,
        l=bits >> 9 & 1,
        db=bits >> 10 & 1,
        g=bits >> 11 & 1,
        unusable=not bits & _ATTRIBUTE_PRESENT,
    )


def _pending_event(events: uapi.KvmVcpuEvents) -> tuple[int, int]:
    """Return ``(pending_event, error_code)``."""
    if events.exception.injected:
        has_error = _EVENT_HAS_ERROR if events.exception.has_error_code else 0
        event = _EVENT_VALID | has_error | _EXCEPTION << 8 | events.exception.nr
        return event, events.exception.error_code if has_error else 0
    if events.nmi.injected:
        return _EVENT_VALID | _NMI << 8 | 2, 0
    if events.interrupt.injected:
        return _EVENT_VALID | (_SOFTWARE if events.interrupt.soft else _EXTERNAL) << 8 | events.interrupt.nr, 0
    return 0, 0


def _kvm_events(state: VcpuState) -> uapi.KvmVcpuEvents:
    events = uapi.KvmVcpuEvents(flags=uapi.KVM_VCPUEVENT_VALID_NMI_PENDING | uapi.KVM_VCPUEVENT_VALID_SHADOW)
    events.interrupt.shadow = state.interrupt_shadow
    events.nmi.pending = state.nmi_pending
    events.nmi.masked = state.nmi_masked
    if not state.pending_event & _EVENT_VALID:
        return events
    vector, kind = state.pending_event & 0xFF, state.pending_event >> 8 & 7
    if kind == _EXCEPTION:
        events.exception.injected = 1
        events.exception.nr = vector
        events.exception.has_error_code = bool(state.pending_event & _EVENT_HAS_ERROR)
        events.exception.error_code = state.error_code
    elif kind == _NMI:
        events.nmi.injected = 1
    elif kind in (_EXTERNAL, _SOFTWARE):
        events.interrupt.injected = 1
        events.interrupt.nr = vector
        events.interrupt.soft = kind == _SOFTWARE
    else:
        raise VmError(f"the state has a pending event of unknown kind {kind}")
    return events


def _refuse_extended(xsave: uapi.KvmXsave) -> None:
    extended = xsave.header[0] & ~_XSTATE_FP_SSE
    if extended:
        names = [_COMPONENTS.get(bit, f"component {bit}") for bit in range(64) if extended >> bit & 1]
        raise VmError(f"the vCPU uses {', '.join(names)}, which no machine state here holds")


def save(fd: VcpuFd, sealed: Sealed | None, others: OtherMsrs, host_tsc_now: int | None = None) -> VcpuState:
    """Return a vCPU's state; it is not inside the guest and has no I/O under way.

    Args:
        fd: the vCPU.
        sealed: what the last :func:`load` returned.
        others: its MSRs that have no field of their own.
        host_tsc_now: from :func:`host_tsc`, the instant for which the TSC is given; None: now.

    Raises:
        VmError: it uses registers that a ``VcpuState`` cannot hold.
        KvmError: the kernel refused.
    """
    events, sregs, regs = uapi.KvmVcpuEvents(), uapi.KvmSregs(), uapi.KvmRegs()
    debug, xsave = uapi.KvmDebugregs(), uapi.KvmXsave()
    fd.ioctl(uapi.KVM_GET_VCPU_EVENTS, events)
    fd.ioctl(uapi.KVM_GET_SREGS, sregs)
    fd.ioctl(uapi.KVM_GET_REGS, regs)
    fd.ioctl(uapi.KVM_GET_DEBUGREGS, debug)
    fd.ioctl(uapi.KVM_GET_XSAVE, xsave)
    _refuse_extended(xsave)
    now, offset = (0, _tsc(fd)) if host_tsc_now is None else (host_tsc_now, _tsc_offset(fd, uapi.KVM_GET_DEVICE_ATTR))
    pending_event, error_code = _pending_event(events)
    image = bytes(xsave.fxsave)
    fields: dict[str, Any] = {name: getattr(regs, name) for name in _GENERAL}
    fields |= {name: getattr(sregs, name) for name in _CONTROL}
    fields |= {name: _segment(getattr(sregs, name)) for name in _SEGMENTS}
    own = read_msrs(fd, MSR_FIELDS)
    fields |= {field: own.get(index, 0) for index, field in MSR_FIELDS.items()}
    fields |= {f"dr{number}": debug.db[number] for number in range(4)}
    state = VcpuState(
        **fields,
        dr6=debug.dr6,
        dr7=debug.dr7,
        ldtr=_segment(sregs.ldt),
        gdtr=DescriptorTable(base=sregs.gdt.base, limit=sregs.gdt.limit),
        idtr=DescriptorTable(base=sregs.idt.base, limit=sregs.idt.limit),
        tsc=(now + offset) & _U64,
        pending_event=pending_event,
        error_code=error_code,
        interrupt_shadow=events.interrupt.shadow,
        nmi_pending=bool(events.nmi.pending),
        nmi_masked=bool(events.nmi.masked),
        fpu_regs=image[:28] + _MXCSR_MASK + image[32:_FXSAVE_USED] + bytes(_FXSAVE_BYTES - _FXSAVE_USED),
        msrs=others.save(fd),
    )
    return replace(state, rflags=state.rflags & ~_RFLAGS_IOPL | sealed.iopl, tr=sealed.tr) if sealed else state


def load(fd: VcpuFd, state: VcpuState, others: OtherMsrs, host_tsc_now: int | None = None) -> Sealed | None:
    """Replace a vCPU's state; it is not inside the guest. Return what the next :func:`save` needs.

    Args:
        fd: the vCPU.
        state: of this or any other machine.
        others: the vCPU's MSRs that have no field of their own.
        host_tsc_now: from :func:`host_tsc`, the instant at which the guest's TSC is ``state.tsc``; None: now.

    Raises:
        VmError: this machine cannot hold the state.
        KvmError: the kernel refused a part of it.
    """
    if len(state.fpu_regs) != _FXSAVE_BYTES:
        raise VmError(f"the FPU state has {len(state.fpu_regs)} bytes, not {_FXSAVE_BYTES}")
    events, sealed = _kvm_events(state), _sealed(state)
    _load_special(fd, state, sealed)
    fd.ioctl(uapi.KVM_SET_REGS, uapi.KvmRegs(**{name: getattr(state, name) for name in _GENERAL}))
    breakpoints = (state.dr0, state.dr1, state.dr2, state.dr3)
    fd.ioctl(uapi.KVM_SET_DEBUGREGS, uapi.KvmDebugregs(db=breakpoints, dr6=state.dr6, dr7=state.dr7))
    xsave = uapi.KvmXsave(fxsave=tuple(state.fpu_regs[:_FXSAVE_USED]))  # all else zero: in its initial state
    xsave.header[0] = _XSTATE_FP_SSE
    fd.ioctl(uapi.KVM_SET_XSAVE, xsave)
    others.load(fd, state.msrs)
    own = {index: getattr(state, field) for index, field in MSR_FIELDS.items()}
    if not state.tsc_aux:
        del own[MSR_TSC_AUX]  # a CPU without RDTSCP has it not, and then it reads as 0
    write_msrs(fd, own)
    if host_tsc_now is None:
        write_msrs(fd, {MSR_IA32_TSC: state.tsc})
    else:
        _tsc_offset(fd, uapi.KVM_SET_DEVICE_ATTR, (state.tsc - host_tsc_now) & _U64)
    fd.ioctl(uapi.KVM_SET_VCPU_EVENTS, events)
    return sealed


def _load_special(fd: VcpuFd, state: VcpuState, sealed: Sealed | None) -> None:
    sregs = uapi.KvmSregs()
    fd.ioctl(uapi.KVM_GET_SREGS, sregs)  # CR8 and the APIC base stay as they are: no field, and no APIC
    for name in _CONTROL:
        setattr(sregs, name, getattr(state, name))
    for name in _SEGMENTS:
        setattr(sregs, name, _kvm_segment(getattr(state, name)))
    if sealed or not state.tr.attributes & _ATTRIBUTE_PRESENT:  # VMX enters with no TR but a busy TSS
        sregs.tr = _kvm_segment(Segment(selector=state.tr.selector, base=0, limit=0xFFFF, attributes=_BUSY_TSS))
    sregs.ldt = _kvm_segment(state.ldtr)
    sregs.gdt = uapi.KvmDtable(base=state.gdtr.base, limit=state.gdtr.limit)
    sregs.idt = uapi.KvmDtable(base=state.idtr.base, limit=state.idtr.limit)
    sregs.interrupt_bitmap = (ctypes.c_uint64 * len(sregs.interrupt_bitmap))()
    fd.ioctl(uapi.KVM_SET_SREGS, sregs)
