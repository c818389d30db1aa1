"""The kit finds every fault that we know to inject, and every one of its checks has found one."""

import pytest
from tiers import sample

from mutation import tracker_faults, tracker_marks, tracker_races, tracker_ranges
from mutation.tracker_wrapper import Faithful, mutated
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.vm import KvmVm
from pageferry.testing import CHECKS
from pageferry.testing.conformance import DEFAULT_MEMORY_BYTES, run_check, select
from pageferry.testing.lab import Lab

ODD, BEHIND_THE_HOLE = DEFAULT_MEMORY_BYTES

#: Which checks must find a fault. Others may find it too.
CAUGHT_BY = {
    tracker_faults.DropsABit: ("clean-protects-again", "rounds-are-exact", "free-running-sweep", "free-running-smp"),
    tracker_faults.DropsTheLastWord: ("rounds-are-exact", "free-running-kv", "free-running-pagetables"),
    tracker_faults.SkipsSmallRounds: ("free-running-idle", "host-writes-are-marked"),
    tracker_faults.DoesNotProtectAgain: (
        "clean-protects-again",
        "changed-between-cleans",
        "state-restore-keeps-tracking",
    ),
    tracker_faults.LosesReleasedPages: ("released-pages-are-tracked",),
    tracker_faults.ClearsAfterTheCopy: ("stamped-copy", "free-running-random", "free-running-hotset"),
    tracker_faults.ReportsLate: ("rounds-are-exact", "rounds-add-up", "clean-clears", "stamped-copy"),
    tracker_faults.NeverClears: ("clean-clears", "rounds-are-exact"),
    tracker_faults.PeekClears: ("peek-changes-nothing", "peek-grows", "pausing-is-no-write", "peeking-thread"),
    tracker_marks.MarksNothing: (
        "host-writes-are-marked",
        "released-pages-are-tracked",
        "marked-after-the-write",
        "marks-are-seen-at-once",
        "free-running-dma",
        "writing-thread",
    ),
    tracker_marks.MarksTheFirst: ("host-writes-are-marked", "marks-and-writes-mix"),
    tracker_marks.MarkLosesARace: ("writing-thread",),
    tracker_marks.RefusesStrangeMarks: ("marks-outside-ram",),
    tracker_races.MarkFindsTheBitmapUnlocked: ("clean-between-steps-of-a-mark",),
    tracker_races.MarkTakesNoLock: ("mark-between-steps-of-clean",),
    tracker_races.PeekWritesBack: ("mark-between-steps-of-peek",),
    tracker_faults.SharesItsBitmap: ("bitmaps-are-the-callers",),
    tracker_faults.EnablesTwice: ("enable-twice",),
    tracker_faults.StartsAllDirty: ("enable-starts-clear",),
    tracker_faults.WorksWhileOff: ("off-at-first", "off-and-on-again"),
    tracker_faults.OffDoesNothing: ("off-and-on-again", "on-and-off-while-running"),
    tracker_faults.OffKeepsTheBits: ("off-and-on-again",),
    tracker_faults.IgnoresTheHole: ("rounds-are-exact", "free-running-stamp"),
    tracker_faults.ReportsAllAlways: ("rounds-are-exact",),
    tracker_faults.ReportsWhatDiffers: ("changed-back-is-reported", "equal-value-is-reported"),
    tracker_faults.ReportsChangedSums: ("permuted-words-are-reported",),
    tracker_faults.CountsWrong: ("stats-count-the-bits",),
    tracker_faults.FaultsTwice: ("one-fault-per-page",),
    tracker_faults.BreaksUnderTwoCallers: ("two-cleaners",),
    tracker_ranges.RangeClearsAll: (
        "range-returns-its-own",
        "range-leaves-the-others",
        "marks-by-range",
        "stamped-copy-by-range",
        "cleaned-by-range-random",
    ),
    tracker_ranges.RangeReturnsAll: ("range-returns-its-own",),
    tracker_ranges.RangeProtectsItsFirstWord: ("range-leaves-the-others", "stamped-copy-by-range"),
    tracker_ranges.RangeClearsBeforeItReads: ("range-returns-its-own", "cleaned-by-range-smp"),
    tracker_ranges.RangeShiftedByAWord: ("range-returns-its-own", "range-leaves-the-others", "stamped-copy-by-range"),
    tracker_ranges.RangeForgetsTheTail: ("range-returns-its-own", "range-leaves-the-others", "strange-ranges"),
    tracker_ranges.RangeEndsAtTheHole: ("range-returns-its-own", "stamped-copy-by-range"),
    tracker_ranges.RangeRoundedOutward: ("strange-ranges",),
    tracker_ranges.EmptyRangeIsAll: ("strange-ranges",),
    tracker_ranges.RangeWorksWhileOff: ("off-at-first", "off-and-on-again"),
    tracker_ranges.RangeKnowsNoMarks: ("marks-by-range", "cleaned-by-range-dma"),
}
CASES = [(fault, check) for fault, checks in CAUGHT_BY.items() for check in checks]
FIRST = [(fault, checks[0]) for fault, checks in CAUGHT_BY.items()]


@pytest.fixture(params=sample(["kvm", "soft"], "the faults are in the kit's wrapper, not in a tracker", quick=["soft"]))
def accel(request):
    if request.param == "kvm":
        request.getfixturevalue("kvm_support")
    return request.param


@pytest.fixture
def make_vm(accel):
    return KvmVm if accel == "kvm" else Domain


@pytest.mark.parametrize(
    ("fault", "check"),
    sample(CASES, "another check finds this fault in `make test`", quick=FIRST),
    ids=[f"{fault.__name__}-{check}" for fault, check in CASES],
)
def test_the_fault_is_found_by_the_check(make_vm, fault, check):
    memory_bytes = (
        BEHIND_THE_HOLE if fault in (tracker_faults.IgnoresTheHole, tracker_ranges.RangeEndsAtTheHole) else ODD
    )
    (selected,) = select([check])
    error = run_check(selected, Lab(make_vm=mutated(make_vm, fault), memory_bytes=memory_bytes, seed=1))
    assert error is not None, f"{check} did not find {fault.__name__}"
    assert (error.check, error.law) == (check, selected.law)


@pytest.mark.parametrize(
    "wrapper", sample([Faithful, tracker_races.HoldsMarks], "the base of the other faults", quick=[Faithful])
)
def test_the_wrapper_alone_is_not_a_fault(make_vm, wrapper):
    lab = Lab(make_vm=mutated(make_vm, wrapper), memory_bytes=ODD, seed=1)
    assert [run_check(check, lab) for check in CHECKS] == [None] * len(CHECKS)


def test_no_fault_and_no_check_is_left_out():
    assert set(CAUGHT_BY) == set(tracker_faults.FAULTS)
    # For one only a device can be at fault, for the other only who counts faults: test_mutants has both.
    others = {"device-marks-after-the-write", "range-costs-no-other-fault"}
    assert {check for _, check in CASES} == {check.name for check in CHECKS} - others
