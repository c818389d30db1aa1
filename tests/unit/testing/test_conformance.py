"""How the kit runs a check: what it repeats, and what it takes for a broken promise at once."""

import itertools

import pytest

from pageferry.testing.conformance import Check, pages_moved, run_check
from pageferry.testing.lab import Extra, Lab, Violation


class Fails:
    """A check that fails so many times."""

    def __init__(self, kind, times):
        self.kind, self.times, self.runs = kind, times, 0

    def __call__(self, lab):
        self.runs += 1
        if self.runs <= self.times:
            raise self.kind("a frame")


def run(fails, moved_pages):
    lab = Lab(make_vm=lambda config: None, memory_bytes=4 << 20, seed=1)
    return run_check(Check(name="fails", law=1, run=fails, summary=""), lab, moved_pages)


def test_a_check_that_the_host_disturbed_is_run_again():
    fails = Fails(Extra, times=2)
    assert run(fails, itertools.count().__next__) is None
    assert fails.runs == 3


def test_too_much_is_an_error_when_it_comes_each_time():
    fails = Fails(Extra, times=100)
    assert "a frame" in str(run(fails, itertools.count().__next__))
    assert fails.runs == 5


@pytest.mark.parametrize(
    ("kind", "moved_pages"), [(Extra, lambda: 7), (Extra, lambda: None), (Violation, itertools.count().__next__)]
)
def test_nothing_else_is_run_again(kind, moved_pages):
    fails = Fails(kind, times=1)
    assert "a frame" in str(run(fails, moved_pages))
    assert fails.runs == 1


def test_how_many_pages_were_moved_is_read_from_the_kernel(tmp_path):
    vmstat = tmp_path / "vmstat"
    assert pages_moved(vmstat) is None
    vmstat.write_text("pgmigrate_fail 3\n")
    assert pages_moved(vmstat) is None
    vmstat.write_text("pgmigrate_fail 3\npgmigrate_success 9\n")
    assert pages_moved(vmstat) == 9
