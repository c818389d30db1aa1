"""A KVM vCPU's pending events: exceptions, interrupts, NMIs, the interrupt shadow, a triple fault.

An exception that was raised and not injected yet has not touched CR2 or DR6: its *payload* will. KVM tells it apart
from an injected one if asked to (KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT), which a machine does when
it is made. Without the former KVM settles the payload when the events are read, and shows the exception as injected.

A SIPI is none of them: KVM never tells its vector, and settles it when the multiprocessing state is read.

System management mode is not part of a state: no machine here raises an SMI. A vCPU that is in it (a guest's own APIC
can bring it there) is refused.

Source: kernel ``api.rst``: KVM_GET_VCPU_EVENTS, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT; AMD APM
volume 2, 15.20 (the layout of ``pending_event``).
"""

from typing import Any

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.state import PendingException, VcpuState
from pageferry.kvm import uapi
from pageferry.kvm.fds import VcpuFd, VmFd

_ALWAYS = uapi.KVM_VCPUEVENT_VALID_NMI_PENDING | uapi.KVM_VCPUEVENT_VALID_SHADOW
_PAYLOAD, _TRIPLE_FAULT = uapi.KVM_VCPUEVENT_VALID_PAYLOAD, uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
_OPTIONAL = {uapi.KVM_CAP_EXCEPTION_PAYLOAD: _PAYLOAD, uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT: _TRIPLE_FAULT}

# pending_event: vector 7..0, kind 10..8, error code valid 11, valid 31
_EVENT_VALID, _EVENT_HAS_ERROR = 1 << 31, 1 << 11
_EXTERNAL, _NMI, _EXCEPTION, _SOFTWARE = 0, 2, 3, 4


def enable_events(vm: VmFd) -> int:
    """Have KVM tell all that it can about pending events; return the flags of what will count in a state.

    Args:
        vm: a machine without vCPUs.

    Raises:
        KvmError: the kernel refused.
    """
    flags = _ALWAYS
    for capability, flag in _OPTIONAL.items():
        if vm.check_extension(capability):
            vm.enable_cap(capability, 1)
            flags |= flag
    return flags


def read_events(fd: VcpuFd) -> dict[str, Any]:
    """Return the fields of ``VcpuState`` that are pending events.

    Raises:
        VmError: the vCPU is in system management mode, or an SMI or INIT waits.
        KvmError: the kernel refused.
    """
    events = uapi.KvmVcpuEvents()
    fd.ioctl(uapi.KVM_GET_VCPU_EVENTS, events)
    if any(bytes(events.smi)):
        raise VmError("the vCPU is in system management mode, or an SMI or INIT waits: no state here holds that")
    pending_event, error_code = _injected(events)
    return {
        "pending_event": pending_event,
        "error_code": error_code,
        "pending_exception": _pending(events),
        "interrupt_shadow": events.interrupt.shadow,
        "nmi_pending": bool(events.nmi.pending),
        "nmi_masked": bool(events.nmi.masked),
        "triple_fault_pending": bool(events.flags & _TRIPLE_FAULT and events.triple_fault),
    }


def _injected(events: uapi.KvmVcpuEvents) -> tuple[int, int]:
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


def _pending(events: uapi.KvmVcpuEvents) -> PendingException | None:
    exception = events.exception
    if not (events.flags & _PAYLOAD and exception.pending):
        return None
    return PendingException(
        vector=exception.nr,
        error_code=exception.error_code if exception.has_error_code else None,
        payload=events.exception_payload if events.exception_has_payload else None,
    )


def kvm_events(state: VcpuState, flags: int) -> uapi.KvmVcpuEvents:
    """Return a state's events as the kernel takes them.

    Args:
        state: of this or any other machine.
        flags: from :func:`enable_events`.

    Raises:
        UnsupportedError: this KVM cannot hold one of them.
        VmError: they contradict each other, or are of an unknown kind.
    """
    _expect_fit(state, flags)
    events = uapi.KvmVcpuEvents(flags=flags, triple_fault=state.triple_fault_pending)
    events.interrupt.shadow = state.interrupt_shadow
    events.nmi.pending = state.nmi_pending
    events.nmi.masked = state.nmi_masked
    if state.pending_exception is not None:
        pending = state.pending_exception
        _set_exception(events, pending.vector, pending.error_code)
        events.exception.pending = 1
        events.exception_has_payload = pending.payload is not None
        events.exception_payload = pending.payload or 0
    if not state.pending_event & _EVENT_VALID:
        return events
    vector, kind = state.pending_event & 0xFF, state.pending_event >> 8 & 7
    if kind == _EXCEPTION:
        _set_exception(events, vector, state.error_code if state.pending_event & _EVENT_HAS_ERROR else None)
        events.exception.injected = 1
    elif kind == _NMI:
        events.nmi.injected = 1
    elif kind in (_EXTERNAL, _SOFTWARE):
        events.interrupt.injected = 1
        events.interrupt.nr = vector
        events.interrupt.soft = kind == _SOFTWARE
    else:
        raise VmError(f"the state has a pending event of unknown kind {kind}")
    return events


def _expect_fit(state: VcpuState, flags: int) -> None:
    if state.pending_exception is not None:
        if not flags & _PAYLOAD:
            raise UnsupportedError("vcpu-events", "this KVM cannot hold an exception that is pending with its payload")
        if state.pending_event & _EVENT_VALID and state.pending_event >> 8 & 7 == _EXCEPTION:
            raise VmError("the state has two exceptions, one injected and one pending")
    if state.triple_fault_pending and not flags & _TRIPLE_FAULT:
        raise UnsupportedError("vcpu-events", "this KVM cannot hold a pending triple fault")


def _set_exception(events: uapi.KvmVcpuEvents, vector: int, error_code: int | None) -> None:
    events.exception.nr = vector
    events.exception.has_error_code = error_code is not None
    events.exception.error_code = error_code or 0
