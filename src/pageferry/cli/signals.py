"""SIGINT, SIGTERM and SIGHUP: they end a command at once, are noted, or ask what is under way to end with care."""

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self


class Stopped(BaseException):
    """A signal asked the command to end, and nothing was under way that had to be ended with care."""


class Requests:
    """Signals that came while they were only noted; to be waited for by ``select``."""

    def __init__(self) -> None:
        self._readable, self._writable = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        """Return what is readable when a signal has come."""
        return self._readable

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Have the interpreter note each signal that has a handler, whichever thread the kernel gives it to."""
        before = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)

    def take(self) -> int:
        """Return how many have come since the last call."""
        try:
            return len(os.read(self._readable, 4096))
        except BlockingIOError:
            return 0

    def wait(self, timeout_s: float) -> bool:
        """Wait for one, or for so long; return whether one has come."""
        return bool(select.select([self], [], [], timeout_s)[0])

    def close(self) -> None:
        """Note nothing more."""
        os.close(self._readable)
        os.close(self._writable)


def _do_nothing() -> None:
    """Let a signal be noted, and no more."""


class _Signals:
    """SIGINT, SIGTERM and SIGHUP, inside a ``with`` block; one that is ignored already stays ignored.

    The first raises :class:`Stopped` in the main thread, unless a block of :meth:`calling` or :meth:`noted` has it
    otherwise. After it, and after such a block, others change nothing.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._instead: Callable[[], None] | None = None
        self._stopped = False
        self._afterwards: signal.Handlers | None = None

    def __enter__(self) -> Self:
        self._stopped = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        afterwards, self._afterwards = self._afterwards, None
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before if afterwards is None else afterwards)

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self._instead is not None:
            self._instead()
        elif not self._stopped:
            self._stopped = True
            raise Stopped
        else:
            with contextlib.suppress(OSError):  # no print: it may have interrupted one
                os.write(2, b"pageferry: ending already\n")

    def outlive(self) -> None:
        """Have the next block leave them ignored at its end: the process ends with an outcome that it has told."""
        self._afterwards = signal.SIG_IGN

    def end(self) -> None:
        """Let no more of them raise."""
        self._stopped = True

    @contextlib.contextmanager
    def calling(self, function: Callable[[], None]) -> Iterator[None]:
        """Have each signal call ``function``, which may do nothing but a plain store or a write."""
        self._instead, before = function, self._instead
        try:
            yield
        finally:
            self.end()
            self._instead = before

    @contextlib.contextmanager
    def noted(self) -> Iterator[Requests]:
        """Have each signal only noted."""
        with contextlib.closing(Requests()) as requests, self.calling(_do_nothing), requests.noting():
            yield requests


SIGNALS = _Signals()
