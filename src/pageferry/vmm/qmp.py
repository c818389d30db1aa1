"""The wire form of QMP, QEMU's machine protocol: JSON values, a greeting, commands with ids, events.

A server per control socket and a small client. Any QMP client can talk to the server; the client talks to any QMP
server. A message is at most 1 MiB long.
"""

import contextlib
import json
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pageferry import __version__
from pageferry.core.errors import PageferryError, UsageError, VmError
from pageferry.engine.transport import listen_unix
from pageferry.vmm.json_framer import JsonFramer

_log = logging.getLogger(__name__)
_MAX_LINE_BYTES = 1 << 20
_UNSENT_EVENTS = 10_000
_ACCEPT_RETRY_S = 0.1

Handler = Callable[[dict[str, Any]], Any]


class QmpError(PageferryError):
    """The other side answered a command with an error; ``error_class`` is QMP's."""

    def __init__(self, message: str, *, error_class: str = "GenericError", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.error_class = error_class


def _encode(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\r\n"


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
        self._outbox: queue.Queue[bytes | None] = queue.Queue(_UNSENT_EVENTS)
        self._writer = threading.Thread(target=self._write, name="qmp-writer", daemon=True)

    def post(self, message: Mapping[str, Any]) -> None:
        """Queue a message; a client that does not read for long is dropped."""
        try:
            self._outbox.put_nowait(_encode(message))
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
            while (data := self._outbox.get()) is not None:
                self._sock.sendall(data)

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
            with contextlib.suppress(queue.Full):
                self._outbox.put_nowait(None)
            self._writer.join(1)
            self._sock.close()

    def _answer(self, text: bytes) -> None:
        reply: dict[str, Any]
        request: Any = None
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

    def _execute(self, command: str, arguments: dict[str, Any]) -> Any:  # noqa: ANN401  # any JSON value
        if not self.negotiated:
            if command != "qmp_capabilities":
                raise QmpError(
                    "expecting capabilities negotiation with 'qmp_capabilities'", error_class="CommandNotFound"
                )
            return {}
        return self._server.execute(command, arguments)


class QmpServer:
    """Serves QMP on a Unix socket.

    Args:
        path: of the socket; made by :meth:`start`, removed by :meth:`close`.
        commands: handlers by name; each takes the arguments and returns a JSON value or raises.
    """

    def __init__(self, path: Path, commands: Mapping[str, Handler]) -> None:
        self._path = path
        self._commands = dict(commands)
        self._clients: set[_Client] = set()
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None

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

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
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
            return [{"name": name} for name in sorted({*self._commands, "query-commands", "query-version"})]
        if command == "query-version":
            return _greeting()["version"]
        handler = self._commands.get(command)
        if handler is None:
            raise QmpError(f"The command {command} has not been found", error_class="CommandNotFound")
        result = handler(arguments)
        return {} if result is None else result

    def event(self, name: str, data: Mapping[str, Any] | None = None) -> None:
        """Send an event to every client that has negotiated."""
        seconds, fraction = divmod(time.time(), 1)
        message: dict[str, Any] = {
            "event": name,
            "timestamp": {"seconds": int(seconds), "microseconds": int(fraction * 1e6)},
        }
        if data is not None:
            message["data"] = dict(data)
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
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        self._path.unlink(missing_ok=True)
        with self._lock:
            clients = list(self._clients)
        for client in clients:
            client.finish()


class QmpClient:
    """A connection to a control socket, negotiated. A context manager.

    Args:
        path: the socket.
        timeout_s: how long to wait for an answer.

    Raises:
        VmError: nobody serves the socket, or not QMP.
    """

    def __init__(self, path: Path, *, timeout_s: float = 30.0) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(timeout_s)
        self._events: list[dict[str, Any]] = []
        self._next_id = 0
        try:
            self._sock.connect(os.fspath(path))
            self._lines = self._sock.makefile("rb")
            if "QMP" not in self._message():
                raise ValueError("no greeting")
        except (OSError, ValueError, UnicodeError) as error:
            self._sock.close()
            raise VmError(f"no guest process answers at {path}", hint="is it running? see --control") from error
        self.execute("qmp_capabilities")

    def __enter__(self) -> "QmpClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._lines.close()
        self._sock.close()

    def _message(self) -> dict[str, Any]:
        line = self._lines.readline(_MAX_LINE_BYTES)
        if not line:
            raise ConnectionResetError("the guest process closed the control socket")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("not a QMP message")
        return message

    def execute(self, command: str, **arguments: Any) -> Any:  # noqa: ANN401  # any JSON value
        """Run a command and return its result; events that come meanwhile are kept for :meth:`events`.

        Raises:
            QmpError: the other side refused it.
            VmError: the connection broke.
        """
        self._next_id += 1
        try:
            self._sock.sendall(_encode({"execute": command, "arguments": arguments, "id": self._next_id}))
            while True:
                message = self._message()
                if "event" in message:
                    self._events.append(message)
                elif message.get("id") == self._next_id:
                    break
        except (OSError, ValueError) as error:
            raise VmError(f"the guest process did not answer {command!r}") from error
        if "error" in message:
            raise QmpError(message["error"].get("desc", "error"), error_class=message["error"].get("class", ""))
        return message["return"]

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield events as they come, for ever; ends with a VmError when the connection breaks."""
        while True:
            while self._events:
                yield self._events.pop(0)
            try:
                self._sock.settimeout(None)
                message = self._message()
            except (OSError, ValueError) as error:
                raise VmError("the guest process went away") from error
            if "event" in message:
                yield message
