"""Machine memory: frames, who owns them, the reverse map, and the paging pool.

One sparse memfd is all of machine memory, mapped once in the order of its frames. Frames ``0 .. ram_frames-1`` are for
guest RAM; the paging pool with the P2M's table frames lies above them::

    mfn 0                                ram_frames                         frames
     |  guest RAM, handed out top-down   |   paging pool      | other owners' |
     |  <- second extent <- first extent |  root, tables ->   |               |

RAM is handed out in extents of whole 2 MiB frames from the top down, so gfn != mfn and code that mixes the two fails at
once. An extent is 2 MiB in a small guest and grows with it, as on a real host where a large guest gets large pieces:
the number of extents, and with it the number of host mappings, stays below about 512 whatever the size.

Frames that the domain gives back (ballooning) are free, without storage. What was given back last is handed out first,
in its order, so that what left in one piece comes back in one. The last 2 MiB belong to *other
owners*: pages that they may grant.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import runs_of
from pageferry.core.errors import VmError
from pageferry.core.frames import PAGE_SHIFT, PAGES_PER_2M, GfnArray, Mfn
from pageferry.core.hostmem import MADV_HUGEPAGE, HostMapping, MemFd
from pageferry.hypervisor.locks import OrderedLock

_MAX_EXTENTS = 256
_SHATTERED = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_LOW_9 = np.uint64(PAGES_PER_2M - 1)
_SHIFT_2M = np.uint64(9)
_ONE = np.uint64(1)
_STEPS = np.arange(PAGES_PER_2M, dtype=np.uint64)
_FOREIGN_FRAMES = PAGES_PER_2M

#: What the reverse map gives for a frame that no gfn maps.
INVALID_GFN = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


class FrameOwner(IntEnum):
    """Who holds a machine frame."""

    FREE = 0
    DOMAIN = 1
    POOL = 2
    FOREIGN = 3
    """Another domain, which may grant it to ours."""


class ReverseMap:
    """The reverse map (Xen's m2p): mfn -> gfn.

    Two levels, so that a superpage costs one entry: ``_large[mfn >> 9]`` is gfn+1 of a 2 MiB frame that maps a
    contiguous, aligned 2 MiB of gfns, 0 when nothing is mapped, or SHATTERED when ``_small[mfn]`` (gfn+1, or 0)
    decides frame by frame. Both start as untouched zero pages.

    Args:
        frames: machine frames covered; a multiple of 512.
    """

    def __init__(self, frames: int) -> None:
        self._large = np.zeros(frames >> 9, np.uint64)
        self._small = np.zeros(frames, np.uint64)

    def set_extent(self, mfn: int, gfn: int, pages: int) -> None:
        """Record that ``pages`` frames from ``mfn`` hold the gfns from ``gfn``; both 2 MiB-aligned."""
        whole = pages >> 9
        first = np.uint64(gfn + 1)
        self._large[mfn >> 9 : (mfn >> 9) + whole] = first + (np.arange(whole, dtype=np.uint64) << _SHIFT_2M)
        if tail := pages & 511:
            self._large[(mfn >> 9) + whole] = _SHATTERED
            at = mfn + (whole << 9)
            self._small[at : at + tail] = first + np.arange(whole << 9, pages, dtype=np.uint64)

    def set_pages(self, mfns: GfnArray, gfns: GfnArray) -> None:
        """Record, frame by frame, that ``mfns`` (distinct) hold ``gfns``; INVALID_GFN: nothing."""
        for block in np.unique(mfns >> _SHIFT_2M).tolist():
            large = self._large[block]
            if large != _SHATTERED:
                self._small[block << 9 : (block + 1) << 9] = (large + _STEPS) if large else 0
                self._large[block] = _SHATTERED
        self._small[mfns] = gfns + _ONE  # INVALID_GFN + 1 wraps to 0

    def gfns(self, mfns: GfnArray) -> GfnArray:
        """Return the gfn of each of ``mfns`` (uint64[n]); INVALID_GFN where nothing is mapped."""
        large = self._large[mfns >> _SHIFT_2M]
        stored = np.where(large == _SHATTERED, self._small[mfns], large + (mfns & _LOW_9))
        result: GfnArray = np.where(large == 0, INVALID_GFN, stored - _ONE)  # 0 - 1 wraps to INVALID_GFN
        return result

    def run_gfns(self, starts: GfnArray, lengths: GfnArray) -> tuple[GfnArray, GfnArray]:
        """Translate runs of frames into runs of gfns, ``(starts, lengths)``, in no order.

        Cost grows with the number of 2 MiB frames touched, and with the pages of shattered ones.
        """
        if not starts.size:
            return starts, lengths
        first, last = starts >> _SHIFT_2M, (starts + lengths - _ONE) >> _SHIFT_2M
        pieces = (last - first + _ONE).astype(np.int64)
        owner = np.repeat(np.arange(starts.size), pieces)
        nth = np.arange(owner.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        block = first[owner] + nth.astype(np.uint64)
        begin = np.maximum(starts[owner], block << _SHIFT_2M)
        end = np.minimum((starts + lengths)[owner], (block + _ONE) << _SHIFT_2M)
        large = self._large[block]
        whole = (large != 0) & (large != _SHATTERED)
        gfn_runs = [(large[whole] - _ONE + (begin[whole] & _LOW_9), (end - begin)[whole])]
        for low, high in zip(begin[large == _SHATTERED].tolist(), end[large == _SHATTERED].tolist(), strict=True):
            stored = self._small[low:high]
            single = stored[stored != 0] - _ONE
            gfn_runs.append((single, np.ones_like(single)))
        return np.concatenate([s for s, _ in gfn_runs]), np.concatenate([n for _, n in gfn_runs])


class PagingPool:
    """Frames for the P2M's tables, and in shadow mode for shadows (Xen's HAP and shadow pools in one).

    Shadows can be made anew at any time and the P2M's tables cannot, so nothing but the *promise* keeps the P2M from
    taking the last frame: a few are kept for shadows, without which no instruction of the guest could complete.

    ``tables`` is uint64[frames, 512] over the pool's machine memory: row r is the frame ``first_mfn + r``.

    Args:
        tables: that view.
        first_mfn: the pool's first frame.
        lock: the PAGING lock.
    """

    def __init__(self, tables: NDArray[np.uint64], first_mfn: Mfn, lock: OrderedLock) -> None:
        self.tables = tables
        self.first_mfn = first_mfn
        self.allocation = len(tables)
        """How many frames the domain may use; at most the pool's size."""
        self.reserved = 0
        """Frames' worth of memory that is accounted here but lies elsewhere: the log-dirty bitmap."""
        self._promised = 0
        self._shadows = 0
        self._lock = lock
        self._free: list[Mfn] = []
        self._fresh = 0

    @property
    def used(self) -> int:
        """How many frames are in use."""
        return self._fresh - len(self._free) + self.reserved

    @property
    def needed(self) -> int:
        """The smallest allocation that would do now: what is in use, and what is kept for shadows."""
        return self.used + self._kept()

    def set_allocation(self, frames: int) -> None:
        """Decide how many frames the domain may use (Xen's SET_ALLOCATION).

        Raises:
            VmError: fewer than are in use, or more than the pool has; nothing changed.
        """
        with self._lock:
            needed = self.needed
            if not needed <= frames <= len(self.tables):
                raise VmError(
                    f"the paging pool cannot have {frames} frames: {needed} are in use, the pool has {len(self.tables)}"
                )
            self.allocation = frames

    def promise(self, frames: int) -> None:
        """Keep so many frames for shadows, those in use by shadows included; 0 in HAP mode.

        Raises:
            VmError: they are not there; nothing changed.
        """
        with self._lock:
            if self.used + max(0, frames - self._shadows) > self.allocation:
                raise VmError(
                    f"the paging pool has no room for shadow tables: {self.used} of {self.allocation} are in use",
                    hint="give the domain a larger paging pool",
                )
            self._promised = frames

    def _kept(self) -> int:
        return max(0, self._promised - self._shadows)

    def reserve(self, frames: int) -> bool:
        """Account for ``frames`` more, or tell that they are not there."""
        with self._lock:
            if self.used + self._kept() + frames > self.allocation:
                return False
            self.reserved += frames
            return True

    def unreserve(self, frames: int) -> None:
        """Undo a reservation."""
        with self._lock:
            self.reserved -= frames

    def allocate(self, *, shadow: bool = False) -> Mfn | None:
        """Return a zeroed frame, for a table of the P2M or a shadow, or None when the allocation is exhausted."""
        with self._lock:
            if self.used + (0 if shadow else self._kept()) >= self.allocation:
                return None
            self._shadows += shadow
            if self._free:
                mfn = self._free.pop()
                self.tables[mfn - self.first_mfn] = 0
                return mfn
            mfn = Mfn(self.first_mfn + self._fresh)
            self._fresh += 1
            return mfn

    def release(self, mfn: Mfn, *, shadow: bool = False) -> None:
        """Take a frame back; nothing refers to it any more."""
        with self._lock:
            self._shadows -= shadow
            self._free.append(mfn)


class MachineMemory:
    """All machine frames of one domain; see the module's text.

    Args:
        extents_2m: guest RAM to make room for, in 2 MiB frames.
        pool_frames: the size of the paging pool.
        paging_lock: guards the pool.
        thp: whether to ask the host for transparent huge pages under guest RAM.
    """

    def __init__(self, *, extents_2m: int, pool_frames: int, paging_lock: OrderedLock, thp: bool = False) -> None:
        self.ram_frames = extents_2m * PAGES_PER_2M
        self.foreign_start = self.ram_frames + -(-pool_frames // PAGES_PER_2M) * PAGES_PER_2M
        self.frames = self.foreign_start + _FOREIGN_FRAMES
        self.size_bytes = self.frames << PAGE_SHIFT
        self.memfd = MemFd("pageferry-machine", self.size_bytes)
        self.mapping = HostMapping(self.size_bytes)
        self.mapping.map_fd(self.memfd, 0, 0, self.size_bytes)
        if thp:
            self.mapping.advise(0, self.ram_frames << PAGE_SHIFT, MADV_HUGEPAGE)
        self.words = self.mapping.view.cast("Q")
        """Machine memory as u64s: word ``maddr >> 3``."""
        self.owner = np.zeros(self.frames, np.uint8)
        self.owner[self.ram_frames : self.foreign_start] = FrameOwner.POOL
        self.owner[self.foreign_start :] = FrameOwner.FOREIGN
        self.m2p = ReverseMap(self.frames)
        whole = np.frombuffer(self.mapping.view, np.uint64)
        tables = whole[self.ram_frames * 512 : (self.ram_frames + pool_frames) * 512].reshape(pool_frames, 512)
        self.pool = PagingPool(tables, Mfn(self.ram_frames), paging_lock)
        self.extent_pages = _extent_pages(extents_2m)
        self._top = self.ram_frames
        self._foreign_next = self.foreign_start
        self._free: GfnArray = np.empty(0, np.uint64)

    def allocate_extent(self, pages: int) -> Mfn:
        """Hand out ``pages`` contiguous frames, 2 MiB-aligned, from the top down; owned by the domain.

        What is left of the last 2 MiB frame stays free.

        Raises:
            VmError: no room.
        """
        top = self._top - -(-pages // PAGES_PER_2M) * PAGES_PER_2M
        if top < 0:
            raise VmError(f"machine memory has no {pages} contiguous frames left")
        self._top = top
        self.owner[top : top + pages] = FrameOwner.DOMAIN
        return Mfn(top)

    def free_frames(self, mfns: GfnArray) -> None:
        """Take single frames back from the domain; their content is gone, and nothing maps them any more."""
        self.owner[mfns] = FrameOwner.FREE
        self._free = np.concatenate((self._free, mfns))
        for start, count in zip(*(part.tolist() for part in runs_of(np.sort(mfns))), strict=True):
            self.memfd.punch(start << PAGE_SHIFT, count << PAGE_SHIFT)

    def allocate_frames(self, count: int) -> GfnArray:
        """Hand out single zeroed frames, uint64[count], of those that were given back last, in that order.

        Raises:
            VmError: there are not so many.
        """
        if count > self._free.size:
            raise VmError(f"machine memory has {self._free.size} free frames, not {count}")
        self._free, mfns = np.split(self._free, [self._free.size - count])
        self.owner[mfns] = FrameOwner.DOMAIN
        return mfns

    def allocate_foreign(self) -> Mfn:
        """Return a zeroed frame of another owner, for that owner to grant.

        Raises:
            VmError: the other owners have no more.
        """
        if self._foreign_next == self.frames:
            raise VmError("the other domains have no frames left")
        self._foreign_next += 1
        return Mfn(self._foreign_next - 1)

    def frame(self, mfn: int) -> memoryview:
        """Return a writable view of one frame, as its owner sees it."""
        return self.mapping.view[mfn << PAGE_SHIFT : (mfn + 1) << PAGE_SHIFT]

    def populated(self) -> tuple[GfnArray, GfnArray]:
        """Return the runs of gfns whose frames have storage, ``(starts, lengths)``, ascending and merged."""
        gfns, pages = self.m2p.run_gfns(*self.memfd.populated())  # the pool's frames have no gfn and drop out
        order = np.argsort(gfns, kind="stable")
        gfns, pages = gfns[order], pages[order]
        if gfns.size < 2:
            return gfns, pages
        new = np.concatenate(([True], gfns[1:] != (gfns + pages)[:-1]))
        return gfns[new], np.add.reduceat(pages, np.flatnonzero(new))

    def close(self) -> None:
        """Give the memory back; a view that is still held reads as zeros."""
        self.mapping.clear()
        self.memfd.close()


def _extent_pages(extents_2m: int) -> int:
    wanted = -(-extents_2m // _MAX_EXTENTS)
    return PAGES_PER_2M << max(0, (wanted - 1).bit_length())
