"""Who may run a guest: the steps at each end, and the lease between them."""

import itertools
import threading

import pytest

from pageferry.core.errors import GuestAt, OrderError
from pageferry.engine.failures import StalledError
from pageferry.engine.handoff.custody import DestinationCustody, Handoff, SourceCustody, Takeover
from pageferry.engine.handoff.give import Giver
from pageferry.engine.wire.connections import NeverRan
from pageferry.engine.wire.peer import PeerFailedError, PeerRefusedError
from pageferry.stream.ferry_frames import Recovered, Running

STEPS = ("cancel", "commit", "running", "refused", "keep", "lost", "taken_back")
#: What may follow in each state, and where it leads; all else is a defect of ours and raises.
LEGAL = {
    (SourceCustody.HERE, "commit"): SourceCustody.COMMITTED,
    (SourceCustody.HERE, "keep"): SourceCustody.KEPT,
    (SourceCustody.COMMITTED, "running"): SourceCustody.THERE,
    (SourceCustody.COMMITTED, "refused"): SourceCustody.HERE,
    (SourceCustody.COMMITTED, "lost"): SourceCustody.UNKNOWN,
    (SourceCustody.UNKNOWN, "lost"): SourceCustody.UNKNOWN,
    (SourceCustody.UNKNOWN, "running"): SourceCustody.THERE,
    (SourceCustody.UNKNOWN, "refused"): SourceCustody.HERE,
    (SourceCustody.UNKNOWN, "taken_back"): SourceCustody.HERE,
    (SourceCustody.THERE, "taken_back"): SourceCustody.HERE,
}


def do(handoff, step):
    """Take one step; the lease is always over."""
    return handoff.taken_back(1.0, handoff.custody) if step == "taken_back" else getattr(handoff, step)()


def explored(depth):
    """Yield each sequence of steps that is legal so far, and one more."""
    for steps in itertools.product(STEPS, repeat=depth):
        handoff = Handoff()
        for step in steps[:-1]:
            if step != "cancel" and (handoff.custody, step) not in LEGAL:
                break
            do(handoff, step)
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
            assert in_time == (before is SourceCustody.HERE)
            assert handoff.custody is before
            assert handoff.cancelled == (cancelled or in_time)
        elif step in ("commit", "keep") and before is SourceCustody.HERE and cancelled:
            assert not do(handoff, step)
            assert handoff.custody is SourceCustody.HERE
        elif (before, step) in LEGAL:
            do(handoff, step)
            assert handoff.custody is LEGAL[before, step]
        else:
            with pytest.raises(AssertionError, match=f"a guest that is {before} cannot"):
                do(handoff, step)
            assert handoff.custody is before
        # It may run here only if the other end was not told that it may run there, or that was taken back.
        assert handoff.committed == (handoff.custody not in (SourceCustody.HERE, SourceCustody.KEPT))
        assert (handoff.guest_at is GuestAt.DESTINATION) == (handoff.custody is SourceCustody.THERE)
        assert (handoff.guest_at is GuestAt.UNKNOWN) == (handoff.custody is SourceCustody.UNKNOWN)
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


def test_a_guest_is_taken_back_only_when_its_commit_can_no_longer_be_accepted():
    handoff = Handoff()
    assert handoff.commit(open_until_s=10.0)
    assert handoff.open_for_s(4.0) == 6.0
    handoff.lost()
    assert handoff.open_for_s(9.5) == 0.5
    with pytest.raises(AssertionError, match="may still be accepted"):
        handoff.taken_back(9.9, SourceCustody.UNKNOWN)
    assert handoff.open_for_s(10.0) == 0.0
    assert not handoff.taken_back(10.0, SourceCustody.THERE)
    assert handoff.custody is SourceCustody.UNKNOWN
    assert handoff.taken_back(10.0, SourceCustody.UNKNOWN)
    assert handoff.custody is SourceCustody.HERE


def test_a_commit_that_was_answered_is_no_longer_open():
    for answer in ("running", "refused"):
        handoff = Handoff()
        assert handoff.commit(open_until_s=10.0)
        getattr(handoff, answer)()
        assert handoff.open_for_s(0.0) == 0.0


def test_a_destination_accepts_a_commit_within_its_part_of_the_lease():
    in_time, late = Takeover(lease_s=10.0), Takeover(lease_s=10.0)
    for takeover in (in_time, late):
        takeover.ready(100.0)
    assert in_time.left_s(100.0) == pytest.approx(9.0)
    assert in_time.accept(108.9)
    assert not late.accept(109.1)
    in_time.run()
    late.give_up()
    assert (in_time.custody, late.custody) == (DestinationCustody.OURS, DestinationCustody.NEVER)


@pytest.mark.parametrize("so_far", [[], ["ready"], ["ready", "accept"]])
def test_a_destination_that_has_given_up_never_runs_the_guest(so_far):
    def do(takeover, step):
        return getattr(takeover, step)(*([0.0] if step in ("ready", "accept") else []))

    takeover = Takeover(lease_s=10.0)
    for step in so_far:
        do(takeover, step)
    takeover.give_up()
    for step in ("ready", "run"):
        with pytest.raises(AssertionError, match="a guest that is never cannot"):
            do(takeover, step)
    assert takeover.custody is DestinationCustody.NEVER


def test_a_destination_that_runs_the_guest_cannot_promise_that_it_never_will():
    takeover = Takeover(lease_s=1.0)
    takeover.ready(0.0)
    assert takeover.accept(0.5)
    takeover.run()
    with pytest.raises(AssertionError, match="a guest that is ours cannot become never"):
        takeover.give_up()


def test_the_latest_guests_that_never_ran_are_remembered():
    never_ran = NeverRan()
    for number in range(2000):
        never_ran.add(str(number))
    assert "1999" in never_ran
    assert "1000" in never_ran
    assert "0" not in never_ran


class Line:
    """A connection over which one thing is heard."""

    def __init__(self, heard):
        self.heard = heard
        self.closed = False

    def receive(self, within_s=None):
        if isinstance(self.heard, Exception):
            raise self.heard
        return self.heard

    def out_of_turn(self, frame):
        return OrderError(f"{type(frame).__name__}")

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("heard", "error"),
    [
        (TimeoutError("stalled"), StalledError),
        (ConnectionResetError("gone"), ConnectionResetError),
        (PeerRefusedError("not here"), PeerRefusedError),
        (PeerFailedError("never ran here"), PeerFailedError),
        (Recovered(), OrderError),
        (Running(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_connection_is_kept_only_if_it_brought_the_answer(heard, error):
    handoff = Handoff()
    handoff.commit()
    handoff.lost()
    line = Line(heard)
    giver = Giver(handoff, lambda within_s: line, patience_s=1.0, now_s=lambda: 0.0, sleep=lambda s: None)
    if error is None:
        assert giver.ask() is line
    else:
        with pytest.raises(error):
            giver.ask()
    assert line.closed == (error is not None)
