"""The order of saving and restoring that ``kvm/vcpu_state.py`` writes down, held by the ioctls that are issued."""

import contextlib
import dataclasses
import itertools

import pytest

from pageferry.core.libc import Fd
from pageferry.core.state import MachineState
from pageferry.core.vm import MachineModel
from pageferry.kvm import uapi

pytestmark = pytest.mark.kvm

TSC, TSC_DEADLINE = "TSC", "TSC_DEADLINE"


@pytest.fixture
def recorded(monkeypatch):
    """Returns a context that lists what is issued inside, by name; ``TSC`` however it is set."""

    @contextlib.contextmanager
    def record():
        seen, plain = [], Fd.ioctl

        def ioctl(fd, request, argument=0):
            name = uapi.IOCTL_NAMES[request]
            if name == "KVM_SET_MSRS" and argument.nmsrs == 1:
                name = {0x10: TSC, 0x6E0: TSC_DEADLINE}.get(argument.entries[0].index, name)
            if name == "KVM_SET_DEVICE_ATTR" and argument.group == uapi.KVM_VCPU_TSC_CTRL:
                name = TSC
            seen.append(name)
            return plain(fd, request, argument)

        with monkeypatch.context() as patch:
            patch.setattr(Fd, "ioctl", ioctl)
            yield seen

    return record


def expect_order(seen, *names):
    """Each of ``names`` was issued, the last time before the next one's first time."""
    missing = set(names) - set(seen)
    assert not missing, f"never issued: {missing}"
    for before, after in itertools.pairwise(names):
        last = len(seen) - 1 - seen[::-1].index(before)
        assert last < seen.index(after), f"{before} after {after}: {seen}"


def test_cpuid_comes_before_whatever_it_decides(kvm, recorded):
    with recorded() as seen:
        kvm.guest("spin")
    expect_order(seen, "KVM_ENABLE_CAP", "KVM_CREATE_VCPU", "KVM_SET_CPUID2", "KVM_GET_CPUID2", "KVM_SET_SREGS")


def test_state_is_restored_in_the_order_that_is_written_down(kvm, recorded):
    vm = kvm.guest("spin")
    state = MachineState(
        vcpus=(kvm.start_state(msrs=((0x277, 0x0007_0106_0007_0406),)),),
        devices=vm.platform.bus.save(),
        kvm_clock_ns=vm.save_state().kvm_clock_ns,
    )
    with recorded() as seen:
        vm.load_state(state)
    expect_order(
        seen, "KVM_SET_SREGS", "KVM_SET_REGS", "KVM_SET_DEBUGREGS", "KVM_SET_XCRS", "KVM_SET_XSAVE", "KVM_SET_MSRS", TSC
    )
    expect_order(seen, TSC, "KVM_SET_VCPU_EVENTS", "KVM_SET_CLOCK")


def test_a_machine_with_interrupt_controllers_has_its_order_too(kvm, recorded):
    if not kvm.support.capabilities["KVM_CAP_IRQCHIP"]:
        pytest.skip("this KVM has no KVM_CAP_IRQCHIP")
    with recorded() as seen:
        vm = kvm.guest("spin", vcpus=(kvm.start_state(), kvm.start_state()), machine=MachineModel.PC)
    expect_order(seen, "KVM_CREATE_IRQCHIP", "KVM_CREATE_PIT2", "KVM_CREATE_VCPU")
    with recorded() as seen:
        saved = vm.save_state()
    expect_order(seen, "KVM_GET_IRQCHIP", "KVM_GET_LAPIC")
    for events in ("KVM_GET_VCPU_EVENTS", "KVM_GET_SREGS"):
        assert seen.index("KVM_GET_MP_STATE") < seen.index(events)
    first = saved.vcpus[0]
    armed = dataclasses.replace(first, lapic=dataclasses.replace(first.lapic, tsc_deadline=1 << 62))
    with recorded() as seen:
        vm.load_state(dataclasses.replace(saved, vcpus=(armed, saved.vcpus[1])))
    one_vcpu = seen[: seen.index("KVM_SET_VCPU_EVENTS") + 1]
    expect_order(one_vcpu, "KVM_SET_SREGS", "KVM_SET_MSRS", "KVM_SET_LAPIC", TSC, TSC_DEADLINE)
    expect_order(one_vcpu, TSC_DEADLINE, "KVM_SET_MP_STATE", "KVM_SET_VCPU_EVENTS")
    expect_order(seen, "KVM_SET_VCPU_EVENTS", "KVM_SET_IRQCHIP", "KVM_SET_PIT2", "KVM_SET_CLOCK")


def test_all_vcpus_are_restored_before_what_the_machine_has_of_its_own(kvm, recorded):
    vm = kvm.guest("spin", vcpus=(kvm.start_state(), kvm.start_state()))
    saved = vm.save_state()
    with recorded() as seen:
        vm.load_state(saved)
    assert seen.count("KVM_SET_VCPU_EVENTS") == 2
    expect_order(seen, "KVM_SET_VCPU_EVENTS", "KVM_SET_CLOCK")


def test_events_are_read_before_the_registers_that_reading_them_may_change(kvm, recorded):
    vm = kvm.guest("spin")
    with recorded() as seen:
        vm.save_state()
    expect_order(seen, "KVM_GET_VCPU_EVENTS", "KVM_GET_SREGS")
    expect_order(seen, "KVM_GET_VCPU_EVENTS", "KVM_GET_DEBUGREGS")
