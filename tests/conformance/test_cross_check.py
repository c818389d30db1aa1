"""A witness beside real trackers of running guests: the whole kit passes through it, and it names what a fault lost."""

import pytest
from tiers import sample

from mutation import tracker_faults, tracker_marks
from mutation.tracker_wrapper import mutated
from pageferry.core.errors import LostPageError, UnsupportedError
from pageferry.core.frames import gpa_of
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.vm import KvmVm
from pageferry.testing import CHECKS, check_log_dirty
from pageferry.testing.lab import STATUS_GFN, Lab
from pageferry.testing.operators import STRAY_GFN
from pageferry.vmm.accel import Accel, choose_machines
from pageferry.witness.cross_check import CrossCheck
from pageferry.witness.machines import with_witness

ODD = (4 << 20) + 3 * 4096


FEW = ["rounds-are-exact", "marks-by-range", "free-running-kv", "two-cleaners"]


@pytest.mark.parametrize("check", sample([check.name for check in CHECKS], "one witness for all", quick=FEW))
def test_a_witness_keeps_every_promise_of_a_sound_tracker(make_watched_vm, check):
    check_log_dirty(make_watched_vm, memory_bytes=[ODD], checks=[check])


@pytest.mark.parametrize(
    "check",
    sample(
        ["rounds-are-exact", "free-running-smp", "free-running-kv", "writing-thread"],
        "one witness for all",
        quick=["free-running-smp"],
    ),
)
def test_behind_the_hole_and_with_two_vcpus(make_watched_vm, check):
    check_log_dirty(make_watched_vm, memory_bytes=[(3 << 30) + 5 * 4096], cpus=2, checks=[check])


@pytest.fixture
def lab(accel):
    """A lab of machines of which the fault is in the primary; ``lab(fault)``."""

    def make(fault):
        def watch(config):
            vm = mutated(KvmVm if accel == "kvm" else Domain, fault)(config)
            watched = CrossCheck(vm.log_dirty, None, vm.memory, still=lambda: vm.run_control.still)
            vm.log_dirty = watched
            vm.memory.on_write(watched.mark)
            return vm

        return Lab(make_vm=watch, memory_bytes=ODD, seed=1)

    return make


def expect_lost(call, *, gfn, fault, round_index):
    with pytest.raises(LostPageError) as lost:
        call()
    assert lost.value.gfn == gfn
    assert lost.value.round_index == round_index
    assert lost.value.lost_by.endswith(fault.__name__)
    assert lost.value.seen_by == "digests"


def test_a_dropped_bit_is_named(lab):
    with lab(tracker_faults.DropsABit).tracked() as guest:
        guest.play(3)  # all pages
        guest.log_dirty.clean()
        expect_lost(guest.log_dirty.peek, gfn=guest.memory.gfn_limit - 1, fault=tracker_faults.DropsABit, round_index=0)


def test_a_last_word_that_is_dropped_is_named(lab):
    with lab(tracker_faults.DropsTheLastWord).tracked() as guest:
        guest.play(3)
        gfn = guest.memory.gfn_limit & ~63
        expect_lost(guest.log_dirty.peek, gfn=gfn, fault=tracker_faults.DropsTheLastWord, round_index=0)
        guest.log_dirty.clean()
        expect_lost(guest.log_dirty.clean, gfn=gfn, fault=tracker_faults.DropsTheLastWord, round_index=0)


def test_a_page_not_protected_again_is_named(lab):
    with lab(tracker_faults.DoesNotProtectAgain).tracked() as guest:
        guest.play(3)
        guest.log_dirty.clean()
        guest.play(8)  # all pages again
        guest.log_dirty.clean()
        expect_lost(guest.log_dirty.clean, gfn=STATUS_GFN, fault=tracker_faults.DoesNotProtectAgain, round_index=1)


@pytest.mark.parametrize("fault", [tracker_marks.MarksNothing, tracker_marks.MarksTheFirst])
def test_writers_whose_marks_are_lost_are_found(lab, fault):
    with lab(fault).tracked() as guest:
        guest.memory.write(gpa_of(STRAY_GFN) + 4000, b"x" * 200)
        gfn = STRAY_GFN + (fault is tracker_marks.MarksTheFirst)
        expect_lost(guest.log_dirty.peek, gfn=gfn, fault=fault, round_index=0)


@pytest.mark.parametrize(
    ("primary", "witness"), [("kvm-bitmap", "kvm-bitmap"), ("uffd-wp", "pagemap-scan"), ("pagemap-scan", "uffd-wp")]
)
def test_trackers_that_cannot_be_on_at_once_are_refused(primary, witness):
    with pytest.raises(UnsupportedError, match="cannot be on at once") as refused:
        with_witness(primary, witness)
    assert "--oracle digests, or one of " in refused.value.hint
    assert witness not in refused.value.hint


def test_the_software_machine_has_digests_only():
    with pytest.raises(UnsupportedError, match="no oracle kvm-bitmap on soft"):
        choose_machines(Accel.SOFT, witness="kvm-bitmap")
    with pytest.raises(UnsupportedError, match="no tracker nope"):
        with_witness("kvm-bitmap", "nope")


def test_a_witness_that_cannot_be_made_leaves_nothing_behind(kvm_support, monkeypatch):
    from pageferry.core.vm import VmConfig
    from pageferry.kvm import trackers

    closed = []

    class Owner:
        tracker = "owner"

        def __init__(self, vm):
            pass

        def close(self):
            closed.append(self)

    def refuse(vm):
        raise UnsupportedError("it", "no")

    monkeypatch.setitem(trackers.TRACKERS, "owner", trackers.Tracker(prepare=lambda _: None, make=Owner))
    witness = trackers.Tracker(prepare=lambda _: None, make=refuse, own_mapping=True)
    monkeypatch.setitem(trackers.TRACKERS, "refuser", witness)
    with pytest.raises(UnsupportedError, match="no"):
        KvmVm(VmConfig(memory_bytes=4 << 20), tracker=with_witness("owner", "refuser"))
    assert len(closed) == 1
