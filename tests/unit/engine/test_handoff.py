"""Every order in which a handoff can go, to the depth where nothing new appears."""

import itertools
import threading

import pytest

from pageferry.core.errors import GuestAt
from pageferry.engine.handoff import Custody, Handoff

STEPS = ("cancel", "commit", "running", "refused", "keep", "lost", "taken_back")
#: What may follow in each state, and where it leads; all else is a defect of ours and raises.
LEGAL = {
    (Custody.HERE, "commit"): Custody.COMMITTED,
    (Custody.HERE, "keep"): Custody.KEPT,
    (Custody.COMMITTED, "running"): Custody.THERE,
    (Custody.COMMITTED, "refused"): Custody.HERE,
    (Custody.COMMITTED, "lost"): Custody.UNKNOWN,
    (Custody.UNKNOWN, "lost"): Custody.UNKNOWN,
    (Custody.UNKNOWN, "running"): Custody.THERE,
    (Custody.UNKNOWN, "refused"): Custody.HERE,
    (Custody.UNKNOWN, "taken_back"): Custody.HERE,
    (Custody.THERE, "taken_back"): Custody.HERE,
}


def explored(depth):
    """Yield each sequence of steps that is legal so far, and one more."""
    for steps in itertools.product(STEPS, repeat=depth):
        handoff = Handoff()
        for step in steps[:-1]:
            if step != "cancel" and (handoff.custody, step) not in LEGAL:
                break
            getattr(handoff, step)()
        else:
            yield handoff, steps[-1]


@pytest.mark.parametrize("depth", range(1, 6))
def test_each_step_leads_where_it_may_and_nowhere_else(depth):
    seen = 0
    for handoff, step in explored(depth):
        seen += 1
        before, cancelled = handoff.custody, handoff.cancelled
        if step == "cancel":
            in_time = handoff.cancel()
            assert in_time == (before is Custody.HERE)
            assert handoff.custody is before
            assert handoff.cancelled == (cancelled or in_time)
        elif step in ("commit", "keep") and before is Custody.HERE and cancelled:
            assert not getattr(handoff, step)()
            assert handoff.custody is Custody.HERE
        elif (before, step) in LEGAL:
            getattr(handoff, step)()
            assert handoff.custody is LEGAL[before, step]
        else:
            with pytest.raises(AssertionError, match=f"a guest that is {before} cannot"):
                getattr(handoff, step)()
            assert handoff.custody is before
        # It may run here only where nobody was told that it may run there, or somebody took that back.
        assert handoff.committed == (handoff.custody not in (Custody.HERE, Custody.KEPT))
        assert (handoff.guest_at is GuestAt.DESTINATION) == (handoff.custody is Custody.THERE)
        assert (handoff.guest_at is GuestAt.UNKNOWN) == (handoff.custody is Custody.UNKNOWN)
    assert seen


def test_of_a_cancel_and_a_commit_at_once_one_is_heard():
    for _ in range(200):
        handoff, start = Handoff(), threading.Barrier(2)
        answers = {}

        def cancel(handoff=handoff, start=start, answers=answers):
            start.wait()
            answers["cancel"] = handoff.cancel()

        canceller = threading.Thread(target=cancel)
        canceller.start()
        start.wait()
        committed = handoff.commit()
        canceller.join()
        assert committed != answers["cancel"]
