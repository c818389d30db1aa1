"""Outlet: where a stream goes: a connection, or a file."""

from collections.abc import Sequence
from typing import Protocol

from pageferry.engine.wire.pacer import Pacer


class Outlet(Protocol):
    """What takes a stream, gathered from guest memory; see :class:`pageferry.engine.wire.channel.Channel`.

    ``pacer``: what keeps it to a bandwidth, if anything does. ``sent_bytes``: how many bytes went there so far.
    """

    pacer: Pacer | None
    sent_bytes: int

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send all of ``buffers`` in order.

        Raises:
            OSError: it could not be done; some of it may have gone.
        """

    def abort(self) -> None:
        """Have a thread that is sending come back soon, if it can be; from any thread."""

    def close(self) -> None:
        """Send no more. May be called twice."""
