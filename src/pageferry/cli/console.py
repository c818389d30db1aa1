"""Attach a terminal, or any two files, to the console of a guest in another process.

One thread, one connection. Input that the guest does not take yet (it does not read, or it is being moved) waits here
and is offered again.
"""

import base64
import contextlib
import os
import select
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any

from pageferry.vmm.qmp_client import QmpClient

#: Ctrl-]
DETACH = b"\x1d"

_OFFER_AGAIN_S = 0.05
_READ_BYTES = 4096
#: What a terminal may type ahead of the guest; a pipe is not read on while anything waits.
_TYPED_AHEAD_BYTES = 4096
_BELL = b"\a"
_DETACHED = "detached"


@contextlib.contextmanager
def raw_input(fd: int) -> Iterator[None]:
    """Have a terminal hand on each key as it is typed, inside a ``with`` block; output is still processed.

    Does nothing if ``fd`` is not a terminal.
    """
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    iflag, oflag, cflag, lflag, *rest = termios.tcgetattr(fd)
    iflag &= ~(termios.BRKINT | termios.ICRNL | termios.INLCR | termios.IGNCR | termios.ISTRIP | termios.IXON)
    lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.IEXTEN | termios.ISIG)
    try:
        termios.tcsetattr(fd, termios.TCSANOW, [iflag, oflag, cflag, lflag, *rest])
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal itself may be gone
            termios.tcsetattr(fd, termios.TCSANOW, before)


class ConsoleSession:
    """One attachment.

    Args:
        client: a fresh connection to the guest process, for this session alone.
        input_fd: where input comes from; Ctrl-] detaches when it is a terminal.
        output_fd: where the guest's output goes, byte for byte.
        tell: sees lines for a person.
    """

    def __init__(self, client: QmpClient, input_fd: int, output_fd: int, tell: Callable[[str], None]) -> None:
        self._client = client
        self._input_fd: int | None = input_fd
        self._output_fd = output_fd
        self._tell = tell
        self._typed = bytearray()
        self._offered: int | None = None  # the id of the command that offers input, while it is unanswered
        self._offered_bytes = 0
        self._offer_again_s = 0.0
        self._ended: str | None = None
        self._terminal = os.isatty(input_fd)

    def run(self) -> None:
        """Attach; return when the user detaches or the guest's console has left this process.

        Raises:
            QmpError: there is no guest to attach to.
            VmError: the guest process went away.
        """
        self._client.execute("x-console-follow")
        self._tell("attached; " + ("Ctrl-] detaches" if self._terminal else "Ctrl-C detaches"))
        self._handle(self._client.received())
        while self._ended is None:
            wait_s = None
            if self._typed and self._offered is None:
                wait_s = max(0.0, self._offer_again_s - time.monotonic())
            readable, _, _ = select.select(self._sources(), [], [], wait_s)
            if self._input_fd is not None and self._input_fd in readable:
                self._read_input(self._input_fd)
            if self._client in readable:
                self._handle(self._client.receive())
            if time.monotonic() >= self._offer_again_s:
                self._offer()
        if self._ended == _DETACHED:
            self._offer_the_rest()
        self._tell(self._ended)
        if self._typed:
            self._tell(f"{len(self._typed):,} bytes of input did not reach the guest")

    def _sources(self) -> list[Any]:
        sources: list[Any] = [self._client]
        if self._input_fd is not None and (self._terminal or not self._typed):
            sources.append(self._input_fd)
        return sources

    def _read_input(self, fd: int) -> None:
        try:
            data = os.read(fd, _READ_BYTES)
        except OSError:  # a terminal that was hung up
            data = b""
        if not data:
            self._input_fd = None  # of a file that is at its end, the guest's output goes on
            self._ended = _DETACHED if self._terminal else self._ended
        elif not self._terminal:
            self._typed += data
        else:
            before, detach, _ = data.partition(DETACH)
            room = _TYPED_AHEAD_BYTES - len(self._typed)
            self._typed += before[:room]
            if len(before) > room:
                self._write(_BELL)
            self._ended = _DETACHED if detach else self._ended

    def _offer(self) -> None:
        if self._typed and self._offered is None:
            self._offered = self._client.send("x-console-write", data=base64.b64encode(self._typed).decode())
            self._offered_bytes = len(self._typed)

    def _offer_the_rest(self) -> None:
        for _ in range(2):  # what is under way, and what was typed after it
            self._offer()
            while self._offered is not None:
                self._handle(self._client.receive())

    def _handle(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            if message.get("event") == "X_PAGEFERRY_CONSOLE":
                self._show(message["data"])
            elif "event" not in message and message.get("id") == self._offered:
                taken = message.get("return", {}).get("taken", 0)  # an error: the guest is leaving, the end follows
                del self._typed[:taken]
                self._offered = None
                self._offer_again_s = time.monotonic() + (_OFFER_AGAIN_S if taken < self._offered_bytes else 0.0)

    def _show(self, data: dict[str, Any]) -> None:
        if data["dropped"]:
            self._tell(f"{data['dropped']:,} bytes of output were lost: they were not read in time")
        self._write(base64.b64decode(data["output"]))
        self._ended = self._ended or data["end"]

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._output_fd, data) :]
