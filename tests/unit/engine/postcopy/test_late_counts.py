"""What is counted after a switch, by a clock that the test turns."""

import pytest

from pageferry.core.frames import PAGE_SIZE
from pageferry.core.policy import RATE_SAMPLE_BYTES
from pageferry.engine.postcopy.late_counts import LateCounts
from pageferry.stream.ferry import Complete

SAMPLE_PAGES = RATE_SAMPLE_BYTES // PAGE_SIZE


class Left:
    """Pages that were left behind."""

    def __init__(self, pages):
        self.pages = pages
        self.sent_pages = self.zero_pages = self.urgent_pages = 0
        self.waits = None

    @property
    def left_pages(self):
        return self.pages - self.sent_pages


@pytest.fixture
def clock():
    return [100.0]


@pytest.fixture
def left():
    return Left(100 * SAMPLE_PAGES)


@pytest.fixture
def late(left, clock):
    return LateCounts(left, lambda: clock[0])


def test_the_time_left_is_what_is_left_by_the_rate_of_this_connection(late, left, clock):
    late.connected()
    assert late.tell(None)[1:] == (None, "nothing was sent yet")
    rate, eta_s, _ = late.tell(RATE_SAMPLE_BYTES)
    assert (rate, eta_s) == (RATE_SAMPLE_BYTES, pytest.approx(100.0))
    left.sent_pages, clock[0] = 20 * SAMPLE_PAGES, 110.0
    rate, eta_s, reason = late.tell(RATE_SAMPLE_BYTES)
    assert (rate, eta_s) == (2 * RATE_SAMPLE_BYTES, pytest.approx(40.0))
    assert reason == "the guest runs there already, and the rest follows"


def test_too_little_tells_no_rate(late, left, clock):
    late.connected()
    left.sent_pages, clock[0] = SAMPLE_PAGES - 1, 110.0
    assert late.tell(1e6)[0] == 1e6


def test_an_end_that_is_moved_back_says_why(late, left, clock):
    late.connected()
    late.tell(10 * RATE_SAMPLE_BYTES)
    left.sent_pages, clock[0] = SAMPLE_PAGES, 101.0
    _, eta_s, reason = late.tell(None)
    assert eta_s == pytest.approx(99.0)
    assert reason.startswith("the wire moves")


def test_during_a_cut_no_end_is_in_sight_and_its_length_is_counted_once(late, left, clock):
    late.connected()
    late.cut()
    clock[0] = 103.0
    late.cut()  # somebody tried to go on, and found nobody
    assert late.tell(1e6)[1:] == (None, "the connection was cut: pageferry migrate --recover goes on")
    clock[0] = 107.0
    late.connected()
    left.sent_pages = SAMPLE_PAGES
    clock[0] = 108.0
    assert late.tell(None)[0] == RATE_SAMPLE_BYTES
    late.cut()
    clock[0] = 110.0
    stats = late.stats(running_at_s=99.0, ended_s=110.0)
    assert (stats.cuts, stats.cut_s, stats.duration_s) == (2, 9.0, 11.0)


def test_what_the_destination_never_told_is_unknown(late, left):
    left.sent_pages, left.zero_pages, left.urgent_pages = 7, 3, 2
    stats = late.stats(running_at_s=99.0, ended_s=100.0)
    assert (stats.missing_pages, stats.sent_pages, stats.zero_pages, stats.urgent_pages) == (left.pages, 7, 3, 2)
    assert (stats.waits, stats.waited_s, stats.longest_wait_s) == (None, None, None)
    left.waits = Complete(waits=4, waited_ns=2_000_000, median_ns=100_000, p99_ns=200_000, longest_ns=1_500_000)
    stats = late.stats(running_at_s=99.0, ended_s=100.0)
    assert (stats.waits, stats.waited_s) == (4, 0.002)
    assert (stats.median_wait_s, stats.p99_wait_s, stats.longest_wait_s) == (0.0001, 0.0002, 0.0015)
