"""A KVM vCPU's registers as a ``VcpuState``, and back.

**Order of restoring**, and why:

1. CPUID was set when the vCPU was made: it decides which bits the rest may hold.
2. special registers: they put the vCPU into its mode (EFER, CR0, CR4) and the rest is checked against that;
3. general registers (which also drops a pending exception), debug registers, FPU and SSE;
4. MSRs, after EFER; the TSC last of them, so that the least time passes unseen;
5. pending events at the end: steps 2 and 3 would have changed them.

Saving reads pending events first: reading them makes KVM settle an exception's payload into CR2 and DR6.

**Which MSRs** travel in ``msrs``: PAT alone. Of what KVM lists, the SYSCALL and SYSENTER ones and the TSC have fields
of their own; the paravirtual ones belong to interfaces that our CPUID does not show; the others describe the host
(speculation, microcode, VMX) or switch features that the baseline has not.

**Sealed in ring 3.** Some KVMs (seen: ``kvm_pvm``) run ring 3 with IOPL 0 whatever RFLAGS said, report it so, and then
look into the TSS for the right to do port I/O. A vCPU that was loaded into ring 3 with no way out of it (no IDT, no
GDT, no SYSCALL, no SYSENTER) cannot change IOPL or TR: so what was loaded is still true and is what ``save`` gives, and
KVM gets a TSS at linear address 0, where a page of zeros permits every port. Where IOPL is kept nobody looks there.
(An LDT does not count as a way out, though a guest could build a gate in it: a reset CPU has one, and none is used.)

**The TSC** goes on from the saved value. Some KVMs (``kvm_pvm`` again) accept that and go on showing the host's;
``KvmSupport.tsc_offset`` tells, and loading does not fail for it: a guest that needs monotonic time has the clock port.

Left out: the one-instruction shadow after STI and MOV SS, which only an interrupt could tell, and there is none.

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

_GENERAL = tuple(field[0] for field in uapi.KvmRegs._fields_)
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr")  # LDTR and the tables have other names in the kernel
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")

MSR_IA32_TSC = 0x10
MSR_IA32_CR_PAT = 0x277
MSR_TSC_AUX = 0xC000_0103
_DEFAULT_PAT = 0x0007_0406_0007_0406
_MSR_FIELDS = {
    0x174: "sysenter_cs",
    0x175: "sysenter_esp",
    0x176: "sysenter_eip",
    0xC000_0081: "star",
    0xC000_0082: "lstar",
    0xC000_0083: "cstar",
    0xC000_0084: "syscall_mask",
    0xC000_0102: "shadow_gs",
    MSR_TSC_AUX: "tsc_aux",
}

_XSTATE_FP_SSE = 3
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


def read_msr(fd: VcpuFd, index: int) -> int | None:
    """Return an MSR, or None when this KVM has it not."""
    msrs = uapi.KvmMsrs(nmsrs=1, entry=uapi.KvmMsrEntry(index=index))
    return int(msrs.entry.data) if fd.ioctl(uapi.KVM_GET_MSRS, msrs) == 1 else None


def write_msr(fd: VcpuFd, index: int, value: int) -> None:
    """Set an MSR.

    Raises:
        VmError: this KVM has it not, or refuses the value.
    """
    msrs = uapi.KvmMsrs(nmsrs=1, entry=uapi.KvmMsrEntry(index=index, data=value))
    if fd.ioctl(uapi.KVM_SET_MSRS, msrs) != 1:
        raise VmError(f"this KVM refuses MSR {index:#x} = {value:#x}")


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
    return ((read_msr(fd, MSR_IA32_TSC) or 0) - offset) & _U64


def can_offset_tsc(fd: VcpuFd) -> bool:
    """Tell, by setting it to something else, whether a vCPU's TSC can be set at all."""
    before, wanted = read_msr(fd, MSR_IA32_TSC) or 0, 1 << 60
    write_msr(fd, MSR_IA32_TSC, wanted)
    after = read_msr(fd, MSR_IA32_TSC) or 0
    write_msr(fd, MSR_IA32_TSC, before)
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
    events = uapi.KvmVcpuEvents()
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


def save(fd: VcpuFd, sealed: Sealed | None, host_tsc_now: int | None = None) -> VcpuState:
    """Return a vCPU's state; it is not inside the guest and has no I/O under way.

    Args:
        fd: the vCPU.
        sealed: what the last :func:`load` returned.
        host_tsc_now: from :func:`host_tsc`, the instant for which the TSC is given; None: now.

    Raises:
        KvmError: the kernel refused.
    """
    events, sregs, regs = uapi.KvmVcpuEvents(), uapi.KvmSregs(), uapi.KvmRegs()
    debug, xsave = uapi.KvmDebugregs(), uapi.KvmXsave()
    fd.ioctl(uapi.KVM_GET_VCPU_EVENTS, events)
    fd.ioctl(uapi.KVM_GET_SREGS, sregs)
    fd.ioctl(uapi.KVM_GET_REGS, regs)
    fd.ioctl(uapi.KVM_GET_DEBUGREGS, debug)
    fd.ioctl(uapi.KVM_GET_XSAVE, xsave)
    if host_tsc_now is None:
        tsc = read_msr(fd, MSR_IA32_TSC) or 0
    else:
        tsc = (host_tsc_now + _tsc_offset(fd, uapi.KVM_GET_DEVICE_ATTR)) & _U64
    pending_event, error_code = _pending_event(events)
    image = bytes(xsave.fxsave)
    fields: dict[str, Any] = {name: getattr(regs, name) for name in _GENERAL}
    fields |= {name: getattr(sregs, name) for name in _CONTROL}
    fields |= {name: _segment(getattr(sregs, name)) for name in _SEGMENTS}
    fields |= {field: read_msr(fd, index) or 0 for index, field in _MSR_FIELDS.items()}
    fields |= {f"dr{number}": debug.db[number] for number in range(4)}
    pat = read_msr(fd, MSR_IA32_CR_PAT)
    state = VcpuState(
        **fields,
        dr6=debug.dr6,
        dr7=debug.dr7,
        ldtr=_segment(sregs.ldt),
        gdtr=DescriptorTable(base=sregs.gdt.base, limit=sregs.gdt.limit),
        idtr=DescriptorTable(base=sregs.idt.base, limit=sregs.idt.limit),
        tsc=tsc,
        pending_event=pending_event,
        error_code=error_code,
        fpu_regs=image[:28] + _MXCSR_MASK + image[32:_FXSAVE_USED] + bytes(_FXSAVE_BYTES - _FXSAVE_USED),
        msrs=() if pat is None else ((MSR_IA32_CR_PAT, pat),),
    )
    return replace(state, rflags=state.rflags & ~_RFLAGS_IOPL | sealed.iopl, tr=sealed.tr) if sealed else state


def load(fd: VcpuFd, state: VcpuState, host_tsc_now: int | None = None) -> Sealed | None:
    """Replace a vCPU's state; it is not inside the guest. Return what the next :func:`save` needs.

    Args:
        fd: the vCPU.
        state: of this or any other machine.
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
    msrs = {MSR_IA32_CR_PAT: _DEFAULT_PAT} | dict(state.msrs)
    msrs |= {index: getattr(state, field) for index, field in _MSR_FIELDS.items()}
    if not state.tsc_aux:
        del msrs[MSR_TSC_AUX]  # a CPU without RDTSCP has it not, and then it reads as 0
    for index, value in msrs.items():
        write_msr(fd, index, value)
    if host_tsc_now is None:
        write_msr(fd, MSR_IA32_TSC, state.tsc)
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
