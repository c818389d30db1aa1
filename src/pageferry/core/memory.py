"""GuestMemory: a guest's RAM, as all but its vCPUs see it.

Guest-physical address ``gpa`` is host address ``hva + gpa``: one linear range of host addresses per guest. RAM is a
list of regions (:mod:`pageferry.core.ram`); what is between them is not mapped. What lies underneath is the machine's
business: on ``kvm`` private memory, or a memfd at offset ``gpa``; on ``soft`` a memfd wherever the P2M says. Frames of
a region may be *removed* for a time (ballooning): they are not RAM then.

Law 4: a writer here is not a vCPU, so nested paging does not see it; every writing method marks the frames
dirty *after* the write. Marking first would let a ``clean()`` in between take the bit and read the old bytes.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, partial

import numpy as np

from pageferry.core.bitmap import DirtyBitmap, expand_runs
from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.frames import (
    PAGE_SHIFT,
    SIZE_2M,
    GfnArray,
    gfns_touched,
)
from pageferry.core.hostmem import (
    MADV_DONTNEED,
    MADV_POPULATE_WRITE,
    MADV_REMOVE,
    HostMapping,
    MemFd,
)
from pageferry.core.hugepages import HugeAdvice, HugePages, chosen, pool_too_small
from pageferry.core.pagemap import filled_runs
from pageferry.core.ram import RamRegion, ram_layout

_COPY = "let it be copied: migrate over TCP"
#: Arrays of so few frames are kept and used again.
_FEW_FRAMES = 32


def _filled(regions: Sequence[RamRegion], mapping: HostMapping) -> tuple[GfnArray, GfnArray]:
    runs = [filled_runs(mapping.hva + region.gpa, region.size_bytes) for region in regions]
    first = [starts + np.uint64(region.first_gfn) for region, (starts, _) in zip(regions, runs, strict=True)]
    return np.concatenate(first), np.concatenate([lengths for _, lengths in runs])


def _touched(regions: Sequence[RamRegion], mapping: HostMapping) -> tuple[GfnArray, GfnArray]:
    # A hugetlb file does not tell what has storage. Guest memory is touched through this mapping only.
    runs = [mapping.resident(region.gpa, region.size_bytes) for region in regions]
    return np.concatenate([starts for starts, _ in runs]), np.concatenate([lengths for _, lengths in runs])


def _nothing() -> tuple[GfnArray, GfnArray]:
    return np.empty(0, np.uint64), np.empty(0, np.uint64)


class _Lent:
    """Views that a caller writes through: a context manager, which marks the frames of their ranges when it ends."""

    __slots__ = ("_memory", "_ranges", "_views")

    def __init__(self, memory: "GuestMemory", ranges: Sequence[tuple[int, int]]) -> None:
        self._memory = memory
        self._ranges = ranges
        self._views = memory._byte_views(ranges)

    def __enter__(self) -> list[memoryview]:
        self._memory._under_way.append(None)
        return self._views

    def __exit__(self, *_: object) -> None:
        try:
            self._memory._mark(self._ranges)
        finally:
            self._memory._under_way.pop()


def _frames(gpa: int, size_bytes: int) -> GfnArray:
    """Return the frames of a range that is not empty, to be looked at only."""
    first, last = gpa >> PAGE_SHIFT, gpa + size_bytes - 1 >> PAGE_SHIFT
    return _few(first, last) if last - first < _FEW_FRAMES else np.arange(first, last + 1, dtype=np.uint64)


@lru_cache(maxsize=256)
def _few(first: int, last: int) -> GfnArray:
    # Devices write the same few frames again and again, their rings' above all.
    gfns = np.arange(first, last + 1, dtype=np.uint64)
    gfns.setflags(write=False)
    return gfns


class GuestMemory:
    """One guest's RAM.

    Args:
        regions: RAM, ascending and disjoint.
        mapping: host addresses with all of RAM mapped at offset gpa; at least ``gfn_limit`` pages.
        populated: returns the page runs (gfns) that have storage; the rest reads as zero.
        huge_pages: what lies underneath; not ``auto``.
        vcpu_mapping: where vCPUs touch this memory; None: in ``mapping`` too.
    """

    def __init__(
        self,
        regions: Sequence[RamRegion],
        mapping: HostMapping,
        populated: Callable[[], tuple[GfnArray, GfnArray]],
        *,
        huge_pages: HugePages = HugePages.OFF,
        vcpu_mapping: HostMapping | None = None,
    ) -> None:
        self.regions = tuple(regions)
        self.mapping = mapping
        self.storage: MemFd | None = None
        """The file with all of RAM at offset gpa, which another process may map too; None if there is no such file."""
        self.huge_pages = huge_pages
        self.advice = HugeAdvice(mapping, [range(r.gpa, r.gpa + r.size_bytes) for r in self.regions], huge_pages)
        """Where the host is told to use huge pages."""
        self._populated = populated
        self._vcpu_mapping = vcpu_mapping or mapping
        self._on_write: Callable[[GfnArray], None] | None = None
        self._under_way: list[None] = []  # one for each write not marked yet; append and pop need no lock
        self._fetch: Callable[[GfnArray], None] | None = None
        self._removed: DirtyBitmap | None = None  # made at the first removal
        self._low_bytes = self.regions[0].size_bytes if self.regions[0].gpa == 0 else 0
        self._plain_bytes = self._low_bytes  # what ends here may be touched without a further look
        self.gfn_limit = self.regions[-1].first_gfn + self.regions[-1].pages
        """One more than the last frame: the size of every dirty bitmap of this guest. Frames in the hole never set."""
        self.size_bytes = sum(region.size_bytes for region in self.regions)

    @classmethod
    def linear(
        cls,
        memory_bytes: int,
        *,
        huge_pages: HugePages = HugePages.OFF,
        storage: MemFd | None = None,
        needs_file: bool = False,
    ) -> "GuestMemory":
        """Make RAM in one piece: private memory, or a memfd whose offset is the gpa (the hole costs nothing).

        Args:
            memory_bytes: how much.
            huge_pages: what to ask of the host.
            storage: of another process, with its content; None makes a new one.
            needs_file: whether :meth:`map_again` will be called.

        Raises:
            UsageError: see :func:`ram_layout`, or the host refuses the size.
            UnsupportedError: the host's pool of huge pages is too small, or what is asked for cannot be a file.
        """
        regions = ram_layout(memory_bytes)
        end = regions[-1].gpa + regions[-1].size_bytes
        hugetlb = huge_pages is HugePages.HUGETLB
        if storage is not None and (hugetlb or huge_pages is HugePages.ANONYMOUS or storage.size_bytes != end):
            raise UnsupportedError("shared-memory", "memory of another kind cannot be taken over", hint=_COPY)
        kind = chosen(huge_pages, needs_file=needs_file or storage is not None)
        mapping = HostMapping(end)
        if kind is HugePages.ANONYMOUS:
            memory = cls(regions, mapping, partial(_filled, regions, mapping), huge_pages=kind)
            for region in regions:
                mapping.map_private(region.gpa, region.size_bytes)
        else:
            memfd = storage or MemFd("pageferry-ram", end, hugetlb=hugetlb)
            populated = partial(_touched, regions, mapping) if hugetlb else memfd.populated
            memory = cls(regions, mapping, populated, huge_pages=kind)
            memory.storage = None if hugetlb else memfd
            memory._map(memfd)
        memory.advice.everywhere()
        return memory

    def _map(self, memfd: MemFd) -> None:
        for region in self.regions:
            try:
                self.mapping.map_fd(memfd, region.gpa, region.gpa, region.size_bytes)
            except VmError as error:
                if not self.reserved:
                    raise
                pages = sum(-(-region.size_bytes // SIZE_2M) for region in self.regions)
                raise pool_too_small(pages) from error

    def map_again(self) -> HostMapping:
        """Return a second mapping of all of RAM, laid out as :attr:`mapping`, for a memory made by :meth:`linear`.

        It can be protected without effect on users of the first.

        Raises:
            UnsupportedError: memory of this kind cannot be mapped twice.
            VmError: the host has no room.
        """
        again = HostMapping(self.mapping.size_bytes)
        for region in self.regions:
            again.map_same(self.mapping, region.gpa, region.size_bytes)
        return again

    @property
    def pages(self) -> int:
        """How many frames the regions have (the hole not counted, removed frames counted)."""
        return self.size_bytes >> PAGE_SHIFT

    @property
    def reserved(self) -> bool:
        """Whether the host has set all of this memory aside already."""
        return self.huge_pages is HugePages.HUGETLB

    def huge_bytes(self) -> int | None:
        """Return how many bytes the host maps by huge pages now, or None where it was not asked for any."""
        return None if self.huge_pages is HugePages.OFF else self._vcpu_mapping.huge_bytes()

    def on_write(self, mark: Callable[[GfnArray], None] | None) -> None:
        """Set what is told of frames written through this object (a LogDirty's ``mark``); None: nothing is."""
        self._on_write = mark

    def on_touch(self, fetch: Callable[[GfnArray], None] | None) -> None:
        """Set what brings the content of frames before they are touched here; None: all of it is there."""
        self._fetch = fetch
        self._set_plain_bytes()

    def _set_plain_bytes(self) -> None:
        self._plain_bytes = self._low_bytes if self._fetch is None and self._removed is None else 0

    @property
    def unmarked_writes(self) -> int:
        """How many writes through this object are under way: their bytes may have landed without a mark."""
        return len(self._under_way)

    def is_ram(self, gpa: int, size_bytes: int = 1) -> bool:
        """Tell whether every byte of a range is RAM of one region."""
        if gpa >= 0 <= size_bytes and gpa + size_bytes <= self._plain_bytes:
            return True
        for region in self.regions:  # no any() here: every access of a device asks
            if region.gpa <= gpa and gpa + size_bytes <= region.gpa + region.size_bytes:
                return self._removed is None or not self._removed.test_many(gfns_touched(gpa, size_bytes)).any()
        return False

    def are_ram(self, gfns: GfnArray) -> np.typing.NDArray[np.bool_]:
        """Tell for each frame whether it is RAM, as bool[n]."""
        result = np.zeros(gfns.shape, np.bool_)
        for region in self.regions:
            result |= (gfns >= region.first_gfn) & (gfns < region.first_gfn + region.pages)
        if self._removed is not None:
            result[result] = ~self._removed.test_many(gfns[result])
        return result

    def all_ram(self) -> DirtyBitmap:
        """Return a bitmap with every frame of RAM set."""
        bitmap = DirtyBitmap(self.gfn_limit)
        for region in self.regions:
            bitmap.set_range(region.first_gfn, region.pages)
        if self._removed is not None:
            bitmap -= self._removed
        return bitmap

    def removed(self) -> GfnArray:
        """Return the frames of the regions that are not RAM now, ascending: a destination must remove them as well."""
        return np.empty(0, np.uint64) if self._removed is None else self._removed.gfns()

    def remove(self, gfns: GfnArray) -> None:
        """Stop counting frames of the regions as RAM; for the machine, which has taken them away."""
        if self._removed is None:
            self._removed = DirtyBitmap(self.gfn_limit)
            self._set_plain_bytes()
        self._removed.set(gfns)

    def restore(self, gfns: GfnArray) -> None:
        """Make removed frames be RAM again; for the machine, which has put frames there."""
        if self._removed is not None:
            self._removed.clear(gfns)

    def populated(self) -> tuple[GfnArray, GfnArray]:
        """Return the page runs with storage as ``(starts, lengths)``, ascending; all else was never touched and is 0.

        The answer is a snapshot: a page may become populated at any time, and is then dirty if log-dirty is on.
        """
        return self._populated()

    def read(self, gpa: int, size_bytes: int) -> bytes:
        """Return a copy of a range.

        Raises:
            VmError: the range is not RAM.
        """
        self._check(gpa, size_bytes)
        return bytes(self.mapping.view[gpa : gpa + size_bytes])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data`` at ``gpa``, then mark its frames dirty.

        Raises:
            VmError: the range is not RAM; nothing was written.
        """
        size_bytes = len(data)
        self._check(gpa, size_bytes)
        self._under_way.append(None)
        try:
            self.mapping.view[gpa : gpa + size_bytes] = data
            if self._on_write is not None and size_bytes:
                self._on_write(_frames(gpa, size_bytes))
        finally:
            self._under_way.pop()

    def copy_within(self, source_gpa: int, target_gpa: int, size_bytes: int) -> None:
        """Copy a range inside the guest (overlap allowed), then mark the target's frames dirty.

        Raises:
            VmError: a range is not RAM; nothing was written.
        """
        self._check(source_gpa, size_bytes)
        view = np.frombuffer(self.mapping.view, np.uint8)
        with self.writing(((target_gpa, size_bytes),)):
            view[target_gpa : target_gpa + size_bytes] = view[source_gpa : source_gpa + size_bytes]

    def reading(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Return one read-only view per range ``(gpa, size_bytes)``, straight onto guest memory: for gather I/O.

        Raises:
            VmError: a range is not RAM.
        """
        return [view.toreadonly() for view in self._byte_views(ranges)]

    def writing(self, ranges: Sequence[tuple[int, int]]) -> AbstractContextManager[list[memoryview]]:
        """Lend one writable view per range ``(gpa, size_bytes)``: for scatter I/O.

        When the block ends, however it does, the frames of all ranges are marked dirty.

        Raises:
            VmError: a range is not RAM; the block was not entered.
        """
        return _Lent(self, ranges)

    def _mark(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Mark the frames of ranges that were written."""
        if self._on_write is None:
            return
        touched = [_frames(gpa, size_bytes) for gpa, size_bytes in ranges if size_bytes]
        if touched:
            self._on_write(touched[0] if len(touched) == 1 else np.concatenate(touched))

    def _byte_views(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        view, plain_bytes = self.mapping.view, self._plain_bytes
        for gpa, size_bytes in ranges:
            if gpa < 0 or size_bytes < 0 or gpa + size_bytes > plain_bytes:
                self._check(gpa, size_bytes)
        return [view[gpa : gpa + size_bytes] for gpa, size_bytes in ranges]

    def read_u64(self, gpa: int) -> int:
        """Return the little-endian u64 at ``gpa``."""
        return int.from_bytes(self.read(gpa, 8), "little")

    def wrote(self, gfns: GfnArray) -> None:
        """Mark frames dirty that the caller has just written through :meth:`views`."""
        if self._on_write is not None and gfns.size:
            self._on_write(gfns)

    def views(self, starts: GfnArray, lengths: GfnArray) -> list[memoryview]:
        """Return one writable view per run, straight onto guest memory: for gather and scatter I/O.

        A caller that writes through a view calls :meth:`wrote` afterwards.

        Raises:
            VmError: a frame is not RAM.
        """
        self._expect_runs(starts, lengths)
        self._expect_there(lambda: expand_runs(starts, lengths))
        view = self.mapping.view
        begins = (starts << np.uint64(PAGE_SHIFT)).tolist()
        ends = ((starts + lengths) << np.uint64(PAGE_SHIFT)).tolist()
        return [view[begin:end] for begin, end in zip(begins, ends, strict=True)]

    def holds(self, run: range) -> bool:
        """Tell whether all frames of a run are RAM of one region."""
        for region in self.regions:
            if region.first_gfn <= run.start and run.stop <= region.first_gfn + region.pages:
                return self._removed is None or not self._removed.test_many(np.array(run, np.uint64)).any()
        return False

    def view(self, run: range) -> memoryview:
        """Return one view, of a run of frames; as :meth:`views` otherwise."""
        if not self.holds(run):
            raise VmError("a run of frames is not inside guest memory")
        self._expect_there(lambda: np.array(run, np.uint64))
        return self.mapping.view[run.start << PAGE_SHIFT : run.stop << PAGE_SHIFT]

    def page_views(self, gfns: GfnArray) -> list[memoryview]:
        """Return one view per frame; as :meth:`views` otherwise."""
        return self.views(gfns, np.ones_like(gfns))

    def populate(self, starts: GfnArray, lengths: GfnArray) -> None:
        """Give storage to runs ahead of a write, without the interpreter lock; content stays as it is.

        Raises:
            VmError: a frame is not RAM, or the host is out of memory.
        """
        self._expect_runs(starts, lengths)
        self.advice.make_huge(starts, lengths)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            self.mapping.advise(start << PAGE_SHIFT, length << PAGE_SHIFT, MADV_POPULATE_WRITE)

    def release(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Give the storage of ranges ``(gpa, size_bytes)`` back to the host: they read as zeros then, and are dirty.

        Args:
            ranges: of whole pages.

        Returns:
            False: it cannot be done, of a pool of huge pages, or while pages of the guest are absent; all is as it was.

        Raises:
            VmError: a range is not RAM; nothing was released.
        """
        if self.reserved or self._fetch is not None:
            for gpa, size_bytes in ranges:
                self._expect_ram(gpa, size_bytes)
            return False
        with self.writing(ranges):
            for gpa, size_bytes in ranges:
                self._drop(gpa, size_bytes)
        return True

    def drop(self, starts: GfnArray, lengths: GfnArray) -> None:
        """Take the storage of runs of RAM away, in every mapping of it, and mark nothing: their content comes later."""
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            self._drop(start << PAGE_SHIFT, length << PAGE_SHIFT)

    def _drop(self, gpa: int, size_bytes: int) -> None:
        private = self.huge_pages is HugePages.ANONYMOUS
        self.mapping.advise(gpa, size_bytes, MADV_DONTNEED if private else MADV_REMOVE)

    def close(self) -> None:
        """Give all storage back to the host at once. A view that is still held reads as zeros."""
        self._on_write = None
        self._populated = _nothing
        self.mapping.clear()
        if self.storage is not None:  # else the file, and all that it holds, would last until this object is collected
            self.storage.close()

    def _expect_runs(self, starts: GfnArray, lengths: GfnArray) -> None:
        if starts.size == 1:  # as most often, where all of memory is gone through
            fits = self.holds(range(int(starts[0]), int(starts[0]) + int(lengths[0])))
        else:
            fits = not starts.size or (self._inside(starts, lengths) and self._none_removed(starts, lengths))
        if not fits:
            raise VmError("a run of frames is not inside guest memory")

    def _inside(self, starts: GfnArray, lengths: GfnArray) -> bool:
        fits = [
            (starts >= r.first_gfn) & (starts + lengths <= r.first_gfn + r.pages) & (lengths <= r.pages)
            for r in self.regions
        ]
        return bool(np.any(fits, axis=0).all())

    def _none_removed(self, starts: GfnArray, lengths: GfnArray) -> bool:
        return self._removed is None or not self._removed.test_many(expand_runs(starts, lengths)).any()

    def _check(self, gpa: int, size_bytes: int) -> None:
        if gpa >= 0 <= size_bytes and gpa + size_bytes <= self._plain_bytes:
            return
        self._expect_ram(gpa, size_bytes)
        if self._fetch is not None:
            self._expect_there(lambda: gfns_touched(gpa, size_bytes))

    def _expect_ram(self, gpa: int, size_bytes: int) -> None:
        if gpa < 0 or size_bytes < 0 or not self.is_ram(gpa, size_bytes):
            raise VmError(f"guest-physical range {gpa:#x}+{size_bytes:#x} is not RAM")

    def _expect_there(self, gfns: Callable[[], GfnArray]) -> None:
        fetch = self._fetch  # looked at once: it may be over in the next moment
        if fetch is not None:
            fetch(gfns())
