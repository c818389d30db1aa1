"""Talk: what either end of the handoff needs of its connection."""

from typing import Protocol

from pageferry.core.errors import RemoteStreamError
from pageferry.stream.ferry_frames import Frame


class Talk(Protocol):
    """A :class:`~pageferry.engine.wire.peer.Peer`, as the handoff needs it."""

    def send(self, frame: Frame) -> None:
        """Send a frame; after an OSError it has not left whole, and will not."""

    def receive(self, within_s: float | None = None) -> Frame:
        """Return the next frame, which comes within so many seconds; raises OSError."""

    def out_of_turn(self, frame: Frame) -> RemoteStreamError:
        """Return the error for a frame that has no place here."""

    def wait_for_end(self, within_s: float) -> None:
        """Return when the other side has closed the connection; raise OSError when it is cut, or was not closed."""

    def close(self) -> None:
        """Close the connection."""
