"""Channel: a connected stream socket with gather/scatter I/O straight between guest memory and the wire.

No method copies page data in Python. Failures are ``OSError`` (of which ``ConnectionError`` and ``TimeoutError`` are
kinds); the engine's phases turn them into a ``TransportError`` that says where the guest is.
"""

import contextlib
import select
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pageferry.core.errors import UsageError

_SOCKET_BUFFER_BYTES = 8 << 20
_SO_SNDBUFFORCE = 32
_SO_RCVBUFFORCE = 33
_MAX_BUFFERS = 1024  # IOV_MAX
DEFAULT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where to listen or connect: TCP if ``host`` is set, else a Unix socket at ``path``."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, uri: str) -> "Endpoint":
        """Read ``tcp://HOST:PORT`` (IPv6 in brackets), ``tcp:HOST:PORT`` as QEMU writes it, or ``unix:PATH``.

        Raises:
            UsageError: it is neither.
        """
        if uri.startswith("unix:"):
            path = uri.removeprefix("unix:")
            path = path.removeprefix("//") if path.startswith("//") else path
            if path:
                return cls(path=path)
        elif uri.startswith("tcp:"):
            with contextlib.suppress(ValueError):
                parts = urlsplit("tcp://" + uri.removeprefix("tcp:").removeprefix("//"))
                if parts.hostname and parts.port is not None and not parts.path:
                    return cls(host=parts.hostname, port=parts.port)
        raise UsageError(f"not an address: {uri!r}", hint="write tcp://HOST:PORT or unix:PATH")

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"

    def connect(self, timeout_s: float) -> "Channel":
        """Connect.

        Raises:
            OSError: nobody listens, the name is unknown, or the time is over.
        """
        if not self.path:
            return Channel(socket.create_connection((self.host, self.port), timeout_s), timeout_s)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(self.path)
        except BaseException:
            sock.close()
            raise
        return Channel(sock, timeout_s)

    def listen(self) -> socket.socket:
        """Return a listening socket; port 0 takes a free one. A Unix socket's path must not exist.

        Raises:
            OSError: the address is in use or not ours.
        """
        if self.path:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.bind(self.path)
                sock.listen(1)
            except BaseException:
                sock.close()
                raise
            return sock
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        return socket.create_server((self.host, self.port), family=family, backlog=1)

    def bound(self, listener: socket.socket) -> "Endpoint":
        """Return this endpoint with the port that ``listener`` really has."""
        return self if self.path else Endpoint(host=self.host, port=listener.getsockname()[1])

    def remove(self) -> None:
        """Remove a Unix socket's path; TCP has nothing to remove."""
        if self.path:
            Path(self.path).unlink(missing_ok=True)


class Channel:
    """One connection.

    Args:
        sock: connected; the channel owns it.
        timeout_s: how long a single send or receive may stand still before it counts as stalled.
    """

    def __init__(self, sock: socket.socket, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self._sock = sock
        self.sent_bytes = 0
        sock.settimeout(timeout_s)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for forced, plain in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
            try:
                sock.setsockopt(socket.SOL_SOCKET, forced, _SOCKET_BUFFER_BYTES)
            except OSError:  # needs privilege; the plain form is capped by the system's limit
                sock.setsockopt(socket.SOL_SOCKET, plain, _SOCKET_BUFFER_BYTES)

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send all of ``buffers`` in order, gathered.

        Raises:
            OSError: cut or stalled.
        """
        queue = [memoryview(buffer) for buffer in buffers if len(buffer)]
        at = 0
        while at < len(queue):
            sent = self._sock.sendmsg(queue[at : at + _MAX_BUFFERS])
            self.sent_bytes += sent
            while at < len(queue) and sent >= len(queue[at]):
                sent -= len(queue[at])
                at += 1
            if sent:
                queue[at] = queue[at][sent:]

    def receive_into(self, views: Sequence[memoryview]) -> None:
        """Fill all of ``views`` in order, scattered.

        Raises:
            ConnectionError: the peer closed before they were full.
            OSError: cut or stalled.
        """
        queue = [view for view in views if len(view)]
        at = 0
        while at < len(queue):
            received = self._sock.recvmsg_into(queue[at : at + _MAX_BUFFERS])[0]
            if not received:
                raise ConnectionResetError("the peer closed the connection")
            while at < len(queue) and received >= len(queue[at]):
                received -= len(queue[at])
                at += 1
            if received:
                queue[at] = queue[at][received:]

    def receive_some(self, at_most_bytes: int) -> bytes:
        """Return some bytes, at least one and at most so many; none when the peer has closed.

        Raises:
            OSError: cut or stalled.
        """
        return self._sock.recv(at_most_bytes)

    def readable(self) -> bool:
        """Tell whether the peer has said something, or has closed, without waiting."""
        return bool(select.select([self._sock], [], [], 0)[0])

    def finish(self, drain_s: float = 2.0) -> None:
        """Say that nothing more will be sent, and read what the peer still sends until it closes; then close.

        Closing with unread data would reset the connection, and the peer might lose the last words sent to it.
        """
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            self._sock.settimeout(drain_s)
            scratch = bytearray(1 << 20)
            while self._sock.recv_into(scratch):
                pass
        self.close()

    def abort(self) -> None:
        """Wake any thread that is sending or receiving with an error; from any thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()
