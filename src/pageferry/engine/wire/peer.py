"""Peer: ferry frames over a channel, one side of the conversation around the libxc stream."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from pageferry.core.errors import PageferryError, RemoteStreamError
from pageferry.engine.wire.channel import Channel
from pageferry.stream.ferry import FerryDecoder, FerryEncoder
from pageferry.stream.ferry_frames import (
    TYPE_OF,
    DestinationHello,
    Failed,
    Frame,
    Join,
    Known,
    Recover,
    Refuse,
    SourceHello,
)
from pageferry.stream.ferry_order import Conversation, Side
from pageferry.stream.ferry_proof import proof_of, proves
from pageferry.stream.intake import Need

_F = TypeVar("_F", bound=Frame)


class PeerFailedError(PageferryError):
    """The peer said, in words of its own, that it refuses or has failed: the guest does not and will not run there."""


class PeerRefusedError(PeerFailedError):
    """The peer refused. In answer to RECOVER that says nothing about where the guest is."""


class Peer:
    """The other side of a connection. Any threads may send; one may receive meanwhile.

    Args:
        channel: connected.
        side: which side we are.
    """

    def __init__(self, channel: Channel, side: Side) -> None:
        self.channel = channel
        self._side = side
        self._conversation = Conversation(side)
        self._encoder = FerryEncoder(self._conversation)
        self._decoder = FerryDecoder(self._conversation)
        self.first: Frame | None = None
        """The peer's first frame, once :meth:`hear` has heard it."""
        self._greeted = False
        self._sending = channel.host.lock()  # frames leave in the order in which they were encoded
        self._turn = threading.Lock()

    def greet(self) -> None:
        """Send our preamble, once; both sides do so at once. The source waits for the destination's, which it answers.

        Raises:
            RemoteStreamError: it is not pageferry, or another version.
            OSError: cut or stalled.
        """
        if self._greeted:
            return
        self._greeted = True
        self.channel.send([self._encoder.preamble()])
        if self._side is Side.SOURCE:
            self._receive_until(lambda: Side.DESTINATION in self._conversation.nonces)

    def hear(self, deadline_s: float) -> Frame:
        """Greet the peer, and return the frame that it says first; the same when it is called again.

        Args:
            deadline_s: for all of that, on the monotonic clock.

        Raises:
            RemoteStreamError: as for :meth:`receive`.
            OSError: cut, or the deadline passed.
        """
        if self.first is None:
            self.greet()
            self.first = self.receive(deadline_s - self.channel.host.now_s())
        return self.first

    def proof(self, kind: type[Frame], token: str = "") -> str:
        """Return the proof in a frame of ours, for this connection; both preambles have passed."""
        return proof_of(TYPE_OF[kind], self._conversation.nonces, token)

    def proves(self, frame: Join | Recover | Known, token: str) -> bool:
        """Tell whether a frame of the peer's was made for this connection, by a peer that knows ``token``."""
        return proves(frame.proof, TYPE_OF[type(frame)], self._conversation.nonces, token)

    def say_known(self, token: str) -> None:
        """Tell a source whose JOIN or RECOVER proves that it knows ``token`` that we do too; the answer follows.

        Raises:
            OSError: cut or stalled.
        """
        self.send(Known(proof=self.proof(Known, token)))

    def expect_known(self, token: str) -> None:
        """Hear that the destination has our migration; raises as :meth:`receive`.

        Raises:
            RemoteStreamError: it does not, and answers something else.
        """
        if not self.proves(self.expect(Known), token):
            raise RemoteStreamError("the destination did not prove that it has this migration")

    def send(self, frame: Frame, fd: int | None = None, content: Sequence[memoryview] = ()) -> None:
        """Send one frame, and a descriptor with it over a Unix socket, or page content after it.

        A hello gets its proof here.

        Raises:
            LocalStreamError: it is not our turn.
            OSError: cut or stalled.
        """
        if isinstance(frame, SourceHello | DestinationHello):
            frame = replace(frame, proof=self.proof(type(frame)))
        with self._sending:
            with self._turn:
                data = self._encoder.frame(frame)
            self.channel.send([data, *content], fd)

    def receive(self, within_s: float | None = None) -> Frame:
        """Return the peer's next frame.

        Args:
            within_s: how long it may take; None: as long as the channel may stand still.

        Raises:
            PeerFailedError: it is the peer's refusal or failure.
            RemoteStreamError: it is not a legal frame, or the peer closed in the middle, or it is a hello that was made
                for another connection.
            OSError: cut or stalled.
        """
        frame = self._receive_until(lambda: False, within_s)
        assert frame is not None
        if isinstance(frame, Refuse):
            raise PeerRefusedError(frame.reason, hint=frame.hint)
        if isinstance(frame, Failed):
            raise PeerFailedError(frame.reason, hint=frame.hint)
        if isinstance(frame, SourceHello | DestinationHello):
            self._expect_fresh(frame)
        return frame

    def _receive_until(self, enough: Callable[[], bool], within_s: float | None = None) -> Frame | None:
        """Return the next frame, or None as soon as bytes came after which ``enough()`` is true."""
        deadline_s = self.channel.deadline_s(within_s)
        while True:
            with self._turn:
                frame = self._decoder.next_event()
            if not isinstance(frame, Need):
                return frame
            if enough():
                return None
            data = self.channel.receive_some(self._decoder.wanted_bytes, deadline_s)
            if not data:
                self._decoder.eof()
                raise ConnectionResetError("the peer closed the connection")
            self._decoder.feed(data)

    def _expect_fresh(self, hello: SourceHello | DestinationHello) -> None:
        if not proves(hello.proof, TYPE_OF[type(hello)], self._conversation.nonces, ""):
            raise RemoteStreamError(
                f"the {self._side.other}'s hello was made for another connection, and is perhaps a recording",
                hint="migrate anew; over a network that others use: tls://",
            )

    def expect(self, kind: type[_F]) -> _F:
        """Return the peer's next frame, which is to be of this kind; raises as :meth:`receive`.

        Raises:
            RemoteStreamError: it is of another.
        """
        frame = self.receive()
        if not isinstance(frame, kind):
            raise self.out_of_turn(frame)
        return frame

    def out_of_turn(self, frame: Frame) -> RemoteStreamError:
        """Return the error for a frame of the peer's that has no place here."""
        did = "answered" if self._side is Side.SOURCE else "sent"
        return RemoteStreamError(f"the {self._side.other} {did} {type(frame).__name__} out of turn")

    def receive_content(self, view: memoryview) -> None:
        """Fill ``view`` with the page content that follows the frame which was received last.

        Raises:
            OSError: cut or stalled.
        """
        self.channel.receive_into([view])
        with self._turn:
            self._decoder.content_passed(len(view))

    def wait_for_end(self, within_s: float) -> None:
        """Return when the peer has closed the connection, within so many seconds, and close it too.

        Raises:
            OSError: it was cut, or the peer has not closed.
        """
        if self.channel.receive_some(1, self.channel.deadline_s(within_s)):
            raise ConnectionAbortedError("the peer went on talking")
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self.channel.close()

    def stream_passed(self, stream_bytes: int) -> None:
        """Say that the libxc stream, of so many bytes, is over; frames follow again."""
        self._conversation.stream_passed(stream_bytes)
