"""Placement: where a boot puts each piece of a guest in RAM; written at once, when all of them are known to fit."""

from bisect import insort
from dataclasses import dataclass

from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.memory import GuestMemory
from pageferry.core.units import format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPart:
    """Content of guest memory at ``gpa``; ``size_bytes`` are needed from there on, zeros after the content."""

    gpa: int
    data: bytes | memoryview
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class _Piece:
    gpa: int
    end_gpa: int
    what: str
    data: bytes | memoryview


class Placement:
    """The pieces of one guest, which has not run: its memory is all zeros, and so the rest of a piece is not written.

    Args:
        memory: where they go; untouched until :meth:`write`.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._pieces: list[_Piece] = []

    def put(self, what: str, gpa: int, data: bytes | memoryview, *, size_bytes: int | None = None) -> None:
        """Place ``data`` at ``gpa``.

        Args:
            what: how messages call it.
            gpa: its place.
            data: its content.
            size_bytes: how much room it takes; None: just its content.

        Raises:
            UsageError: some of that is not RAM, or taken by another piece.
        """
        piece = _Piece(gpa=gpa, end_gpa=gpa + (size_bytes or len(data)), what=what, data=data)
        if not self._memory.is_ram(gpa, piece.end_gpa - gpa):
            raise UsageError(
                f"{what} does not fit: it needs {gpa:#x} to {piece.end_gpa:#x}, the guest has "
                f"{format_size(self._memory.size_bytes)}",
                hint=f"more memory: at least {-(-piece.end_gpa >> 20)}M",
            )
        for other in self._pieces:
            if piece.gpa < other.end_gpa and other.gpa < piece.end_gpa:
                raise UsageError(f"{what} at {gpa:#x} lies over {other.what} at {other.gpa:#x}")
        insort(self._pieces, piece)

    def put_high(self, what: str, data: bytes, within: range) -> int:
        """Place ``data`` on a page boundary, as high as there is room in ``within``; return its gpa.

        Raises:
            UsageError: it does not fit.
        """
        low = self._memory.regions[0]
        end_gpa = min(within.stop, low.gpa + low.size_bytes)
        for piece in (*reversed(self._pieces), None):
            floor_gpa = within.start if piece is None else max(piece.end_gpa, within.start)
            gpa = (end_gpa - len(data)) & -PAGE_SIZE
            if gpa >= floor_gpa:
                self.put(what, gpa, data)
                return gpa
            if piece is not None:
                end_gpa = min(end_gpa, piece.gpa)
        raise UsageError(
            f"{what} of {format_size(len(data))} does not fit beside the kernel in the guest's "
            f"{format_size(self._memory.size_bytes)}",
            hint="more memory",
        )

    def write(self) -> None:
        """Write every piece into memory."""
        for piece in self._pieces:
            self._memory.write(piece.gpa, piece.data)
