"""A guest's console: a terminal, or any two files, attached to that of a guest in another process, or in this one.

Input that the guest does not take yet (it does not read, or it is being moved) waits here and is offered again.
"""

import base64
import contextlib
import os
import select
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from pageferry.cli.signals import Stopped
from pageferry.cli.stdio import OutputLostError
from pageferry.core.descriptors import write_all
from pageferry.core.threads import begin
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


class Typed:
    """Input, typed at a terminal or read from a file, that the guest has not taken yet.

    Args:
        fd: where input comes from; Ctrl-] detaches when it is a terminal.
        ring: called when a key is dropped, because the guest has not taken many before it.
    """

    def __init__(self, fd: int, ring: Callable[[], object]) -> None:
        self.fd = fd
        self.terminal = os.isatty(fd)
        self.waiting = bytearray()
        self.detached = False
        """Whether the user has asked to detach, or the terminal was hung up."""
        self._at_end = False
        self._ring = ring

    @property
    def wanted(self) -> bool:
        """Whether to read on now: keys at any time, a file when all of it that was read is taken."""
        return not self._at_end and (self.terminal or not self.waiting)

    def read(self) -> None:
        """Read what there is; waits if there is nothing."""
        try:
            data = os.read(self.fd, _READ_BYTES)
        except OSError:  # a terminal that was hung up
            data = b""
        if not data:
            self._at_end = True  # of a file that is at its end, the guest's output goes on
            self.detached = self.terminal
        elif not self.terminal:
            self.waiting += data
        else:
            before, detach, _ = data.partition(DETACH)
            room = _TYPED_AHEAD_BYTES - len(self.waiting)
            self.waiting += before[:room]
            if len(before) > room:
                self._ring()
            self.detached = bool(detach)


class ConsoleSession:
    """One attachment to a guest in another process: one thread, one connection.

    Args:
        client: a fresh connection to the guest process, for this session alone.
        input_fd: where input comes from; Ctrl-] detaches when it is a terminal.
        output_fd: where the guest's output goes, byte for byte.
        tell: sees lines for a person.
    """

    def __init__(self, client: QmpClient, input_fd: int, output_fd: int, tell: Callable[[str], None]) -> None:
        self._client = client
        self._output_fd = output_fd
        self._tell = tell
        self._typed = Typed(input_fd, lambda: self._write(_BELL))
        self._offered: int | None = None  # the id of the command that offers input, while it is unanswered
        self._offered_bytes = 0
        self._offer_again_s = 0.0
        self._ended: str | None = None

    def run(self) -> None:
        """Attach; return when the user detaches or the guest's console has left this process.

        Raises:
            QmpError: there is no guest to attach to.
            VmError: the guest process went away.
            OutputLostError: the output cannot be written.
        """
        self._client.execute("x-console-follow")
        self._tell("attached; " + ("Ctrl-] detaches" if self._typed.terminal else "Ctrl-C detaches"))
        try:
            self._follow()
        except Stopped:
            if self._typed.terminal:  # whose Ctrl-C is typed to the guest: this was another signal
                raise
            self._ended = _DETACHED  # an answer may be half read: nothing more is offered
        else:
            if self._ended == _DETACHED:
                self._offer_the_rest()
        self._tell(self._ended or _DETACHED)
        if self._typed.waiting:
            self._tell(f"{len(self._typed.waiting):,} bytes of input did not reach the guest")

    def _follow(self) -> None:
        self._handle(self._client.received())
        while self._ended is None:
            wait_s = None
            if self._typed.waiting and self._offered is None:
                wait_s = max(0.0, self._offer_again_s - time.monotonic())
            sources: list[Any] = [self._client, *([self._typed.fd] if self._typed.wanted else [])]
            readable, _, _ = select.select(sources, [], [], wait_s)
            if self._typed.fd in readable:
                self._typed.read()
                self._ended = _DETACHED if self._typed.detached else None
            if self._client in readable:
                self._handle(self._client.receive())
            if time.monotonic() >= self._offer_again_s:
                self._offer()

    def _offer(self) -> None:
        if self._typed.waiting and self._offered is None:
            self._offered = self._client.send("x-console-write", data=base64.b64encode(self._typed.waiting).decode())
            self._offered_bytes = len(self._typed.waiting)

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
                del self._typed.waiting[:taken]
                self._offered = None
                self._offer_again_s = time.monotonic() + (_OFFER_AGAIN_S if taken < self._offered_bytes else 0.0)

    def _show(self, data: dict[str, Any]) -> None:
        if data["dropped"]:
            self._tell(f"{data['dropped']:,} bytes of output were lost: they were not read in time")
        self._write(base64.b64decode(data["output"]))
        self._ended = self._ended or data["end"]

    def _write(self, data: bytes) -> None:
        try:
            write_all(self._output_fd, data)
        except OSError as error:
            raise OutputLostError(error) from error


class LocalConsole:
    """Hands on input to the console of a guest in this process, on a thread, inside a ``with`` block.

    A terminal is in raw mode meanwhile, until Ctrl-] gives it back; then Ctrl-C ends the guest, as without this.

    Args:
        input_fd: where input comes from.
        output_fd: where the guest's output goes, by others.
        offer: gives the guest input, and returns how many of the bytes it took.
        tell: sees lines for a person.
    """

    def __init__(
        self, input_fd: int, output_fd: int, offer: Callable[[bytes], int], tell: Callable[[str], None]
    ) -> None:
        self._output_fd = output_fd
        self._typed = Typed(input_fd, self._ring)
        self._offer = offer
        self._tell = tell
        self._raw = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._typed.terminal:
            self._tell("your keys go to the guest; Ctrl-] gives the terminal back")
        self._end, self._wake = os.pipe()
        self._raw.enter_context(raw_input(self._typed.fd))
        try:
            self._thread = begin(self._hand_on, "console-input")
        except OSError:
            self._raw.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._wake)
        self._thread.join()
        os.close(self._end)
        self._raw.close()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # what is lost there is told by who writes the output
            os.write(self._output_fd, _BELL)

    def _hand_on(self) -> None:
        while not self._typed.detached:
            wait_s = _OFFER_AGAIN_S if self._typed.waiting else None
            sources = [self._end, *([self._typed.fd] if self._typed.wanted else [])]
            readable, _, _ = select.select(sources, [], [], wait_s)
            if self._end in readable:
                return
            if self._typed.fd in readable:
                self._typed.read()
            if self._typed.waiting:
                del self._typed.waiting[: self._offer(bytes(self._typed.waiting))]
        self._raw.close()
        self._tell("detached; Ctrl-C ends the guest")
