"""The connections of one migration: how those after the first join, how a source comes back, which pages go where."""

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pageferry.core.command_hints import RECOVER
from pageferry.core.errors import PageferryError, RemoteStreamError
from pageferry.core.frames import PAGES_PER_2M, GfnArray
from pageferry.engine.wire.channel import Channel
from pageferry.engine.wire.peer import Peer
from pageferry.stream.ferry_frames import Join, Joined, Recover, Recovered, Refuse, Running
from pageferry.stream.ferry_order import Side

#: Returns a peer that has connected; None when there was none within so many seconds.
Accept = Callable[[float], Peer | None]

#: How long to wait for a connection before looking at anything else.
POLL_S = 0.1
#: How long a caller may take to say what it wants that was not heard before; no other joins or comes back meanwhile.
_PATIENCE_S = 2.0
_TAKEN = Refuse(reason="the guest here belongs to another source", hint=f"to go on with it, there: {RECOVER}")
BUSY = Refuse(
    reason="busy with another attempt: another guest is being received here", hint="try again when that has ended"
)
#: How many migrations a destination remembers whose guest never ran there.
_REMEMBERED = 1024
_Request = TypeVar("_Request", Join, Recover)


def _anything(_: Join | Recover) -> bool:
    """Take any."""
    return True


def _is_one_of(free: Collection[int], join: Join) -> bool:
    return join.index in free


class NeverRan:
    """The tokens of migrations whose guest never ran in this process and never will: the latest 1,024 of them.

    One that was forgotten costs an answer, and no guest: its source hears that it is not known here.
    """

    def __init__(self) -> None:
        self._tokens: deque[str] = deque(maxlen=_REMEMBERED)

    def add(self, token: str) -> None:
        """Remember one."""
        self._tokens.append(token)

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._tokens))


def connection_of(gfns: GfnArray, connections: int) -> NDArray[np.uint64]:
    """Return the connection of each page, uint64[n], from 0: 2 MiB of memory each, round-robin.

    **Source:** docs/reference/stream.md, part 2.
    """
    return (gfns // np.uint64(PAGES_PER_2M)) % np.uint64(connections)


def join(channel: Channel, token: str, index: int) -> None:
    """Make a connection part of the migration with this token; the source's side.

    Raises:
        PeerFailedError: the destination refuses.
        RemoteStreamError: it answers something else.
        OSError: cut or stalled.
    """
    peer = Peer(channel, Side.SOURCE)
    peer.greet()
    peer.send(Join(proof=peer.proof(Join, token), index=index))
    peer.expect_known(token)
    if not isinstance(peer.receive(), Joined):
        raise RemoteStreamError("the destination did not let a connection join")


def come_back(channel: Channel, token: str) -> Peer:
    """Ask for a guest that was given away over a connection that is lost; the source's side. The answer comes next.

    Raises:
        PeerRefusedError: the migration is not known there.
        RemoteStreamError: it answers something else, or cannot prove that it knows it.
        OSError: cut or stalled.
    """
    peer = Peer(channel, Side.SOURCE)
    peer.greet()
    peer.send(Recover(proof=peer.proof(Recover, token)))
    peer.expect_known(token)
    return peer


def take_in(main: Channel, accept: Accept, token: str, connections: int) -> list[Channel]:
    """Wait until all connections but the first have joined; the destination's side. Strangers are refused.

    Args:
        main: the first connection, on which the source is silent meanwhile.
        accept: where connections come from.
        token: that they must prove to know.
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
            if main.host.now_s() > deadline_s:
                raise TimeoutError("stalled")
            peer = accept(POLL_S)
            if peer is not None:
                fits = partial(_is_one_of, {*range(1, connections)} - joined.keys())
                request = admit(peer, Join, token, answer=Joined(), refusal=BUSY, fits=fits)
                if request is not None:
                    joined[request.index] = peer.channel
    except BaseException:
        for channel in joined.values():
            channel.close()
        raise
    return [joined[index] for index in sorted(joined)]


def wait_for_return(
    accept: Accept, token: str, answer: Running | Recovered, given_up: Callable[[], bool]
) -> Peer | None:
    """Wait until the source of the guest that is here comes back; the destination's side. Strangers are refused.

    Args:
        accept: where connections come from.
        token: that it must show.
        answer: sent to it.
        given_up: whether it is not waited for any longer; asked ten times a second.

    Returns:
        The source; None when ``given_up`` said so, or nothing can be accepted any more.
    """
    while not given_up():
        try:
            peer = accept(POLL_S)
        except OSError:
            return None
        if peer is not None and admit(peer, Recover, token, answer=answer, refusal=_TAKEN) is not None:
            return peer
    return None


def admit(
    peer: Peer,
    request: type[_Request],
    token: str,
    *,
    answer: Joined | Running | Recovered,
    refusal: Refuse,
    fits: Callable[[_Request], bool] = _anything,
) -> _Request | None:
    """Hear what a new connection wants, the destination's side; return the request.

    None: it did not ask for this, with a proof that it knows the token. It is refused, and the connection is closed.

    Args:
        peer: who has connected, and was perhaps heard already.
        request: the kind of request that is waited for.
        token: that it must prove to know.
        answer: sent to one who is let in.
        refusal: sent to all others.
        fits: whether the rest of the request is right.
    """
    with contextlib.suppress(OSError, PageferryError):
        frame = peer.hear(peer.channel.host.now_s() + _PATIENCE_S)
        if isinstance(frame, request) and peer.proves(frame, token) and fits(frame):
            peer.say_known(token)
            peer.send(answer)
            return frame
        peer.send(refusal)
        peer.channel.finish()
    peer.channel.close()
    return None
