"""Faults of marks, in front of any tracker; see :mod:`.tracker_faults`."""

import threading

from mutation.tracker_wrapper import WINDOW_S, Faithful
from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import GfnArray
from pageferry.core.machine import Machine


class MarksNothing(Faithful):
    """Writers that are not vCPUs are not seen."""

    def mark(self, gfns: GfnArray) -> None:
        """Do nothing."""


class MarksTheFirst(Faithful):
    """A write over several frames marks only the first."""

    def mark(self, gfns: GfnArray) -> None:
        """Mark too little."""
        self._sound.mark(gfns[:1])


class MarkLosesARace(Faithful):
    """A mark is recorded a little late: a CLEAN by another thread that overtakes it swallows it."""

    def __init__(self, vm: Machine) -> None:
        super().__init__(vm)
        self._cleaner: int | None = None
        self._overtaken = threading.Event()
        self._patience = 3  # a thread that cleans may wait for the one that marks

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN."""
        self._cleaner = threading.get_ident()
        self._overtaken.set()
        return self._sound.clean_range(gfns)

    def mark(self, gfns: GfnArray) -> None:
        """Mark, unless a CLEAN comes in between; while another thread calls it, there is the time for that."""
        self._overtaken.clear()
        if self._patience and self._cleaner not in (None, threading.get_ident()):
            if self._overtaken.wait(WINDOW_S):
                return
            self._patience -= 1
        self._sound.mark(gfns)


class RefusesStrangeMarks(Faithful):
    """A mark of a frame that is not RAM raises."""

    def mark(self, gfns: GfnArray) -> None:
        """Raise for frames beyond the bitmap."""
        DirtyBitmap(self._vm.memory.gfn_limit).set(gfns)
        self._sound.mark(gfns)


FAULTS: tuple[type[Faithful], ...] = (
    MarksNothing,
    MarksTheFirst,
    MarkLosesARace,
    RefusesStrangeMarks,
)
