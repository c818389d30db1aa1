"""Warm memory: what a host has that is no virtual machine.

A virtual machine may report its free memory to its host and lose it; getting it back can take seconds per GiB, and that
is what a benchmark would measure. So all that is free is touched and held here, and given back at the last moment: the
kernel reports nothing sooner than some two seconds after.
"""

import mmap
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pageferry.core.hostmem import MADV_POPULATE_WRITE

_PIECE_BYTES = 64 << 20
#: Left free, so that nothing else on the host has to wait for memory.
_SPARE_BYTES = 1 << 30


def free_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return how much memory nothing uses, not even as a cache."""
    words = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemFree:")).split()
    return int(words[1]) << 10


class WarmMemory:
    """Free memory of this host, in use here until it is given back. A context manager; all is free again at its end.

    ``free``: tells how much there is.
    """

    def __init__(self, free: Callable[[], int] = free_bytes) -> None:
        self._free = free
        self._pieces: list[mmap.mmap] = []

    def __enter__(self) -> "WarmMemory":
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.give_back(self.held_bytes)

    @property
    def held_bytes(self) -> int:
        """How much is in use here."""
        return len(self._pieces) * _PIECE_BYTES

    def hold(self) -> None:
        """Touch all that is free now, but for 1 GiB, and keep it."""
        for _ in range((self._free() - _SPARE_BYTES) // _PIECE_BYTES):
            piece = mmap.mmap(-1, _PIECE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._pieces.append(piece)
            piece.madvise(mmap.MADV_HUGEPAGE)
            piece.madvise(MADV_POPULATE_WRITE)

    def give_back(self, size_bytes: int) -> None:
        """Free at least so much, or all that is held."""
        for _ in range(min(-(-size_bytes // _PIECE_BYTES), len(self._pieces))):
            self._pieces.pop().close()
