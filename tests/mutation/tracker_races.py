"""Faults that are races, in front of any tracker that is sound: each wrapper holds the marks itself, and not soundly.

See :mod:`.tracker_faults`.
"""

import threading

from mutation.tracker_wrapper import Faithful
from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import GfnArray
from pageferry.core.machine import Machine
from pageferry.core.vm import LogDirtyStats


class HoldsMarks(Faithful):
    """Marks in a bitmap here, which CLEAN takes out under a lock, as mark sets them: the base of the faults."""

    def __init__(self, vm: Machine) -> None:
        super().__init__(vm)
        self._lock = threading.Lock()
        self._marks = DirtyBitmap(vm.memory.gfn_limit)

    def enable(self) -> None:
        """ENABLE."""
        super().enable()
        self._marks = DirtyBitmap(self._marks.nbits)

    def peek(self) -> DirtyBitmap:
        """PEEK."""
        seen = super().peek()
        with self._lock:
            return seen | self._marks

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN: the bitmap is exchanged for an empty one, and what lies beside the range is put back."""
        bitmap = super().clean_range(gfns)
        with self._lock:
            taken, self._marks = self._marks, DirtyBitmap(self._marks.nbits)
            bitmap |= taken.take(gfns)
            self._marks |= taken
        return bitmap

    def stats(self) -> LogDirtyStats:
        """Return the counters."""
        return LogDirtyStats(fault_count=self._sound.stats().fault_count, dirty_count=self.peek().count())

    def mark(self, gfns: GfnArray) -> None:
        """Mark frames."""
        if self.enabled:
            frames = gfns[self._vm.memory.are_ram(gfns)]
            with self._lock:
                self._marks.set(frames)


class MarkFindsTheBitmapUnlocked(HoldsMarks):
    """A mark looks up the bitmap before it takes the lock: CLEAN may have handed that one out meanwhile."""

    def mark(self, gfns: GfnArray) -> None:
        """Mark in the bitmap that was there."""
        if self.enabled:
            frames, marks = gfns[self._vm.memory.are_ram(gfns)], self._marks
            with self._lock:
                marks.set(frames)


class MarkTakesNoLock(HoldsMarks):
    """CLEAN copies the marks and clears them, and a mark that comes between the two takes no lock."""

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN, in two steps."""
        bitmap = Faithful.clean_range(self, gfns)
        with self._lock:
            bitmap |= self._marks.take(gfns)
        return bitmap

    def mark(self, gfns: GfnArray) -> None:
        """Mark at once."""
        if self.enabled:
            self._marks.set(gfns[self._vm.memory.are_ram(gfns)])


class PeekWritesBack(HoldsMarks):
    """PEEK takes the marks out and puts them back: what was marked meanwhile is gone."""

    def peek(self) -> DirtyBitmap:
        """PEEK, without the lock."""
        marks = self._marks.copy()
        seen = Faithful.peek(self) | marks
        self._marks = marks
        return seen


FAULTS: tuple[type[Faithful], ...] = (MarkFindsTheBitmapUnlocked, MarkTakesNoLock, PeekWritesBack)
