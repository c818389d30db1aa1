"""A pause that takes too long is given up, once, and never after the commit."""

import threading

import pytest
from shortage import no_more_threads

from pageferry.core.errors import GuestAt
from pageferry.core.events import DOWNTIME_PHASES, Phase
from pageferry.core.threads import OutOfThreadsError
from pageferry.engine.handoff.custody import Handoff, SourceCustody
from pageferry.engine.pause import PauseWatch, pause_limit_s, waits_for


@pytest.mark.parametrize(
    ("asked_s", "downtime_limit_s", "limit_s"),
    [(None, 0.3, 3.0), (None, 0.001, 2.0), (None, 60, 600), (None, None, None), (0.1, 0.3, 0.1), (5.0, None, 5.0)],
)
def test_the_limit_is_what_was_asked_or_ten_times_the_downtime_limit(asked_s, downtime_limit_s, limit_s):
    assert pause_limit_s(asked_s, downtime_limit_s) == limit_s


@pytest.mark.parametrize("saves", [False, True])
def test_each_part_of_a_pause_waits_for_something(saves):
    phases = [phase for phase in DOWNTIME_PHASES if not (saves and phase is Phase.HANDOFF)]  # a save's watch has ended
    assert len({waits_for(phase, saves=saves) for phase in phases}) == len(phases) > 3


def test_the_watch_calls_once_when_the_time_is_over():
    called = threading.Semaphore(0)
    watch = PauseWatch(called.release)
    watch.begin(0.001)
    assert called.acquire(timeout=60)
    watch.end()
    assert not called.acquire(blocking=False)


@pytest.mark.parametrize("limit_s", [None, 1e6, 1e300, float("inf")])
def test_a_pause_that_is_over_in_time_is_left_alone(limit_s):
    before = threading.active_count()
    watch = PauseWatch(pytest.fail)
    watch.end()
    watch.begin(limit_s)
    watch.end()
    watch.end()
    assert threading.active_count() == before


def test_a_pause_that_cannot_be_watched_does_not_begin():
    watch = PauseWatch(pytest.fail)
    with no_more_threads(), pytest.raises(OutOfThreadsError):
        watch.begin(1.0)
    watch.end()


def test_a_guest_whose_pause_was_given_up_stays():
    handoff = Handoff()
    assert handoff.give_up()
    assert (handoff.forbidden, handoff.cancelled) == (True, False)
    assert not handoff.commit()
    assert not handoff.keep()
    assert (handoff.custody, handoff.guest_at) == (SourceCustody.HERE, GuestAt.SOURCE)
    assert not handoff.give_up()  # once


def test_a_cancel_comes_before_a_budget():
    handoff = Handoff()
    handoff.cancel()
    assert not handoff.give_up()


@pytest.mark.parametrize("steps", [("commit",), ("commit", "lost"), ("commit", "running"), ("keep",)])
def test_nothing_is_given_up_after_the_commit(steps):
    handoff = Handoff()
    for step in steps:
        getattr(handoff, step)()
    before = handoff.custody
    assert not handoff.give_up()
    assert (handoff.custody, handoff.forbidden) == (before, False)
