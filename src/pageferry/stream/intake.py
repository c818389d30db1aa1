"""Intake: the bytes that a decoder was fed and has not used yet."""

from enum import Enum
from typing import Final


class Need(Enum):
    """What a decoder returns in place of an event."""

    DATA = "data"


#: No event can be made of what was fed so far.
NEED_DATA: Final = Need.DATA


class Intake:
    """A queue of bytes that knows how far into the stream it is.

    ``offset`` counts every byte taken or passed over since the start. It holds what it was fed and nothing else, so
    its size is the caller's choice.
    """

    __slots__ = ("_data", "offset")

    def __init__(self) -> None:
        self._data = bytearray()
        self.offset = 0

    def __len__(self) -> int:
        return len(self._data)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Append ``data``."""
        self._data += data

    def take(self, count: int) -> bytes:
        """Remove and return the first ``count`` bytes; there must be as many."""
        with memoryview(self._data) as view:
            taken = bytes(view[:count])
        assert len(taken) == count, "took more than was fed"
        self.discard(count)
        return taken

    def discard(self, count: int) -> None:
        """Remove the first ``count`` bytes; there must be as many."""
        del self._data[:count]
        self.offset += count

    def peek(self, count: int) -> bytes:
        """Return up to ``count`` of the first bytes and leave them."""
        return bytes(self._data[:count])
