"""The vCPUs' view of RAM: the host addresses that KVM's slots point to, and the frames behind them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PAGE_SHIFT, GfnArray
from pageferry.core.hostmem import HostMapping
from pageferry.core.memory import GuestMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuView:
    """RAM as only the vCPUs write it: host address ``mapping.hva + gpa``.

    ``memory``: everybody else's view of the same bytes, by another mapping.
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


def spans_of(bitmap: DirtyBitmap, within: range, *, max_gap: int) -> Iterator[tuple[int, int]]:
    """Yield spans ``(gfn, pages)`` inside ``within`` that cover every bit set there.

    Args:
        bitmap: the bits.
        within: frames, inside the bitmap.
        max_gap: bits that are nearer than this many pages share a span.
    """
    gfns = bitmap.gfns()
    gfns = gfns[np.searchsorted(gfns, within.start) : np.searchsorted(gfns, within.stop)]
    if not gfns.size:
        return
    breaks = np.flatnonzero(np.diff(gfns) > max_gap)
    firsts = gfns[np.concatenate(([0], breaks + 1))]
    lasts = gfns[np.concatenate((breaks, [gfns.size - 1]))]
    yield from zip(firsts.tolist(), (lasts - firsts + np.uint64(1)).tolist(), strict=True)
