"""XenStore: a client of Xen's store, through its socket or the kernel's device; one request at a time, no watches.

Source: Xen ``xen/include/public/io/xs_wire.h``, ``docs/misc/xenstore.txt``.
"""

import errno
import os
import socket
import struct
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from pageferry.core.errors import UnsupportedError, XenError

_MESSAGE = struct.Struct("<IIII")  # type, request, transaction, length
_DIRECTORY, _READ, _WRITE, _RM, _ERROR = 1, 2, 11, 13, 16
_MAX_BYTES = 4096
SOCKETS = (Path("/run/xenstored/socket"), Path("/var/run/xenstored/socket"))
DEVICES = (Path("/dev/xen/xenbus"), Path("/proc/xen/xenbus"))


class XenStore:
    """A connection to the store. A context manager; any thread may use it.

    Args:
        sockets: where the store's socket may be.
        devices: where the kernel's device may be, for a store that is in another domain.

    Raises:
        UnsupportedError: the store cannot be reached.
    """

    def __init__(self, sockets: tuple[Path, ...] = SOCKETS, devices: tuple[Path, ...] = DEVICES) -> None:
        self._lock = threading.Lock()
        self._fd = _connected(sockets, devices)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, path: str) -> str | None:
        """Return the value at a path; None: there is none."""
        value = self._ask(_READ, path.encode() + b"\0")
        return None if value is None else value.decode("utf-8", "replace")

    def directory(self, path: str) -> list[str]:
        """Return the names below a path; none where there is no such path."""
        names = self._ask(_DIRECTORY, path.encode() + b"\0")
        return [] if not names else [name.decode("utf-8", "replace") for name in names.rstrip(b"\0").split(b"\0")]

    def write(self, path: str, value: str) -> None:
        """Set the value at a path."""
        self._ask(_WRITE, path.encode() + b"\0" + value.encode())

    def remove(self, path: str) -> None:
        """Remove a path and all below it; nothing happens where there is none."""
        self._ask(_RM, path.encode() + b"\0")

    def _ask(self, kind: int, payload: bytes) -> bytes | None:
        """Make one request; return the answer's payload, or None: there is no such path.

        Raises:
            XenError: the store refused, or the connection is gone.
        """
        what = f"xenstore {payload.partition(bytes(1))[0].decode()}"
        if len(payload) > _MAX_BYTES:
            raise XenError(what, errno.E2BIG)
        with self._lock:
            try:
                self._send(_MESSAGE.pack(kind, 0, 0, len(payload)) + payload)
                answer, _, _, length = _MESSAGE.unpack(self._take(_MESSAGE.size))
                if length > _MAX_BYTES:
                    raise XenError(what, errno.EPROTO)
                content = self._take(length)
            except OSError as error:
                if isinstance(error, XenError):
                    raise
                raise XenError(what, error.errno or errno.EIO) from error
        if answer != _ERROR:
            return content
        name = content.rstrip(b"\0").decode("ascii", "replace")
        if name == "ENOENT":
            return None
        raise XenError(what, getattr(errno, name, errno.EIO))

    def _send(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fd, data) :]

    def _take(self, size_bytes: int) -> bytes:
        taken = b""
        while len(taken) < size_bytes:
            more = os.read(self._fd, size_bytes - len(taken))
            if not more:
                raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
            taken += more
        return taken


def _connected(sockets: tuple[Path, ...], devices: tuple[Path, ...]) -> int:
    for path in sockets:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(os.fspath(path))
        except OSError:
            connection.close()
        else:
            return connection.detach()
    for path in devices:
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
    raise UnsupportedError(
        "xenstore", "Xen's store cannot be reached", hint="does xenstored run? Debian: systemctl start xen"
    )
