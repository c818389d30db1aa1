"""LeftBehind: the source's side of post-copy: pages that were not sent when the guest switched, and go when asked for.

The guest is frozen here and never runs here again, so a page is what it was at the pause however late it goes.
"""

import contextlib
from collections.abc import Callable

from pageferry.core.bitmap import DirtyBitmap, runs_of
from pageferry.core.errors import RemoteStreamError
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.page_words import page_words, zero_pages
from pageferry.engine.wire.peer import Peer
from pageferry.stream.ferry import Complete, Dropped, Missing, Pages, Wanted
from pageferry.stream.ferry_postcopy import MAX_MISSING_RUNS, digest_of


class LeftBehind:
    """The pages of one guest that come after the switch.

    Args:
        memory: the guest's, which stands still for ever.
        gfns: uint64[n], ascending, n at least 1, all of them RAM.
    """

    def __init__(self, memory: GuestMemory, gfns: GfnArray) -> None:
        self._memory = memory
        self._words = page_words(memory)
        self.missing = DirtyBitmap.of(memory.gfn_limit, gfns)
        """Which pages."""
        self.pages = int(gfns.size)
        """How many there are in all."""
        self.sent_pages = 0
        """How many have gone, each counted once."""
        self.gone = DirtyBitmap(memory.gfn_limit)
        """Which have gone."""
        self.urgent_pages = 0
        """How many were asked for because somebody waited for them."""
        self.zero_pages = 0
        """How many were zero, and went by name."""
        self.waits: Complete | None = None
        """What the destination told of its waiting when it had everything."""

    @property
    def left_pages(self) -> int:
        """How many were never sent."""
        return self.pages - self.sent_pages

    def announce(self, peer: Peer) -> None:
        """Tell the destination which pages are missing.

        Raises:
            OSError: cut or stalled.
        """
        starts, lengths = self.missing.runs()
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
                with contextlib.suppress(OSError):  # whoever has not heard it asks again, and nothing is here to go
                    peer.send(Dropped())
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
        return int(gfns[-1]) < self.missing.nbits and bool(self.missing.test_many(gfns).all())
