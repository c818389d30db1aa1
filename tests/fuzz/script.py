"""Conversations that were recorded, and how one is played to an end that takes it for its peer.

A script is a list of turns: what the other end says on one connection at once. A turn is said when the end under test
waits for something on that connection and has heard all that was said. So nothing is said too early unless a change
made it so, no thread and no clock is in it, and a script that is over is a connection that was closed.

Proofs are made anew, as an honest peer makes them: each stands in a script as its frame's type, eight times in
hexadecimal digits, and is made of the nonces of the connection and the migration's token when its turn comes.
"""

import lzma
import os
import re
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pageferry.engine.wire.channel import Channel
from pageferry.stream.ferry import MAGIC, NONCE_BYTES
from pageferry.stream.ferry_frames import FrameType
from pageferry.stream.ferry_order import Side
from pageferry.stream.ferry_proof import proof_of

RECORDED = Path(__file__).parent / "recorded"
_HEAD = struct.Struct("<II")
_PROOF = re.compile(rb'("proof": ?")([0-9a-f]{64})"')
_TOKEN = re.compile(rb'"token": ?"([0-9a-f]+)"')
#: Frames with a proof, and whether it is made before there is a token.
_PROVEN = {
    FrameType.SOURCE_HELLO: True,
    FrameType.DESTINATION_HELLO: True,
    FrameType.JOIN: False,
    FrameType.RECOVER: False,
    FrameType.KNOWN: False,
}
_NONCE_AT = len(MAGIC) + 8
#: How long a peer may be silent: it never is.
TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What is said at once on one connection, numbered as they were opened; ``after_s``: so long is waited first."""

    connection: int
    said: bytes
    after_s: float = 0.0


def read_script(name: str) -> list[Turn]:
    """Return a script of the tree."""
    data, at, turns = lzma.decompress((RECORDED / name).read_bytes()), 0, []
    while at < len(data):
        connection, size = _HEAD.unpack_from(data, at)
        at += _HEAD.size + size
        turns.append(Turn(connection=connection, said=data[at - size : at]))
    return turns


def write_script(name: str, turns: Sequence[Turn]) -> None:
    """Write a script into the tree."""
    data = b"".join(_HEAD.pack(turn.connection, len(turn.said)) + turn.said for turn in turns)
    (RECORDED / name).write_bytes(lzma.compress(data, preset=9))


def place_of(frame_type: FrameType) -> bytes:
    """Return what stands in a script where a proof is made."""
    return f"{int(frame_type):08x}".encode() * 8


def without_proofs(said: bytes, frame_type: FrameType) -> bytes:
    """Return a frame of this type with the place of its proof in place of that."""
    return _PROOF.sub(rb"\g<1>" + place_of(frame_type) + b'"', said)


def _nonce_of(data: bytes | bytearray) -> bytes:
    nonce = bytes(data[_NONCE_AT : _NONCE_AT + NONCE_BYTES])
    return nonce if data.startswith(MAGIC) and len(nonce) == NONCE_BYTES else b""


class Player:
    """The other end of one conversation.

    Args:
        side: the end that is played to.
        turns: what is said there.
        handed: a descriptor that is handed over with the first turn, which stays the caller's; None: none.
    """

    def __init__(self, side: Side, turns: Sequence[Turn], handed: int | None = None) -> None:
        self.side = side
        self.handed = handed
        self.channels: list[PlayedChannel] = []
        self._token = ""
        self._turns: dict[int, deque[Turn]] = {}
        for turn in turns:
            self._turns.setdefault(turn.connection, deque()).append(turn)

    def connect(self, watch: "Callable[[bytes], None]" = lambda _: None) -> "PlayedChannel":
        """Return the next connection; ``watch`` sees what the end under test says on it.

        Raises:
            ConnectionAbortedError: the script has no more.
        """
        number = len(self.channels)
        if number not in self._turns:
            raise ConnectionAbortedError("the script has no more connections")
        self.channels.append(PlayedChannel(self, self._turns[number], watch))
        return self.channels[-1]

    @property
    def has_more_connections(self) -> bool:
        """Whether another one is in the script."""
        return len(self.channels) in self._turns

    def proven(self, channel: "PlayedChannel", said: bytes) -> bytes:
        """Return what is said next on a connection, with the proofs that an honest peer makes there."""
        ours = bytes(channel.said + said)
        nonces = {self.side: _nonce_of(channel.heard), self.side.other: _nonce_of(ours)}
        spoken = (ours, *(each for channel in self.channels for each in (channel.heard, channel.said)))
        self._token = self._token or next((match[1].decode() for each in spoken if (match := _TOKEN.search(each))), "")

        def made(match: re.Match[bytes]) -> bytes:
            for frame_type, opens in _PROVEN.items():
                if match[2] == place_of(frame_type):
                    return match[1] + proof_of(frame_type, nonces, "" if opens else self._token).encode() + b'"'
            return match[0]

        return _PROOF.sub(made, said) if all(nonces.values()) else said

    def close(self) -> None:
        """Close what the end under test has not."""
        for channel in self.channels:
            channel.close()


class PlayedChannel(Channel):
    """One connection of a script. Everything on it is in memory."""

    def __init__(self, player: Player, turns: deque[Turn], watch: Callable[[bytes], None]) -> None:
        near, far = socket.socketpair()
        far.close()
        super().__init__(near, TIMEOUT_S)
        self.heard = bytearray()
        """What the end under test has said."""
        self.said = bytearray()
        """What it was told."""
        self._player = player
        self._turns = turns
        self._watch = watch
        self._inbox = bytearray()
        self._over = False
        self._changed = threading.Lock()
        self.local = player.handed is not None

    def send(self, buffers, fd=None):
        with self._changed:
            data = b"".join(map(bytes, buffers))
            self.heard += data
            self.sent_bytes += len(data)
        self._watch(data)
        if self._over:
            raise BrokenPipeError("the script is over")

    def receive_some(self, at_most_bytes, deadline_s=None):
        with self._changed:
            self._speak()
            data = bytes(self._inbox[:at_most_bytes])
            del self._inbox[: len(data)]
            return data

    def receive_into(self, views, ahead=None):
        for view in views:
            at = 0
            while at < len(view):
                data = self.receive_some(len(view) - at)
                if not data:
                    raise ConnectionResetError("the peer closed the connection")
                view[at : at + len(data)] = data
                at += len(data)
        if ahead is None or not views:
            return 0
        with self._changed:
            came = bytes(self._inbox[: len(ahead)])
            del self._inbox[: len(came)]
        ahead[: len(came)] = came
        return len(came)

    def readable(self, wait_s=0.0):
        with self._changed:
            if wait_s:
                self._speak()
            return bool(self._inbox) or self._over

    def take_fd(self):
        fd, self._player.handed = self._player.handed, None
        return None if fd is None else os.dup(fd)

    def abort(self):
        self._over = True
        super().abort()

    def _speak(self):
        while not self._inbox and not self._over:
            if self._turns:
                turn = self._turns.popleft()
                if turn.after_s:
                    time.sleep(turn.after_s)
                said = self._player.proven(self, turn.said)
                self.said += said
                self._inbox += said
            else:
                self._over = True
