"""The source's side of post-copy: sends the pages that were missing at the switch, when they are asked for.

The guest is frozen here and never runs here again, so a page is what it was at the pause however late it goes.
"""

import threading
from collections.abc import Callable

from pageferry.core.bitmap import DirtyBitmap, runs_of
from pageferry.core.command_hints import RECOVER
from pageferry.core.errors import RemoteStreamError
from pageferry.core.events import PostcopyStats
from pageferry.core.forecast import Eta, Pace
from pageferry.core.frames import PAGE_SIZE, GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.page_words import page_words, zero_pages
from pageferry.core.policy import RATE_SAMPLE_BYTES
from pageferry.engine.host import Host
from pageferry.engine.postcopy.recovery import Recovery
from pageferry.engine.progress import Outlook
from pageferry.engine.wire.peer import Peer
from pageferry.stream.ferry_bodies import digest_of
from pageferry.stream.ferry_frames import MAX_MISSING_RUNS, Complete, Missing, Pages, Wanted

_CUT = f"the connection was cut; to go on: {RECOVER}"
_SWITCHED = "the guest runs there already, and the rest follows"


class MissingPages:
    """The pages of one guest that the destination gets after the switch.

    Args:
        memory: the guest's, which stands still for ever.
        gfns: uint64[n], ascending, n at least 1, all of them RAM.
    """

    def __init__(self, memory: GuestMemory, gfns: GfnArray) -> None:
        self._memory = memory
        self._words = page_words(memory)
        self.bitmap = DirtyBitmap.of(memory.gfn_limit, gfns)
        """Which pages."""
        self.pages = int(gfns.size)
        """How many there are in all."""
        self.sent_pages = 0
        """How many have gone, each counted once."""
        self.gone = DirtyBitmap(memory.gfn_limit)
        """Which have gone."""
        self.urgent_pages = 0
        """How many were asked for because a vCPU, or a device, waited for them."""
        self.zero_pages = 0
        """How many were zero, and went by name."""
        self.waits: Complete | None = None
        """The destination's account of its waits, told when it had everything."""

    @property
    def left_pages(self) -> int:
        """How many were never sent."""
        return self.pages - self.sent_pages

    def announce(self, peer: Peer) -> None:
        """Tell the destination which pages are missing.

        Raises:
            OSError: cut or stalled.
        """
        starts, lengths = self.bitmap.runs()
        for at in range(0, starts.size, MAX_MISSING_RUNS):
            part = slice(at, at + MAX_MISSING_RUNS)
            peer.send(Missing(first_gfns=starts[part], pages=lengths[part]))

    def serve(self, peer: Peer, on_progress: Callable[[], None]) -> None:
        """Answer the destination until it needs nothing more.

        Args:
            peer: the destination.
            on_progress: called after each answer.

        Raises:
            RemoteStreamError: it says something else, or asks for a page that is not missing.
            OSError: cut or stalled; call it again with another connection.
        """
        while True:
            frame = peer.receive()
            if isinstance(frame, Complete):
                self.waits = frame
                return
            if not isinstance(frame, Wanted) or not self._are_missing(frame.gfns):
                raise RemoteStreamError(f"the destination sent {type(frame).__name__}, which asks for no missing page")
            zero = zero_pages(self._words, frame.gfns)
            content = self._memory.views(*runs_of(frame.gfns[~zero]))
            pages = Pages(gfns=frame.gfns, zero=zero, digest=digest_of(frame.gfns, zero, content))
            peer.send(pages, content=content)
            self._count(pages, urgent=frame.urgent)
            on_progress()

    def _count(self, pages: Pages, *, urgent: bool) -> None:
        fresh = ~self.gone.test_many(pages.gfns)  # what a cut lost goes again
        self.gone.set(pages.gfns)
        self.sent_pages += int(fresh.sum())
        self.zero_pages += int((pages.zero & fresh).sum())
        if urgent:
            self.urgent_pages += int(fresh.sum())

    def _are_missing(self, gfns: GfnArray) -> bool:
        return int(gfns[-1]) < self.bitmap.nbits and bool(self.bitmap.test_many(gfns).all())


class Postcopy:
    """The source's state for a guest that switches: its missing pages, cuts, and how to go on after one.

    All but :meth:`outlook` and ``recovery`` for the thread of the migration.

    Args:
        missing: the pages.
        host: its clock counts, and it waits there for a recovery.
    """

    def __init__(self, missing: MissingPages, host: Host) -> None:
        self.missing = missing
        self.recovery = Recovery(host)
        self.cut_reason = ""
        """How the connection was lost last."""
        self._now_s = host.now_s
        self._eta = Eta()
        self._eta_lock = threading.Lock()  # the estimate remembers what it told before
        self._connected_s: float | None = None
        self._pages_before = 0
        self._cut_at_s: float | None = None
        self._cuts = 0
        self._cut_s = 0.0

    @property
    def paused(self) -> str | None:
        """Why the pages are here without a connection, while it must be told where to connect; else None."""
        return self.cut_reason if self.recovery.waiting else None

    def connected(self) -> None:
        """The destination asks for pages from now on."""
        now_s = self._now_s()
        if self._cut_at_s is not None:
            self._cut_s += now_s - self._cut_at_s
            self._cut_at_s = None
        self._connected_s, self._pages_before = now_s, self.missing.sent_pages

    def cut(self, reason: str) -> None:
        """Note that the connection is lost; may be called again for the same cut."""
        self.cut_reason = reason
        if self._cut_at_s is None:
            self._cut_at_s = self._now_s()
            self._cuts += 1

    def outlook(self, precopy_bytes_per_s: float | None) -> Outlook:
        """Return how fast it goes and when it will be over, from any thread.

        Args:
            precopy_bytes_per_s: the rate before the switch, for as long as too little has gone since to tell one.
        """
        now_s, connected_s, rate = self._now_s(), self._connected_s, precopy_bytes_per_s
        moved_bytes = (self.missing.sent_pages - self._pages_before) * PAGE_SIZE
        if connected_s is not None and now_s > connected_s and moved_bytes >= RATE_SAMPLE_BYTES:
            rate = moved_bytes / (now_s - connected_s)
        eta_s, reason = None, _CUT
        if self._cut_at_s is None:
            pace = Pace(
                remaining_bytes=self.missing.left_pages * PAGE_SIZE,
                wire_bytes_per_s=rate,
                dirty_bytes_per_s=0.0,
                fixed_s=0.0,
                limit_s=None,
            )
            with self._eta_lock:
                eta_s, reason = self._eta.tell(pace, now_s), self._eta.reason or _SWITCHED
        return Outlook(
            wire_bytes_per_s=rate, dirty_bytes_per_s=0.0, expected_downtime_s=None, eta_s=eta_s, eta_reason=reason
        )

    def stats(self, running_at_s: float, ended_s: float) -> PostcopyStats:
        """Return what was counted.

        Args:
            running_at_s: when the guest ran at the destination, on the same clock.
            ended_s: when the migration ended.
        """
        waits = self.missing.waits
        lost_s = 0.0 if self._cut_at_s is None else ended_s - self._cut_at_s
        return PostcopyStats(
            missing_pages=self.missing.pages,
            sent_pages=self.missing.sent_pages,
            zero_pages=self.missing.zero_pages,
            urgent_pages=self.missing.urgent_pages,
            duration_s=ended_s - running_at_s,
            cuts=self._cuts,
            cut_s=self._cut_s + lost_s,
            waits=None if waits is None else waits.waits,
            waited_s=None if waits is None else waits.waited_ns / 1e9,
            median_wait_s=None if waits is None else waits.median_ns / 1e9,
            p99_wait_s=None if waits is None else waits.p99_ns / 1e9,
            longest_wait_s=None if waits is None else waits.longest_ns / 1e9,
        )
