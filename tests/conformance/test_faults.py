"""The kit finds every fault that we know to inject, and every one of its checks has found one."""

import pytest
from tiers import sample

from mutation import faults, mark_faults, range_faults
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.vm import KvmVm
from pageferry.testing import CHECKS
from pageferry.testing.conformance import DEFAULT_MEMORY_BYTES, run_check, select
from pageferry.testing.lab import Lab

ODD, BEHIND_THE_HOLE = DEFAULT_MEMORY_BYTES

#: Which checks must find a fault. Others may find it too.
CAUGHT_BY = {
    faults.DropsABit: ("clean-protects-again", "rounds-are-exact", "free-running-sweep", "free-running-smp"),
    faults.DropsTheLastWord: ("rounds-are-exact", "free-running-kv", "free-running-pagetables"),
    faults.SkipsSmallRounds: ("free-running-idle", "host-writes-are-marked"),
    faults.DoesNotProtectAgain: ("clean-protects-again", "changed-between-cleans", "state-restore-keeps-tracking"),
    faults.ClearsAfterTheCopy: ("stamped-copy", "free-running-random", "free-running-hotset"),
    faults.ReportsLate: ("rounds-are-exact", "rounds-add-up", "clean-clears", "stamped-copy"),
    faults.NeverClears: ("clean-clears", "rounds-are-exact"),
    faults.PeekClears: ("peek-changes-nothing", "peek-grows", "pausing-is-no-write", "peeking-thread"),
    mark_faults.MarksNothing: (
        "host-writes-are-marked",
        "marked-after-the-write",
        "marks-are-seen-at-once",
        "free-running-dma",
        "writing-thread",
    ),
    mark_faults.MarksTheFirst: ("host-writes-are-marked", "marks-and-writes-mix"),
    mark_faults.MarkLosesARace: ("writing-thread",),
    mark_faults.RefusesStrangeMarks: ("marks-outside-ram",),
    faults.SharesItsBitmap: ("bitmaps-are-the-callers",),
    faults.EnablesTwice: ("enable-twice",),
    faults.StartsAllDirty: ("enable-starts-clear",),
    faults.WorksWhileOff: ("off-at-first", "off-and-on-again"),
    faults.OffDoesNothing: ("off-and-on-again", "on-and-off-while-running"),
    faults.OffKeepsTheBits: ("off-and-on-again",),
    faults.IgnoresTheHole: ("rounds-are-exact", "free-running-stamp"),
    faults.ReportsAllAlways: ("rounds-are-exact",),
    faults.CountsWrong: ("stats-count-the-bits",),
    faults.FaultsTwice: ("one-fault-per-page",),
    faults.BreaksUnderTwoCallers: ("two-cleaners",),
    range_faults.RangeClearsAll: (
        "range-returns-its-own",
        "range-leaves-the-others",
        "marks-by-range",
        "stamped-copy-by-range",
        "cleaned-by-range-random",
    ),
    range_faults.RangeReturnsAll: ("range-returns-its-own",),
    range_faults.RangeProtectsItsFirstWord: ("range-leaves-the-others", "stamped-copy-by-range"),
    range_faults.RangeClearsBeforeItReads: ("range-returns-its-own", "cleaned-by-range-smp"),
    range_faults.RangeShiftedByAWord: ("range-returns-its-own", "range-leaves-the-others", "stamped-copy-by-range"),
    range_faults.RangeForgetsTheTail: ("range-returns-its-own", "range-leaves-the-others", "strange-ranges"),
    range_faults.RangeEndsAtTheHole: ("range-returns-its-own", "stamped-copy-by-range"),
    range_faults.RangeRoundedOutward: ("strange-ranges",),
    range_faults.EmptyRangeIsAll: ("strange-ranges",),
    range_faults.RangeWorksWhileOff: ("off-at-first", "off-and-on-again"),
    range_faults.RangeKnowsNoMarks: ("marks-by-range", "cleaned-by-range-dma"),
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
    memory_bytes = BEHIND_THE_HOLE if fault in (faults.IgnoresTheHole, range_faults.RangeEndsAtTheHole) else ODD
    (selected,) = select([check])
    error = run_check(selected, Lab(make_vm=faults.mutated(make_vm, fault), memory_bytes=memory_bytes, seed=1))
    assert error is not None, f"{check} did not find {fault.__name__}"
    assert (error.check, error.law) == (check, selected.law)


def test_the_wrapper_alone_is_no_fault(make_vm):
    lab = Lab(make_vm=faults.mutated(make_vm, faults.Faithful), memory_bytes=ODD, seed=1)
    assert [run_check(check, lab) for check in CHECKS] == [None] * len(CHECKS)


def test_no_fault_and_no_check_is_left_out():
    assert set(CAUGHT_BY) == set(faults.FAULTS)
    # For one only a device can be at fault, for the other only who counts faults: test_mutants has both.
    others = {"device-marks-after-the-write", "range-costs-no-other-fault"}
    assert {check for _, check in CASES} == {check.name for check in CHECKS} - others
