"""A client of QMP, for the command line and tests: it talks to any QMP server that ends its messages with a newline."""

import errno
import json
import os
import select
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from pageferry.core.errors import VmError
from pageferry.core.os_hints import connect_hint, owner_of
from pageferry.vmm.qmp import encode
from pageferry.vmm.qmp_error import ErrorKind, QmpError

#: A report has some 500 bytes a round, and a policy may make any number of rounds.
_MAX_LINE_BYTES = 16 << 20
_READ_BYTES = 1 << 16


_HAS_ENDED = "if it has ended, what it printed last says why"
_IS_A_SOCKET = "--control takes the socket that run, receive or restore made with --control"


def _why(error: OSError, path: Path) -> str:
    if error.errno == errno.ENOENT:
        return ": it does not exist"
    if error.errno == errno.ECONNREFUSED:
        return ": the process that made the socket has ended" if _is_socket(path) else ": it is not a socket"
    return f": {error.strerror or error}"


def _hint(error: OSError, path: Path) -> str:
    if isinstance(error, TimeoutError):
        return "is it stopped, or very busy?"
    if isinstance(error, PermissionError) and (owner := owner_of(path)):
        return f"it belongs to {owner}: use the command as that user"
    if isinstance(error, FileNotFoundError):
        return f"check the path, and that the guest process runs; {_IS_A_SOCKET}"
    if isinstance(error, ConnectionRefusedError):
        return "start it again, or use another's socket" if _is_socket(path) else _IS_A_SOCKET
    return connect_hint(error, path=str(path)) or _IS_A_SOCKET


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:  # it is gone meanwhile
        return True


def _refusal(error: dict[str, Any]) -> QmpError:
    return QmpError(
        error.get("desc", "error"),
        error_class=error.get("class", ""),
        hint=error.get("x-hint", ""),
        kind=ErrorKind(error.get("x-kind", ErrorKind.FAILED)),
    )


class HasFileno(Protocol):
    """Something with a descriptor that can be waited for."""

    def fileno(self) -> int:
        """Return it."""


class QmpClient:
    """A connection to a control socket, negotiated. A context manager.

    Args:
        path: the socket.
        timeout_s: how long to wait for an answer.

    Raises:
        VmError: no process serves the socket, or it speaks something else.
    """

    def __init__(self, path: Path, *, timeout_s: float = 30.0) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._connect()

    def reconnect(self) -> None:
        """Connect again after the connection broke; what was not read of it is lost.

        Raises:
            VmError: as the constructor.
        """
        self.close()
        self._connect()

    def _connect(self) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(self._timeout_s)
        self._unread = bytearray()
        self._events: list[dict[str, Any]] = []
        self._next_id = 0
        try:
            self._negotiate()
        except BaseException:
            self._sock.close()
            raise

    def _negotiate(self) -> None:
        path = self._path
        try:
            self._sock.connect(os.fspath(path))
            greeting = self._message()
            turned_away = greeting.get("error")
            if "QMP" not in greeting and not isinstance(turned_away, dict):
                raise ValueError("no greeting")
        except OSError as error:
            raise VmError(f"no guest process answers at {path}{_why(error, path)}", hint=_hint(error, path)) from error
        except ValueError as error:
            raise VmError(f"what answers at {path} does not speak QMP", hint="is it a control socket?") from error
        if turned_away is not None:
            why = _refusal(turned_away)
            raise VmError(f"the guest process at {path} turned the connection away: {why}", hint=why.hint)
        self.execute("qmp_capabilities")

    def __enter__(self) -> "QmpClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()

    def fileno(self) -> int:
        """Return the socket's descriptor: for ``select``, then :meth:`receive`; look at :meth:`received` first."""
        return self._sock.fileno()

    def wait(self, other: HasFileno) -> None:
        """Wait until bytes have come, which :meth:`received` then looks at, or ``other`` can be read.

        Raises:
            VmError: the connection broke.
        """
        readable, _, _ = select.select([self, other], [], [])
        if self in readable:
            try:
                self._read()
            except OSError as error:
                raise VmError("the guest process went away", hint=_HAS_ENDED) from error

    def _read(self) -> None:
        data = self._sock.recv(_READ_BYTES)
        if not data:
            raise ConnectionResetError("the guest process closed the control socket")
        self._unread += data

    def _next(self) -> dict[str, Any] | None:
        """Return the next message of those that have come whole, if any."""
        end = self._unread.find(b"\n")
        if end < 0:
            if len(self._unread) > _MAX_LINE_BYTES:
                raise ValueError("a message is too long")
            return None
        line = bytes(self._unread[:end])
        del self._unread[: end + 1]
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("not a QMP message")
        return message

    def _message(self) -> dict[str, Any]:
        while (message := self._next()) is None:
            self._read()
        return message

    def send(self, command: str, **arguments: Any) -> int:  # noqa: ANN401  # any JSON value
        """Send a command without waiting; return the id that its answer will have.

        Raises:
            VmError: the connection broke.
        """
        self._next_id += 1
        try:
            self._sock.sendall(encode({"execute": command, "arguments": arguments, "id": self._next_id}))
        except OSError as error:
            raise VmError(f"the guest process did not take {command!r}", hint=_HAS_ENDED) from error
        return self._next_id

    def received(self) -> list[dict[str, Any]]:
        """Return the messages, events and answers, that are here already; waits for nothing.

        Raises:
            VmError: what came is not QMP.
        """
        messages, self._events = self._events, []
        try:
            while (message := self._next()) is not None:
                messages.append(message)
        except ValueError as error:
            raise VmError("the guest process does not speak QMP") from error
        return messages

    def receive(self) -> list[dict[str, Any]]:
        """Wait for some bytes, as long as for an answer; return as :meth:`received`: no message, or many.

        Raises:
            VmError: the connection broke, or what came is not QMP.
        """
        try:
            self._read()
        except TimeoutError:  # the process has nothing to say, and is not gone
            pass
        except OSError as error:
            raise VmError("the guest process went away", hint=_HAS_ENDED) from error
        return self.received()

    def execute(self, command: str, **arguments: Any) -> Any:  # noqa: ANN401  # any JSON value
        """Run a command and return its result; events that come meanwhile are kept for :meth:`events`.

        Raises:
            QmpError: the other side refused it.
            VmError: the connection broke.
        """
        number = self.send(command, **arguments)
        try:
            while (message := self._message()).get("id") != number or "event" in message:
                if "event" in message:
                    self._events.append(message)
        except (OSError, ValueError) as error:
            raise VmError(f"the guest process did not answer {command!r}", hint=_HAS_ENDED) from error
        if "error" in message:
            raise _refusal(message["error"])
        return message["return"]

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield events as they come, for ever; ends with a VmError when the connection breaks."""
        self._sock.settimeout(None)
        while True:
            while self._events:
                yield self._events.pop(0)
            try:
                message = self._message()
            except (OSError, ValueError) as error:
                raise VmError("the guest process went away", hint=_HAS_ENDED) from error
            if "event" in message:
                yield message
