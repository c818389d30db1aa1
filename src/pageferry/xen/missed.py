"""A second reading: the suspended domain's memory, mapped anew, against what was written or sent of it.

Xen's log-dirty does not see every writer: it misses writes through foreign mappings (by a backend, a device model, a
tool), and pages that came or were exchanged meanwhile. So at the pause all of memory is compared, through a mapping
made then: with a file byte by byte, or with digests of what was sent. What differs, or is not there, was missed: it
goes again, and is counted.
"""

import mmap
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE, GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.page_words import WORDS_PER_PAGE, PageWords, page_words
from pageferry.engine.image.outlet import FileOutlet
from pageferry.engine.pages.encode import Coded, PlainCoder
from pageferry.engine.verify.digests import DIGEST_BYTES, DigestArray, digest_views
from pageferry.stream.encoder import Encoder
from pageferry.stream.format import MAX_PAGES_PER_RECORD


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


class DigestedCoder:
    """Pages as copies, digested; remembers the digest of the last content of each that was sent.

    Args:
        memory: the guest's.
        encoder: of the stream.
    """

    def __init__(self, memory: GuestMemory, encoder: Encoder) -> None:
        self._memory = memory
        self._words = page_words(memory)
        self._encoder = encoder
        self._copies = np.empty((MAX_PAGES_PER_RECORD, WORDS_PER_PAGE), np.uint64)
        self.sent = DirtyBitmap(memory.gfn_limit)
        self.digests: DigestArray = np.zeros((memory.gfn_limit, DIGEST_BYTES), np.uint8)

    def code(self, gfns: GfnArray, *, fresh: bool) -> Coded:
        """Return one PAGE_DATA record of the copies; they are valid until the next call."""
        self._memory.page_views(gfns)  # or a frame that is gone would be read
        copies = self._copies[: gfns.size]
        np.take(self._words, gfns.astype(np.intp), axis=0, out=copies, mode="clip")
        self.digests[gfns.astype(np.intp)] = digests_of(copies)
        self.sent.set(gfns)
        return Coded(buffers=[self._encoder.page_data(gfns), copies.data.cast("B")])

    def forget(self, gfns: GfnArray) -> None:
        """Nothing is sent but by :meth:`code`."""


def digests_of(pages: PageWords) -> DigestArray:
    """Return the digest of each page."""
    held = pages.data.cast("B")
    views = [held[at : at + PAGE_SIZE] for at in range(0, len(held), PAGE_SIZE)]
    return digest_views(views, np.ones(len(views), np.uint64))


def differing_pages(memory: GuestMemory, coder: DigestedCoder) -> GfnArray:
    """Return the frames (uint64[n], ascending) of a domain that stands still whose content is not what was sent."""
    gfns, words = memory.all_ram().gfns(), page_words(memory)
    known = np.zeros(gfns.size, np.bool_)
    inside = gfns < coder.sent.nbits
    known[inside] = coder.sent.test_many(gfns[inside])
    missed = DirtyBitmap.of(memory.gfn_limit, gfns[~known])
    gfns = gfns[known]
    for at in range(0, gfns.size, MAX_PAGES_PER_RECORD):
        some = gfns[at : at + MAX_PAGES_PER_RECORD]
        rows = some.astype(np.intp)
        now = digests_of(np.ascontiguousarray(words[rows]))
        missed.set(some[(now != coder.digests[rows]).any(axis=1)])
    return missed.gfns()
