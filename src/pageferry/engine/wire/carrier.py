"""Carriers: how a channel's bytes go over its socket, plain or through TLS.

Both are used alike: one thread may send and another receive at the same time, and no call blocks past its deadline.
"""

import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from pageferry.engine.host import THIS_HOST, Host
from pageferry.engine.wire.tls_errors import SecretContext, explained

#: Encrypted by one call, during which the other direction waits.
_PIECE_BYTES = 256 << 10
#: Smaller buffers are put together, so that a record of TLS (16 KiB) is full.
_SMALL_BYTES = 16 << 10
#: Decrypted before another thread has a turn.
_TURN_BYTES = 1 << 20
#: Read at once of what is forgotten.
_SCRATCH_BYTES = 1 << 20
_R = TypeVar("_R")


class Carrier(Protocol):
    """A socket as a channel needs it."""

    def send(self, buffers: Sequence[memoryview], deadline_s: float, fd: int | None) -> int:
        """Send some of ``buffers``, none of them empty; return how many bytes.

        Args:
            buffers: what to send, MAX_BUFFERS at the most.
            deadline_s: on the monotonic clock.
            fd: a descriptor to hand over with the first byte.

        Raises:
            OSError: cut, or the deadline passed.
        """

    def receive_into(self, views: Sequence[memoryview], deadline_s: float) -> int:
        """Fill some of ``views``, none of them empty and MAX_BUFFERS at the most; return how many bytes.

        0: the peer has closed.

        Raises:
            OSError: cut, or the deadline passed.
        """

    def receive(self, at_most_bytes: int, deadline_s: float) -> tuple[bytes, list[int]]:
        """Return some bytes, none when the peer has closed, and the descriptors that came with them.

        Raises:
            OSError: cut, or the deadline passed.
        """

    def readable(self, wait_s: float) -> bool:
        """Tell whether :meth:`receive` would not wait, within ``wait_s``."""

    def shut_down(self, how: int) -> None:
        """Shut the connection down, beneath its TLS if it has one.

        Raises:
            OSError: it is closed already.
        """

    def drain(self, deadline_s: float) -> None:
        """Read and forget what comes until the peer closes, beneath TLS if there is one.

        Raises:
            OSError: cut, or the deadline passed.
        """


def left_s(deadline_s: float, host: Host) -> float:
    """Return how long it is to a deadline.

    Raises:
        TimeoutError: it has passed.
    """
    left = deadline_s - host.now_s()
    if left <= 0:
        raise TimeoutError("stalled")
    return left


class PlainCarrier:
    """Hands bytes to the kernel where they lie: by one system call, and two more only where it has to wait.

    Args:
        sock: connected. It is made non-blocking.
        host: on which it waits.
    """

    def __init__(self, sock: socket.socket, host: Host = THIS_HOST) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._host = host
        self._takes_fds = sock.family == socket.AF_UNIX

    def send(self, buffers: Sequence[memoryview], deadline_s: float, fd: int | None) -> int:
        """Send by one system call; see :class:`Carrier`."""
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))]
        while True:
            try:
                return self._sock.sendmsg(buffers, rights)
            except BlockingIOError:
                self._host.writable(self._sock, left_s(deadline_s, self._host))

    def receive_into(self, views: Sequence[memoryview], deadline_s: float) -> int:
        """Receive by one system call; see :class:`Carrier`."""
        while True:
            try:
                return self._sock.recvmsg_into(views)[0]
            except BlockingIOError:
                self._host.readable(self._sock, left_s(deadline_s, self._host))

    def receive(self, at_most_bytes: int, deadline_s: float) -> tuple[bytes, list[int]]:
        """Receive by one system call, with one descriptor at the most; see :class:`Carrier`."""
        while True:
            try:
                if not self._takes_fds:
                    return self._sock.recv(at_most_bytes), []
                data, fds, _, _ = socket.recv_fds(self._sock, at_most_bytes, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                self._host.readable(self._sock, left_s(deadline_s, self._host))
            else:
                return data, fds

    def readable(self, wait_s: float) -> bool:
        """Ask the kernel."""
        return self._host.readable(self._sock, wait_s)

    def shut_down(self, how: int) -> None:
        """Shut the connection down; see :class:`Carrier`."""
        self._sock.shutdown(how)

    def drain(self, deadline_s: float) -> None:
        """Read until the peer closes; see :class:`Carrier`."""
        scratch = [memoryview(bytearray(_SCRATCH_BYTES))]
        while self.receive_into(scratch, deadline_s):
            pass


class TlsCarrier:
    """Encrypts on the way out and decrypts on the way in.

    OpenSSL's object is for one thread at a time, so no call of it blocks: a thread that has to wait does so outside the
    lock.

    Args:
        sock: connected; no byte of TLS has passed. It is made non-blocking.
        host: whose clock counts.
    """

    def __init__(self, sock: ssl.SSLSocket, host: Host = THIS_HOST) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._host = host
        self._turn = threading.Lock()
        self._sending = threading.Lock()  # a write that had to wait must be repeated as it was
        self._ahead = b""  # decrypted by :meth:`readable`
        self._over: OSError | None = None  # met by it

    def handshake(self, deadline_s: float, given_up: Callable[[], bool]) -> None:
        """Agree on keys, and see who the peer is.

        Args:
            deadline_s: on the monotonic clock.
            given_up: asked ten times a second.

        Raises:
            TlsError: the peer is not accepted, does not accept us, or does not speak TLS.
            OSError: cut, or the deadline passed, or ``given_up`` said so.
        """
        self._until_done(self._sock.do_handshake, deadline_s, given_up)

    def send(self, buffers: Sequence[memoryview], deadline_s: float, fd: int | None) -> int:
        """Encrypt and send one piece; see :class:`Carrier`. ``fd`` is None: TLS hands over no descriptors."""
        assert fd is None
        piece = _piece_of(buffers)
        with self._sending:
            return self._until_done(lambda: self._sock.send(piece), deadline_s)

    def receive_into(self, views: Sequence[memoryview], deadline_s: float) -> int:
        """Decrypt into ``views`` as much as has come; see :class:`Carrier`."""
        if self._ahead or self._over is not None:
            data = self._taken(len(views[0]))
            views[0][: len(data)] = data
            return len(data)
        return self._until_done(lambda: self._fill(views), deadline_s)

    def receive(self, at_most_bytes: int, deadline_s: float) -> tuple[bytes, list[int]]:
        """Decrypt some; see :class:`Carrier`."""
        if self._ahead or self._over is not None:
            return self._taken(at_most_bytes), []
        return self._until_done(lambda: self._sock.recv(at_most_bytes), deadline_s), []

    def readable(self, wait_s: float) -> bool:
        """Find out by decrypting: what the kernel has may hold no data, or only part of a record."""
        if self._ahead or self._over is not None:
            return True
        try:
            self._ahead = self._until_done(lambda: self._sock.recv(_SMALL_BYTES), self._host.now_s() + wait_s)
        except TimeoutError:
            return False
        except OSError as error:
            self._over = error
            return True
        if not self._ahead:
            self._over = ConnectionResetError("the peer closed the connection")
        return True

    def shut_down(self, how: int) -> None:
        """Shut it down in the kernel: ``SSLSocket.shutdown`` would go on in the clear."""
        socket.socket.shutdown(self._sock, how)

    def drain(self, deadline_s: float) -> None:
        """Read beneath TLS until the peer closes; see :class:`Carrier`."""
        scratch = bytearray(_SCRATCH_BYTES)
        while True:
            self._sock.settimeout(left_s(deadline_s, self._host))
            if not socket.socket.recv_into(self._sock, scratch):
                return

    def _taken(self, at_most_bytes: int) -> bytes:
        data, self._ahead = self._ahead[:at_most_bytes], self._ahead[at_most_bytes:]
        if not data and self._over is not None and not isinstance(self._over, ConnectionResetError):
            raise self._over
        return data

    def _fill(self, views: Sequence[memoryview]) -> int:
        total = 0
        try:
            for view in views:
                at = 0
                while at < len(view):
                    received = self._sock.recv_into(view[at:])
                    at += received
                    total += received
                    if not received or total >= _TURN_BYTES:
                        return total
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if not total:
                raise
        return total

    def _until_done(self, step: Callable[[], _R], deadline_s: float, given_up: Callable[[], bool] | None = None) -> _R:
        poll = select.poll()
        while True:
            try:
                with self._turn:
                    return step()
            except ssl.SSLWantReadError:
                event = select.POLLIN
            except ssl.SSLWantWriteError:
                event = select.POLLOUT
            except ssl.SSLError as error:
                by_secret = isinstance(self._sock.context, SecretContext)
                raise explained(error, server_side=self._sock.server_side, by_secret=by_secret) from error
            poll.register(self._sock, event)
            left = left_s(deadline_s, self._host)
            if given_up is not None:
                if given_up():
                    raise TimeoutError("given up")
                left = min(left, 0.1)
            poll.poll(left * 1e3)


def _piece_of(buffers: Sequence[memoryview]) -> memoryview | bytes:
    first = buffers[0]
    if len(first) >= _SMALL_BYTES or len(buffers) == 1:
        return first[:_PIECE_BYTES]
    some, size_bytes = [], 0
    for buffer in buffers:
        if size_bytes + len(buffer) > _PIECE_BYTES:
            break
        some.append(buffer)
        size_bytes += len(buffer)
    return b"".join(some)
