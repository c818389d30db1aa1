"""A KVM vCPU's registers as a ``VcpuState``, and back.

**Order of restoring**, and why; a test holds it (``tests/kvm/test_state_order.py``):

1. *when the machine is made*: what KVM is to tell of events and the interrupt controllers, which KVM allows before the
   first vCPU only; then CPUID of each vCPU, which decides which bits the rest may hold, and which KVM does not take
   later;
2. special registers: they put the vCPU into its mode (EFER, CR0, CR4), and the rest is checked against that; with them
   the base of the local APIC;
3. general registers (which also drops a pending exception), debug registers;
4. XCR0, then the XSAVE area, which holds what XCR0 has enabled;
5. MSRs, after EFER;
6. the local APIC's registers, after its base, which says how they are laid out;
7. the TSC, late, so that the least time passes unseen; then the deadline of the APIC's timer, which is a value of the
   TSC and counts only in the mode that the registers have set;
8. the multiprocessing state, which special registers of a vCPU after reset would set to "runnable";
9. events (what is pending, the interrupt shadow, NMIs): steps 2 and 3 would have changed them;
10. *after all vCPUs*, the machine's own: interrupt controllers (what is pending there goes on to the local APICs, and
    would be lost if they came later), the PIT (its first tick may come at once), and the clock (see :mod:`.clock`).

Saving begins with the machine's own, so that an interrupt which goes on to a local APIC meanwhile is in both states and
not in neither. Of a vCPU it begins with the multiprocessing state (reading it makes KVM settle a pending INIT or SIPI,
which changes registers) and then the events (the same with an exception's payload, CR2 and DR6, on a KVM that cannot
tell the two apart).

**Which MSRs** travel in ``msrs``: see :mod:`pageferry.kvm.msrs`.

**Sealed in ring 3.** A vCPU that was loaded into ring 3 with no way out of it (no IDT, no GDT, no SYSCALL, no SYSENTER)
cannot change IOPL or TR: so what was loaded is still true and is what ``save`` gives, whatever KVM shows. (Some KVMs,
seen: ``kvm_pvm``, run ring 3 with IOPL 0 whatever RFLAGS said.) KVM gets a TSS at linear address 0, where a page of
zeros permits every port; of which kind is found out (:mod:`pageferry.kvm.tss`).

**The TSC** goes on from the saved value, at the saved rate: see :mod:`pageferry.kvm.tsc`.

Left out: what no guest here can have. System management mode: no machine raises an SMI, and a vCPU that has brought
itself there is refused. Nested virtualisation: no CPUID table has it. Components of XSAVE that only the supervisor
sees: nor has a table those.

Source: kernel ``api.rst``: KVM_SET_SREGS, KVM_SET_REGS, KVM_SET_MSRS, KVM_SET_VCPU_EVENTS.
"""

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

from pageferry.core.confined import is_confined
from pageferry.core.cpuid import APIC, Leaves, find
from pageferry.core.state import DescriptorTable, LapicState, MpState, Segment, VcpuState
from pageferry.kvm import lapic, tsc, uapi
from pageferry.kvm.events import kvm_events, read_events
from pageferry.kvm.fds import VcpuFd, VmFd
from pageferry.kvm.msrs import MSR_FIELDS, MSR_TSC_AUX, OtherMsrs, read_msrs, write_msrs
from pageferry.kvm.xsave import Xsave

_GENERAL = tuple(field[0] for field in uapi.KvmRegs._fields_)
_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr")  # LDTR and the tables have other names in the kernel
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")

_ATTRIBUTE_PRESENT = 1 << 7
_SEGMENT_TYPE = 0xF
_CR3_PWT = 1 << 3
_BUSY_TSS = 0x8B  # present, system, type 11
_RFLAGS_IOPL = 3 << 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What one vCPU has besides the registers that every one has.

    ``event_flags``: see :func:`pageferry.kvm.events.enable_events`. ``new_lapic``: its local APIC when it was new;
    None: the machine has no interrupt controllers. ``tss``: see :func:`pageferry.kvm.tss.tss_attributes`.
    """

    msrs: OtherMsrs
    xsave: Xsave
    event_flags: int
    new_lapic: LapicState | None
    tss: int

    @classmethod
    def of(
        cls, vm: VmFd, fd: VcpuFd, *, table: Leaves, listed: Iterable[int], event_flags: int, irqchip: bool, tss: int
    ) -> Self:
        """Find out, and switch off a local APIC that the table does not have; nothing was loaded yet.

        Args:
            vm: the machine.
            fd: the vCPU, with its CPUID.
            table: the guest's CPUID table.
            listed: the MSRs that this KVM lists.
            event_flags: from :func:`pageferry.kvm.events.enable_events`.
            irqchip: whether the machine has interrupt controllers.
            tss: the attributes of a TSS that permits ports.

        Raises:
            KvmError: the kernel refused.
        """
        if irqchip and not find(table, 1)[3] & APIC:
            lapic.switch_off(fd)
        return cls(
            msrs=OtherMsrs.of(fd, listed),
            xsave=Xsave.of(vm, fd, table),
            event_flags=event_flags,
            new_lapic=lapic.read_lapic(fd, _special(fd).apic_base) if irqchip else None,
            tss=tss,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """What a vCPU that cannot leave ring 3 cannot change; see the module's text."""

    iopl: int
    tr: Segment


def _sealed(state: VcpuState) -> Sealed | None:
    if not is_confined(state):
        return None
    return Sealed(iopl=state.rflags & _RFLAGS_IOPL, tr=state.tr)


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


def _special(fd: VcpuFd) -> uapi.KvmSregs:
    sregs = uapi.KvmSregs()
    fd.ioctl(uapi.KVM_GET_SREGS, sregs)
    return sregs


def save(fd: VcpuFd, sealed: Sealed | None, parts: Parts, host_tsc_now: int | None = None) -> VcpuState:
    """Return a vCPU's state; it is not inside the guest and has no I/O under way.

    Args:
        fd: the vCPU.
        sealed: what the last :func:`load` returned.
        parts: what it has.
        host_tsc_now: from :func:`pageferry.kvm.tsc.host_tsc`, the instant for which the TSC is given; None: now.

    Raises:
        VmError: it has something in use that a ``VcpuState`` cannot hold.
        KvmError: the kernel refused.
    """
    mp_state = lapic.read_mp_state(fd) if parts.new_lapic else MpState.RUNNABLE
    events = read_events(fd)
    sregs, regs, debug = _special(fd), uapi.KvmRegs(), uapi.KvmDebugregs()
    fd.ioctl(uapi.KVM_GET_REGS, regs)
    fd.ioctl(uapi.KVM_GET_DEBUGREGS, debug)
    image, extended = parts.xsave.save(fd)
    fields: dict[str, Any] = {name: getattr(regs, name) for name in _GENERAL}
    fields |= {name: getattr(sregs, name) for name in _CONTROL}
    fields |= {name: _segment(getattr(sregs, name)) for name in _SEGMENTS}
    own = read_msrs(fd, MSR_FIELDS)
    fields |= {field: own.get(index, 0) for index, field in MSR_FIELDS.items()}
    fields |= {f"dr{number}": debug.db[number] for number in range(4)}
    state = VcpuState(
        **fields,
        **events,
        dr6=debug.dr6,
        dr7=debug.dr7,
        ldtr=_segment(sregs.ldt),
        gdtr=DescriptorTable(base=sregs.gdt.base, limit=sregs.gdt.limit),
        idtr=DescriptorTable(base=sregs.idt.base, limit=sregs.idt.limit),
        tsc=tsc.read(fd, host_tsc_now),
        mp_state=mp_state,
        lapic=lapic.saved_lapic(fd, sregs.apic_base, parts.new_lapic) if parts.new_lapic else None,
        fpu_regs=image,
        extended=extended,
        msrs=parts.msrs.save(fd),
    )
    return replace(state, rflags=state.rflags & ~_RFLAGS_IOPL | sealed.iopl, tr=sealed.tr) if sealed else state


def load(fd: VcpuFd, state: VcpuState, parts: Parts, host_tsc_now: int | None = None) -> Sealed | None:
    """Replace a vCPU's state; it is not inside the guest. Return what the next :func:`save` needs.

    Args:
        fd: the vCPU.
        state: of this or any other machine; one without a local APIC leaves ours as it was when it was new.
        parts: what the vCPU has.
        host_tsc_now: from :func:`pageferry.kvm.tsc.host_tsc`, the instant at which the guest's TSC is ``state.tsc``;
            None: now.

    Raises:
        VmError: this machine cannot hold the state.
        KvmError: the kernel refused a part of it.
    """
    parts.xsave.expect_fit(state.fpu_regs, state.extended)
    lapic.expect_fit(state, irqchip=parts.new_lapic is not None)
    events, sealed, apic = kvm_events(state, parts.event_flags), _sealed(state), state.lapic or parts.new_lapic
    _load_special(fd, state, parts.tss if sealed else None, apic)
    fd.ioctl(uapi.KVM_SET_REGS, uapi.KvmRegs(**{name: getattr(state, name) for name in _GENERAL}))
    breakpoints = (state.dr0, state.dr1, state.dr2, state.dr3)
    fd.ioctl(uapi.KVM_SET_DEBUGREGS, uapi.KvmDebugregs(db=breakpoints, dr6=state.dr6, dr7=state.dr7))
    parts.xsave.load(fd, state.fpu_regs, state.extended)
    _load_msrs(fd, state, parts.msrs)
    if apic:
        lapic.write_registers(fd, apic)
    tsc.write(fd, state.tsc, host_tsc_now)
    if apic:
        lapic.write_deadline(fd, apic)
        lapic.write_mp_state(fd, state.mp_state)
    fd.ioctl(uapi.KVM_SET_VCPU_EVENTS, events)
    return sealed


def _load_msrs(fd: VcpuFd, state: VcpuState, others: OtherMsrs) -> None:
    others.load(fd, state.msrs)
    own = {index: getattr(state, field) for index, field in MSR_FIELDS.items()}
    if not state.tsc_aux:
        del own[MSR_TSC_AUX]  # a CPU without RDTSCP has it not, and then it reads as 0
    write_msrs(fd, own)


def forget_translations(fd: VcpuFd, sealed: Sealed | None, parts: Parts) -> None:
    """Load CR3 anew. KVM does nothing for the same value, so its PWT bit (a cache hint) changes to and fro.

    Args:
        fd: the vCPU; it is not inside the guest and has no I/O under way.
        sealed: what the last :func:`load` returned.
        parts: what it has.

    Raises:
        KvmError: the kernel refused.
    """
    sregs = _special(fd)
    if sealed is not None:
        sregs.tr.type = parts.tss & _SEGMENT_TYPE  # KVM tells of any TSS as a busy one
    for _ in range(2):
        sregs.cr3 ^= _CR3_PWT
        fd.ioctl(uapi.KVM_SET_SREGS, sregs)


def begin(fd: VcpuFd, state: VcpuState, *, tss: int) -> None:
    """Load no more than a confined vCPU needs to run a few instructions: a trial's.

    Args:
        fd: the vCPU.
        state: its registers.
        tss: the attributes of its TSS.

    Raises:
        KvmError: the kernel refused.
    """
    _load_special(fd, state, tss, None)
    fd.ioctl(uapi.KVM_SET_REGS, uapi.KvmRegs(**{name: getattr(state, name) for name in _GENERAL}))


def _load_special(fd: VcpuFd, state: VcpuState, tss: int | None, apic: LapicState | None) -> None:
    sregs = _special(fd)  # CR8 stays as it is: the local APIC has it, if there is one
    if apic:
        sregs.apic_base = apic.base
    for name in _CONTROL:
        setattr(sregs, name, getattr(state, name))
    for name in _SEGMENTS:
        setattr(sregs, name, _kvm_segment(getattr(state, name)))
    if tss is not None or not state.tr.attributes & _ATTRIBUTE_PRESENT:  # VMX enters with no TR but a busy TSS
        attributes = tss or _BUSY_TSS
        sregs.tr = _kvm_segment(Segment(selector=state.tr.selector, base=0, limit=0xFFFF, attributes=attributes))
    sregs.ldt = _kvm_segment(state.ldtr)
    sregs.gdt = uapi.KvmDtable(base=state.gdtr.base, limit=state.gdtr.limit)
    sregs.idt = uapi.KvmDtable(base=state.idtr.base, limit=state.idtr.limit)
    sregs.interrupt_bitmap = (ctypes.c_uint64 * len(sregs.interrupt_bitmap))()
    fd.ioctl(uapi.KVM_SET_SREGS, sregs)
