"""The stamp oracle: which pages the ``stamp`` guest writes in a round, computed on the host.

The generator is that of ``guests/programs/stamp.c`` and docs/reference/guest-abi.md; here it runs over all pages
at once.
"""

import numpy as np
from numpy.typing import NDArray

from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE, GfnArray, gfns_touched
from pageferry.core.memory import GuestMemory
from pageferry.guests import abi
from pageferry.guests.elf import Program

_STEP = 0x9E37_79B9_7F4A_7C15
_DEFAULT_DENSITY = 64
_U64 = (1 << 64) - 1


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # The finaliser of SplitMix64, modulo 2^64; arrays wrap silently.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return x ^ (x >> np.uint64(31))


class StampOracle:
    """Knows what a ``stamp`` guest writes, and what its memory must hold after the rounds it was told.

    ``gfns`` is uint64[n], page i of the working set; ``words`` is uint64[n], which u64 of page i is stamped.

    Args:
        info: what the guest was told at boot.
    """

    def __init__(self, info: abi.GuestInfo) -> None:
        self.gfns = working_set_gfns(info)
        self._seed = info.seed
        self._densities = info.arguments or (_DEFAULT_DENSITY,)
        self._steps = np.arange(self.gfns.size, dtype=np.uint64) * np.uint64(_STEP)
        self.words: NDArray[np.uint64] = _mix(np.uint64(info.seed) + self._steps) & np.uint64(511)
        self._stamps = np.zeros(self.gfns.size, np.uint64)

    def _picked(self, number: int) -> NDArray[np.bool_]:
        key = _mix(np.array([(self._seed + number * _STEP) & _U64], np.uint64))
        density = self._densities[number % len(self._densities)]
        return (_mix(key + self._steps) & np.uint64(255)) < np.uint64(density)

    def written(self, number: int) -> GfnArray:
        """Return the frames of the working set that the guest writes in round ``number``, ascending."""
        return self.gfns[self._picked(number)]

    def played(self, number: int) -> None:
        """Take note that the guest has completed round ``number``; rounds are noted in the order they happened."""
        self._stamps[self._picked(number)] = number

    def wrong_gfns(self, memory: GuestMemory) -> GfnArray:
        """Return the frames of the working set that do not hold exactly what the rounds so far left in them.

        The guest is at a sync point (or ``memory`` is a copy): each page is all zeros but for its stamp.
        """
        pages = np.frombuffer(b"".join(memory.page_views(self.gfns)), np.uint64).reshape(self.gfns.size, -1)
        rows = np.arange(self.gfns.size)
        others = np.bitwise_or.reduce(pages, axis=1) if pages.size else self._stamps
        wrong: NDArray[np.bool_] = (pages[rows, self.words] != self._stamps) | (others != self._stamps)
        return self.gfns[wrong]


def working_set_gfns(info: abi.GuestInfo) -> GfnArray:
    """Return the frames of the working set in the guest's order: RAM from its start on, holes skipped."""
    left = info.working_set_bytes // PAGE_SIZE
    pieces = []
    for gpa, size_bytes in info.ram_regions:
        start = max(gpa, info.working_set_gpa)
        pages = min(left, max(0, gpa + size_bytes - start) // PAGE_SIZE)
        pieces.append((start >> PAGE_SHIFT) + np.arange(pages, dtype=np.uint64))
        left -= pages
    return np.concatenate(pieces)


def explained_gfns(info: abi.GuestInfo, program: Program) -> GfnArray:
    """Return the frames outside the working set that a built-in guest may write by just running, ascending.

    Status page, stacks, the program's writable segments, and the page tables: the processor sets accessed and dirty
    bits in them, and AMD's nested walk treats each of its reads there as a write (APM volume 2, nested paging).
    """
    end_of_ram = sum(info.ram_regions[-1])
    stacks = abi.STACK_BYTES * info.cpus
    pieces = [
        gfns_touched(abi.STATUS_GPA, PAGE_SIZE),
        gfns_touched(abi.PAGE_TABLES_GPA, abi.page_tables_end(end_of_ram) - abi.PAGE_TABLES_GPA),
        gfns_touched(abi.STACKS_TOP - stacks, stacks),
        *(gfns_touched(s.gpa, s.size_bytes) for s in program.segments if s.writable),
    ]
    return np.unique(np.concatenate(pieces))
