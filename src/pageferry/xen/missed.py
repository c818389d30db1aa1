"""A second reading: the suspended domain's memory, mapped anew, against what was written of it.

Xen's log-dirty does not see every writer: it misses writes through foreign mappings (by a backend, a device model, a
tool), and pages that came or were exchanged meanwhile. So at the pause all of memory is compared with the file, byte by
byte, through a mapping that is made then. What differs, or is not there, was missed: it is written again, and counted.
"""

import mmap
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE, GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.engine.image.outlet import FileOutlet
from pageferry.engine.pages.encode import Coded, PlainCoder
from pageferry.stream.encoder import Encoder


class PlacedCoder(PlainCoder):
    """Pages as they lie in guest memory; remembers where in the file the last content of each is.

    Args:
        memory: the guest's.
        encoder: of the stream.
        outlet: where each record is written next.
    """

    def __init__(self, memory: GuestMemory, encoder: Encoder, outlet: FileOutlet) -> None:
        super().__init__(memory, encoder)
        self._outlet = outlet
        #: int64[gfn_limit]: the offset of each frame's content, 0 where none was written.
        self.places: NDArray[np.int64] = np.zeros(memory.gfn_limit, np.int64)

    def code(self, gfns: GfnArray, *, fresh: bool) -> Coded:
        """Return one PAGE_DATA record, to be written at once."""
        coded = super().code(gfns, fresh=fresh)
        content_at = self._outlet.sent_bytes + len(coded.buffers[0])
        self.places[gfns] = content_at + PAGE_SIZE * np.arange(gfns.size, dtype=np.int64)
        return coded


def missed_pages(memory: GuestMemory, places: NDArray[np.int64], fd: int, size_bytes: int) -> GfnArray:
    """Return the frames (uint64[n], ascending) whose content is not what a file holds of them.

    Args:
        memory: of a domain that stands still, mapped just now.
        places: where in the file each frame's last content is, as :class:`PlacedCoder` has it.
        fd: of the file.
        size_bytes: its length.
    """
    gfns = memory.all_ram().gfns()
    placed = gfns < places.size
    offsets = np.zeros(gfns.size, np.int64)
    offsets[placed] = places[gfns[placed]]
    missed = DirtyBitmap(memory.gfn_limit)
    missed.set(gfns[offsets == 0])
    gfns, offsets = gfns[offsets > 0], offsets[offsets > 0]
    if gfns.size:
        with mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ) as content:
            held = np.frombuffer(content, np.uint8, size_bytes)
            try:
                missed.set(_different(np.frombuffer(memory.mapping.view, np.uint8), gfns, held, offsets))
            finally:
                del held  # or the mapping could not be closed
    return missed.gfns()


def _different(
    memory: NDArray[np.uint8], gfns: GfnArray, held: NDArray[np.uint8], offsets: NDArray[np.int64]
) -> list[int]:
    """Return the frames whose pages differ; runs that lie together in both are compared at once."""
    together = (np.diff(gfns.astype(np.int64)) == 1) & (np.diff(offsets) == PAGE_SIZE)
    edges = [0, *(np.flatnonzero(~together) + 1).tolist(), gfns.size]
    different: list[int] = []
    for begin, end in pairwise(edges):
        first, at, count = int(gfns[begin]), int(offsets[begin]), end - begin
        ours = memory[first << PAGE_SHIFT : (first + count) << PAGE_SHIFT]
        theirs = held[at : at + ours.size]
        if not np.array_equal(ours, theirs):
            pages = (ours.reshape(count, -1) != theirs.reshape(count, -1)).any(axis=1)
            different += (np.flatnonzero(pages) + first).tolist()
    return different
