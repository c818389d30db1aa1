"""What is counted after a switch, by a clock that the test turns."""

import pytest

from pageferry.core.command_hints import RECOVER
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.policy import RATE_SAMPLE_BYTES
from pageferry.engine.host import Host
from pageferry.engine.postcopy.server import Postcopy
from pageferry.stream.ferry_frames import Complete

SAMPLE_PAGES = RATE_SAMPLE_BYTES // PAGE_SIZE


class Missing:
    """The counts of missing pages."""

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
def missing():
    return Missing(100 * SAMPLE_PAGES)


@pytest.fixture
def postcopy(missing, clock):
    host = Host()
    host.now_s = lambda: clock[0]
    return Postcopy(missing, host)


def tell(postcopy, precopy_bytes_per_s):
    outlook = postcopy.outlook(precopy_bytes_per_s)
    assert (outlook.dirty_bytes_per_s, outlook.expected_downtime_s) == (0.0, None)
    return outlook.wire_bytes_per_s, outlook.eta_s, outlook.eta_reason


def test_the_time_left_is_what_is_left_by_the_rate_of_this_connection(postcopy, missing, clock):
    postcopy.connected()
    assert tell(postcopy, None)[1:] == (None, "nothing was sent yet")
    rate, eta_s, _ = tell(postcopy, RATE_SAMPLE_BYTES)
    assert (rate, eta_s) == (RATE_SAMPLE_BYTES, pytest.approx(100.0))
    missing.sent_pages, clock[0] = 20 * SAMPLE_PAGES, 110.0
    rate, eta_s, reason = tell(postcopy, RATE_SAMPLE_BYTES)
    assert (rate, eta_s) == (2 * RATE_SAMPLE_BYTES, pytest.approx(40.0))
    assert reason == "the guest runs there already, and the rest follows"


def test_too_little_tells_no_rate(postcopy, missing, clock):
    postcopy.connected()
    missing.sent_pages, clock[0] = SAMPLE_PAGES - 1, 110.0
    assert tell(postcopy, 1e6)[0] == 1e6


def test_an_end_that_is_moved_back_says_why(postcopy, missing, clock):
    postcopy.connected()
    tell(postcopy, 10 * RATE_SAMPLE_BYTES)
    missing.sent_pages, clock[0] = SAMPLE_PAGES, 101.0
    _, eta_s, reason = tell(postcopy, None)
    assert eta_s == pytest.approx(99.0)
    assert reason.startswith("the wire moves")


def test_during_a_cut_no_end_is_in_sight_and_its_length_is_counted_once(postcopy, missing, clock):
    postcopy.connected()
    postcopy.cut("gone")
    clock[0] = 103.0
    postcopy.cut("gone")  # a recovery was tried, and found no destination
    assert tell(postcopy, 1e6)[1:] == (
        None,
        f"the connection was cut; to go on: {RECOVER}",
    )
    clock[0] = 107.0
    postcopy.connected()
    missing.sent_pages = SAMPLE_PAGES
    clock[0] = 108.0
    assert tell(postcopy, None)[0] == RATE_SAMPLE_BYTES
    postcopy.cut("gone")
    clock[0] = 110.0
    stats = postcopy.stats(running_at_s=99.0, ended_s=110.0)
    assert (stats.cuts, stats.cut_s, stats.duration_s) == (2, 9.0, 11.0)


def test_what_the_destination_never_told_is_unknown(postcopy, missing):
    missing.sent_pages, missing.zero_pages, missing.urgent_pages = 7, 3, 2
    stats = postcopy.stats(running_at_s=99.0, ended_s=100.0)
    assert (stats.missing_pages, stats.sent_pages, stats.zero_pages, stats.urgent_pages) == (missing.pages, 7, 3, 2)
    assert (stats.waits, stats.waited_s, stats.longest_wait_s) == (None, None, None)
    missing.waits = Complete(waits=4, waited_ns=2_000_000, median_ns=100_000, p99_ns=200_000, longest_ns=1_500_000)
    stats = postcopy.stats(running_at_s=99.0, ended_s=100.0)
    assert (stats.waits, stats.waited_s) == (4, 0.002)
    assert (stats.median_wait_s, stats.p99_wait_s, stats.longest_wait_s) == (0.0001, 0.0002, 0.0015)
