"""Rounds: pages from guest memory to the wire, gathered, and what each round cost."""

from collections.abc import Callable, Iterable

import numpy as np

from pageferry.core.bitmap import runs_of
from pageferry.core.errors import VmError
from pageferry.core.events import Event, RoundBegan, RoundProgress
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.policy import RoundStats
from pageferry.engine.transport import Channel
from pageferry.stream.codec import Encoder
from pageferry.stream.format import MAX_PAGES_PER_RECORD, PageType


class PageSender:
    """Sends rounds of pages as PAGE_DATA records, straight from guest memory.

    Args:
        memory: the guest's.
        encoder: of the stream that the records belong to.
        on_event: sees rounds begin and go on.
        now_s: a monotonic clock in seconds.
        on_sent: sees the round's index and the frames, uint64[n], of each record that was sent.
    """

    def __init__(
        self,
        memory: GuestMemory,
        encoder: Encoder,
        on_event: Callable[[Event], None],
        now_s: Callable[[], float],
        on_sent: Callable[[int, GfnArray], None],
    ) -> None:
        self._memory = memory
        self._encoder = encoder
        self._on_event = on_event
        self._now_s = now_s
        self._on_sent = on_sent
        self.rounds: list[RoundStats] = []
        self.remaining_pages = 0
        """Pages of the round under way that are still to be sent; between rounds, what was dirty at the last look."""

    def send(
        self,
        channel: Channel,
        chunks: Iterable[GfnArray],
        *,
        expected_pages: int,
        final: bool,
        check: Callable[[], None],
        count_dirty: Callable[[], int],
    ) -> RoundStats:
        """Send one round.

        Args:
            channel: where to.
            chunks: the frames, uint64[n] each, strictly ascending. Law 3: the CLEAN that reported a chunk has returned
                when the chunk is taken from here; each is taken when those before it are sent.
            expected_pages: how many there are likely to be in all, for progress.
            final: whether this is the stop-and-copy.
            check: called before each record; raises to end the round.
            count_dirty: called at the end: how many pages are dirty now.

        Raises:
            OSError: cut or stalled.
        """
        index = len(self.rounds)
        self._on_event(RoundBegan(index=index, dirty_pages=expected_pages, final=final))
        began_s, sent_before = self._now_s(), channel.sent_bytes
        dirty_pages = passed_pages = sent_pages = 0
        for gfns in chunks:
            dirty_pages += gfns.size
            for at in range(0, gfns.size, MAX_PAGES_PER_RECORD):
                check()
                batch, views = self._present(gfns[at : at + MAX_PAGES_PER_RECORD])
                if batch.size:
                    channel.send([self._encoder.page_data(batch), *views])
                    self._on_sent(index, batch)
                sent_pages += batch.size
                passed_pages += min(gfns.size - at, MAX_PAGES_PER_RECORD)
                self.remaining_pages = max(expected_pages, dirty_pages) - passed_pages
                sent_bytes = channel.sent_bytes - sent_before
                self._on_event(RoundProgress(index=index, sent_pages=sent_pages, sent_bytes=sent_bytes))
        self.remaining_pages = count_dirty()
        stats = RoundStats(
            index=index,
            dirty_pages=dirty_pages,
            sent_pages=sent_pages,
            sent_bytes=channel.sent_bytes - sent_before,
            duration_s=self._now_s() - began_s,
            remaining_pages=self.remaining_pages,
            final=final,
        )
        self.rounds.append(stats)
        return stats

    def send_removed(self, channel: Channel, gfns: GfnArray) -> None:
        """Tell that frames are no RAM of the guest any more (PAGE_DATA of type XTAB, without data).

        Args:
            channel: where to.
            gfns: uint64[n], strictly ascending; the guest is frozen.

        Raises:
            OSError: cut or stalled.
        """
        for at in range(0, gfns.size, MAX_PAGES_PER_RECORD):
            batch = gfns[at : at + MAX_PAGES_PER_RECORD]
            channel.send([self._encoder.page_data(batch, np.full(batch.size, PageType.XTAB, np.uint8))])

    def _present(self, gfns: GfnArray) -> tuple[GfnArray, list[memoryview]]:
        """Return those of the frames that are RAM, with their views: the guest may have given some back meanwhile."""
        while True:
            present = gfns[self._memory.are_ram(gfns)]
            try:
                return present, self._memory.views(*runs_of(present))
            except VmError:
                continue  # one more was given back between the two lines
