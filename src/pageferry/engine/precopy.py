"""Pre-copy: rounds of pages from a guest that runs, until the policy says that it may be paused.

::

    ENABLE, then the snapshot of what has storage
    +-> the pages of the round: CLEAN a part of memory, send it, CLEAN the next ... (laws 2 and 3)
    |   digests of pages that lie still, until everything that was sent and lies still is proven
    |   FENCE: the destination has all of it
    |   one PEEK: what is dirty now
    +-- decide: another round ... or stop-and-copy, post-copy, abort
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Protocol

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.events import RoundEnded, RoundOutcome
from pageferry.core.frames import GfnArray
from pageferry.core.policy import Action, Decision, Progress, RoundStats
from pageferry.engine.attempt import Attempt
from pageferry.engine.guest import TrackedGuest
from pageferry.engine.job import JobStatus
from pageferry.engine.pages.send import Lanes
from pageferry.engine.stall_meter import Stall
from pageferry.engine.verify.digests import RunDigests

#: How much memory is cleaned at once, 1 GiB: its bitmap is 32 KiB, and its pages are on the wire for a good part of a
#: second, in which many of those that come later are written again.
CHUNK_PAGES = 1 << 18
#: While the migration is held, a round in so much time keeps what is left small.
HELD_ROUND_S = 1.0
#: Saving the state is rehearsed so often at the most, and once where it takes no longer than this.
_REHEARSALS, _QUICK_S = 3, 0.02


class Sink(Protocol):
    """Where pages go: to a destination, which may answer, or into a file."""

    @property
    def lanes(self) -> Lanes:
        """What carries them."""

    def begin(self, gfns: GfnArray) -> None:
        """Log-dirty is on, and these frames (uint64[n]) will be sent first.

        Raises:
            OSError: cut or stalled, or the disk is full.
        """

    def check(self) -> None:
        """Raise what the destination says, if it says anything."""

    def fence(self, number: int) -> None:
        """Wait until everything that was sent in round ``number`` is in place.

        Raises:
            OSError: cut or stalled.
        """


class Verifier(Protocol):
    """Proves memory equal while the guest runs, and knows what a proof at the pause would cost."""

    def begin_round(self, dirty: DirtyBitmap) -> None:
        """A round begins; ``dirty`` is the bitmap when the last one ended."""

    def due(self) -> RunDigests | None:
        """Return digests to send now, each behind the pages that it is of; None when there are none."""

    def idle(self) -> bool:
        """Tell whether all is proven that was sent, lies still, and is to be proven while the guest runs."""

    def wait(self) -> None:
        """Wait a while for :meth:`due` to have something."""

    def pause_s(self, dirty: DirtyBitmap) -> float:
        """Return how long proving at a pause now would take, when ``dirty`` is the bitmap."""

    def close(self) -> None:
        """End what runs in the background. May be repeated."""


class Precopy:
    """Copies a running guest, round by round.

    Args:
        attempt: whose guest it is.
        sink: where to.
        verifier: of what is sent.
        may_switch: whether the policy may decide for post-copy.
        chunk_pages: how much memory is cleaned at once; a multiple of 64.
        held_round_s: how long a round waits for the word to go on while the migration is held.
    """

    def __init__(
        self,
        attempt: Attempt,
        sink: Sink,
        verifier: Verifier,
        *,
        may_switch: bool = False,
        chunk_pages: int = CHUNK_PAGES,
        held_round_s: float = HELD_ROUND_S,
    ) -> None:
        self._attempt = attempt
        self._vm = attempt.guest.vm
        self._job = attempt.job
        self._sink = sink
        self._verifier = verifier
        self._may_switch = may_switch
        self._chunk_pages = chunk_pages
        self._held_round_s = held_round_s
        self._judged_rounds: int | None = None  # how many there were when the migration began to be held

    def run(self) -> Decision:
        """Copy until the policy lets the guest be paused; return its last decision.

        Raises:
            PolicyAbort: it gives up, or the guest ended.
            OSError: cut or stalled, or the disk is full.
        """
        attempt, stall = self._attempt, self._attempt.stall
        stall.begin()
        with stall.spent_on(Stall.REHEARSAL):
            attempt.state_s = state_s(attempt.guest, attempt.clock.now_s)
        with stall.spent_on(Stall.ENABLE):
            attempt.guest.enable()
        dirty = DirtyBitmap(self._vm.memory.gfn_limit)
        populated = attempt.guest.populated()
        self._sink.begin(populated)
        chunks: Iterable[GfnArray] = [populated]
        expected_pages = populated.size
        while True:
            self._verifier.begin_round(dirty)
            throttle = attempt.throttle.share
            stats, dirty = self._send_round(chunks, expected_pages)
            ended_s = self._job.elapsed_s
            attempt.expect_alive()
            decision = self._decide(stats, dirty, throttle, ended_s)
            if decision.action is Action.ABORT:
                raise self._job.abort(decision.reason)
            if decision.action is Action.POST_COPY and not self._may_switch:
                raise self._job.abort(f"the policy wants post-copy, and has no switches = True: {decision.reason}")
            if decision.action is not Action.NEXT_ROUND:
                self._verifier.close()
                return decision
            attempt.throttle.set(decision.throttle)
            if self._job.status is JobStatus.HELD:
                self._job.wait_to_go_on(self._held_round_s)
            chunks, expected_pages = self._clean_in_chunks(), stats.remaining_pages

    def _send_round(self, chunks: Iterable[GfnArray], expected_pages: int) -> tuple[RoundStats, DirtyBitmap]:
        """Send one round and prove what lies still; return what it was, and what is dirty now."""
        lanes, rounds = self._sink.lanes, self._attempt.rounds
        number = rounds.index
        self._attempt.accounts.begin_round(number)
        under_way = rounds.begin(expected_pages, lambda: lanes.counts)
        for gfns in chunks:
            under_way.found(gfns.size)
            for batch in lanes.batches(gfns):
                self._between_records()
                lanes.send(batch, fresh=number == 0)
                under_way.passed(batch.size)
        lanes.drain()
        under_way.drained()
        self._between_records()
        while not self._verifier.idle():
            self._verifier.wait()
            self._between_records()
        self._sink.fence(number)
        dirty = self._vm.log_dirty.peek()
        return rounds.end(dirty.count()), dirty

    def _between_records(self) -> None:
        self._job.check()
        self._sink.check()
        audit = self._verifier.due()
        if audit is not None:
            self._sink.lanes.send_audit(audit)

    def _clean_in_chunks(self) -> Iterator[GfnArray]:
        """Yield what is dirty, each part of memory cleaned only when those before it are sent.

        A page that is written again before its turn is thus sent once, and no CLEAN stops the guest for long.
        """
        gfn_limit = self._vm.memory.gfn_limit
        for first in range(0, gfn_limit, self._chunk_pages):
            part = range(first, min(first + self._chunk_pages, gfn_limit))
            with self._attempt.stall.spent_on(Stall.CLEAN):
                dirty = self._vm.log_dirty.clean_range(part)
            self._attempt.accounts.reported(dirty, part)
            yield dirty.gfns(part)

    def _decide(self, stats: RoundStats, dirty: DirtyBitmap, throttle: float, ended_s: float) -> Decision:
        """Ask the policy about the end of the round: one instant, of which the bitmap and all figures are."""
        fixed_s = self._attempt.rounds.fixed_s = self._attempt.state_s + self._verifier.pause_s(dirty)
        progress = Progress(
            memory_pages=self._vm.memory.pages,
            rounds=self._rounds_to_judge(),
            fixed_s=fixed_s,
            elapsed_s=self._job.elapsed_s,
            throttle=throttle,
        )
        decision = self._unless_held(self._job.policy.decide(progress))
        work = self._attempt.stall.work()
        self._attempt.report.round_ends.append(
            RoundOutcome(
                ended_s=ended_s,
                work=None if work is None else work.work,
                fixed_s=fixed_s,
                expected_downtime_s=progress.expected_downtime_s,
                throttle=throttle,
                decision=decision,
            )
        )
        self._attempt.on_event(RoundEnded(stats=stats, decision=decision))
        return decision

    def _unless_held(self, decision: Decision) -> Decision:
        """Turn a stop into another round as long as the migration is told to hold."""
        if self._job.may_go_on:
            self._job.status = JobStatus.ACTIVE
            return decision
        if decision.action not in (Action.STOP_AND_COPY, Action.POST_COPY):
            return decision
        if self._job.status is not JobStatus.HELD:
            self._judged_rounds = self._attempt.rounds.index
            self._job.status = JobStatus.HELD
        return replace(decision, action=Action.NEXT_ROUND, reason=f"ready, and held: {decision.reason}")

    def _rounds_to_judge(self) -> tuple[RoundStats, ...]:
        """Return the rounds that count for the policy: those that were only made because it is held do not."""
        rounds = self._attempt.rounds.ended
        if self._judged_rounds is None or len(rounds) <= self._judged_rounds:
            return rounds
        return (*rounds[: self._judged_rounds], replace(rounds[-1], index=self._judged_rounds))


def last_dirty(attempt: Attempt) -> GfnArray:
    """Return what is dirty in a frozen guest, uint64[n]. Nothing writes any more: PEEK is enough."""
    dirty = attempt.guest.vm.log_dirty.peek()
    attempt.accounts.reported(dirty)
    return dirty.gfns()


def stop_and_copy(attempt: Attempt, sink: Sink, gfns: GfnArray) -> None:
    """Send the last pages of a frozen guest, and the frames that it has given back.

    Args:
        attempt: whose guest it is.
        sink: where to.
        gfns: uint64[n], strictly ascending: what is dirty, unless it follows after a switch.

    Raises:
        PolicyAbort: it was cancelled.
        OSError: cut or stalled, or the disk is full.
    """
    lanes, rounds = sink.lanes, attempt.rounds
    number = rounds.index
    attempt.accounts.begin_round(number)
    under_way = rounds.begin(gfns.size, lambda: lanes.counts, final=True)
    under_way.found(gfns.size)
    for batch in lanes.batches(gfns):
        attempt.job.check()
        sink.check()
        lanes.send(batch, fresh=False)
        under_way.passed(batch.size)
    lanes.drain()
    under_way.drained()
    stats = rounds.end(0)
    lanes.send_removed(attempt.guest.vm.memory.removed())
    attempt.on_event(RoundEnded(stats=stats, decision=None))


def state_s(guest: TrackedGuest, now_s: Callable[[], float]) -> float:
    """Return what the state will cost at a pause: saving it here, and as long again for loading it there.

    The guest stands still meanwhile, for about half of the result. What takes long is tried again: the host may have
    been busy just then, and a policy that believes it gives the migration up.
    """
    least_s = math.inf
    for _ in range(_REHEARSALS):
        began_s = now_s()
        guest.rehearse_state()
        least_s = min(least_s, now_s() - began_s)
        if least_s <= _QUICK_S:
            break
    return 2 * least_s
