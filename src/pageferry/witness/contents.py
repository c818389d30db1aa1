"""Which pages of a guest changed between two readings, by a digest of each."""

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PAGE_SIZE, GfnArray
from pageferry.core.memory import GuestMemory

#: Pages digested at a time, with the interpreter lock held: a fraction of a millisecond for a vCPU that waits for it.
_CHUNK_PAGES = 1024
_ZERO = np.uint64(xxh3_64_intdigest(bytes(PAGE_SIZE)))


class Contents:
    """What every page held at the last reading.

    A page is known by its xxh3-64, XOR that of a page of zeros: so a page of zeros has 0, and a page without storage
    need not be read, which would only give it storage.

    Args:
        memory: the guest's.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._digests = np.zeros(memory.gfn_limit, np.uint64)

    def changed(self, among: DirtyBitmap, *, keep: bool) -> DirtyBitmap:
        """Read pages, and return those that do not hold what they held at the reading before.

        The guest may run: a page is read at some instant of this call, or while it changes, and either shows a change.

        Args:
            among: which pages to read; those that are not RAM or have no storage are left out.
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
        digests = np.empty(gfns.size, np.uint64)
        for at in range(0, gfns.size, _CHUNK_PAGES):
            views = self._memory.page_views(gfns[at : at + _CHUNK_PAGES])
            digests[at : at + len(views)] = np.fromiter(map(xxh3_64_intdigest, views), np.uint64)
        return digests ^ _ZERO
