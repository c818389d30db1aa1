"""Rounds: which pages go when, and what each round cost."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pageferry.core.events import Event, RoundBegan, RoundProgress
from pageferry.core.frames import PAGE_SIZE, GfnArray
from pageferry.core.policy import RoundStats
from pageferry.engine.pages.lane import Sent
from pageferry.engine.pages.lanes import Lanes


@dataclass(frozen=True, slots=True, kw_only=True)
class UnderWay:
    """A round that has begun; ``moved_bytes`` as in :class:`RoundStats`."""

    elapsed_s: float
    moved_bytes: int


class PageSender:
    """Sends rounds of pages.

    Args:
        on_event: sees rounds begin and go on.
        now_s: a monotonic clock in seconds.
    """

    def __init__(self, on_event: Callable[[Event], None], now_s: Callable[[], float]) -> None:
        self._on_event = on_event
        self._now_s = now_s
        self.rounds: list[RoundStats] = []
        self._under_way: Callable[[], UnderWay | None] = lambda: None
        self.remaining_pages = 0
        """Pages of the round under way that are still to be sent; between rounds, what was dirty at the last look."""

    def send(
        self,
        lanes: Lanes,
        chunks: Iterable[GfnArray],
        *,
        expected_pages: int,
        final: bool,
        before_record: Callable[[], None],
        count_dirty: Callable[[], int],
    ) -> RoundStats:
        """Send one round.

        Args:
            lanes: where to.
            chunks: the frames, uint64[n] each, strictly ascending. Law 3: the CLEAN that reported a chunk has returned
                when the chunk is taken from here; each is taken when those before it are sent, or with other lanes than
                the first are next to be.
            expected_pages: how many there are likely to be in all, for progress.
            final: whether this is the stop-and-copy.
            before_record: called before each record; may send others, and raises to end the round.
            count_dirty: called at the end: how many pages are dirty now.

        Raises:
            OSError: cut or stalled.
        """
        index = len(self.rounds)
        self._on_event(RoundBegan(index=index, dirty_pages=expected_pages, final=final))
        began_s, bytes_before, sent_before = self._now_s(), lanes.sent_bytes, lanes.sent

        def under_way() -> UnderWay:
            pages = lanes.sent - sent_before
            moved_bytes = max(lanes.sent_bytes - bytes_before, (pages.pages - pages.zero_pages) * PAGE_SIZE)
            return UnderWay(elapsed_s=self._now_s() - began_s, moved_bytes=moved_bytes)

        self._under_way = under_way
        dirty_pages = passed_pages = 0
        reported = Sent()
        for gfns in chunks:
            dirty_pages += gfns.size
            at = 0
            while at < gfns.size:  # the size of a batch may change meanwhile
                before_record()
                batch = gfns[at : at + lanes.batch_pages]
                lanes.send(batch, fresh=index == 0)
                at += batch.size
                passed_pages += batch.size
                self.remaining_pages = max(expected_pages, dirty_pages) - passed_pages
                reported = lanes.sent - sent_before
                self._report(index, reported, lanes.sent_bytes - bytes_before)
        lanes.barrier()
        sent, sent_bytes = lanes.sent - sent_before, lanes.sent_bytes - bytes_before
        if sent != reported:
            self._report(index, sent, sent_bytes)
        self.remaining_pages = count_dirty()
        stats = RoundStats(
            index=index,
            dirty_pages=dirty_pages,
            sent_pages=sent.pages,
            zero_pages=sent.zero_pages,
            packed_pages=sent.packed_pages,
            packed_bytes=sent.packed_bytes,
            delta_pages=sent.delta_pages,
            delta_bytes=sent.delta_bytes,
            sent_bytes=sent_bytes,
            duration_s=self._now_s() - began_s,
            remaining_pages=self.remaining_pages,
            final=final,
        )
        self.rounds.append(stats)
        self._under_way = lambda: None
        return stats

    def under_way(self) -> UnderWay | None:
        """Return how far the round under way is, if one is; from any thread."""
        return self._under_way()

    def _report(self, index: int, sent: Sent, sent_bytes: int) -> None:
        self._on_event(RoundProgress(index=index, sent_pages=sent.pages, sent_bytes=sent_bytes))
