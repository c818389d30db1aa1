"""Links: how a guest's network device reaches the network of this host.

A frame is an Ethernet frame behind the 12 bytes of a virtio_net_hdr, which tells a tap what is left to do (checksum,
segmentation). A link that can do nothing of that leaves the header zero. All calls are made by one thread at a time.

Source: Linux ``networking/tuntap.rst``; VIRTIO 1.2, section 5.1.6.
"""

import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Sequence
from typing import Protocol

from pageferry.core.errors import UsageError, VmError
from pageferry.core.os_hints import connect_hint

HEADER_BYTES = 12
#: A segment that is still to be cut, and its headers.
MAX_FRAME_BYTES = HEADER_BYTES + 65_550
_BROADCAST = b"\xff" * 6
_ETHERTYPE_RARP = 0x8035
_MIN_FRAME_BYTES = 60

_TUN = "/dev/net/tun"
_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ = 0x4004_54CA, 0x4004_54D0, 0x4004_54D8
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_IFREQ = struct.Struct("16sH22x")
#: TUNSETOFFLOAD's bits.
CHECKSUM, TSO4, TSO6 = 1, 2, 4
#: What a socket has in place of the virtio_net_hdr: the frame's length.
_LENGTH = struct.Struct(">I")
_SEND_BUFFER_BYTES = 1 << 20


class Link(Protocol):
    """One guest's way to a network; claimed and released as every backend."""

    offloads: int
    """The work that it can leave to the receiver of a frame: CHECKSUM, TSO4, TSO6."""

    def claim(self) -> None:
        """Take the link; see :class:`pageferry.devices.virtio.devices.Backend`."""

    def release(self) -> None:
        """Give it back."""

    def close(self) -> None:
        """Let go of it for good. May be called twice."""

    def fileno(self) -> int:
        """Return the descriptor that is readable when a frame may be there; it is claimed."""

    def leave(self, offloads: int) -> None:
        """Say what of a frame may be left to the guest from now on."""

    def receive(self, buffer: bytearray) -> int:
        """Put the next frame into ``buffer``, of MAX_FRAME_BYTES; return its length, 0: none is there.

        Raises:
            OSError: the link is broken.
        """

    def send(self, frame: Sequence[memoryview]) -> None:
        """Send a frame in pieces, or drop it where there is no room.

        Raises:
            OSError: the link is broken.
        """


def rarp(mac: bytes) -> bytes:
    """Return a frame by which switches learn where ``mac`` is now: a request of RARP, as after every move.

    Source: RFC 903.
    """
    ethernet = _BROADCAST + mac + _ETHERTYPE_RARP.to_bytes(2, "big")
    request = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 3) + 2 * (mac + bytes(4))
    return bytes(HEADER_BYTES) + (ethernet + request).ljust(_MIN_FRAME_BYTES, b"\0")


def open_link(address: str) -> "TapLink | SocketLink":
    """Return the link that ``tap:NAME`` or ``unix:PATH`` names, not claimed yet.

    Raises:
        UsageError: it names none, or there is no such thing here.
    """
    kind, _, rest = address.partition(":")
    if kind == "tap" and rest:
        return TapLink(rest)
    if kind == "unix" and rest:
        return SocketLink(rest)
    raise UsageError(f"no network: {address!r}", hint="tap:NAME, or unix:PATH for a socket of passt")


class TapLink:
    """A tap device, which this process attaches to while the link is claimed.

    Args:
        name: of the interface, which exists.

    Raises:
        UsageError: there is no such interface, or it is not ours to use.
    """

    offloads = CHECKSUM | TSO4 | TSO6

    def __init__(self, name: str) -> None:
        self._name = name
        self._fd = -1
        self._left = 0
        try:
            socket.if_nametoindex(name)
        except OSError as error:
            hint = f"make one: ip tuntap add {name} mode tap"
            raise UsageError(f"there is no network interface {name}", hint=hint) from error
        try:
            os.close(self._attach())  # found out by doing, before a guest depends on it
        except OSError as error:
            if error.errno != errno.EBUSY:  # its source may be on this host
                raise UsageError(f"cannot use tap {name}: {error.strerror}") from error

    def _attach(self) -> int:
        fd = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
            fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(self._name.encode(), flags))
            fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", HEADER_BYTES))
            fcntl.ioctl(fd, _TUNSETOFFLOAD, self._left)
        except OSError:
            os.close(fd)
            raise
        return fd

    def claim(self) -> None:
        """Attach to the interface. Nothing happens when it is attached.

        Raises:
            VmError: another process is, or the host refuses.
        """
        if self._fd >= 0:
            return
        try:
            self._fd = self._attach()
        except OSError as error:
            hint = "end the guest or program that uses it" if error.errno == errno.EBUSY else ""
            raise VmError(f"cannot attach to tap {self._name}: {error.strerror}", hint=hint) from error

    def release(self) -> None:
        """Detach from the interface."""
        self.close()

    def close(self) -> None:
        """Detach from the interface. May be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def fileno(self) -> int:
        """Return the descriptor, -1 when it is not claimed."""
        return self._fd

    def leave(self, offloads: int) -> None:
        """Have the host leave so much to the guest; it does the rest by itself."""
        if offloads != self._left:
            self._left = offloads
            if self._fd >= 0:
                fcntl.ioctl(self._fd, _TUNSETOFFLOAD, offloads)

    def receive(self, buffer: bytearray) -> int:
        """Take a frame from the interface; see the protocol."""
        try:
            return os.readv(self._fd, [buffer])
        except BlockingIOError:
            return 0

    def send(self, frame: Sequence[memoryview]) -> None:
        """Put a frame on the interface; one that it does not take is dropped, as on a wire."""
        try:
            os.writev(self._fd, frame)
        except OSError as error:
            # No room, the interface is down, or the guest's header makes no sense.
            if error.errno not in (errno.EAGAIN, errno.EIO, errno.EINVAL, errno.ENOBUFS, errno.ENOMEM):
                raise


class SocketLink:
    """A Unix stream socket with frames behind their length, as passt speaks; connected while the link is claimed.

    Args:
        path: where it listens.

    Raises:
        UsageError: there is no socket.
    """

    offloads = 0

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket: socket.socket | None = None
        self._received = bytearray()
        self._unsent = b""
        try:
            is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
        except OSError as error:
            raise UsageError(f"cannot use socket {path}: {error.strerror}", hint=_hint(error, path)) from error
        if not is_socket:
            raise UsageError(f"{path} is not a socket")

    def claim(self) -> None:
        """Connect. Nothing happens when it is connected.

        Raises:
            VmError: no process listens, or the host refuses.
        """
        if self._socket is not None:
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(self._path)
        except OSError as error:
            sock.close()
            raise VmError(f"cannot connect to {self._path}: {error.strerror}", hint=_hint(error, self._path)) from error
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._socket = sock

    def release(self) -> None:
        """Disconnect; a frame that came in part is lost."""
        self.close()

    def close(self) -> None:
        """Disconnect. May be called twice."""
        sock, self._socket, self._unsent = self._socket, None, b""
        self._received.clear()
        if sock is not None:
            sock.close()

    def fileno(self) -> int:
        """Return the descriptor, -1 when it is not claimed."""
        return -1 if self._socket is None else self._socket.fileno()

    def leave(self, offloads: int) -> None:
        """Do nothing: frames come complete."""

    def receive(self, buffer: bytearray) -> int:
        """Take a frame off the stream; see the protocol."""
        while (size_bytes := self._take_frame(buffer)) == 0:
            try:
                data = self._connected().recv(MAX_FRAME_BYTES)
            except BlockingIOError:
                return 0
            if not data:
                raise ConnectionResetError(errno.ECONNRESET, f"{self._path} was closed")
            self._received += data
        return size_bytes

    def _take_frame(self, buffer: bytearray) -> int:
        if len(self._received) < _LENGTH.size:
            return 0
        size_bytes: int = _LENGTH.unpack_from(self._received)[0]
        if not 0 < size_bytes <= MAX_FRAME_BYTES - HEADER_BYTES:
            raise ConnectionResetError(errno.EPROTO, f"{self._path} sent a frame of {size_bytes} bytes")
        end = _LENGTH.size + size_bytes
        if len(self._received) < end:
            return 0
        buffer[:HEADER_BYTES] = bytes(HEADER_BYTES)
        buffer[HEADER_BYTES : HEADER_BYTES + size_bytes] = self._received[_LENGTH.size : end]
        del self._received[:end]
        return HEADER_BYTES + size_bytes

    def send(self, frame: Sequence[memoryview]) -> None:
        """Send a frame; it is dropped where there is no room for any of it, and never in part."""
        if self._unsent:
            self._unsent = self._unsent[self._send([memoryview(self._unsent)]) :]
            if self._unsent:
                return
        whole = b"".join(frame)[HEADER_BYTES:]
        if not whole:
            return
        head = _LENGTH.pack(len(whole))
        sent = self._send([memoryview(head), memoryview(whole)])
        if sent:
            self._unsent = (head + whole)[sent:]

    def _send(self, pieces: Sequence[memoryview]) -> int:
        try:
            return self._connected().sendmsg(pieces)
        except BlockingIOError:
            return 0

    def _connected(self) -> socket.socket:
        if self._socket is None:
            raise OSError(errno.ENOTCONN, f"{self._path} is not connected")
        return self._socket


def _hint(error: OSError, path: str) -> str:
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return "start passt first"
    return connect_hint(error, path=path)
