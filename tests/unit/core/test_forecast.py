"""When it will be over: the forecast against a simulation, and an ETA that goes back only with a reason."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.core.forecast import Eta, Pace, left_s

MB = 1 << 20
PACE = Pace(remaining_bytes=1000 * MB, wire_bytes_per_s=100 * MB, dirty_bytes_per_s=10 * MB, fixed_s=0.1, limit_s=0.3)


def but(pace=PACE, **changes):
    return dataclasses.replace(pace, **changes)


def test_rounds_shrink_until_the_pause_fits():
    # 1000 MB take 10 s and leave 100 MB, these 1 s and leave 10 MB, whose pause fits: 0.1 s and 0.1 s.
    assert left_s(PACE) == pytest.approx(10 + 1 + 0.1 + 0.1)


def test_without_a_limit_it_goes_on_to_a_few_pages():
    assert left_s(but(limit_s=None)) == pytest.approx(10 + 1 + 0.1 + 0.01 + 0.1 + 0.001)


def test_an_idle_guest_is_one_round_and_a_pause():
    assert left_s(but(dirty_bytes_per_s=0.0)) == pytest.approx(10.1)


@pytest.mark.parametrize(
    "changes",
    [{"dirty_bytes_per_s": 100 * MB}, {"wire_bytes_per_s": None}, {"fixed_s": 0.4}, {"wire_bytes_per_s": 0.0}],
)
def test_what_does_not_come_to_an_end_has_no_forecast(changes):
    assert left_s(but(**changes)) is None


def test_it_counts_down():
    eta = Eta()
    assert eta.tell(but(dirty_bytes_per_s=0.0), 0.0) == pytest.approx(10.1)
    assert eta.tell(but(dirty_bytes_per_s=0.0, remaining_bytes=500 * MB), 5.0) == pytest.approx(5.1)
    assert eta.tell(but(dirty_bytes_per_s=0.0, remaining_bytes=100 * MB), 6.0) == pytest.approx(1.1)  # sooner
    assert eta.reason == ""


def test_noise_does_not_move_it():
    eta = Eta()
    eta.tell(but(dirty_bytes_per_s=0.0), 0.0)
    assert eta.tell(but(dirty_bytes_per_s=0.0, remaining_bytes=920 * MB), 1.0) == pytest.approx(9.1)
    assert eta.reason == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dirty_bytes_per_s": 50 * MB}, "the guest writes 50 MiB/s; it was 10 MiB/s"),
        ({"wire_bytes_per_s": 50 * MB}, "the wire moves 50 MiB/s; it was 100 MiB/s"),
        ({"fixed_s": 0.25}, "state and verification take 250 ms; it was 100 ms"),
        ({"limit_s": 0.11}, "the downtime limit was changed"),
        ({"remaining_bytes": 2000 * MB}, "a round left more than was expected"),
    ],
)
def test_it_goes_back_only_with_a_reason(changes, reason):
    eta = Eta()
    first = eta.tell(PACE, 0.0)
    assert eta.tell(but(**changes), 2.0 if "fixed_s" not in changes else 9.0) > first - 2.0
    assert eta.reason == reason


def test_no_end_in_sight_says_why():
    eta = Eta()
    eta.tell(PACE, 0.0)
    assert eta.tell(but(dirty_bytes_per_s=200 * MB), 1.0) is None
    assert eta.reason == "the guest writes 200 MiB/s, the wire moves 100 MiB/s"
    assert eta.tell(PACE, 2.0) == pytest.approx(11.2)
    assert Eta().tell(but(wire_bytes_per_s=None), 0.0) is None


paces = st.builds(
    Pace,
    remaining_bytes=st.floats(0, 1e12),
    wire_bytes_per_s=st.none() | st.floats(1e3, 1e11),
    dirty_bytes_per_s=st.floats(0, 1e11),
    fixed_s=st.floats(0, 10),
    limit_s=st.none() | st.floats(1e-3, 10),
)


@given(st.lists(st.tuples(paces, st.floats(0.01, 100)), min_size=2, max_size=20))
def test_whatever_is_measured_it_never_goes_back_in_silence(measured):
    eta, now_s, end_s = Eta(), 0.0, None
    for pace, pause_s in measured:
        now_s += pause_s
        told = eta.tell(pace, now_s)
        if told is None or (end_s is not None and now_s + told > max(end_s, now_s) + 1e-6):
            assert eta.reason
        end_s = None if told is None else now_s + told
