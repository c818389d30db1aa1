"""The progress of a migration or a save: its phases, how far it is, how fast it goes, when it will end."""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec

from pageferry.core.events import Event, Phase, PhaseBegan, PhaseEnded, RoundBegan, RoundProgress
from pageferry.core.forecast import Eta, Pace
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.page_counts import NO_PAGES, PageCounts
from pageferry.core.policy import RATE_SAMPLE_BYTES, Progress, RoundStats

_log = logging.getLogger(__name__)

Seen = ParamSpec("Seen")


def guarded(observer: Callable[Seen, None]) -> Callable[Seen, None]:
    """Return the observer with its own failures logged: they end no migration."""

    def observe(*seen: Seen.args, **named: Seen.kwargs) -> None:
        try:
            observer(*seen, **named)
        except Exception:
            _log.exception("an observer of the migration failed")

    return observe


class PhaseClock:
    """Tells which phase is on and how long each took: one begin and one end event each, for source and destination.

    Args:
        on_event: sees the begin and end of each phase.
        now_s: a monotonic clock in seconds.
    """

    def __init__(self, on_event: Callable[[Event], None], now_s: Callable[[], float]) -> None:
        self._on_event = on_event
        self.now_s = now_s
        self.current = Phase.CONNECT
        self.began_s: dict[Phase, float] = {}

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Be in ``phase`` for the length of a ``with`` block; an error leaves ``current`` at the phase it came from."""
        self.current = phase
        began_s = self.began_s[phase] = self.now_s()
        self._on_event(PhaseBegan(phase=phase))
        try:
            yield
        finally:
            self._on_event(PhaseEnded(phase=phase, duration_s=self.now_s() - began_s))

    def parts_s(self, phases: Sequence[Phase], end_s: float) -> dict[str, float]:
        """Divide the time from the begin of the first of ``phases`` to ``end_s`` among them, without a gap.

        Args:
            phases: in the order in which they were.
            end_s: when the last of them ended, on the clock of ``now_s``.
        """
        edges = [*(self.began_s[phase] for phase in phases), end_s]
        return {str(phase): after - before for phase, before, after in zip(phases, edges, edges[1:], strict=False)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """How far an attempt is.

    ``memory_bytes``: the guest's RAM. ``rounds``: how many have ended, in which the pages of ``counts`` went.
    ``remaining_pages``: of the round under way; between rounds, what was dirty at the last look. ``sent_bytes``: over
    the wire so far, all of the conversation.
    """

    memory_bytes: int
    rounds: int
    counts: PageCounts
    remaining_pages: int
    sent_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """How fast an attempt goes, and when it will be over.

    ``wire_bytes_per_s``: None before anything was sent. ``dirty_bytes_per_s``: by the guest in the last round, distinct
    pages only; 0 after a switch. ``expected_downtime_s``: of a pause now; None after a switch. ``eta_s``: seconds to
    the end, None when none is in sight; ``eta_reason``: why not, or why it was moved back last; empty while it only
    counts down.
    """

    wire_bytes_per_s: float | None
    dirty_bytes_per_s: float
    expected_downtime_s: float | None
    eta_s: float | None
    eta_reason: str


class Round:
    """One round of pages under way, the stop-and-copy included.

    Args:
        index: from 0.
        expected_pages: how many pages there are likely to be in all.
        counts: returns what was sent so far, in all rounds.
        final: whether this is the stop-and-copy.
        on_event: sees how the round goes on.
        now_s: a monotonic clock in seconds.
    """

    def __init__(
        self,
        index: int,
        expected_pages: int,
        *,
        counts: Callable[[], PageCounts],
        final: bool,
        on_event: Callable[[Event], None],
        now_s: Callable[[], float],
    ) -> None:
        self.index = index
        self._expected_pages = expected_pages
        self._counts = counts
        self._final = final
        self._on_event = on_event
        self._now_s = now_s
        on_event(RoundBegan(index=index, dirty_pages=expected_pages, final=final))
        self._began_s = now_s()
        self._before = counts()
        self._reported = self._total = NO_PAGES
        self._found_pages = 0
        self._passed_pages = 0

    @property
    def sent(self) -> PageCounts:
        """What was sent in this round so far."""
        return self._counts() - self._before

    @property
    def elapsed_s(self) -> float:
        """How long it has taken so far."""
        return self._now_s() - self._began_s

    @property
    def remaining_pages(self) -> int:
        """How many of its pages are still to be sent, as far as that is known."""
        return max(self._expected_pages, self._found_pages) - self._passed_pages

    def found(self, pages: int) -> None:
        """Count pages that were found dirty."""
        self._found_pages += pages

    def passed(self, pages: int) -> None:
        """Count pages that were handed to their connections, and tell of it."""
        self._passed_pages += pages
        self._report(self.sent)

    def drained(self) -> None:
        """Close the counts, when all pages are sent: what is sent until the round ends are proofs and a fence."""
        self._total = self.sent
        if self._total.sent_pages != self._reported.sent_pages:
            self._report(self._total)

    def stats(self, remaining_pages: int) -> RoundStats:
        """Return what the round was, when it has ended and so many pages are dirty."""
        return RoundStats(
            index=self.index,
            dirty_pages=self._found_pages,
            duration_s=self.elapsed_s,
            remaining_pages=remaining_pages,
            final=self._final,
            **self._total.as_dict(),
        )

    def _report(self, sent: PageCounts) -> None:
        self._reported = sent
        self._on_event(RoundProgress(index=self.index, sent_pages=sent.sent_pages, sent_bytes=sent.sent_bytes))


class Rounds:
    """The rounds of one attempt; read from any thread.

    Args:
        memory_pages: of the guest.
        on_event: sees rounds begin and go on.
        now_s: a monotonic clock in seconds.
    """

    def __init__(self, memory_pages: int, on_event: Callable[[Event], None], now_s: Callable[[], float]) -> None:
        self.ended: tuple[RoundStats, ...] = ()
        self.fixed_s = 0.0
        """The time that a pause takes besides the pages, as of the end of the last round."""
        self._on_event = on_event
        self._now_s = now_s
        self._expected_pages = memory_pages
        self._current: Round | None = None
        self._eta = Eta()
        self._eta_lock = threading.Lock()  # the estimate remembers what it told before

    @property
    def index(self) -> int:
        """The number of the round under way, or of the next."""
        return len(self.ended)

    @property
    def counts(self) -> PageCounts:
        """What was sent in the rounds that have ended."""
        return sum(self.ended, NO_PAGES)

    @property
    def remaining_pages(self) -> int:
        """Pages of the round under way that are to be sent; between rounds, what was dirty at the last look.

        Before the first: as many as are likely to be sent in it.
        """
        current, ended = self._current, self.ended
        if current is not None:
            return current.remaining_pages
        return ended[-1].remaining_pages if ended else self._expected_pages

    def expect(self, pages: int) -> None:
        """So many pages are likely to be sent in the first round; until this is called, all of memory."""
        self._expected_pages = pages

    def begin(self, expected_pages: int, counts: Callable[[], PageCounts], *, final: bool = False) -> Round:
        """Begin a round; arguments as for :class:`Round`."""
        self._current = Round(
            self.index, expected_pages, counts=counts, final=final, on_event=self._on_event, now_s=self._now_s
        )
        return self._current

    def end(self, remaining_pages: int) -> RoundStats:
        """End the round under way, of which so many pages are dirty again."""
        assert self._current is not None
        stats = self._current.stats(remaining_pages)
        self.ended, self._current = (*self.ended, stats), None
        return stats

    def outlook(self, *, limit_s: float | None, held: bool) -> Outlook:
        """Return how fast it goes and when it will be over, before a switch.

        Args:
            limit_s: the downtime that is allowed; None: any.
            held: it is ready, and waits to be told to go on.
        """
        ended = self.ended
        measured = Progress(memory_pages=0, rounds=ended, fixed_s=0.0) if ended else None
        wire = self.wire_bytes_per_s()
        pace = Pace(
            remaining_bytes=self.remaining_pages * PAGE_SIZE,
            wire_bytes_per_s=wire,
            dirty_bytes_per_s=0.0 if measured is None else measured.dirty_bytes_per_s,
            fixed_s=self.fixed_s,
            limit_s=limit_s,
        )
        with self._eta_lock:
            eta_s = self._eta.tell(pace, self._now_s())
            reason = self._eta.reason
        return Outlook(
            wire_bytes_per_s=wire,
            dirty_bytes_per_s=pace.dirty_bytes_per_s,
            expected_downtime_s=pace.fixed_s + pace.remaining_bytes / wire if wire else None,
            eta_s=None if held else eta_s,
            eta_reason="it is ready, and held until it is told to go on" if held else reason,
        )

    def wire_bytes_per_s(self) -> float | None:
        """Return how fast memory moves: in the round under way once it tells, else in those before; None at first."""
        ended, current = self.ended, self._current
        if current is not None:
            sent, elapsed_s = current.sent, current.elapsed_s
            if elapsed_s > 0 and (not ended or sent.moved_bytes >= RATE_SAMPLE_BYTES):
                return sent.moved_bytes / elapsed_s
        return Progress(memory_pages=0, rounds=ended, fixed_s=0.0).wire_bytes_per_s if ended else None
