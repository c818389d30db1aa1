"""PageCache: the contents of pages as they were last sent, in bounded memory."""

import numpy as np
from numpy.typing import NDArray

from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SIZE, GfnArray
from pageferry.core.page_words import WORDS_PER_PAGE, PageWords
from pageferry.core.units import format_size

_NO_PAGE = -1


class PageCache:
    """Remembers what was sent of the pages that were sent most lately; the oldest make room. For one thread.

    What is in here is at the destination, byte for byte: the sender of a page puts in the very copy that is sent, or
    has it forgotten.

    Args:
        size_bytes: for contents, at least a page; more than the guest has is not taken. The index takes 12 bytes for
            each frame besides. Storage is taken as it is used.
        gfn_limit: one more than the last frame.

    Raises:
        UsageError: the host has not so much memory.
    """

    def __init__(self, size_bytes: int, gfn_limit: int) -> None:
        slots = min(size_bytes // PAGE_SIZE, gfn_limit)
        try:
            self._pages = np.empty((slots, WORDS_PER_PAGE), np.uint64)
        except MemoryError as error:
            what = f"this host has no memory for a delta cache of {format_size(slots * PAGE_SIZE)}"
            raise UsageError(what, hint="a smaller --delta-cache, or none") from error
        self._owner = np.full(slots, _NO_PAGE, np.int64)
        self._slot_of = np.zeros(gfn_limit, np.int32)  # plus 1; 0: not here
        self._next = 0
        self._unused = slots

    @property
    def capacity_pages(self) -> int:
        """How many pages fit."""
        return self._owner.size

    def fill(self, gfns: GfnArray, pages: PageWords) -> None:
        """Put in pages that are not here, as long as none has to make room for them.

        Args:
            gfns: uint64[n], distinct.
            pages: uint64[n, 512].
        """
        self._insert(gfns[: self._unused], pages[: self._unused])

    def swap(self, gfns: GfnArray, pages: PageWords) -> tuple[NDArray[np.bool_], PageWords]:
        """Put contents in; return which pages were here (bool[n]) and what was here of those (uint64[k, 512]).

        Args:
            gfns: uint64[n], distinct, at most ``capacity_pages``.
            pages: uint64[n, 512].
        """
        slots = self._slot_of[gfns] - 1
        known = slots >= 0
        old = self._pages[slots[known]]
        self._pages[slots[known]] = pages[known]
        self._insert(gfns[~known], pages[~known])
        return known, old

    def forget(self, gfns: GfnArray) -> None:
        """Drop pages, of which something else was sent.

        Args:
            gfns: uint64[n].
        """
        slots = self._slot_of[gfns] - 1
        self._owner[slots[slots >= 0]] = _NO_PAGE
        self._slot_of[gfns] = 0

    def _insert(self, gfns: GfnArray, pages: PageWords) -> None:
        slots = (self._next + np.arange(gfns.size)) % self._owner.size
        self._next = (self._next + gfns.size) % self._owner.size
        self._unused = max(0, self._unused - gfns.size)
        evicted = self._owner[slots]
        self._slot_of[evicted[evicted != _NO_PAGE]] = 0
        self._owner[slots] = gfns
        self._slot_of[gfns] = slots + 1
        self._pages[slots] = pages
