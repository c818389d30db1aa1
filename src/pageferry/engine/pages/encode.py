"""PageCoder: the contents of pages as records, straight from guest memory or packed.

What is packed is copied first. A page that the guest changes meanwhile is then of two moments at the worst, as one that
is sent straight from memory may be (and is dirty and sent again: law 3), but a packer never reads changing bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pageferry.core.bitmap import runs_of
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.page_counts import NO_PAGES, PageCounts
from pageferry.core.page_words import WORDS_PER_PAGE, PageWords, page_words
from pageferry.engine.pages.cache import PageCache
from pageferry.stream.encoder import Encoder
from pageferry.stream.format import MAX_PAGES_PER_RECORD
from pageferry.stream.packing import Packer
from pageferry.stream.records import DeltaPages, PackedPages

#: Pages that packing makes smaller by less than an eighth go as they are: unpacking them would cost more than it saves.
_WORTH = 7 / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """The records of a batch of pages: what to send, in order, and the counts of what was packed."""

    buffers: Sequence[bytes | memoryview]
    counts: PageCounts = NO_PAGES


class PageCoder(Protocol):
    """Makes records of pages."""

    def code(self, gfns: GfnArray, *, fresh: bool) -> Coded:
        """Return the records; they are valid until the next call.

        Args:
            gfns: uint64[n], strictly ascending, 1 to 1,024, RAM a moment ago.
            fresh: nothing was sent of these pages before.

        Raises:
            VmError: a frame is not RAM any more; nothing was written to the stream.
        """

    def forget(self, gfns: GfnArray) -> None:
        """Hear of pages (uint64[n]) of which something was sent that was not made here."""


class PlainCoder:
    """Pages as they lie in guest memory, without a copy.

    Args:
        memory: the guest's.
        encoder: of the stream.
    """

    def __init__(self, memory: GuestMemory, encoder: Encoder) -> None:
        self._memory = memory
        self._encoder = encoder

    def code(self, gfns: GfnArray, *, fresh: bool) -> Coded:
        """Return one PAGE_DATA record; see :class:`PageCoder`."""
        views = self._memory.views(*runs_of(gfns))
        return Coded(buffers=[self._encoder.page_data(gfns), *views])

    def forget(self, gfns: GfnArray) -> None:
        """Nothing is remembered here."""


class PackingCoder:
    """Pages copied, then packed batch by batch; those that do not get smaller go as they are.

    With a cache, of a page that is sent again only what changed is sent. The very copy that is sent, or that a change
    leads to, goes into the cache. The first sending of a page goes in only while there is room: most pages are sent
    once, and those that are sent again come first.

    Args:
        memory: the guest's.
        encoder: of the stream, where PACKED_PAGES was agreed on.
        packer: ours alone.
        cache: ours alone, of 1,024 pages at least, where DELTA_PAGES was agreed on too; None: no deltas.
    """

    def __init__(self, memory: GuestMemory, encoder: Encoder, packer: Packer, cache: PageCache | None = None) -> None:
        self._cache = cache
        self._words = page_words(memory)
        self._encoder = encoder
        self._packer = packer
        self._copies = np.empty((MAX_PAGES_PER_RECORD, WORDS_PER_PAGE), np.uint64)

    def code(self, gfns: GfnArray, *, fresh: bool) -> Coded:
        """Return PACKED_PAGES, DELTA_PAGES and PAGE_DATA records; see :class:`PageCoder`."""
        copies = self._copies[: gfns.size]
        np.take(self._words, gfns.astype(np.intp), axis=0, out=copies, mode="clip")
        if self._cache is None:
            return self._packed(gfns, copies)
        if fresh:
            self._cache.fill(gfns, copies)
            return self._packed(gfns, copies)
        known, changes = self._cache.swap(gfns, copies)
        if not known.any():
            return self._packed(gfns, copies)
        changes ^= copies[known]
        delta = self._delta(gfns[known], changes)
        if delta is None:  # the changes do not get smaller
            return self._packed(gfns, copies)
        if known.all():
            return delta
        packed = self._packed(gfns[~known], copies[~known])
        return Coded(buffers=[*delta.buffers, *packed.buffers], counts=delta.counts + packed.counts)

    def forget(self, gfns: GfnArray) -> None:
        """Drop pages from the cache; see :class:`PageCoder`."""
        if self._cache is not None:
            self._cache.forget(gfns)

    def _delta(self, gfns: GfnArray, changes: PageWords) -> Coded | None:
        raw = changes.data.cast("B")
        packed = self._packer.pack(raw)
        if len(packed) > _WORTH * raw.nbytes:
            return None
        record = self._encoder.record(DeltaPages(pfns=gfns, data=packed))
        return Coded(buffers=[record], counts=PageCounts(delta_pages=gfns.size, delta_bytes=len(record)))

    def _packed(self, gfns: GfnArray, copies: PageWords) -> Coded:
        raw = copies.data.cast("B")
        packed = self._packer.pack(raw)
        if len(packed) > _WORTH * raw.nbytes:
            return Coded(buffers=[self._encoder.page_data(gfns), raw])
        record = self._encoder.record(PackedPages(pfns=gfns, data=packed))
        return Coded(buffers=[record], counts=PageCounts(packed_pages=gfns.size, packed_bytes=len(record)))
