"""The table of trackers, and what a machine does for the one it has."""

import pytest

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.vm import VmConfig
from pageferry.kvm import uapi
from pageferry.kvm.trackers import TRACKERS, Tracker, find_tracker
from pageferry.kvm.vm import KvmVm

pytestmark = pytest.mark.kvm


def test_an_unknown_tracker_is_refused_and_the_known_ones_are_named():
    with pytest.raises(UnsupportedError, match="no tracker nope") as refused:
        find_tracker("nope")
    assert refused.value.hint == f"one of {', '.join(TRACKERS)}"


class Owner:
    """A tracker that owns something: notes what of the machine is still open when it is closed."""

    def __init__(self, vm):
        self.vm = vm
        self.tracker = "owner"
        self.closed = []

    def mark(self, gfns):
        pass

    def close(self):
        self.closed.append([self.vm.vm_fd.check_extension(uapi.KVM_CAP_USER_MEMORY), self.vm.run_control.held])
        self.vm.vcpus[0].save()  # its descriptor is open


def test_what_a_tracker_owns_is_closed_once_after_the_vcpus_stopped_and_before_their_descriptors(kvm_support):
    vm = KvmVm(VmConfig(memory_bytes=4 << 20), tracker=Tracker(prepare=lambda _: None, make=Owner))
    owner = vm.log_dirty
    vm.close()
    vm.close()
    assert owner.closed == [[1, True]]


def test_what_a_tracker_owns_is_closed_when_the_machine_cannot_be_finished(kvm_support):
    made = []

    class Unfinished(KvmVm):
        def _attach(self, vcpus, log_dirty):
            made.append(log_dirty)
            super()._attach(vcpus, log_dirty)
            raise VmError("no")

    with pytest.raises(VmError, match="no"):
        Unfinished(VmConfig(memory_bytes=4 << 20), tracker=Tracker(prepare=lambda _: None, make=Owner))
    assert made[0].closed == [[1, True]]
