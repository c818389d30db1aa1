"""The wire form of QMP, QEMU's machine protocol: JSON values, a greeting, commands with ids, events.

A server per control socket; any QMP client can talk to it, ours is :mod:`.qmp_client`. A message is at most 1 MiB long.
"""

import contextlib
import json
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pageferry.core.errors import PageferryError, UsageError
from pageferry.core.version import __version__
from pageferry.engine.wire.listener import Listener, listen_unix
from pageferry.vmm.json_framer import JsonFramer

_log = logging.getLogger(__name__)
_UNSENT_EVENTS = 10_000
_ACCEPT_RETRY_S = 0.1

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


class QmpError(PageferryError):
    """The other side answered a command with an error; ``error_class`` is QMP's."""

    def __init__(self, message: str, *, error_class: str = "GenericError", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.error_class = error_class


def encode(message: Mapping[str, Any]) -> bytes:
    """Return a message as it goes over the wire."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\r\n"


def _event(name: str, data: Mapping[str, Any] | None) -> dict[str, Any]:
    seconds, fraction = divmod(time.time(), 1)
    timestamp = {"seconds": int(seconds), "microseconds": int(fraction * 1e6)}
    return {"event": name, "timestamp": timestamp} | ({} if data is None else {"data": dict(data)})


def _greeting() -> dict[str, Any]:
    major, minor, micro = (int(part) for part in __version__.split(".")[:3])
    version = {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": f"pageferry {__version__}"}
    return {"version": version, "capabilities": []}


class _Client(threading.Thread):
    """One connected client: a thread that reads commands, and one that writes answers and events in order."""

    def __init__(self, server: "QmpServer", sock: socket.socket) -> None:
        super().__init__(name="qmp-client", daemon=True)
        self.negotiated = False
        self._server = server
        self._sock = sock
        self._subscription: Subscription | None = None
        self._outbox: queue.Queue[bytes | Subscription | None] = queue.Queue(_UNSENT_EVENTS)
        self._writer = threading.Thread(target=self._write, name="qmp-writer", daemon=True)

    def post(self, message: Mapping[str, Any]) -> None:
        """Queue a message; a client that does not read for long is dropped."""
        self._queue(encode(message))

    def _queue(self, item: bytes | Subscription) -> None:
        try:
            self._outbox.put_nowait(item)
        except queue.Full:
            self.drop()

    def finish(self) -> None:
        """Let what is queued out, then close."""
        with contextlib.suppress(queue.Full):
            self._outbox.put_nowait(None)
        self._writer.join(1)
        self.drop()

    def drop(self) -> None:
        """Close now; the reading thread ends."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (item := self._outbox.get()) is not None:
                self._sock.sendall(item if isinstance(item, bytes) else encode(_event(item.event, item.take())))

    def run(self) -> None:
        self._writer.start()
        self.post({"QMP": _greeting()})
        try:
            framer = JsonFramer()
            while data := self._sock.recv(1 << 16):
                for request in framer.feed(data):
                    self._answer(request)
        except (OSError, ValueError) as error:
            _log.debug("a control client was dropped: %s", error)  # nothing of ours depends on it
        finally:
            self._server.forget(self)
            if self._subscription is not None:
                self._subscription.close()
            with contextlib.suppress(queue.Full):
                self._outbox.put_nowait(None)
            self._writer.join(1)
            self._sock.close()

    def _answer(self, text: bytes) -> None:
        reply: dict[str, Any]
        request: Any = None
        subscription = self._subscription
        try:
            request = json.loads(text)
            if not isinstance(request, dict) or not isinstance(request.get("execute"), str):
                raise QmpError("a command is an object with a string 'execute'")
            arguments = request.get("arguments", {})
            if not isinstance(arguments, dict):
                raise QmpError("'arguments' must be an object")
            reply = {"return": self._execute(request["execute"], arguments)}
        except QmpError as error:
            reply = {"error": {"class": error.error_class, "desc": str(error)}}
        except (PageferryError, OSError, ValueError) as error:
            hint = getattr(error, "hint", "")
            reply = {"error": {"class": "GenericError", "desc": f"{error}" + (f" ({hint})" if hint else "")}}
        except Exception as error:
            _log.exception("a control command failed by a defect")
            reply = {"error": {"class": "GenericError", "desc": f"internal error: {error!r}"}}
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
            return {}
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
            hint = "another process serves it; choose another path" if self._path.exists() else "does the folder exist?"
            why = error.strerror or error
            raise UsageError(f"cannot listen on the control socket {self._path}: {why}", hint=hint) from error
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), name="qmp-accept", daemon=True).start()

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
            client.start()

    def execute(self, command: str, arguments: dict[str, Any]) -> Any:  # noqa: ANN401  # any JSON value
        """Run one command.

        Raises:
            QmpError: it is unknown.
        """
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
        self._path.unlink(missing_ok=True)
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            client.finish()
