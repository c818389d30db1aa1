"""Acceptor: a place where guests arrive, and where their sources come back to after a cut.

Those who connect are heard several at a time, each on a thread of its own, until they have said what they want::

    connected -- TLS, if it is asked for -- preambles -- the first frame, whole
                                                           | HELLO: the next guest, or "busy", after a while
                                                           | JOIN, RECOVER: for the guest that is being received

Up to then a caller has a few seconds, whatever it sends, and costs a thread, a descriptor and at most one hello. When
too many are heard, the one that has taken longest is dropped: a real source is let in at once.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from pageferry.core.errors import PageferryError, RemoteStreamError, UsageError
from pageferry.core.os_hints import listen_hint
from pageferry.core.threads import OutOfThreadsError
from pageferry.engine.host import THIS_HOST, Host
from pageferry.engine.wire.channel import DEFAULT_TIMEOUT_S, Channel, Endpoint
from pageferry.engine.wire.connections import BUSY, NeverRan
from pageferry.engine.wire.credentials import Credentials, names_of
from pageferry.engine.wire.listener import Listener
from pageferry.engine.wire.peer import Peer
from pageferry.engine.wire.tls_errors import TlsError
from pageferry.stream.ferry import MAGIC
from pageferry.stream.ferry_frames import Failed, Recover, Refuse, SourceHello
from pageferry.stream.ferry_order import Side

_log = logging.getLogger(__name__)
_RETRY_S = 0.05
#: So long may a caller take in all to say what it wants.
HELLO_S = 5.0
#: So many are heard at a time, and as many of those who want to join or come back wait for their turn.
MAX_CALLERS, _MAX_WAITING = 32, 16
#: How long a source waits for an attempt to end, as one that was just cancelled does, and how many may.
_PATIENCE_S, _MAX_PATIENT = 2.0, 4
_NOTHING_TO_JOIN = Refuse(reason="no guest is being received here", hint="begin a new migration")
_NO_MORE = Refuse(reason="no guest is waited for here any more", hint="start another pageferry receive")
_TLS_ONLY = Refuse(
    reason="this destination speaks TLS only", hint="pageferry migrate to tls://, with --tls-dir or --secret-file"
)


_Caller = TypeVar("_Caller", Channel, Peer)


def _say_nothing(_: str) -> None:
    """Do not tell it."""


def _patience_s(hello: SourceHello) -> float:
    """Return for how long a source may wait: it has to hear that we are busy before it gives us up."""
    return min(_PATIENCE_S, hello.lease_ms / 2e3)


@dataclass(slots=True)
class _Places:
    """Who waits for what; under the acceptor's lock."""

    #: The source of the next guest, if the place is free, or those who come back for a guest that is not here.
    next: deque[Peer] = field(default_factory=deque)
    #: Those who want to join or come back while a guest is being received.
    others: deque[Peer] = field(default_factory=deque)
    #: Who is being heard, the one that has taken longest first.
    heard: list[Channel] = field(default_factory=list)
    #: How many sources wait for the attempt that is under way to end.
    patient: int = 0
    #: Whether :meth:`Acceptor.wait` has given away a source, and :meth:`Acceptor.free` was not called since.
    busy: bool = False

    @property
    def taken(self) -> bool:
        """Whether there is no place for a source now."""
        return self.busy or any(isinstance(each.first, SourceHello) for each in self.next)

    def refusal_of(self, peer: Peer) -> Refuse | None:
        """Give a caller that was heard its place; return what to tell it instead, if there is none for it."""
        if isinstance(peer.first, SourceHello):
            if self.taken:
                return BUSY
            self.next.appendleft(peer)
        elif self.busy:
            if len(self.others) >= _MAX_WAITING:
                return BUSY
            self.others.append(peer)
        elif isinstance(peer.first, Recover) and len(self.next) < _MAX_WAITING:
            self.next.append(peer)
        else:
            return _NOTHING_TO_JOIN
        return None


class Acceptor:
    """Listens at an address until it is closed. A context manager.

    Args:
        endpoint: where, or its URI (``tls://HOST:PORT``, ``tcp://HOST:PORT``, port 0 for a free one; ``unix:PATH``).
        timeout_s: how long a connection that came here may stand still.
        credentials: who we are and whom we accept; for an endpoint with TLS, and for no other.
        on_refused: told in one line who was turned away and why; on any thread.
        host: on which it waits.

    Raises:
        UsageError: it is not an address, or the address is in use or not ours, or TLS and credentials do not go
            together.
    """

    def __init__(
        self,
        endpoint: Endpoint | str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        *,
        credentials: Credentials | None = None,
        on_refused: Callable[[str], None] = _say_nothing,
        host: Host = THIS_HOST,
    ) -> None:
        asked = Endpoint.parse(endpoint) if isinstance(endpoint, str) else endpoint
        asked.expect_suits(credentials)
        try:
            listener = asked.listen()
        except OSError as error:
            hint = listen_hint(error, path=asked.path)
            raise UsageError(f"cannot listen at {asked}: {error.strerror or error}", hint=hint) from error
        self._listener: Listener | None = listener
        self._timeout_s = timeout_s
        self._credentials = credentials
        self._on_refused = on_refused
        self._host = host
        self._changed = host.condition()
        self._places = _Places()
        self.endpoint = asked.bound(listener)
        """The address, with the port that it really has."""
        self.never_ran = NeverRan()
        """The guests that were to come to this place, and never ran here."""
        try:
            host.begin(self._accept_all, "accept", listener)
        except OutOfThreadsError:
            listener.close()
            raise

    def __enter__(self) -> "Acceptor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._listener is None

    def wait(self) -> Peer:
        """Wait for a source that wants to move its guest here, or comes back for one that is not here.

        From now on other sources are told that we are busy, until :meth:`free`, or this, is called.

        Raises:
            ConnectionAbortedError: it was closed.
        """
        self.free()
        with self._changed:
            self._changed.wait_for(lambda: self._places.next or self.closed)
            if self.closed:
                raise ConnectionAbortedError("no longer listening")
            self._places.busy = True
            return self._places.next.popleft()

    def accept(self, wait_s: float) -> Peer | None:
        """Return the next caller that wants to join the guest being received, or None when none came in ``wait_s``.

        Raises:
            OSError: it was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._places.others or self.closed, wait_s)
            if self.closed:
                raise ConnectionAbortedError("no longer listening")
            return self._places.others.popleft() if self._places.others else None

    def free(self) -> None:
        """End what :meth:`wait` began: no guest is being received, and the next source is let in."""
        with self._changed:
            waiting, self._places.others, self._places.busy = list(self._places.others), deque(), False
            self._changed.notify_all()
        for peer in waiting:
            self._aside(self._find_place, peer)

    def turn_away(self, peer: Peer) -> None:
        """Refuse a caller that :meth:`wait` returned: no guest is waited for any more."""
        self._refuse(peer, self._no_more(peer))

    def close(self) -> None:
        """Stop listening, and wake the thread that waits; from any thread. May be called twice."""
        with self._changed:
            listener, self._listener = self._listener, None
            self._changed.notify_all()
            waiting = [*self._places.next, *self._places.others]
            self._places.next, self._places.others = deque(), deque()
            heard = list(self._places.heard)
        if listener is None:
            return
        listener.shutdown()
        listener.close()
        for channel in heard:
            channel.abort()
        for peer in waiting:
            peer.channel.close()

    # -- those who connect -----------------------------------------------------------------------------------------

    def _accept_all(self, listener: Listener) -> None:
        while not self.closed:
            try:
                channel = Channel(listener.accept(), self._timeout_s, self._host)
            except OSError as error:
                if not self.closed:
                    _log.debug("a connection was not accepted: %s", error)
                    self._host.sleep(_RETRY_S)  # out of descriptors, or a source that left at once
                continue
            with self._changed:
                if self._listener is None:  # closed since
                    channel.close()
                    return
                self._places.heard.append(channel)
                longest = self._places.heard.pop(0) if len(self._places.heard) > MAX_CALLERS else None
            if longest is not None:
                longest.abort()
            self._aside(self._hear, channel)

    def _aside(self, serve: Callable[[_Caller], None], caller: _Caller) -> None:
        """Serve a caller on a thread, or on this one where there are no more: others wait for it then."""
        try:
            self._host.begin(serve, "caller", caller)
        except OutOfThreadsError:
            serve(caller)

    def _hear(self, channel: Channel) -> None:
        """Hear one caller to the end of its first frame, and find it a place."""
        caller = channel.peer_name
        try:
            self._find_place(self._heard(channel))
        except (OSError, PageferryError) as error:
            self._on_refused(f"{caller} was turned away: {error}")
            channel.close()
            return
        except Exception:
            _log.exception("a caller was lost by a defect")
            channel.close()
            return
        finally:
            with self._changed:
                self._places.heard = [each for each in self._places.heard if each is not channel]

    def _heard(self, channel: Channel) -> Peer:
        deadline_s = self._host.now_s() + min(HELLO_S, self._timeout_s)
        refusal = None if self._credentials is None else self._secure(channel, self._credentials, deadline_s)
        peer = Peer(channel, Side.DESTINATION)
        try:
            peer.hear(deadline_s)
        except RemoteStreamError as error:
            with contextlib.suppress(OSError, PageferryError):  # it may not be our turn
                peer.send(Failed(reason=str(error), hint=error.hint))
            channel.finish()
            raise
        if refusal is not None:
            self._refuse(peer, refusal)
            raise TlsError(refusal.reason)
        return peer

    def _secure(self, channel: Channel, credentials: Credentials, deadline_s: float) -> Refuse | None:
        """Speak TLS; return what to tell a source whose certificate is good and is for another name."""
        if channel.first_bytes(len(MAGIC), deadline_s).startswith(MAGIC[:2]):
            self._refuse(Peer(channel, Side.DESTINATION), _TLS_ONLY)
            raise TlsError("it does not speak TLS", "pageferry migrate to tls:// there")
        try:
            certificate = channel.secure(credentials.context, deadline_s=deadline_s)
        except TlsError:
            channel.finish()  # it has yet to hear why
            raise
        if credentials.accepts(certificate):
            return None
        names = ", ".join(names_of(certificate)) or "no name"
        what = f"the source's certificate is for {names}, and not for {credentials.peer}"
        return Refuse(reason=what, hint="--peer at the destination says whom it accepts")

    def _find_place(self, peer: Peer) -> None:
        with self._changed:
            self._places.heard = [each for each in self._places.heard if each is not peer.channel]
            if isinstance(peer.first, SourceHello) and self._places.patient < _MAX_PATIENT:
                self._places.patient += 1
                self._changed.wait_for(lambda: self.closed or not self._places.taken, _patience_s(peer.first))
                self._places.patient -= 1
            refusal = self._no_more(peer) if self.closed else self._places.refusal_of(peer)
            self._changed.notify_all()
        if refusal is not None:
            self._refuse(peer, refusal)

    @staticmethod
    def _no_more(peer: Peer) -> Refuse:
        return _NO_MORE if isinstance(peer.first, SourceHello) else _NOTHING_TO_JOIN

    @staticmethod
    def _refuse(peer: Peer, refusal: Refuse) -> None:
        with contextlib.suppress(OSError, PageferryError):
            peer.greet()
            peer.send(refusal)
        peer.channel.finish()
