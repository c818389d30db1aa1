"""A network for guests with taps, and another behind it where a peer answers, all made for the length of a test.

Both are network namespaces. The caller's process enters the first, which has a bridge with the taps; in the second one
thread echoes whatever comes on TCP port 7, so that a connection between the two passes a guest's tap both ways::

    guest -- tap0 --+
                    +-- bridge ===== peer (10.77.0.1): echo
    guest -- tap1 --+
"""

import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pageferry.core.libc import libc

PEER = "10.77.0.1"
#: What a guest's address may be, as ``ip addr add`` takes it.
ADDRESS = "10.77.0.2/24"
ECHO_PORT = 7
_CLONE_NEWNET = 0x4000_0000
_PIECE_BYTES = 1 << 16


class NoNetworkError(Exception):
    """The networks cannot be made here; the message says why."""


class Peer:
    """The other end. ``connections``: how many it has had; ``echoed_bytes``: on all of them."""

    def __init__(self) -> None:
        self.connections = 0
        self.echoed_bytes = 0
        self._ready = threading.Event()
        self._listener: socket.socket | None = None
        self._tid = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def begin(self) -> int:
        """Serve in a new namespace; return the id of the thread that is in it."""
        self._thread.start()
        self._ready.wait()
        if self._listener is None:
            raise NoNetworkError("no second network namespace")
        return self._tid

    def _serve(self) -> None:
        self._tid = threading.get_native_id()
        if not libc.unshare(_CLONE_NEWNET):
            self._listener = socket.create_server(("", ECHO_PORT))
        self._ready.set()
        with suppress(OSError):  # the listener was shut down
            while self._listener is not None:
                connection = self._listener.accept()[0]
                self.connections += 1
                with connection:
                    while data := connection.recv(_PIECE_BYTES):
                        connection.sendall(data)
                        self.echoed_bytes += len(data)

    def end(self) -> None:
        """Accept no more connections."""
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()


@contextmanager
def two_networks(taps: int) -> Iterator[Peer]:
    """Put this thread, and those that it starts, into a new network with ``tap0``, ``tap1``, ...; yield the peer.

    The thread stays there.

    Raises:
        NoNetworkError: the host refuses.
    """
    if libc.unshare(_CLONE_NEWNET):
        raise NoNetworkError(f"no network namespace: {os.strerror(ctypes.get_errno())}")
    peer = Peer()
    tid = peer.begin()
    try:
        _ip("link set lo up")
        _ip("link add name bridge type bridge forward_delay 0")
        _ip("link set bridge up")
        for number in range(taps):
            _ip(f"tuntap add tap{number} mode tap")
            _ip(f"link set tap{number} master bridge up")
        _ip(f"link add name wire master bridge type veth peer name peer netns {tid}")
        _ip("link set wire up")
        _in(tid, f"addr add {PEER}/24 dev peer")
        _in(tid, "link set peer up")
        yield peer
    finally:
        peer.end()


def _ip(command: str) -> None:
    _run("ip", *command.split())


def _in(tid: int, command: str) -> None:
    _run("nsenter", f"--net=/proc/{os.getpid()}/task/{tid}/ns/net", "ip", *command.split())


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise NoNetworkError(f"{command[0]} is not installed") from error
    if done.returncode:
        raise NoNetworkError(f"{' '.join(command)}: {done.stderr.strip()}")
