"""Channel: a connected stream socket with gather/scatter I/O straight between guest memory and the wire.

No method copies page data in Python. Failures are ``OSError`` (of which ``ConnectionError`` and ``TimeoutError`` are
kinds); the engine's phases turn them into a ``TransportError`` that says where the guest is.
"""

import contextlib
import errno
import ipaddress
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pageferry.core.errors import UsageError
from pageferry.core.gather import MAX_BUFFERS, first_left
from pageferry.core.os_hints import MAX_SOCKET_PATH_BYTES
from pageferry.engine.host import THIS_HOST, Host
from pageferry.engine.wire.carrier import Carrier, PlainCarrier, TlsCarrier, left_s
from pageferry.engine.wire.listener import Listener, listen_tcp, listen_unix, parse_host_port, resolve
from pageferry.engine.wire.pacer import Pacer

_SOCKET_BUFFER_BYTES = 8 << 20
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
#: So many may connect before the next is accepted.
_BACKLOG = 64
_CONNECT_POLL_MS = 100
_BACKLOG_POLL_S = 0.02
_KEEPALIVE_PROBES = 3
#: ``struct tcp_info`` up to and with tcpi_last_ack_recv. Source: linux/tcp.h.
_TCP_INFO_BYTES, _TCPI_UNACKED, _TCPI_LAST_ACK_RECV = 60, 24, 56
_U32 = struct.Struct("=I")
#: Linux takes no more.
_MAX_KEEPALIVE_S = 32_767
DEFAULT_TIMEOUT_S = 30.0
MAX_TIMEOUT_S = 86_400.0
_ADDRESS_HINT = "write tls://HOST:PORT, tcp://HOST:PORT, tcp://[IPV6]:PORT or unix:PATH"


def _never() -> bool:
    """Do not give up."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where to listen or connect: TCP if ``host`` is set, with TLS if ``tls``; else a Unix socket at ``path``."""

    host: str = ""
    port: int = 0
    path: str = ""
    tls: bool = False

    @classmethod
    def parse(cls, uri: str) -> "Endpoint":
        """Read ``tcp://HOST:PORT`` (IPv6 in brackets), ``tls://HOST:PORT`` or ``unix:PATH``.

        ``tcp:HOST:PORT`` is read too, as QEMU writes it.

        Raises:
            UsageError: it is not an address; says what is wrong with it.
        """
        try:
            if uri.startswith("unix:"):
                return cls(path=_unix_path(uri.removeprefix("unix:").removeprefix("//")))
            if uri.startswith(("tcp:", "tls:")):
                host, port = parse_host_port(uri[len("tcp:") :].removeprefix("//"))
                return cls(host=host, port=port, tls=uri.startswith("tls:"))
        except ValueError as error:
            raise UsageError(f"not an address: {uri!r}: {error}", hint=_ADDRESS_HINT) from error
        raise UsageError(f"not an address: {uri!r}", hint=_ADDRESS_HINT)

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.tls else 'tcp'}://{host}:{self.port}"

    def expect_suits(self, credentials: object | None) -> None:
        """Check that there are credentials if this is TLS, and none if it is not.

        Raises:
            UsageError: it is not so.
        """
        if self.tls and credentials is None:
            hint = "--tls-dir DIR, or a one-time secret; `pageferry keys` makes what a lab needs"
            raise UsageError(f"{self} needs certificates, or a secret", hint=hint)
        if credentials is not None and not self.tls:
            raise UsageError(
                f"{self} is not encrypted, and certificates or a secret were given", hint="tls://HOST:PORT"
            )

    @property
    def exposed(self) -> bool:
        """Whether others can read and change what goes there: it is neither on this host nor TLS."""
        return not (self.path or self.tls or _is_loopback(self.host))

    def connect(self, timeout_s: float, given_up: Callable[[], bool] = _never) -> "Channel":
        """Connect.

        Args:
            timeout_s: how long to try; later, how long the channel may stand still.
            given_up: asked ten times a second.

        Raises:
            OSError: nothing listens there, the name is unknown, the time is over, or ``given_up`` said so.
        """
        if self.path:
            addresses: list[tuple[int, Any]] = [(socket.AF_UNIX, self.path)]
        elif not self.port:
            raise OSError(errno.EADDRNOTAVAIL, "port 0 is for listening only")
        else:
            addresses = resolve(self.host, self.port)
        failure: OSError = OSError("no address")
        deadline_s = time.monotonic() + timeout_s
        for at, (family, address) in enumerate(addresses):
            sock = socket.socket(family, socket.SOCK_STREAM)
            left_s = deadline_s - time.monotonic()
            try:  # each has an equal share of what is left: one that answers nothing leaves time for the others
                _connect(sock, address, time.monotonic() + left_s / (len(addresses) - at), given_up)
                return Channel(sock, timeout_s)
            except OSError as error:
                sock.close()
                failure = error
        raise failure

    def listen(self) -> Listener:
        """Listen; port 0 takes a free one.

        Raises:
            OSError: the address is in use or not ours.
        """
        if self.path:
            return listen_unix(Path(self.path), _BACKLOG)
        return listen_tcp(self.host, self.port, _BACKLOG)

    def bound(self, listener: Listener) -> "Endpoint":
        """Return this endpoint with the port that ``listener`` really has."""
        return self if self.path else replace(self, port=listener.port)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def _unix_path(path: str) -> str:
    if not path:
        raise ValueError("the path is missing")
    if "\0" in path:
        raise ValueError("a path has no NUL")
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"a socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes")
    return path


def _connect(sock: socket.socket, address: Any, deadline_s: float, given_up: Callable[[], bool]) -> None:  # noqa: ANN401
    sock.setblocking(False)
    code = sock.connect_ex(address)
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    while code in (errno.EINPROGRESS, errno.EAGAIN):
        if given_up() or time.monotonic() > deadline_s:
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        if code == errno.EAGAIN:  # a Unix socket with a full backlog: nothing tells when there is room
            time.sleep(_BACKLOG_POLL_S)
            code = sock.connect_ex(address)
        elif poll.poll(_CONNECT_POLL_MS):
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def _notice_silence(sock: socket.socket, timeout_s: float) -> None:
    # A peer that is gone is noticed within the timeout, whether something is on its way to it or nothing is.
    timeout_ms = max(1, int(timeout_s * 1000))
    probe_s = max(1, int(timeout_s / (_KEEPALIVE_PROBES + 1)))
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_USER_TIMEOUT, timeout_ms),
        (socket.TCP_KEEPIDLE, min(probe_s, _MAX_KEEPALIVE_S)),
        (socket.TCP_KEEPINTVL, min(probe_s, _MAX_KEEPALIVE_S)),
        (socket.TCP_KEEPCNT, _KEEPALIVE_PROBES),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class _Waiting:
    """Knows who waits for the peer, and since when it has not moved: a block for each wait."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._threads: set[int] = set()
        self.moved_s = now_s()

    def __bool__(self) -> bool:
        return bool(self._threads)

    def __enter__(self) -> None:
        if not self._threads:
            self.moved_s = self._now_s()
        self._threads.add(threading.get_ident())

    def __exit__(self, failed: object, *_: object) -> None:
        if failed is None:
            self.moved_s = self._now_s()
        self._threads.discard(threading.get_ident())


class Channel:
    """One connection.

    Args:
        sock: connected; the channel owns it.
        timeout_s: how long a single call may take before it counts as stalled. A peer that trickles is a stalled one.
        host: on which it waits.
    """

    def __init__(self, sock: socket.socket, timeout_s: float = DEFAULT_TIMEOUT_S, host: Host = THIS_HOST) -> None:
        self._sock = sock
        self._carrier: Carrier = PlainCarrier(sock, host)
        self.host = host
        self.timeout_s = timeout_s
        self.sent_bytes = 0
        self.pacer: Pacer | None = None
        self._aborted = host.event()
        self._waiting = _Waiting(host.now_s)
        self._fd: int | None = None
        self.local = sock.family == socket.AF_UNIX
        if not self.local:
            _notice_silence(sock, timeout_s)
        for forced, plain in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
            try:
                sock.setsockopt(socket.SOL_SOCKET, forced, _SOCKET_BUFFER_BYTES)
            except OSError:  # needs privilege; the plain form is capped by the system's limit
                sock.setsockopt(socket.SOL_SOCKET, plain, _SOCKET_BUFFER_BYTES)

    @property
    def socket(self) -> socket.socket:
        """The connection itself, to see where it leads."""
        return self._sock

    def send(self, buffers: Sequence[bytes | memoryview], fd: int | None = None) -> None:
        """Send all of ``buffers`` in order, gathered, when the pacer allows it.

        Args:
            buffers: what to send.
            fd: a descriptor to hand over with the first byte (Unix sockets only); it stays ours too.

        Raises:
            OSError: cut or stalled.
        """
        queue = [memoryview(buffer) for buffer in buffers if len(buffer)]
        if self.pacer is not None and self._aborted.wait(self.pacer.reserve(sum(map(len, queue)))):
            raise ConnectionAbortedError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))
        at = 0
        deadline_s = self.deadline_s()
        while at < len(queue):
            with self._waiting:
                sent = self._carrier.send(queue[at : at + MAX_BUFFERS], deadline_s, fd)
            self.sent_bytes += sent
            fd = None
            at = first_left(queue, at, sent)

    def receive_into(self, views: Sequence[memoryview], ahead: memoryview | None = None) -> int:
        """Fill all of ``views`` in order, scattered; with them, what has come of ``ahead``.

        Args:
            views: where to.
            ahead: takes what comes next, as far as it is there already.

        Returns:
            How many bytes ``ahead`` has got.

        Raises:
            ConnectionError: the peer closed before they were full.
            OSError: cut or stalled.
        """
        queue = [view for view in views if len(view)]
        at, full = 0, len(queue)
        if ahead is not None and full:
            queue.append(ahead)
        deadline_s = self.deadline_s()
        while at < full:
            with self._waiting:
                received = self._carrier.receive_into(queue[at : at + MAX_BUFFERS], deadline_s)
            if not received:
                raise ConnectionResetError("the peer closed the connection")
            at = first_left(queue, at, received)
        if ahead is None or not full:
            return 0
        return len(ahead) - (len(queue[full]) if at == full else 0)

    @property
    def silent_s(self) -> float:
        """For how long the peer has neither said what is waited for nor acknowledged what was sent; from any thread."""
        waited_s = self.unmoved_s if self._waiting else 0.0
        return max(waited_s, 0.0 if self.local else self._unacknowledged_s())

    def _unacknowledged_s(self) -> float:
        # What was sent may be in the kernel still, of a peer that is long gone.
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except OSError:  # closed
            return 0.0
        (unacked,), (last_ack_ms,) = _U32.unpack_from(info, _TCPI_UNACKED), _U32.unpack_from(info, _TCPI_LAST_ACK_RECV)
        return last_ack_ms / 1e3 if unacked else 0.0

    @property
    def unmoved_s(self) -> float:
        """For how long nothing has moved either way, waited for or not."""
        return self.host.now_s() - self._waiting.moved_s

    def secure(
        self,
        context: ssl.SSLContext,
        *,
        server_name: str | None = None,
        deadline_s: float | None = None,
        given_up: Callable[[], bool] = _never,
    ) -> dict[str, Any]:
        """Speak TLS from now on; return what the peer's certificate says, as :meth:`ssl.SSLSocket.getpeercert` does.

        Args:
            context: whom we accept, and who we are; of a server where ``server_name`` is None.
            server_name: which name or address the server's certificate must have.
            deadline_s: of the handshake, on the monotonic clock; None: as for any other call.
            given_up: asked ten times a second.

        Raises:
            TlsError: the peer is not accepted, does not accept us, or does not speak TLS. A client whose certificate
                is not accepted may hear it at its first receive only.
            OSError: cut or stalled.
        """
        secured = context.wrap_socket(
            self._sock,
            server_side=server_name is None,
            server_hostname=server_name,
            do_handshake_on_connect=False,
        )
        self._sock = secured
        self._carrier = carrier = TlsCarrier(secured, self.host)
        carrier.handshake(self.deadline_s() if deadline_s is None else deadline_s, given_up)
        return secured.getpeercert() or {}

    def first_bytes(self, count: int, deadline_s: float) -> bytes:
        """Return up to ``count`` of the bytes that come next and leave them, as soon as there are some.

        Raises:
            OSError: cut, or the deadline passed.
        """
        while not self._carrier.readable(left_s(deadline_s, self.host)):
            pass
        return self._sock.recv(count, socket.MSG_PEEK)

    @property
    def peer_name(self) -> str:
        """Where the peer is, for people."""
        try:
            host, port, *_ = ("this host", 0) if self.local else self._sock.getpeername()
        except OSError:
            return "a peer that has left"
        return host if self.local else f"{host} port {port}"

    def deadline_s(self, within_s: float | None = None) -> float:
        """Return when a call that begins now counts as stalled, on the monotonic clock.

        Args:
            within_s: how long it may take; None: as long as any.
        """
        return self.host.now_s() + (self.timeout_s if within_s is None else within_s)

    def receive_some(self, at_most_bytes: int, deadline_s: float | None = None) -> bytes:
        """Return some bytes, at least one and at most so many; none when the peer has closed.

        Args:
            at_most_bytes: at least 1.
            deadline_s: of the call that this is a part of; None: a call of its own.

        Raises:
            OSError: cut or stalled.
        """
        with self._waiting:
            data, fds = self._carrier.receive(at_most_bytes, self.deadline_s() if deadline_s is None else deadline_s)
        for fd in fds:
            if self._fd is None:
                self._fd = fd
            else:
                os.close(fd)
        return data

    def take_fd(self) -> int | None:
        """Return the descriptor that the peer handed over, which is the caller's then; None if there is none.

        Until it is taken others are closed as they come, so a peer has no more than one open here.
        """
        fd, self._fd = self._fd, None
        return fd

    def readable(self, wait_s: float = 0.0) -> bool:
        """Tell whether the peer has said something, or has closed, or does so within ``wait_s``."""
        return self._carrier.readable(wait_s)

    def finish(self, drain_s: float = 2.0) -> None:
        """Say that nothing more will be sent, and read what the peer still sends until it closes; then close.

        Closing with unread data would reset the connection, and the peer might lose the last words sent to it.
        """
        with contextlib.suppress(OSError):
            self._carrier.shut_down(socket.SHUT_WR)
            self._carrier.drain(self.host.now_s() + drain_s)
        self.close()

    def abort(self) -> None:
        """Wake any thread that is sending, waiting to send or receiving with an error; from any thread."""
        self._aborted.set()
        with contextlib.suppress(OSError):
            self._carrier.shut_down(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection, and what was handed over and not taken."""
        self._sock.close()
        fd = self.take_fd()
        if fd is not None:
            os.close(fd)
