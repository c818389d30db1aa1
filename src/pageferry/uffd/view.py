"""The vCPUs' view of RAM: the host addresses that KVM's slots point to, and the frames behind them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PAGE_SHIFT, GfnArray
from pageferry.core.hostmem import HostMapping
from pageferry.core.memory import GuestMemory

#: Words of a bitmap no farther apart than this are protected by one call: 2 MiB of RAM, one page table of the host's.
#: A call costs tens of microseconds, most of it for the flush of every CPU's TLB; more than to pass over the table.
SPAN_GAP_WORDS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuView:
    """RAM as only the vCPUs write it: host address ``mapping.hva + gpa``.

    ``memory``: the same bytes by another mapping, for all other writers.
    """

    memory: GuestMemory
    mapping: HostMapping

    def regions(self) -> Iterator[tuple[int, int]]:
        """Yield each region of RAM as ``(hva, size_bytes)``."""
        for region in self.memory.regions:
            yield self.hva(region.first_gfn), region.size_bytes

    def parts(self, gfns: range) -> Iterator[range]:
        """Yield the frames of RAM inside a range of frames, region by region."""
        for region in self.memory.regions:
            first = max(gfns.start, region.first_gfn)
            stop = min(gfns.stop, region.first_gfn + region.pages)
            if first < stop:
                yield range(first, stop)

    def hva(self, gfn: int) -> int:
        """Return the host address of a frame."""
        return self.mapping.hva + (gfn << PAGE_SHIFT)

    def gfns(self, hvas: GfnArray) -> GfnArray:
        """Return the frames at host addresses, uint64[n] each."""
        frames: GfnArray = (hvas - np.uint64(self.mapping.hva)) >> np.uint64(PAGE_SHIFT)
        return frames


def spans_of(bitmap: DirtyBitmap, part: range) -> Iterator[range]:
    """Yield the frames to protect again: spans of whole words, inside ``part``, that cover every bit set there.

    What lies between is protected already. Each span costs a call, and KVM all that it has mapped there.

    Args:
        bitmap: the bits.
        part: frames inside the bitmap; whole words of it, as those of :meth:`VcpuView.parts` are of a range that is.
    """
    where = bitmap.words_of(part)
    dirty = np.flatnonzero(bitmap.words[where])
    if not dirty.size:
        return
    breaks = np.flatnonzero(np.diff(dirty) > SPAN_GAP_WORDS)
    firsts = dirty[np.concatenate(([0], breaks + 1))] * 64 + part.start
    stops = dirty[np.concatenate((breaks, [dirty.size - 1]))] * 64 + part.start + 64
    for first, stop in zip(firsts.tolist(), stops.tolist(), strict=True):
        yield range(first, min(stop, part.stop))
