"""Lookout: how far an attempt is, how fast it goes, and when it will be over; asked from any thread meanwhile."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from pageferry.core.forecast import Eta, Pace
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.policy import RATE_SAMPLE_BYTES, Progress
from pageferry.engine.postcopy.late_counts import LateCounts
from pageferry.engine.rounds import PageSender


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """How far an attempt is, in counts.

    ``memory_bytes``: the guest's RAM. ``rounds``: how many have ended; in those, ``sent_pages`` went, ``zero_pages`` of
    them by name only, ``packed_pages`` in ``packed_bytes``, and of ``delta_pages`` the changes in ``delta_bytes``.
    ``remaining_pages``: of the round under way; between rounds, what was dirty at the last look. ``sent_bytes``: over
    the wire so far, all of the conversation.
    """

    memory_bytes: int
    rounds: int
    sent_pages: int
    zero_pages: int
    packed_pages: int
    packed_bytes: int
    delta_pages: int
    delta_bytes: int
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


class Lookout:
    """Looks at the pages of one attempt as they leave.

    Its lock guards the estimate of the end, which remembers what it told before; that after a switch too.

    Args:
        sender: sends the pages, up to the switch.
        now_s: a monotonic clock in seconds.
    """

    def __init__(self, sender: PageSender, now_s: Callable[[], float]) -> None:
        self._sender = sender
        self._now_s = now_s
        self._eta = Eta()
        self._lock = threading.Lock()

    def traffic(self, *, memory_bytes: int, late_pages: int | None, sent_bytes: int) -> Traffic:
        """Return how far it is.

        Args:
            memory_bytes: the guest's RAM.
            late_pages: how many pages follow after the switch and have not gone; None: it does not come to that.
            sent_bytes: over the wire so far.
        """
        rounds = tuple(self._sender.rounds)
        return Traffic(
            memory_bytes=memory_bytes,
            rounds=len(rounds),
            sent_pages=sum(stats.sent_pages for stats in rounds),
            zero_pages=sum(stats.zero_pages for stats in rounds),
            packed_pages=sum(stats.packed_pages for stats in rounds),
            packed_bytes=sum(stats.packed_bytes for stats in rounds),
            delta_pages=sum(stats.delta_pages for stats in rounds),
            delta_bytes=sum(stats.delta_bytes for stats in rounds),
            remaining_pages=self._sender.remaining_pages if late_pages is None else late_pages,
            sent_bytes=sent_bytes,
        )

    def outlook(self, *, fixed_s: float, limit_s: float | None, held: bool) -> Outlook:
        """Return how fast it goes and when it will be over, before a switch.

        Args:
            fixed_s: what a pause takes besides the pages.
            limit_s: the downtime that is allowed; None: any.
            held: it is ready, and waits to be told to go on.
        """
        measured, wire = self._measured()
        pace = Pace(
            remaining_bytes=self._sender.remaining_pages * PAGE_SIZE,
            wire_bytes_per_s=wire,
            dirty_bytes_per_s=0.0 if measured is None else measured.dirty_bytes_per_s,
            fixed_s=fixed_s,
            limit_s=limit_s,
        )
        with self._lock:
            eta_s = self._eta.tell(pace, self._now_s())
            return Outlook(
                wire_bytes_per_s=wire,
                dirty_bytes_per_s=pace.dirty_bytes_per_s,
                expected_downtime_s=pace.fixed_s + pace.remaining_bytes / wire if wire else None,
                eta_s=None if held else eta_s,
                eta_reason="it is ready, and held until it is told to go on" if held else self._eta.reason,
            )

    def outlook_after_switch(self, late: LateCounts) -> Outlook:
        """Return the same when the guest has switched, and ``late`` counts what follows."""
        _, precopy_bytes_per_s = self._measured()
        with self._lock:
            wire, eta_s, reason = late.tell(precopy_bytes_per_s)
        return Outlook(
            wire_bytes_per_s=wire, dirty_bytes_per_s=0.0, expected_downtime_s=None, eta_s=eta_s, eta_reason=reason
        )

    def _measured(self) -> tuple[Progress | None, float | None]:
        """Return the rounds that have ended, None before the first, and the rate of the wire in bytes per second."""
        rounds = tuple(self._sender.rounds)
        measured = Progress(memory_pages=0, rounds=rounds, fixed_s=0.0) if rounds else None
        wire = None if measured is None else measured.wire_bytes_per_s
        now = self._sender.under_way()
        if now is not None and now.elapsed_s > 0 and (measured is None or now.moved_bytes >= RATE_SAMPLE_BYTES):
            wire = now.moved_bytes / now.elapsed_s
        return measured, wire
