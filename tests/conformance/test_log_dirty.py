"""The conformance kit over every tracker; one test per check, so that a failure names the law."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiers import sample

from mutation.tracker_wrapper import Faithful, mutated
from pageferry.core.errors import UnsupportedError, UsageError
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.vm import KvmVm
from pageferry.testing import CHECKS, ConformanceError, check_log_dirty, failures
from pageferry.testing.conformance import LAWS
from pageferry.testing.lab import Lab

ROOT = Path(__file__).parents[2]
SMALLEST = 4 << 20


STEP_BY_STEP = [check.name for check in CHECKS if check.once]
OTHERS = [check.name for check in CHECKS if not check.once]


@pytest.mark.parametrize(
    "check",
    sample([check.name for check in CHECKS], "two are taken step by step, in the next test", quick=OTHERS),
)
def test_the_tracker_keeps_its_promise(make_vm, check):
    check_log_dirty(make_vm, checks=[check])


@pytest.mark.parametrize("check", STEP_BY_STEP)
def test_no_interruption_makes_a_machines_own_tracker_break_it(accel, check):
    check_log_dirty(KvmVm if accel == "kvm" else Domain, checks=[check])


@pytest.mark.parametrize("seed", sample([0, 2, (1 << 64) - 1], "one seed of three", quick=[2]))
def test_whatever_the_seed_and_the_size(make_vm, seed):
    sizes = [SMALLEST + pages * 4096 for pages in (0, 1, 63)]
    check_log_dirty(make_vm, memory_bytes=sizes, seeds=[seed], checks=["rounds-are-exact", "free-running-random"])


# Those that vCPUs in parallel can break; sizes that are a multiple of nothing, the second behind the PCI hole.
SMP_CHECKS = [
    *("rounds-are-exact", "one-fault-per-page", "state-restore-keeps-tracking", "changed-between-cleans"),
    *("free-running-smp", "free-running-kv", "free-running-random", "peeking-thread", "writing-thread"),
    *("two-cleaners", "on-and-off-while-running"),
    *("range-leaves-the-others", "stamped-copy-by-range", "cleaned-by-range-random", "cleaned-by-range-smp"),
]


@pytest.mark.parametrize(
    "check",
    sample(SMP_CHECKS, "the check with one vCPU is in `make test`", quick=["free-running-smp", "two-cleaners"]),
)
@pytest.mark.parametrize(
    ("cpus", "memory_bytes"),
    sample(
        [(2, SMALLEST + 7 * 4096), (3, (3 << 30) + 61 * 4096), (4, SMALLEST + 513 * 4096)],
        "one shape of three",
        quick=[(2, SMALLEST + 7 * 4096)],
    ),
)
def test_it_keeps_it_with_several_vcpus(make_vm, cpus, memory_bytes, check):
    check_log_dirty(make_vm, memory_bytes=[memory_bytes], cpus=cpus, checks=[check])


def test_names_are_distinct_and_each_check_says_what_it_promises():
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    assert all(check.summary.endswith(".") for check in CHECKS)
    assert {check.law for check in CHECKS} == {None, 1, 2, 3, 4, 5, 8}


def test_an_unknown_check_is_refused_before_anything_runs():
    def make_vm(config):
        pytest.fail("a machine was made")

    with pytest.raises(UsageError, match="no such check: nope"):
        check_log_dirty(make_vm, checks=["off-at-first", "nope"])


def test_a_machine_that_cannot_be_made_is_not_a_broken_promise():
    def make_vm(config):
        raise UnsupportedError("kvm", "not here")

    with pytest.raises(UnsupportedError):
        check_log_dirty(make_vm)


def test_an_unexpected_error_is_a_broken_promise_and_not_the_end_of_the_report():
    def make_vm(config):
        raise OSError("no")

    found = list(failures(make_vm, checks=["off-at-first", "two-cleaners"], memory_bytes=[SMALLEST]))
    assert [(error.check, error.law) for error in found] == [("off-at-first", None), ("two-cleaners", 2)]
    assert "unexpected OSError: no" in found[0].detail
    assert "4194304 bytes, seed 1" in str(found[0])


def test_a_tracker_that_lacks_a_method_is_one_failure_that_names_it():
    class Machine:
        log_dirty = SimpleNamespace(tracker="mine", enabled=False, enable=None, peek=None, off=None, mark=None)

        def close(self):
            pass

    def refused(config):
        raise UsageError("tracker 'mine:Mine' made Mine, which has no peek")

    for make_vm, told in (
        (lambda config: Machine(), "the tracker, a SimpleNamespace, has no clean, clean_range, stats"),
        (refused, "tracker 'mine:Mine' made Mine, which has no peek"),
    ):
        (error,) = failures(make_vm, memory_bytes=[SMALLEST])
        assert str(error).splitlines()[0] == f"can-be-checked (operator semantics): {told}"
        assert error.__cause__ is None  # which a traceback would show at length


def test_a_failure_says_what_is_promised_and_which_law_that_defends():
    error = next(failures(lambda config: None, checks=["clean-protects-again"], memory_bytes=[SMALLEST]))
    first, promised, law, guest = str(error).split("\n")
    assert first.startswith("clean-protects-again (law 1): unexpected AttributeError")
    assert promised == "  promised: A page that is written in every round is reported by every CLEAN."
    assert law.startswith("  law 1: Dirty or protected. At every instant each page")
    assert guest == f"  guest: memory {SMALLEST} bytes, seed 1, 1 vCPU(s)"


def test_the_laws_of_the_kit_are_those_of_the_document():
    text = " ".join((ROOT / "docs/internals/laws.md").read_text().replace("*", "").replace("`", "").split())
    assert {law for law, sentence in LAWS.items() if f"{law}. {sentence.rstrip('.')}" not in text} == set()
    assert set(LAWS) == set(range(1, 9))


class Hangs(Faithful):
    """A tracker whose CLEAN waits for what never comes, until the test lets it go."""

    let_go = threading.Event()

    def clean_range(self, gfns):
        self.let_go.wait()
        return super().clean_range(gfns)


def test_a_check_that_hangs_is_given_up_and_named_with_where_the_tracker_is():
    try:
        with pytest.raises(ConformanceError) as hung:
            check_log_dirty(mutated(Domain, Hangs), memory_bytes=[SMALLEST], checks=["clean-clears"], patience_s=2)
    finally:
        Hangs.let_go.set()
    assert (hung.value.check, hung.value.law) == ("clean-clears", None)
    assert "nothing has happened for 2 s: clean_clears (operators.py:" in hung.value.detail
    assert "> clean_range (test_log_dirty.py:" in hung.value.detail


def test_the_lab_puts_the_working_set_at_the_very_end_of_ram(make_vm):
    for memory_bytes in (SMALLEST + 3 * 4096, (3 << 30) + 5 * 4096):
        lab = Lab(make_vm=make_vm, memory_bytes=memory_bytes, seed=1)
        with lab.guest("stamp", pages=96) as guest:
            assert guest.oracle.gfns.size == 96
            assert int(guest.oracle.gfns[-1]) == guest.memory.gfn_limit - 1
            assert guest.memory.are_ram(guest.oracle.gfns).all()
