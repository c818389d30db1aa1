"""The wire form of QMP, QEMU's machine protocol: JSON values, a greeting, commands with ids, events.

A server per control socket; any QMP client can talk to it, ours is :mod:`.qmp_client`. A message is at most 1 MiB long.
"""

import contextlib
import json
import logging
import math
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pageferry.core.errors import PageferryError, RefusedError, UnsupportedError, UsageError
from pageferry.core.os_hints import listen_hint, resource_hint
from pageferry.core.threads import OutOfThreadsError, begin
from pageferry.core.version import __version__
from pageferry.engine.wire.listener import Listener, listen_unix
from pageferry.vmm.json_framer import MAX_DEPTH, JsonFramer
from pageferry.vmm.qmp_error import ErrorKind, QmpError

_log = logging.getLogger(__name__)
#: A client that leaves so much unread is not listened to, and one that leaves more than that is dropped.
_UNREAD_BYTES, _MAX_UNREAD_BYTES = 1 << 20, 16 << 20
_MAX_INTEGER_CHARACTERS = 21
_MEMBERS = {"execute", "arguments", "id"}
_ACCEPT_RETRY_S = 0.1
#: How long the end of a process waits for a client's command, and for a client to read.
_FINISH_S = 1.0

Handler = Callable[[dict[str, Any]], Any]


class Subscription(Protocol):
    """Something that one client follows at its own pace: events of its own, of which at most one waits to be sent.

    What makes it calls ``wake`` once when something is new, and again only after the next :meth:`take`.
    """

    event: str

    def take(self) -> Mapping[str, Any]:
        """Return the data of the next event: all that is new."""

    def close(self) -> None:
        """The client has gone."""


Subscribe = Callable[[dict[str, Any], Callable[[], None]], Subscription]


def _kind_of(error: Exception) -> ErrorKind:
    if isinstance(error, QmpError):
        return error.kind
    if isinstance(error, UsageError | RefusedError | ValueError):
        return ErrorKind.USAGE
    return ErrorKind.UNSUPPORTED if isinstance(error, UnsupportedError) else ErrorKind.FAILED


def _error(error: Exception) -> dict[str, Any]:
    # QMP's two members, and what a person is told besides.
    known = isinstance(error, PageferryError | OSError | ValueError)
    answer = {
        "class": error.error_class if isinstance(error, QmpError) else "GenericError",
        "desc": str(error) if known else f"internal error: {error!r}",
        "x-kind": _kind_of(error),
    }
    hint = resource_hint(error) if isinstance(error, OSError) else ""
    hint = error.hint if isinstance(error, PageferryError) else hint
    return {"error": answer | ({"x-hint": hint} if hint else {})}


def encode(message: Mapping[str, Any]) -> bytes:
    """Return a message as it goes over the wire.

    Raises:
        ValueError: it is not JSON: a number in it is not finite.
    """
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\r\n"


def decode(text: bytes) -> Any:  # noqa: ANN401  # any JSON value
    """Return the JSON value in ``text``, strictly: as RFC 8259 has it, numbers in 64 bits.

    Raises:
        QmpError: it is not JSON.
    """
    try:
        return json.loads(text.decode(), parse_constant=_number, parse_int=_number, parse_float=_number)
    except ValueError as error:
        raise QmpError(f"JSON parse error: {error}") from error


def _number(text: str) -> int | float:
    # A constant, as NaN, is one of the texts that come here.
    if text.lstrip("-").isdecimal():
        if len(text) <= _MAX_INTEGER_CHARACTERS and -(1 << 63) <= (number := int(text)) < 1 << 64:
            return number
    elif math.isfinite(value := float(text)):
        return value
    raise ValueError(f"{text[:_MAX_INTEGER_CHARACTERS]} is out of range")


def _event(name: str, data: Mapping[str, Any] | None) -> dict[str, Any]:
    seconds, fraction = divmod(time.time(), 1)
    timestamp = {"seconds": int(seconds), "microseconds": int(fraction * 1e6)}
    return {"event": name, "timestamp": timestamp} | ({} if data is None else {"data": dict(data)})


def _greeting() -> dict[str, Any]:
    major, minor, micro = (int(part) for part in __version__.split(".")[:3])
    version = {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": f"pageferry {__version__}"}
    return {"version": version, "capabilities": []}


class _Outbox:
    """What one client is still to be sent, in order; from any thread."""

    def __init__(self) -> None:
        self._items: deque[bytes | Subscription] = deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: "bytes | Subscription") -> bool:
        """Add a message, or something that has one when its turn comes; return False if that is too much."""
        with self._changed:
            self._items.append(item)
            self._bytes += len(item) if isinstance(item, bytes) else 0
            self._changed.notify_all()
            return self._bytes <= _MAX_UNREAD_BYTES

    def take(self) -> "bytes | Subscription | None":
        """Return the next; None when it is closed and empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed)
            if not self._items:
                return None
            item = self._items.popleft()
            self._bytes -= len(item) if isinstance(item, bytes) else 0
            self._changed.notify_all()
            return item

    def wait_for_room(self) -> None:
        """Return when the client has read enough of it, or nothing more will be sent."""
        with self._changed:
            self._changed.wait_for(lambda: self._bytes < _UNREAD_BYTES or self._closed)

    def close(self, *, now: bool = False) -> None:
        """Let the writer end when all was taken; with ``now``, forget what is there."""
        with self._changed:
            self._closed = True
            if now:
                self._items.clear()
                self._bytes = 0
            self._changed.notify_all()


class _Client:
    """One connected client: a thread that reads and runs its commands, and one that writes answers and events in order.

    No command of another client runs on its thread.
    """

    def __init__(self, server: "QmpServer", sock: socket.socket) -> None:
        self.negotiated = False
        self._server = server
        self._sock = sock
        self._subscription: Subscription | None = None
        self._outbox = _Outbox()
        self._answering = threading.Lock()
        self._writer: threading.Thread | None = None

    def begin(self) -> None:
        """Begin to serve it.

        Raises:
            OutOfThreadsError: it was told so, and is gone.
        """
        try:
            self._writer = begin(self._write, "qmp-writer")
            begin(self._serve, "qmp-client")
        except OutOfThreadsError as error:
            with contextlib.suppress(OSError):  # all it has to read so far, so it is not waited for
                self._sock.send(encode(_error(error)))
            self._end()
            raise

    def post(self, message: Mapping[str, Any]) -> None:
        """Queue a message; a client that does not read for long is dropped."""
        self._queue(encode(message))

    def _queue(self, item: bytes | Subscription) -> None:
        if not self._outbox.put(item):
            self.drop()

    def finish(self) -> None:
        """Let the command that runs be answered and what is queued out, then close."""
        answered = self._answering.acquire(timeout=_FINISH_S)
        self._outbox.close()
        if answered:
            self._answering.release()
        self._join()
        self.drop()

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join(_FINISH_S)

    def drop(self) -> None:
        """Close now; the reading thread ends."""
        self._outbox.close(now=True)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (item := self._outbox.take()) is not None:
                self._sock.sendall(item if isinstance(item, bytes) else encode(_event(item.event, item.take())))

    def _serve(self) -> None:
        self.post({"QMP": _greeting()})
        try:
            framer = JsonFramer()
            while data := self._sock.recv(1 << 16):
                for request in framer.feed(data):
                    self._outbox.wait_for_room()
                    with self._answering:
                        self._answer(request)
        except (OSError, ValueError) as error:
            _log.debug("a control client was dropped: %s", error)  # nothing of ours depends on it
        finally:
            if self._subscription is not None:
                self._subscription.close()
            self._end()

    def _end(self) -> None:
        self._server.forget(self)
        self._outbox.close()
        self._join()
        self._sock.close()

    def _answer(self, text: bytes | None) -> None:
        reply: dict[str, Any]
        request: Any = None
        subscription = self._subscription
        try:
            if text is None:
                raise QmpError(f"JSON parse error: it is nested more than {MAX_DEPTH} deep")
            request = decode(text)
            if not isinstance(request, dict):
                raise QmpError("a command is an object")
            for name in request:
                if name not in _MEMBERS:
                    raise QmpError(f"QMP input member '{name}' is unexpected")
            if not isinstance(request.get("execute"), str):
                raise QmpError("a command has a string 'execute'")
            arguments = request.get("arguments", {})
            if not isinstance(arguments, dict):
                raise QmpError("'arguments' must be an object")
            reply = {"return": self._execute(request["execute"], arguments)}
        except (PageferryError, OSError, ValueError) as error:
            reply = _error(error)
        except Exception as error:
            _log.exception("a control command failed by a defect")
            reply = _error(error)
        if isinstance(request, dict) and "id" in request:
            reply["id"] = request["id"]
        self.post(reply)
        if "return" in reply:
            self.negotiated = True  # events follow the answer to qmp_capabilities, they never come before it
            if subscription is not self._subscription and self._subscription is not None:
                self._queue(self._subscription)  # what is there already follows the answer

    def _execute(self, command: str, arguments: dict[str, Any]) -> Any:  # noqa: ANN401  # any JSON value
        if not self.negotiated:
            if command != "qmp_capabilities":
                raise QmpError(
                    "expecting capabilities negotiation with 'qmp_capabilities'", error_class="CommandNotFound"
                )
            _expect_no_capabilities(arguments)
            return {}
        if command == "qmp_capabilities":
            raise QmpError("the capabilities are negotiated already", error_class="CommandNotFound")
        subscribe = self._server.subscriptions.get(command)
        if subscribe is None:
            return self._server.execute(command, arguments)
        if self._subscription is not None:
            raise QmpError("this connection follows something already", hint="use another connection")
        self._subscription = subscribe(arguments, self._wake)
        return {}

    def _wake(self) -> None:
        if self._subscription is not None:
            self._queue(self._subscription)


def _expect_no_capabilities(arguments: dict[str, Any]) -> None:
    wanted = arguments.get("enable", [])
    for name in arguments:
        if name != "enable":
            raise QmpError(f"Parameter '{name}' is unexpected")
    if not isinstance(wanted, list):
        raise QmpError("Invalid parameter type for 'enable', expected: array")
    if wanted:
        raise QmpError(f"capability {wanted[0]} is not available", hint="the greeting says which are: none")


class QmpServer:
    """Serves QMP on a Unix socket.

    Args:
        path: of the socket; made by :meth:`start`, removed by :meth:`close`.
        commands: handlers by name; each takes the arguments and returns a JSON value or raises.
        subscriptions: commands that have the client follow something; each takes the arguments and how to wake it.
    """

    def __init__(
        self, path: Path, commands: Mapping[str, Handler], subscriptions: Mapping[str, Subscribe] | None = None
    ) -> None:
        self._path = path
        self._commands = dict(commands)
        self.subscriptions = dict(subscriptions or {})
        self._clients: set[_Client] = set()
        self._lock = threading.Lock()
        self._listener: Listener | None = None

    def start(self) -> None:
        """Listen and serve.

        Raises:
            UsageError: the path cannot be used, or a living process serves it.
        """
        try:
            listener = listen_unix(self._path, backlog=8)
        except OSError as error:
            hint = listen_hint(error, path=str(self._path))
            why = error.strerror or error
            raise UsageError(f"cannot listen on the control socket {self._path}: {why}", hint=hint) from error
        self._listener = listener
        begin(self._accept, "qmp-accept", listener)

    def _accept(self, listener: Listener) -> None:
        while True:
            try:
                sock = listener.accept()
            except OSError:
                if self._listener is None:
                    return  # closed
                time.sleep(_ACCEPT_RETRY_S)  # out of descriptors, or a client that left at once
                continue
            client = _Client(self, sock)
            with self._lock:
                self._clients.add(client)
            try:
                client.begin()
            except OutOfThreadsError as error:
                _log.error("a control client was turned away: %s", error)
                time.sleep(_ACCEPT_RETRY_S)

    def execute(self, command: str, arguments: dict[str, Any]) -> Any:  # noqa: ANN401  # any JSON value
        """Run one command.

        Raises:
            QmpError: it is unknown.
        """
        if command in ("query-commands", "query-version"):
            for name in arguments:
                raise QmpError(f"Parameter '{name}' is unexpected")
        if command == "query-commands":
            names = {*self._commands, *self.subscriptions, "query-commands", "query-version"}
            return [{"name": name} for name in sorted(names)]
        if command == "query-version":
            return _greeting()["version"]
        handler = self._commands.get(command)
        if handler is None:
            raise QmpError(f"The command {command} has not been found", error_class="CommandNotFound")
        result = handler(arguments)
        return {} if result is None else result

    def event(self, name: str, data: Mapping[str, Any] | None = None) -> None:
        """Send an event to every client that has negotiated."""
        message = _event(name, data)
        with self._lock:
            clients = [client for client in self._clients if client.negotiated]
        for client in clients:
            client.post(message)

    @property
    def connected(self) -> bool:
        """Whether any client is."""
        return bool(self._clients)

    def forget(self, client: _Client) -> None:
        """Drop a client that has gone."""
        with self._lock:
            self._clients.discard(client)

    def close(self) -> None:
        """Stop listening, remove the socket, let queued answers out, drop the clients."""
        if self._listener is None:
            return
        listener, self._listener = self._listener, None
        listener.shutdown()
        listener.close()
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            client.finish()
