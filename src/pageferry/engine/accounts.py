"""The source's knowledge of each page: whether it has storage, was sent and is proven; how often it was sent."""

import threading

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap, places_of
from pageferry.core.frames import GfnArray
from pageferry.core.sent_pages import HeatMap, HotRange, SentPages
from pageferry.engine.host import THIS_HOST, Host

#: The heat map is counted in so many cells and rows at the most, and told in so many cells.
_COUNTED_CELLS = 1 << 16
_ROWS = 64
_TOLD_CELLS = 256

_MOST = np.iinfo(np.uint16).max

#: A page is hot that was sent again at least this share as often as the page that was sent most often.
_HOT_SHARE = 0.5
#: Hot pages are told in so many ranges, cells of the heat map lie in so many areas.
_HOT_RANGES = 8
_AREAS = 32
#: What parts them is a gap of at least so many pages, and of so many times the usual gap. (Of pages written at random,
#: no gap among thousands is that much longer than the usual one.)
_MIN_GAP_PAGES = 64
_GAP_FACTOR = 24


class PageAccounts:
    """Accounts of every page of one guest. Any thread may call; ``changed`` guards everything but ``send_counts``.

    A page *is sent* from when it is on the wire until a CLEAN or the last PEEK reports it, and *is proven* while its
    digest was found equal at the destination since it was sent. It *was reported* if that happened since the auditor
    began its last piece.

    Args:
        gfn_limit: one more than the last frame.
        host: on which others wait for a change.
    """

    def __init__(self, gfn_limit: int, host: Host = THIS_HOST) -> None:
        self.host = host
        self.changed = host.condition()
        """Notified when as many pages are sent as are waited for."""
        self.send_counts = SendCounts(gfn_limit)
        self.populated = DirtyBitmap(gfn_limit)
        """What had storage at the last look, and all that was reported since."""
        self.is_sent = DirtyBitmap(gfn_limit)
        self.is_proven = DirtyBitmap(gfn_limit)
        self.was_reported = DirtyBitmap(gfn_limit)
        self.awaited_sendings = 0
        """How many of these are waited for; of fewer no other thread is told."""
        self.sendings = 0
        """How many pages were sent in all, each as often as it was."""
        self._round = 0

    def found(self, starts: GfnArray, lengths: GfnArray) -> None:
        """Take in which runs have storage now; a page that gets some later is dirty by then."""
        with self.changed:
            self.populated = DirtyBitmap(self.populated.nbits)
            self.populated.set_runs(starts, lengths)

    def reported(self, dirty: DirtyBitmap, gfns: range | None = None) -> None:
        """Take in what a CLEAN returned, or the last PEEK: it is to be sent again, and nothing is proven of it.

        Args:
            dirty: what was reported.
            gfns: outside of this range nothing was; None: all of memory.
        """
        words = slice(0, dirty.words.size) if gfns is None else dirty.words_of(gfns)
        which = np.flatnonzero(dirty.words[words]) + words.start
        reported = dirty.words[which]
        with self.changed:
            self.populated.words[which] |= reported
            self.is_sent.words[which] &= ~reported
            self.is_proven.words[which] &= ~reported
            self.was_reported.words[which] |= reported

    def begin_round(self, index: int) -> None:
        """Count what is sent from now on as sent in round ``index``; all of the rounds before is on the wire."""
        self._round = index

    def sent(self, gfns: GfnArray) -> None:
        """Take in that these frames (uint64[n], strictly ascending) are on the wire, ahead of what is sent next."""
        self.send_counts.add(self._round, gfns)
        with self.changed:
            self.is_sent.set(gfns)
            self.sendings += gfns.size
            if self.sendings >= self.awaited_sendings:
                self.changed.notify_all()

    def proven(self) -> DirtyBitmap:
        """Return which frames are proven; a copy."""
        with self.changed:
            return self.is_proven.copy()


class SendCounts:
    """Counts sendings of pages. Any thread may count.

    Costs 2 bytes of address space for each frame, and at most 16 MiB for the heat map; both take storage only where
    something is sent. A page's count ends at 65,535.

    Args:
        gfn_limit: one more than the last frame.
    """

    def __init__(self, gfn_limit: int) -> None:
        self._lock = threading.Lock()
        self._sent = np.zeros(gfn_limit, np.uint16)
        self._cell_shift = max(0, (gfn_limit - 1).bit_length() - (_COUNTED_CELLS.bit_length() - 1))
        self._rows = np.zeros((_ROWS, ((gfn_limit - 1) >> self._cell_shift) + 1), np.uint32)
        self._rounds_per_row = 1
        self._rounds = 0

    def add(self, index: int, gfns: GfnArray) -> None:
        """Count one sending of each frame.

        Args:
            index: the round; rounds are counted from 0, and none is counted before an earlier one has begun.
            gfns: uint64[n], strictly ascending, below ``gfn_limit``.
        """
        if not gfns.size:
            return
        where = places_of(gfns)
        cells = gfns.astype(np.intp) >> self._cell_shift
        first = int(cells[0])
        pages = np.bincount(cells - first)
        with self._lock:
            self._rounds = max(self._rounds, index + 1)
            while index // self._rounds_per_row >= _ROWS:
                self._halve_rows()
            row = self._rows[index // self._rounds_per_row]
            row[first : first + pages.size] += pages.astype(np.uint32)
            counts = self._sent[where]
            self._sent[where] = counts + (counts < _MOST)

    def result(self) -> SentPages:
        """Return what was counted so far."""
        with self._lock:
            gfns = np.flatnonzero(self._sent).astype(np.uint64)
            sent = self._sent[gfns].astype(np.int64)
            return SentPages(
                pages=gfns.size,
                rewritten_pages=int((sent > 1).sum()),
                again_pages=int((sent - 1).sum()),
                hot=_hot_ranges(gfns, sent),
                heat=self._heat(gfns),
            )

    def _halve_rows(self) -> None:
        half = _ROWS // 2
        self._rows[:half] = self._rows[0::2] + self._rows[1::2]
        self._rows[half:] = 0
        self._rounds_per_row *= 2

    def _heat(self, gfns: GfnArray) -> HeatMap:
        counted = np.bincount((gfns >> np.uint64(self._cell_shift)).astype(np.int64), minlength=self._rows.shape[1])
        used = np.flatnonzero(counted)
        pages = counted[used]
        _, first, place = np.unique(_told_cells(used, pages, self._cell_shift), return_index=True, return_inverse=True)
        last = np.append(first, used.size)[1:] - 1
        rows = self._rows[: -(-self._rounds // self._rounds_per_row), used]
        return HeatMap(
            first_gfns=tuple((used[first] << self._cell_shift).tolist()),
            last_gfns=tuple(((used[last] + 1 << self._cell_shift) - 1).tolist()),
            pages=_sums(place, pages, first.size),
            rounds_per_row=self._rounds_per_row,
            rows=tuple(_sums(place, row, first.size) for row in rows),
        )


def _long_gaps(gaps: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Return where the longest of the gaps are, at most so many, ascending; of gaps in pages."""
    at_least = max(_MIN_GAP_PAGES, _GAP_FACTOR * (float(np.median(gaps)) if gaps.size else 0.0))
    long = np.flatnonzero(gaps >= at_least)
    return np.sort(long[np.argsort(gaps[long], kind="stable")[::-1][:most]])


def _told_cells(used: NDArray[np.int64], pages: NDArray[np.int64], cell_shift: int) -> NDArray[np.int64]:
    """Return a number for each counted cell that has pages: neighbours with the same one are told as one.

    No told cell lies on both sides of a long gap.
    """
    begins = np.zeros(used.size, np.int64)
    begins[_long_gaps((np.diff(used) - 1) << cell_shift, _AREAS - 1) + 1] = 1
    area = np.cumsum(begins)
    before = np.cumsum(pages) - pages
    before -= before[np.searchsorted(area, area)]  # in its area
    told_pages = -(-int(pages.sum()) // (_TOLD_CELLS - _AREAS))
    return area * (_TOLD_CELLS + 1) + before // max(1, told_pages)


def _sums(place: NDArray[np.int64], values: NDArray[np.integer], size: int) -> tuple[int, ...]:
    """Return for each of ``size`` places the sum of the values there."""
    return tuple(np.bincount(place, weights=values, minlength=size).astype(np.int64).tolist())


def _hot_ranges(gfns: GfnArray, sent: NDArray[np.int64]) -> tuple[HotRange, ...]:
    again = sent - 1
    if not again.any():
        return ()
    hot = gfns[again >= max(1.0, _HOT_SHARE * int(again.max()))]
    gaps = np.diff(hot).astype(np.int64) - 1
    after = _long_gaps(gaps, _HOT_RANGES - 1) + 1
    firsts = hot[np.concatenate(([0], after))]
    lasts = hot[np.concatenate((after - 1, [hot.size - 1]))]
    ranges = []
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        inside = slice(*np.searchsorted(gfns, np.array((first, last + 1), np.uint64)).tolist())
        ranges.append(
            HotRange(
                first_gfn=first,
                pages=last + 1 - first,
                sent_pages=int(sent[inside].sum()),
                again_pages=int(again[inside].sum()),
            )
        )
    return tuple(sorted(ranges, key=lambda each: each.again_pages, reverse=True))
