"""Faults of CLEAN of a range alone, in front of any tracker whose whole CLEAN is sound; see :mod:`.tracker_faults`."""

import numpy as np

from mutation.tracker_wrapper import Faithful
from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PCI_HOLE_END, GfnArray, gfn_of
from pageferry.core.machine import Machine

_WORD = 64


class _SoundWhole(Faithful):
    def clean(self) -> DirtyBitmap:
        return self._sound.clean()


class RangeClearsAll(_SoundWhole):
    """CLEAN of a range clears and protects all frames, and returns the range's bits."""

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN, cut down."""
        return self._sound.clean().take(gfns)


class RangeReturnsAll(_SoundWhole):
    """CLEAN of a range returns the bits of all frames, and clears the range's."""

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of the range, and a PEEK."""
        shown = self._sound.peek()
        return self._sound.clean_range(gfns) | shown


class RangeProtectsItsFirstWord(_SoundWhole):
    """CLEAN of a range protects its first 64 frames again; what is written to the others then goes unseen."""

    def __init__(self, vm: Machine) -> None:
        super().__init__(vm)
        self._writable = DirtyBitmap(vm.memory.gfn_limit)

    def clean(self) -> DirtyBitmap:
        """CLEAN, which protects all."""
        seen = self._sound.clean() - self._writable
        self._writable.words[:] = 0
        return seen

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of the range, without those that were left writable."""
        seen = self._sound.clean_range(gfns) - self._writable
        rest = seen.copy()
        rest.take(range(gfns.start, gfns.start + _WORD))
        self._writable |= rest
        return seen


class RangeClearsBeforeItReads(_SoundWhole):
    """CLEAN of a range clears its bits first and copies them then."""

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of the range, and what has come since."""
        self._sound.clean_range(gfns)
        return self._sound.peek().take(gfns)


class RangeShiftedByAWord(_SoundWhole):
    """CLEAN of a range returns its bits one word too low."""

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of the range, 64 frames off."""
        bitmap = self._sound.clean_range(gfns)
        return DirtyBitmap(bitmap.nbits, np.append(bitmap.words[1:], np.uint64(0)))


class RangeForgetsTheTail(_SoundWhole):
    """CLEAN of a range that goes to the end of RAM forgets the last, partial word."""

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of the range, rounded down."""
        bitmap = self._sound.clean_range(gfns)
        if bitmap.nbits % _WORD:
            bitmap.words[-1] = 0
        return bitmap


class RangeEndsAtTheHole(_SoundWhole):
    """CLEAN of a range finds no page behind the PCI hole."""

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of the range, as far as it lies below 4 GiB."""
        below = min(gfns.stop, gfn_of(PCI_HOLE_END))
        return self._sound.clean_range(range(min(gfns.start, below), below))


class RangeRoundedOutward(_SoundWhole):
    """CLEAN of a range takes whole words where the caller gave part of them."""

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of more."""
        return self._sound.clean_range(range(max(0, gfns.start) & -_WORD, -(-gfns.stop // _WORD) * _WORD))


class EmptyRangeIsAll(_SoundWhole):
    """An empty range is taken for all frames."""

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of the range, if there is one."""
        return self._sound.clean_range(gfns) if gfns else self._sound.clean()


class RangeWorksWhileOff(_SoundWhole):
    """CLEAN of a range returns an empty bitmap while log-dirty is off."""

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of the range, or nothing."""
        return self._sound.clean_range(gfns) if self.enabled else DirtyBitmap(self._vm.memory.gfn_limit)


class RangeKnowsNoMarks(_SoundWhole):
    """What others than vCPUs wrote is reported by a CLEAN of everything only."""

    def __init__(self, vm: Machine) -> None:
        super().__init__(vm)
        self._marked = DirtyBitmap(vm.memory.gfn_limit)

    def mark(self, gfns: GfnArray) -> None:
        """Mark, and remember."""
        self._marked.set(gfns[self._vm.memory.are_ram(gfns)])
        self._sound.mark(gfns)

    def clean(self) -> DirtyBitmap:
        """CLEAN."""
        self._marked.words[:] = 0
        return self._sound.clean()

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of the range, but for marks."""
        bitmap = self._sound.clean_range(gfns)
        unmarked = bitmap - self._marked
        self._sound.mark((bitmap - unmarked).gfns())
        return unmarked


FAULTS: tuple[type[Faithful], ...] = (
    RangeClearsAll,
    RangeReturnsAll,
    RangeProtectsItsFirstWord,
    RangeClearsBeforeItReads,
    RangeShiftedByAWord,
    RangeForgetsTheTail,
    RangeEndsAtTheHole,
    RangeRoundedOutward,
    EmptyRangeIsAll,
    RangeWorksWhileOff,
    RangeKnowsNoMarks,
)
