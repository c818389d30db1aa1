"""Guest memory as one array of words, page by page, and which of its pages are zero."""

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import places_of, runs_of
from pageferry.core.frames import PAGE_SIZE, GfnArray
from pageferry.core.memory import GuestMemory

WORDS_PER_PAGE = PAGE_SIZE // 8
#: A page with a bit in one of these words is not zero; nearly every page with content has one.
_SAMPLES = (0, 129, 258, WORDS_PER_PAGE - 1)
#: Scattered pages are copied side by side before they are looked at, so many at a time: 256 KiB, which a cache holds.
_BLOCK_PAGES = 64
#: Runs of at least so many pages on average are looked at where they lie.
_LONG_RUN = 8

PageWords = NDArray[np.uint64]
"""uint64[n, 512]: row i is the 4,096 bytes of a page."""


def page_words(memory: GuestMemory) -> PageWords:
    """Return all of guest memory where it lies, one row per gfn.

    Only rows of frames that are RAM, or were, may be touched: the hole is not mapped.
    """
    return np.frombuffer(memory.mapping.view, np.uint64).reshape(-1, WORDS_PER_PAGE)


def zero_pages(words: PageWords, gfns: GfnArray) -> NDArray[np.bool_]:
    """Tell for each of ``gfns`` whether its page is all zeros, as bool[n].

    A few words of each page are looked at first, and all of it only where those are zero. Of a page that is written
    meanwhile the answer may mix two moments: the caller must hear of the write (law 3) and look again.

    Args:
        words: of all of guest memory.
        gfns: uint64[n], strictly ascending, RAM.
    """
    zero = np.zeros(gfns.size, np.bool_)
    if not gfns.size:
        return zero
    suspects = np.flatnonzero(words[places_of(gfns), _SAMPLES[0]] == 0)
    for sample in _SAMPLES[1:]:
        suspects = suspects[words[gfns[suspects], sample] == 0]
    if suspects.size:
        zero[suspects] = _or_of_pages(words, gfns[suspects]) == 0
    return zero


def _or_of_pages(words: PageWords, gfns: GfnArray) -> NDArray[np.uint64]:
    # The bits that are set anywhere in each page.
    starts, lengths = runs_of(gfns)
    if starts.size * _LONG_RUN <= gfns.size:
        pieces = [words[at : at + count] for at, count in zip(starts.tolist(), lengths.tolist(), strict=True)]
    else:
        pieces = [words[gfns[at : at + _BLOCK_PAGES]] for at in range(0, gfns.size, _BLOCK_PAGES)]
    return np.concatenate([np.bitwise_or.reduce(piece, axis=1) for piece in pieces])
