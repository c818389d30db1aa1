"""Conformance checks of races that are brought about: an operator between any two steps of another (:mod:`.steps`)."""

from collections.abc import Callable, Iterator

import numpy as np

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import gpa_of
from pageferry.testing.lab import Copy, Guest, Lab, Violation, listed, require
from pageferry.testing.operators import STRAY_GFN
from pageferry.testing.steps import Interrupted, called_by

#: Written by a device: before the two calls that race, and by one of them.
_BEFORE_GFN, _RACING_GFN = STRAY_GFN, STRAY_GFN + 1
_GFNS = np.array([_BEFORE_GFN, _RACING_GFN], np.uint64)


class _Race:
    """A device's writes against operators; what CLEAN reports is copied at once, as a migration might."""

    def __init__(self, guest: Guest, operator: Callable[[], DirtyBitmap]) -> None:
        self._guest = guest
        self.operator = operator
        self._copy = Copy(guest.memory)
        self._copy.take_all()
        self._reported = DirtyBitmap(guest.memory.gfn_limit)
        self._number = 0

    def write(self) -> None:
        """A device writes a page, and marks it."""
        self._guest.memory.write(gpa_of(_RACING_GFN), self._number.to_bytes(8, "little"))

    def take(self, reported: DirtyBitmap | None) -> None:
        """Note what CLEAN has just reported, and copy those pages."""
        if reported is not None:
            self._reported |= reported
            self._copy.take(reported)

    def clean(self) -> None:
        """CLEAN, and copy the pages that it reports."""
        self.take(self.operator())

    def explore(
        self, what: str, first: Callable[[], DirtyBitmap | None], second: Callable[[], None], *, bitmap_counts: bool
    ) -> None:
        """Have ``second`` interrupt ``first`` before each of its steps; what a device wrote is reported each time."""
        place: str | None = ""
        while place is not None:
            self._number += 1
            self._reported.words[:] = 0
            self._guest.memory.write(gpa_of(_BEFORE_GFN), self._number.to_bytes(8, "little"))
            race = Interrupted(first, second, self._number - 1, done=self.take if bitmap_counts else lambda _: None)
            try:
                race.run()
            except Exception as error:
                raise Violation(f"{what} at {race.place}: {error!r}") from error
            place = race.place
            if place is None:
                second()
            self.clean()
            lost = _GFNS[~self._reported.test_many(_GFNS)]
            require(not lost.size, f"{what} at {place}: a device's write is in no bitmap: {listed(lost)}")
            self._copy.require_equal_at(_GFNS, f"{what} at {place}: ")


def clean_between_steps_of_a_mark(lab: Lab) -> None:
    """A CLEAN that falls between any two steps of a device's write and its mark loses nothing."""
    for race in _races(lab):
        race.explore("a mark that CLEAN interrupts", race.write, race.clean, bitmap_counts=False)


def mark_between_steps_of_clean(lab: Lab) -> None:
    """A device's write that falls between any two steps of a CLEAN is in this bitmap or the next one."""
    for race in _races(lab):
        race.explore("CLEAN that a mark interrupts", race.operator, race.write, bitmap_counts=True)


def mark_between_steps_of_peek(lab: Lab) -> None:
    """A device's write that falls between any two steps of a PEEK is in the next CLEAN's bitmap."""
    with lab.tracked(pages=8) as guest:
        race = _Race(guest, guest.log_dirty.clean)
        race.explore("PEEK that a mark interrupts", guest.log_dirty.peek, race.write, bitmap_counts=False)


def _races(lab: Lab) -> Iterator[_Race]:
    with lab.tracked(pages=8) as guest:
        log_dirty = guest.log_dirty
        yield _Race(guest, log_dirty.clean)
        if "clean_range" not in called_by(log_dirty.clean):
            yield _Race(guest, lambda: log_dirty.clean_range(range(64)))
