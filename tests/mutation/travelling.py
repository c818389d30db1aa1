"""Faults of the ways that pages travel: encoded, by name, on several connections, by a file, after a switch."""

from collections.abc import Callable
from typing import Any

import numpy as np
from altered import AlteredDestination, AlteredSave, AlteredSource

from mutation.fault import Faults, Room
from mutation.moving import unless_nothing_remained
from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PAGE_SIZE, PAGES_PER_2M, GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.page_words import PageWords, page_words
from pageferry.engine.image.lazy import LazyRestore
from pageferry.engine.image.proof import AtPause
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.engine.pages.cache import PageCache
from pageferry.engine.pages.encode import PackingCoder
from pageferry.engine.pages.receive import PageWriter
from pageferry.engine.pages.send import Lanes
from pageferry.engine.postcopy.pager import DemandPager
from pageferry.engine.source import DestinationSink
from pageferry.stream.encoder import Encoder
from pageferry.stream.packing import Packer
from pageferry.stream.records import ZeroPages

fault = Faults(Room.ENGINE)

_NEEDS = "lz4"


class _Rereads(PageCache):
    """Remembers what is in memory now instead of what it is given."""

    def __init__(self, memory: GuestMemory, sound: PageCache) -> None:
        super().__init__(sound.capacity_pages * PAGE_SIZE, memory.gfn_limit)
        self._memory_words = page_words(memory)

    def swap(self, gfns: GfnArray, pages: PageWords) -> Any:
        return super().swap(gfns, self._memory_words[gfns])


class _CachesMemory(PackingCoder):
    def __init__(self, memory: GuestMemory, encoder: Encoder, packer: Packer, cache: PageCache | None) -> None:
        super().__init__(memory, encoder, packer, None if cache is None else _Rereads(memory, cache))


@fault(
    "QEMU: XBZRLE encoded a page straight from memory that the guest was changing",
    law=3,
    found_by=("written-while-it-is-encoded",),
    needs=_NEEDS,
)
class CacheReadsMemoryAgain(AlteredSource, parts={"source.PackingCoder": _CachesMemory}):
    """What goes into the delta cache is read from memory once more, and is not what was sent."""


class _NeverForgets(PackingCoder):
    def forget(self, gfns: GfnArray) -> None:
        pass


@fault(
    "QEMU: a page that was sent as zero stayed in the XBZRLE cache with its old content",
    law=2,
    found_by=("zero-and-back-again",),
    needs=_NEEDS,
)
class CacheKeepsWhatBecameZero(AlteredSource, parts={"source.PackingCoder": _NeverForgets}):
    """A page that is named zero stays in the delta cache: the next change is one of its old content."""


class _LeavesWhatWasThere(PageWriter):
    def zero_pages(self, record: ZeroPages) -> None:
        self._pages.arrived(record.pfns)


@fault(
    "QEMU: zero pages were left out of the first round, and the destination's memory was not zero everywhere",
    law=2,
    found_by=("a-page-becomes-zero",),
)
class ZeroNamedAndNotCleared(AlteredDestination, parts={"pages.receive.PageWriter": _LeavesWhatWasThere}):
    """The destination notes that a page became zero, and leaves in it what was there."""


class _SkipsBorders(Lanes):
    def send(self, gfns: GfnArray, *, fresh: bool) -> None:
        last = np.uint64(PAGES_PER_2M - 1)
        super().send(gfns[gfns % np.uint64(PAGES_PER_2M) != last] if len(self.all) > 1 else gfns, fresh=fresh)


@fault(
    "no bug on record: what a partition by ranges invites",
    law=2,
    found_by=("both-sides-of-a-border",),
)
class BorderPageSkipped(AlteredSource, parts={"source.Lanes": _SkipsBorders}):
    """Over several connections, the last page of a connection's piece is on none of them."""


class _NeverDrains(Lanes):
    def drain(self) -> None:
        pass


class _NeverFences(DestinationSink):
    def fence(self, number: int) -> None:
        pass


@fault(
    "no bug on record: each connection keeps its own pages in order, and none knows where a round ends",
    law=3,
    found_by=("a-round-ends-when-all-is-sent",),
)
class BarrierMissing(AlteredSource, parts={"source.Lanes": _NeverDrains, "source.DestinationSink": _NeverFences}):
    """A round ends when the first connection has sent its pages."""


@fault(
    "Xen: the dirty count read 0, so a round was skipped",
    law=2,
    found_by=("saved-after-the-last-count",),
)
class SavedWithoutTheLastRound(AlteredSave, parts={"image.save.stop_and_copy": unless_nothing_remained}):
    """When the last round left nothing dirty, a save has nothing to write at the pause."""


class _ExpectsNothing(AtPause):
    def expect_in(self, saved: SavedGuest, check: Callable[[], None]) -> None:
        pass


@fault(
    "no bug on record: what was written is taken for what is on the disk",
    law=7,
    found_by=("a-spoiled-file-is-no-file",),
)
class FileNotReadBack(AlteredSave, parts={"image.save.AtPause": _ExpectsNothing}):
    """A file gets its name when it is written, and is not compared with the guest."""


class _LetsTouch(DemandPager):
    def fetch(self, gfns: GfnArray) -> None:
        pass


@fault(
    "no bug on record: what is old in memory looks like any other content",
    law=2,
    found_by=("written-before-it-came",),
)
class MissingPagesNotWaitedFor(AlteredDestination, parts={"postcopy.client.DemandPager": _LetsTouch}):
    """In post-copy, a missing page is used without a wait for its content."""


@fault(
    "no bug on record: the thread that reads the rest does not ask what is there by now",
    law=2,
    found_by=("touched-before-it-is-read",),
)
class RestReadOverWhatIsThere(LazyRestore):
    """The rest of a lazy restore is read over pages that came early and were written since."""

    def read_ahead(self) -> None:
        everything: Any = self._pager
        everything._missing = DirtyBitmap.of(everything._missing.nbits, self._saved.data_pages)
        everything.missing_pages = self._saved.data_pages.size
        super().read_ahead()
