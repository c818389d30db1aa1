"""Sends a guest's console output to a stream and to attached clients; the guest never waits for either."""

import base64
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from pageferry.core.descriptors import write_all
from pageferry.core.threads import begin

_QUEUED_PIECES, _AT_ONCE_PIECES = 1 << 16, 1 << 12
_FLUSH_S = 1.0
_TAIL_BYTES = 4096
_UNREAD_BYTES = 64 << 10


class ConsoleOutput:
    """Writes what it is given to a descriptor, on a thread of its own.

    The guest's vCPU calls it in the middle of an instruction, so it neither blocks nor raises: output is dropped while
    a reader stands still and after it has gone.

    Args:
        fd: where to; it stays the caller's.
        on_lost: told once, on that thread, why nothing more can be written.
    """

    def __init__(self, fd: int, on_lost: Callable[[OSError], None]) -> None:
        self._fd = fd
        self._on_lost = on_lost
        self._pieces: queue.Queue[bytes | None] = queue.Queue(_QUEUED_PIECES)
        self._thread = begin(self._write, "console")

    def __call__(self, data: bytes) -> None:
        """Queue some output."""
        try:
            self._pieces.put_nowait(data)
        except queue.Full:
            return

    def close(self) -> None:
        """Let out what is queued, for a second at the most."""
        try:
            self._pieces.put(None, timeout=_FLUSH_S)
        except queue.Full:
            return
        self._thread.join(_FLUSH_S)

    def _write(self) -> None:
        try:
            for data in self._queued():
                write_all(self._fd, data)
        except OSError as error:
            self._on_lost(error)

    def _queued(self) -> Iterator[bytes]:
        # A guest writes byte by byte: what has gathered meanwhile is written at once.
        ended = False
        while not ended:
            pieces = [self._pieces.get()]
            while len(pieces) < _AT_ONCE_PIECES and not self._pieces.empty():
                pieces.append(self._pieces.get())
            ended = None in pieces
            yield b"".join(filter(None, pieces))


class ConsoleTail:
    """The end of the output so far, and its followers.

    The guest's vCPU calls it in the middle of an instruction, so it never waits for a follower.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tail = bytearray()
        self._followers: set[ConsoleFollower] = set()

    def __call__(self, data: bytes) -> None:
        """Take some output."""
        with self._lock:
            self._tail += data
            if len(self._tail) > 2 * _TAIL_BYTES:
                del self._tail[:-_TAIL_BYTES]
            for follower in self._followers:
                follower.add(data)

    def text(self) -> str:
        """Return the end of the output."""
        with self._lock:
            return self._tail.decode("ascii", "replace")

    def follow(self, wake: Callable[[], None]) -> "ConsoleFollower":
        """Return what follows the output from the tail on; each byte after the tail comes exactly once.

        Args:
            wake: called when something is new, on the thread that made it; may not block. At first something is.
        """
        with self._lock:
            follower = ConsoleFollower(bytes(self._tail), wake, self._forget)
            self._followers.add(follower)
        return follower

    def end(self, why: str) -> None:
        """Tell the followers that no more will come; ``why`` is one line for a person."""
        with self._lock:
            followers, self._followers = self._followers, set()
        for follower in followers:
            follower.end(why)

    def _forget(self, follower: "ConsoleFollower") -> None:
        with self._lock:
            self._followers.discard(follower)


class ConsoleFollower:
    """One reader's place in the output; implements :class:`pageferry.vmm.qmp.Subscription`.

    It keeps the last 64 KiB that the reader has not taken, and counts what it dropped before.
    """

    event = "X_PAGEFERRY_CONSOLE"

    def __init__(self, tail: bytes, wake: Callable[[], None], forget: Callable[["ConsoleFollower"], None]) -> None:
        self._lock = threading.Lock()
        self._wake = wake
        self._forget = forget
        self._unread = bytearray(tail)
        self._dropped_bytes = 0
        self._ended: str | None = None
        self._awake = True

    def add(self, data: bytes) -> None:
        """Take some output, after all that came before."""
        with self._lock:
            self._unread += data
            excess = len(self._unread) - _UNREAD_BYTES
            if excess > 0:
                del self._unread[:excess]
                self._dropped_bytes += excess
            asleep, self._awake = not self._awake, True
        if asleep:
            self._wake()

    def end(self, why: str) -> None:
        """Take the end."""
        with self._lock:
            self._ended = why
            asleep, self._awake = not self._awake, True
        if asleep:
            self._wake()

    def take(self) -> dict[str, Any]:
        """Return what is new: ``output`` (base64), bytes ``dropped`` before it, and ``end`` (null: it goes on)."""
        with self._lock:
            output, self._unread = self._unread, bytearray()
            dropped_bytes, self._dropped_bytes = self._dropped_bytes, 0
            self._awake = False
            return {"output": base64.b64encode(output).decode(), "dropped": dropped_bytes, "end": self._ended}

    def close(self) -> None:
        """Follow no more."""
        self._forget(self)
