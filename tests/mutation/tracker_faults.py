"""Faults to inject: trackers that are wrong in one way each, to prove that the conformance kit finds it.

Each wraps a sound tracker of any machine; ``mutated(make_vm, fault)`` gives the kit a machine with that fault. Those
of marks are in :mod:`.tracker_marks`, those that are races in :mod:`.tracker_races`, those of CLEAN of a range alone in
:mod:`.tracker_ranges`.
"""

import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from altered import alter
from numpy.typing import NDArray

from mutation import tracker_marks, tracker_races, tracker_ranges
from mutation.tracker_wrapper import WINDOW_S, Faithful
from pageferry.core.bitmap import DirtyBitmap, expand_runs
from pageferry.core.errors import LogDirtyError
from pageferry.core.frames import PCI_HOLE_END, PCI_HOLE_START, GfnArray, gfn_of, gfns_touched, gpa_of
from pageferry.core.machine import Machine
from pageferry.core.vm import LogDirtyStats
from pageferry.testing.operators import STRAY_GFN

_A_HANDFUL = 16
_Ranges: TypeAlias = Sequence[tuple[int, int]]


class DropsABit(Faithful):
    """CLEAN forgets the last frame of each bitmap."""

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN, one bit short."""
        bitmap = self._sound.clean_range(gfns)
        if bitmap.any():
            bitmap.clear(int(bitmap.gfns()[-1]))
        return bitmap


class DropsTheLastWord(Faithful):
    """CLEAN and PEEK forget the last, partial word of the bitmap."""

    def peek(self) -> DirtyBitmap:
        """PEEK, rounded down to whole words."""
        return self._cut(self._sound.peek())

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN, rounded down to whole words."""
        return self._cut(self._sound.clean_range(gfns))

    def _cut(self, bitmap: DirtyBitmap) -> DirtyBitmap:
        if bitmap.nbits % 64:
            bitmap.words[-1] = 0
        return bitmap


class SkipsSmallRounds(Faithful):
    """A handful of dirty pages counts as none, and CLEAN forgets them."""

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN, when it is worth it."""
        bitmap = self._sound.clean_range(gfns)
        return bitmap if bitmap.count() >= _A_HANDFUL else DirtyBitmap(bitmap.nbits)


class DoesNotProtectAgain(Faithful):
    """CLEAN clears a bit but leaves its page writable, so that the next write to it goes unseen."""

    def __init__(self, vm: Machine) -> None:
        super().__init__(vm)
        self._writable = DirtyBitmap(vm.memory.gfn_limit)

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN, without those of the CLEAN before."""
        seen = self._sound.clean_range(gfns) - self._writable.take(gfns)
        self._writable |= seen
        return seen


class LosesReleasedPages(Faithful):
    """A page whose storage was given back is marked; its new storage is never protected, and writes to it go unseen."""

    def __init__(self, vm: Machine) -> None:
        super().__init__(vm)
        self._released = DirtyBitmap(vm.memory.gfn_limit)
        self._unprotected = DirtyBitmap(vm.memory.gfn_limit)
        alter(vm.memory, "release", self._noted)

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN, without those that were released before the CLEAN before."""
        seen = self._sound.clean_range(gfns) - self._unprotected
        self._unprotected |= self._released.take(gfns)
        return seen

    def _noted(self, sound: Callable[[_Ranges], bool]) -> Callable[[_Ranges], bool]:
        def release(ranges: _Ranges) -> bool:
            done = sound(ranges)
            if done:
                for gpa, size_bytes in ranges:
                    self._released.set(gfns_touched(gpa, size_bytes))
            return done

        return release


class ClearsAfterTheCopy(Faithful):
    """CLEAN copies the bitmap, and clears it a little later: a write in between is lost."""

    _writes = 0

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN in two steps, and a device that writes in between, every time."""
        bitmap = self._sound.peek().take(gfns)
        self._writes += 1
        self._vm.memory.write(gpa_of(STRAY_GFN), self._writes.to_bytes(8, "little"))
        self._sound.clean_range(gfns)
        return bitmap


class ReportsLate(Faithful):
    """CLEAN returns the bitmap of the CLEAN before."""

    def __init__(self, vm: Machine) -> None:
        super().__init__(vm)
        self._late = DirtyBitmap(vm.memory.gfn_limit)

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN, one call late."""
        last = self._late.take(gfns)
        self._late |= self._sound.clean_range(gfns)
        return last


class NeverClears(Faithful):
    """CLEAN is a PEEK."""

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """PEEK."""
        return self._sound.peek().take(gfns)


class PeekClears(Faithful):
    """PEEK is a CLEAN."""

    def peek(self) -> DirtyBitmap:
        """CLEAN."""
        return self._sound.clean()


class SharesItsBitmap(Faithful):
    """PEEK and CLEAN hand out one and the same object."""

    _shared: DirtyBitmap | None = None

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN into the shared object."""
        bitmap = self._sound.clean_range(gfns)
        if self._shared is None:
            self._shared = bitmap
        self._shared.words[:] = bitmap.words
        return self._shared


class EnablesTwice(Faithful):
    """A second ENABLE is accepted, and starts afresh."""

    def enable(self) -> None:
        """ENABLE without a check."""
        if self._sound.enabled:
            self._sound.clean()
        else:
            self._sound.enable()


class StartsAllDirty(Faithful):
    """ENABLE starts with all of RAM set."""

    def enable(self) -> None:
        """ENABLE and set everything."""
        self._sound.enable()
        self._sound.mark(self._vm.memory.all_ram().gfns())


class WorksWhileOff(Faithful):
    """PEEK and CLEAN return an empty bitmap instead of refusing."""

    def peek(self) -> DirtyBitmap:
        """PEEK, or nothing."""
        return self._sound.peek() if self.enabled else DirtyBitmap(self._vm.memory.gfn_limit)

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN, or nothing."""
        return self._sound.clean_range(gfns) if self.enabled else DirtyBitmap(self._vm.memory.gfn_limit)


class OffDoesNothing(Faithful):
    """OFF is ignored."""

    def off(self) -> None:
        """Do nothing."""


class OffKeepsTheBits(Faithful):
    """OFF keeps the bitmap for the next ENABLE, which finds old bits in it."""

    _kept: DirtyBitmap | None = None

    def off(self) -> None:
        """OFF, remembering."""
        if self.enabled:
            self._kept = self._sound.peek()
        self._sound.off()

    def enable(self) -> None:
        """ENABLE, with the bits of last time."""
        self._sound.enable()
        if self._kept is not None:
            self._sound.mark(self._kept.gfns())


class IgnoresTheHole(Faithful):
    """RAM behind the PCI hole is reported as if there were none."""

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN with frames shifted down."""
        bitmap = self._sound.clean_range(gfns)
        found, hole = bitmap.gfns(), np.uint64(gfn_of(PCI_HOLE_END) - gfn_of(PCI_HOLE_START))
        above = found >= np.uint64(gfn_of(PCI_HOLE_END))
        return DirtyBitmap.of(bitmap.nbits, np.where(above, found - hole * above.astype(np.uint64), found))


class ReportsAllAlways(Faithful):
    """CLEAN reports all of RAM: safe, and useless."""

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN."""
        return self._sound.clean_range(gfns) | self._vm.memory.all_ram().take(gfns)


class _LooksAtContents(Faithful):
    """What was written is judged by what the pages hold: the base of two faults."""

    def __init__(self, vm: Machine) -> None:
        super().__init__(vm)
        self._known: dict[int, int] = {}

    def enable(self) -> None:
        """ENABLE, and note what the pages with storage hold."""
        self._sound.enable()
        self._note(expand_runs(*self._vm.memory.populated()))

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN, without pages that hold what they held at the last."""
        seen = self._sound.clean_range(gfns)
        before, written = self._known.copy(), seen.gfns()
        self._note(written)
        same = [gfn for gfn in written.tolist() if before.get(gfn) == self._known[gfn]]
        seen.clear(np.array(same, np.uint64))
        return seen

    def _note(self, gfns: GfnArray) -> None:
        for gfn, view in zip(gfns.tolist(), self._vm.memory.page_views(gfns), strict=True):
            self._known[gfn] = self._summary_of(np.frombuffer(view, np.uint64))

    def _summary_of(self, words: NDArray[np.uint64]) -> int:
        return hash(words.tobytes())


class ReportsWhatDiffers(_LooksAtContents):
    """CLEAN reports pages that hold something else than at the CLEAN before, however often they changed between."""


class ReportsChangedSums(_LooksAtContents):
    """CLEAN reports pages whose words have another sum than at the CLEAN before."""

    def _summary_of(self, words: NDArray[np.uint64]) -> int:
        return int(words.sum())


class CountsWrong(Faithful):
    """``dirty_count`` says 0 while pages are dirty."""

    def stats(self) -> LogDirtyStats:
        """Return truncated counters."""
        return LogDirtyStats(fault_count=self._sound.stats().fault_count, dirty_count=0)


class FaultsTwice(Faithful):
    """Each page costs two faults in a cycle."""

    _pages = 0

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN, counting."""
        bitmap = self._sound.clean_range(gfns)
        self._pages += bitmap.count()
        return bitmap

    def stats(self) -> LogDirtyStats:
        """Return twice the faults."""
        sound = self._sound.stats()
        return LogDirtyStats(fault_count=2 * (self._pages + sound.dirty_count), dirty_count=sound.dirty_count)


class BreaksUnderTwoCallers(Faithful):
    """CLEAN is not safe to call from two threads: one that comes while the other is there is refused."""

    def __init__(self, vm: Machine) -> None:
        super().__init__(vm)
        self._callers: set[int] = set()
        self._one = threading.Lock()
        self._refused = threading.Event()

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN, for one; once there are two, each gives the other the time to come."""
        if not self._one.acquire(blocking=False):
            self._refused.set()
            raise LogDirtyError("busy")
        try:
            self._callers.add(threading.get_ident())
            if len(self._callers) > 1:
                self._refused.wait(WINDOW_S)
            return self._sound.clean_range(gfns)
        finally:
            self._one.release()


FAULTS: tuple[type[Faithful], ...] = (
    DropsABit,
    DropsTheLastWord,
    SkipsSmallRounds,
    DoesNotProtectAgain,
    LosesReleasedPages,
    ClearsAfterTheCopy,
    ReportsLate,
    NeverClears,
    PeekClears,
    SharesItsBitmap,
    EnablesTwice,
    StartsAllDirty,
    WorksWhileOff,
    OffDoesNothing,
    OffKeepsTheBits,
    IgnoresTheHole,
    ReportsAllAlways,
    ReportsWhatDiffers,
    ReportsChangedSums,
    CountsWrong,
    FaultsTwice,
    BreaksUnderTwoCallers,
    *tracker_marks.FAULTS,
    *tracker_races.FAULTS,
    *tracker_ranges.FAULTS,
)
