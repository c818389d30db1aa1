"""How post-copy goes on after its connection was cut: a new connection, by the token of the destination's hello."""

import contextlib
import hmac
import threading

from pageferry.core.errors import PageferryError, RemoteStreamError
from pageferry.core.vm import Vm
from pageferry.engine.wire.channel import Channel, Endpoint
from pageferry.engine.wire.peer import Peer, PeerFailedError
from pageferry.stream.ferry import Failed, Recover, Recovered, Refuse, Side

#: While somebody else who connected says nothing, the source cannot come back.
_PATIENCE_S = 2.0


def come_back(channel: Channel, token: str) -> Peer:
    """Go on with the migration of this token over a new connection; the source's side.

    Raises:
        PeerRefusedError: no guest of this migration is there; another destination may have it.
        PeerFailedError: this is the destination, and the guest never ran there and never will.
        RemoteStreamError: it answers something else.
        OSError: cut or stalled.
    """
    peer = Peer(channel, Side.SOURCE)
    peer.greet()
    peer.send(Recover(token=token))
    if not isinstance(peer.receive(), Recovered):
        raise RemoteStreamError("the destination did not go on with the migration")
    return peer


def take_back_in(channel: Channel, token: str) -> Peer | None:
    """Return the source that has connected, the destination's side; None: it was somebody else, who is refused."""
    patience_s, channel.timeout_s = channel.timeout_s, min(channel.timeout_s, _PATIENCE_S)
    peer = Peer(channel, Side.DESTINATION)
    with contextlib.suppress(OSError, PageferryError, PeerFailedError):
        peer.greet()
        frame = peer.receive()
        if isinstance(frame, Recover) and hmac.compare_digest(frame.token.encode(), token.encode()):
            peer.send(Recovered())
            channel.timeout_s = patience_s
            return peer
        peer.send(Refuse(reason="the guest here belongs to another source", hint="pageferry migrate --recover there"))
        channel.finish()
    channel.close()
    return None


def refuse_return(peer: Peer, *, dropped: bool) -> None:
    """Answer a source that comes back for a guest that is not here.

    Args:
        peer: the source, which has sent RECOVER.
        dropped: the guest was to switch to this process, and never ran here and never will.

    Raises:
        OSError: cut or stalled.
    """
    if dropped:
        peer.send(Failed(reason="the guest had not all arrived when the connection was cut, and never ran there"))
    else:
        hint = "if it surely runs nowhere: pageferry resume --force at the source"
        peer.send(Refuse(reason="no guest of that migration is here", hint=hint))
    peer.channel.finish()


class Hold:
    """Holds a guest from now on. A vCPU that waits for a page stops when it has it, so nobody here waits for that.

    Args:
        vm: the guest.
    """

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._freezing = threading.Thread(target=vm.freeze, name="hold", daemon=True)
        self._freezing.start()

    def end(self) -> None:
        """Let it run again, as soon as every vCPU has stopped: pages come again."""
        threading.Thread(target=self._thaw, name="hold", daemon=True).start()

    def _thaw(self) -> None:
        self._freezing.join()
        self._vm.thaw()


class Recovery:
    """A migration that was cut after the switch waits here for somebody who says where to connect."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._endpoint: Endpoint | None = None
        self._abandoned = False
        self._waiting = False

    @property
    def waiting(self) -> bool:
        """Whether it waits now."""
        return self._waiting

    @property
    def abandoned(self) -> bool:
        """Whether :meth:`abandon` was called."""
        return self._abandoned

    def ask(self, endpoint: Endpoint) -> bool:
        """Say where to connect; from any thread. Return whether anybody waited for it."""
        with self._changed:
            if not self._waiting:
                return False
            self._waiting = False
            self._endpoint = endpoint
            self._changed.notify_all()
            return True

    def abandon(self) -> None:
        """Say that nobody ever will."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def end(self) -> bool:
        """End the wait as :meth:`abandon` does, if it waits now. Return whether it did."""
        with self._changed:
            if self._waiting:
                self._waiting = False
                self.abandon()
                return True
            return False

    def begin(self) -> None:
        """Begin to wait: from here on :meth:`ask` is heard."""
        with self._changed:
            self._endpoint, self._waiting = None, True

    def wait(self) -> Endpoint | None:
        """Return what :meth:`ask` was told, when it is; None when the migration was abandoned."""
        with self._changed:
            self._changed.wait_for(lambda: self._endpoint is not None or self._abandoned)
            self._waiting = False
            return None if self._abandoned else self._endpoint
