"""Contents: what every page of a guest held at the last reading, as one digest each."""

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PAGE_SIZE, GfnArray
from pageferry.core.memory import GuestMemory

_WORDS = PAGE_SIZE // 8
#: Pages digested at a time: what is copied out of guest memory for it stays in the processor's cache.
_CHUNK_PAGES = 64
_FOLD = np.uint64(32)


def _multipliers() -> NDArray[np.uint64]:
    random = np.random.default_rng(0x9E37_79B9)  # the same on every host: a finding can be repeated
    return random.integers(0, 1 << 64, _WORDS, np.uint64) | np.uint64(1)


class Contents:
    """Digests of a guest's pages.

    A digest is the sum, modulo 2^64, of the page's 64-bit words, each with its upper half folded into its lower, times
    an odd number of its own: one changed word always shows, several cancel out about once in 2^32 times at the worst.
    A page of zeros has digest 0, so a page without storage need not be read (reading would only give it storage).

    Args:
        memory: the guest's.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._multipliers = _multipliers()
        self._digests = np.zeros(memory.gfn_limit, np.uint64)

    def changed(self, among: DirtyBitmap, *, keep: bool) -> DirtyBitmap:
        """Read pages, and return those that do not hold what they held at the reading before.

        The guest may run: a page is read at some instant of this call, or while it changes, and either shows a change.

        Args:
            among: which pages to read; those that are no RAM or have no storage are left out.
            keep: whether later readings are compared with this one.
        """
        stored = DirtyBitmap(self._memory.gfn_limit)
        stored.set_runs(*self._memory.populated())
        stored &= among
        gfns = stored.gfns()
        gfns = gfns[self._memory.are_ram(gfns)]
        digests = self._read(gfns)
        differ = digests != self._digests[gfns]
        if keep:
            self._digests[gfns] = digests
        return DirtyBitmap.of(stored.nbits, gfns[differ])

    def _read(self, gfns: GfnArray) -> NDArray[np.uint64]:
        pages = np.frombuffer(self._memory.mapping.view, np.uint64).reshape(-1, _WORDS)
        digests = np.empty(gfns.size, np.uint64)
        for at in range(0, gfns.size, _CHUNK_PAGES):
            words = pages[gfns[at : at + _CHUNK_PAGES]]
            words ^= words >> _FOLD
            digests[at : at + _CHUNK_PAGES] = words @ self._multipliers
        return digests
