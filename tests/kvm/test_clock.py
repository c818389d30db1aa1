"""KVM's clock: it goes on from where it was, for the machine and for a guest that reads it."""

import dataclasses
import struct

import pytest

from pageferry.core.errors import UnsupportedError
from pageferry.core.state import MachineState
from pageferry.core.vm import VmConfig
from pageferry.hypervisor.domain import Domain
from pageferry.kvm import uapi
from pageferry.kvm.fds import VmFd
from pageferry.kvm.msrs import MSR_KVM_SYSTEM_TIME
from pageferry.stream.hvm_context import decode_machine_state, encode_machine_state

pytestmark = pytest.mark.kvm

HOUR_NS = 3600 * 10**9
LONG_NS = 1 << 60  # years later than any clock that was not set


def moved(saved):
    return decode_machine_state(encode_machine_state(saved))


def with_clock(vm, clock_ns):
    return dataclasses.replace(vm.save_state(), kvm_clock_ns=clock_ns)


@pytest.fixture
def adjustable(kvm):
    if not kvm.support.capabilities["KVM_CAP_ADJUST_CLOCK"]:
        pytest.skip("this KVM has no KVM_CAP_ADJUST_CLOCK")


def test_the_clock_goes_on_in_another_machine(kvm, adjustable):
    vm, other = kvm.guest("spin"), kvm.guest("spin")
    vm.load_state(with_clock(vm, LONG_NS))
    saved = vm.save_state()
    assert LONG_NS <= saved.kvm_clock_ns < LONG_NS + HOUR_NS
    other.load_state(moved(saved))
    assert saved.kvm_clock_ns <= other.save_state().kvm_clock_ns < saved.kvm_clock_ns + HOUR_NS


def test_a_state_without_a_clock_leaves_it(kvm, adjustable):
    vm = kvm.guest("spin")
    vm.load_state(with_clock(vm, LONG_NS))
    vm.load_state(MachineState(vcpus=(kvm.start_state(),), devices=vm.platform.bus.save()))
    assert vm.save_state().kvm_clock_ns >= LONG_NS


def test_the_software_machine_keeps_it_for_the_next_kvm(kvm, adjustable):
    vm = kvm.guest("spin")
    vm.load_state(with_clock(vm, LONG_NS))
    saved = vm.save_state()
    domain = Domain(VmConfig(memory_bytes=4 << 20))
    try:
        assert domain.save_state().kvm_clock_ns is None
        domain.load_state(moved(saved))
        back = moved(domain.save_state())
    finally:
        domain.close()
    assert back.kvm_clock_ns == saved.kvm_clock_ns
    vm.load_state(back)
    assert vm.save_state().kvm_clock_ns >= saved.kvm_clock_ns


def test_a_kvm_that_cannot_set_its_clock_goes_without(kvm, monkeypatch):
    plain = VmFd.check_extension
    monkeypatch.setattr(
        VmFd, "check_extension", lambda fd, number: 0 if number == uapi.KVM_CAP_ADJUST_CLOCK else plain(fd, number)
    )
    vm = kvm.guest("spin")
    assert vm.save_state().kvm_clock_ns is None
    vm.load_state(with_clock(vm, LONG_NS))
    assert vm.save_state().kvm_clock_ns is None


def shown_ns(vm, gpa):
    """Return what the guest's copy of the clock says of the time at which KVM wrote it: version and nanoseconds."""
    version, _, _, system_time = struct.unpack_from("<IIQQ", vm.memory.read(gpa, 32))
    return version, system_time


def test_a_guest_that_reads_the_clock_never_sees_it_go_back(kvm, adjustable):
    gpa = kvm.DATA_GPA + 0x800
    state = kvm.start_state(msrs=((MSR_KVM_SYSTEM_TIME, gpa | 1),))
    vm = kvm.guest("stamp", vcpus=(dataclasses.replace(state, rdi=kvm.DATA_GPA + 0x1000, rsi=1),))
    vm.load_state(with_clock(vm, LONG_NS))
    last_ns = LONG_NS
    for _ in range(3):
        vm.resume()
        kvm.wait_for(vm, lambda vm=vm: shown_ns(vm, gpa)[1] > 0)
        vm.pause()
        version, now_ns = shown_ns(vm, gpa)
        assert version % 2 == 0
        assert last_ns <= now_ns < last_ns + HOUR_NS
        saved = vm.save_state()
        last_ns = saved.kvm_clock_ns
        assert last_ns >= now_ns
        assert dict(saved.vcpus[0].msrs)[MSR_KVM_SYSTEM_TIME] == gpa | 1
        other = kvm.guest()
        for region in vm.memory.regions:
            other.memory.write(region.gpa, vm.memory.read(region.gpa, region.size_bytes))
        other.memory.write(gpa, bytes(32))  # what was written here cannot be the old machine's
        other.load_state(moved(saved))
        vm.close()
        vm = other


def test_such_a_guest_does_not_go_to_the_software_machine(kvm):
    domain = Domain(VmConfig(memory_bytes=4 << 20))
    state = kvm.start_state(msrs=((MSR_KVM_SYSTEM_TIME, 1),))
    try:
        with pytest.raises(UnsupportedError, match="no MSR 0x4b564d01"):
            domain.load_state(MachineState(vcpus=(state,), devices=domain.platform.bus.save()))
    finally:
        domain.close()
