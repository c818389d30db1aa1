"""Pending events of a vCPU: there and back through the stream, and refused where they cannot be held."""

import dataclasses
import itertools

import pytest

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.state import MachineState, MpState, PendingException
from pageferry.core.vm import VmConfig
from pageferry.hypervisor.domain import Domain
from pageferry.kvm import uapi
from pageferry.kvm.fds import VmFd
from pageferry.stream.hvm_context import decode_machine_state, encode_machine_state

pytestmark = pytest.mark.kvm

PAGE_FAULT = PendingException(vector=14, error_code=4, payload=0x7000_1234)
DEBUG = PendingException(vector=1, payload=1)
UNDEFINED = PendingException(vector=6)


@pytest.fixture
def lacking(monkeypatch):
    """Lets machines that are made from now on believe that KVM has not some capabilities."""

    def lack(*capabilities):
        plain = VmFd.check_extension
        monkeypatch.setattr(
            VmFd, "check_extension", lambda fd, number: 0 if number in capabilities else plain(fd, number)
        )

    return lack


def loaded(vm, state):
    vm.load_state(MachineState(vcpus=(state,), devices=vm.platform.bus.save()))


def test_events_go_through_the_stream_into_another_machine(kvm):
    for events in itertools.product((0, 1, 2), (False, True), (False, True)):
        changes = dict(zip(("interrupt_shadow", "nmi_pending", "nmi_masked"), events, strict=True))
        saved = kvm.guest("spin", **changes).save_state()
        told = {name: getattr(saved.vcpus[0], name) for name in changes}
        both = 3 if changes["interrupt_shadow"] else 0  # AMD-V does not tell the two kinds apart
        assert told in (changes, changes | {"interrupt_shadow": both})
        other = kvm.guest("spin", interrupt_shadow=1, nmi_masked=True)
        other.load_state(decode_machine_state(encode_machine_state(saved)))
        (state,) = other.save_state().vcpus
        assert {name: getattr(state, name) for name in changes} == told


@pytest.mark.parametrize("exception", [PAGE_FAULT, DEBUG, UNDEFINED], ids=["#PF", "#DB", "#UD"])
def test_an_exception_not_yet_injected_keeps_its_payload(kvm, exception):
    if not kvm.support.capabilities["KVM_CAP_EXCEPTION_PAYLOAD"]:
        pytest.skip("this KVM has no KVM_CAP_EXCEPTION_PAYLOAD")
    saved = kvm.guest("spin", pending_exception=exception, cr2=0x5000).save_state()
    other = kvm.guest("spin")
    other.load_state(decode_machine_state(encode_machine_state(saved)))
    (state,) = other.save_state().vcpus
    assert state.pending_exception == exception
    assert state.pending_event == 0
    assert (state.cr2, state.dr6) == (0x5000, kvm.start_state().dr6)  # the payload has not taken effect
    loaded(other, kvm.start_state())
    assert other.save_state().vcpus[0].pending_exception is None


def test_a_pending_exception_is_raised_where_the_guest_goes_on(kvm):
    if not kvm.support.capabilities["KVM_CAP_EXCEPTION_PAYLOAD"]:
        pytest.skip("this KVM has no KVM_CAP_EXCEPTION_PAYLOAD")
    vm = kvm.guest("spin", pending_exception=PAGE_FAULT)
    vm.resume()
    vm.wait(60)
    assert vm.end is not None  # without a handler it is the guest's end, and without the exception there is none
    assert vm.end.crash is not None


def test_a_pending_triple_fault_is_carried(kvm):
    if not kvm.support.capabilities["KVM_CAP_X86_TRIPLE_FAULT_EVENT"]:
        pytest.skip("this KVM has no KVM_CAP_X86_TRIPLE_FAULT_EVENT")
    saved = kvm.guest("spin", triple_fault_pending=True).save_state()
    other = kvm.guest("spin")
    other.load_state(decode_machine_state(encode_machine_state(saved)))
    assert other.save_state().vcpus[0].triple_fault_pending
    other.resume()
    other.wait(60)
    assert other.end is not None
    assert "triple fault" in other.end.crash


def test_a_kvm_that_cannot_hold_an_event_says_so(kvm, lacking):
    lacking(uapi.KVM_CAP_EXCEPTION_PAYLOAD, uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT)
    vm = kvm.guest("spin")
    with pytest.raises(UnsupportedError, match="cannot hold an exception that is pending with its payload"):
        loaded(vm, kvm.start_state(pending_exception=PAGE_FAULT))
    with pytest.raises(UnsupportedError, match="cannot hold a pending triple fault"):
        loaded(vm, kvm.start_state(triple_fault_pending=True))


def test_a_machine_without_interrupt_controllers_has_no_halted_vcpus(kvm):
    vm = kvm.guest("spin")
    with pytest.raises(UnsupportedError, match="no interrupt controllers, and the vCPU is HALTED"):
        loaded(vm, kvm.start_state(mp_state=MpState.HALTED))


def test_two_exceptions_at_once_are_refused(kvm):
    vm = kvm.guest("spin")
    injected = 1 << 31 | 3 << 8 | 13
    with pytest.raises(VmError, match="two exceptions, one injected and one pending"):
        loaded(vm, kvm.start_state(pending_event=injected, pending_exception=PAGE_FAULT))


def test_a_vcpu_in_system_management_mode_is_refused(kvm, monkeypatch):
    vm = kvm.guest("spin")
    fd = vm.vcpus[0].fd
    plain = fd.ioctl

    def ioctl(request, argument=0):
        result = plain(request, argument)
        if request == uapi.KVM_GET_VCPU_EVENTS:
            argument.smi.smm = 1
        return result

    monkeypatch.setattr(fd, "ioctl", ioctl)
    with pytest.raises(VmError, match="system management mode"):
        vm.save_state()


@pytest.mark.parametrize(
    "changes",
    [
        {"pending_event": 1 << 31 | 3 << 8 | 6},
        {"pending_exception": UNDEFINED},
        {"triple_fault_pending": True},
        {"mp_state": MpState.HALTED},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_software_machine_holds_each(kvm, changes):
    vm = Domain(VmConfig(memory_bytes=4 << 20))
    try:
        loaded(vm, dataclasses.replace(kvm.start_state(), **changes))
        ((name, value),) = changes.items()
        assert getattr(vm.save_state().vcpus[0], name) == value
    finally:
        vm.close()
