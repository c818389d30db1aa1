"""Starts threads. That can fail as opening a file can: user, container and host limit their number."""

import errno
import threading
from collections.abc import Callable
from typing import Any


class OutOfThreadsError(OSError):
    """No more threads can be started. ``errno`` is EAGAIN, yet it is no BlockingIOError: nothing can be waited for."""

    def __init__(self) -> None:
        super().__init__(errno.EAGAIN, "no more threads can be started")

    def __str__(self) -> str:
        """Return it in words."""
        return str(self.strerror)


def begin(function: Callable[..., object], name: str, *arguments: Any) -> threading.Thread:  # noqa: ANN401  # its own
    """Begin to run ``function(*arguments)`` on a thread, which ends with the process at the latest; return the thread.

    Raises:
        OutOfThreadsError: it does not run, and never will.
    """
    return started(threading.Thread(target=function, args=arguments, name=name, daemon=True))


def started(thread: threading.Thread) -> threading.Thread:
    """Start a thread, and return it.

    Raises:
        OutOfThreadsError: as for :func:`begin`.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise OutOfThreadsError from error
    return thread
