"""How further connections join a migration: by the token of the destination's hello, before the stream begins."""

import contextlib
import hmac
import time
from collections.abc import Callable

from pageferry.core.errors import PageferryError, RemoteStreamError
from pageferry.engine.wire.channel import Channel
from pageferry.engine.wire.peer import Peer, PeerFailedError
from pageferry.stream.ferry import Join, Joined, Refuse, Side

#: Accepts a connection: None when none came within so many seconds.
Accept = Callable[[float], Channel | None]

#: How long to wait for a connection before looking at anything else.
POLL_S = 0.1
#: While somebody else who connected says nothing, nobody can join.
_PATIENCE_S = 2.0


def join(channel: Channel, token: str, index: int) -> None:
    """Make a connection part of the migration with this token; the source's side.

    Raises:
        PeerFailedError: the destination refuses.
        RemoteStreamError: it answers something else.
        OSError: cut or stalled.
    """
    peer = Peer(channel, Side.SOURCE)
    peer.greet()
    peer.send(Join(token=token, index=index))
    if not isinstance(peer.receive(), Joined):
        raise RemoteStreamError("the destination did not let a connection join")


def take_in(main: Channel, accept: Accept, token: str, connections: int) -> list[Channel]:
    """Wait until all connections but the first have joined; the destination's side. Strangers are refused.

    Args:
        main: the first connection, on which the source is silent meanwhile.
        accept: where connections come from.
        token: that they must show.
        connections: how many there will be, the first counted.

    Returns:
        The others, number 1 first.

    Raises:
        OSError: the source left, or took longer than the first connection may stand still.
    """
    joined: dict[int, Channel] = {}
    deadline_s = main.deadline_s()
    try:
        while len(joined) < connections - 1:
            if main.readable():
                raise ConnectionResetError("the source left before all its connections had joined")
            if time.monotonic() > deadline_s:
                raise TimeoutError("stalled")
            channel = accept(POLL_S)
            if channel is not None:
                index = _index_of(channel, token, {*range(1, connections)} - joined.keys())
                if index is not None:
                    joined[index] = channel
    except BaseException:
        for channel in joined.values():
            channel.close()
        raise
    return [joined[index] for index in sorted(joined)]


def _index_of(channel: Channel, token: str, free: set[int]) -> int | None:
    # The number of a connection that joins now; None: it was a stranger's, and is closed.
    patience_s, channel.timeout_s = channel.timeout_s, min(channel.timeout_s, _PATIENCE_S)
    peer = Peer(channel, Side.DESTINATION)
    with contextlib.suppress(OSError, PageferryError, PeerFailedError):
        peer.greet()
        frame = peer.receive()
        if (
            isinstance(frame, Join)
            and hmac.compare_digest(frame.token.encode(), token.encode())
            and frame.index in free
        ):
            peer.send(Joined())
            channel.timeout_s = patience_s
            return frame.index
        peer.send(Refuse(reason="another guest is being received here", hint="try again when it has arrived"))
        channel.finish()
    channel.close()
    return None
