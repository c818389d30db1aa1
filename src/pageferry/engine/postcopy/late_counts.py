"""LateCounts: what is counted at the source from the switch of post-copy to its end."""

from collections.abc import Callable

from pageferry.core.events import PostcopyStats
from pageferry.core.forecast import Eta, Pace
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.policy import RATE_SAMPLE_BYTES
from pageferry.engine.postcopy.server import LeftBehind

_CUT = "the connection was cut: pageferry migrate --recover goes on"
_SWITCHED = "the guest runs there already, and the rest follows"


class LateCounts:
    """Counts of one guest that switched; all but :meth:`tell` for the thread of the migration.

    Args:
        left: its pages that were not sent before.
        now_s: a monotonic clock in seconds.
    """

    def __init__(self, left: LeftBehind, now_s: Callable[[], float]) -> None:
        self._left = left
        self._now_s = now_s
        self._eta = Eta()
        self._connected_s: float | None = None
        self._pages_before = 0
        self._cut_at_s: float | None = None
        self._cuts = 0
        self._cut_s = 0.0

    def connected(self) -> None:
        """The destination asks for pages from now on."""
        now_s = self._now_s()
        if self._cut_at_s is not None:
            self._cut_s += now_s - self._cut_at_s
            self._cut_at_s = None
        self._connected_s, self._pages_before = now_s, self._left.sent_pages

    def cut(self) -> None:
        """There is no connection; may be said again of the same cut."""
        if self._cut_at_s is None:
            self._cut_at_s = self._now_s()
            self._cuts += 1

    def tell(self, wire_bytes_per_s: float | None) -> tuple[float | None, float | None, str]:
        """Return the rate in bytes per second, how long it still takes, and why it does or why that is not known.

        Args:
            wire_bytes_per_s: the rate before the switch, for as long as too little has gone since to tell one.
        """
        now_s, connected_s = self._now_s(), self._connected_s
        moved_bytes = (self._left.sent_pages - self._pages_before) * PAGE_SIZE
        if connected_s is not None and now_s > connected_s and moved_bytes >= RATE_SAMPLE_BYTES:
            wire_bytes_per_s = moved_bytes / (now_s - connected_s)
        if self._cut_at_s is not None:
            return wire_bytes_per_s, None, _CUT
        left_bytes = self._left.left_pages * PAGE_SIZE
        pace = Pace(
            remaining_bytes=left_bytes,
            wire_bytes_per_s=wire_bytes_per_s,
            dirty_bytes_per_s=0.0,
            fixed_s=0.0,
            limit_s=None,
        )
        eta_s = self._eta.tell(pace, now_s)
        return wire_bytes_per_s, eta_s, self._eta.reason or _SWITCHED

    def stats(self, running_at_s: float, ended_s: float) -> PostcopyStats:
        """Return what was counted.

        Args:
            running_at_s: when the guest ran at the destination, on the same clock.
            ended_s: when the migration ended.
        """
        waits = self._left.waits
        lost_s = 0.0 if self._cut_at_s is None else ended_s - self._cut_at_s
        return PostcopyStats(
            missing_pages=self._left.pages,
            sent_pages=self._left.sent_pages,
            zero_pages=self._left.zero_pages,
            urgent_pages=self._left.urgent_pages,
            duration_s=ended_s - running_at_s,
            cuts=self._cuts,
            cut_s=self._cut_s + lost_s,
            waits=None if waits is None else waits.waits,
            waited_s=None if waits is None else waits.waited_ns / 1e9,
            median_wait_s=None if waits is None else waits.median_ns / 1e9,
            p99_wait_s=None if waits is None else waits.p99_ns / 1e9,
            longest_wait_s=None if waits is None else waits.longest_ns / 1e9,
        )
