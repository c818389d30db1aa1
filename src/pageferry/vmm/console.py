"""Where a guest's console output goes, without the guest ever waiting for it."""

import contextlib
import queue
import threading
from typing import BinaryIO

_QUEUED_PIECES = 1 << 16
_FLUSH_S = 1.0


class ConsoleOutput:
    """Writes what it is given to a stream, on a thread of its own.

    The guest's vCPU calls it in the middle of an instruction, so it neither blocks nor raises: output is dropped while
    a reader stands still and after it has gone.

    Args:
        stream: where to; closed at the end.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._pieces: queue.Queue[bytes | None] = queue.Queue(_QUEUED_PIECES)
        self._thread = threading.Thread(target=self._write, name="console", daemon=True)
        self._thread.start()

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
        with contextlib.suppress(OSError), self._stream:  # an error: nobody reads any more
            while (data := self._pieces.get()) is not None:
                self._stream.write(data)
                if self._pieces.empty():
                    self._stream.flush()
