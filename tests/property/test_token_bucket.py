"""The bandwidth cap, on a clock of the test's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.engine.wire.pacer import BURST_S, TokenBucket

rates = st.integers(1 << 16, 10 << 30)
sizes = st.integers(0, 8 << 20)
#: How late a sender is: to ask, and to wake up.
gaps = st.floats(0, 0.5)
EPSILON_S = 1e-6


def sent(rate, pieces):
    """When each piece leaves: a sender that asks ``gap`` after it sent the last, and wakes up ``late``."""
    now_s, log = 0.0, []
    bucket = TokenBucket(rate, now_s)
    for size, gap, late in pieces:
        now_s += gap
        now_s += bucket.reserve(size, now_s) + late
        log.append((now_s, size))
    return log


@given(rates, st.lists(st.tuples(sizes, gaps, st.just(0.0)), min_size=1, max_size=60))
def test_no_span_of_time_lets_more_pass_than_the_rate(rate, pieces):
    log = sent(rate, pieces)
    for first in range(len(log)):
        for last in range(first, len(log)):
            before_the_last = sum(size for _, size in log[first:last])
            assert before_the_last <= rate * (log[last][0] - log[first][0] + BURST_S + EPSILON_S)


@given(rates, st.lists(st.tuples(sizes, gaps, gaps), min_size=1, max_size=60))
def test_a_sender_that_is_late_sends_no_faster_over_all(rate, pieces):
    log = sent(rate, pieces)
    assert sum(size for _, size in log[:-1]) <= rate * (log[-1][0] + BURST_S + EPSILON_S)


@given(rates, st.lists(st.tuples(st.floats(1, 4), st.floats(0, 0.99)), min_size=1, max_size=60))
def test_a_sender_that_is_late_by_less_than_a_piece_takes_gets_all_of_the_rate(rate, pieces):
    unit = rate * BURST_S
    log = sent(rate, [(int(size * unit), 0.0, late * BURST_S) for size, late in pieces])
    assert log[-1][0] <= sum(size for _, size in log[:-1]) / rate + BURST_S + EPSILON_S


@given(rates, st.floats(0.06, 0.2))
def test_over_ten_seconds_the_cap_holds_within_five_percent(rate, share):
    """Pieces as the engine makes them: BURST_S at the rate; a sender now and then much too late."""
    piece = max(1, int(rate * BURST_S))
    log = sent(rate, [(piece, 0.0, share if index % 50 == 0 else 0.001) for index in range(200)])
    span_s = log[-1][0]
    passed = sum(size for _, size in log[:-1])
    assert passed <= 1.05 * rate * span_s
    assert passed >= 0.9 * rate * (span_s - 4 * (share - BURST_S))


def test_the_first_piece_leaves_at_once_and_idle_time_is_not_saved_up():
    bucket = TokenBucket(1000, 5.0)
    assert bucket.reserve(100, 5.0) == 0.0
    assert bucket.reserve(100, 100.0) == 0.0
    assert bucket.reserve(100, 100.0) == pytest.approx(0.1 - BURST_S)
