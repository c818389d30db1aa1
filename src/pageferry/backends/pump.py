"""Pump: a thread that waits for input on a descriptor, or to be woken, and has done what there is to do.

It sleeps on the descriptor and on an event of its own; what makes it possible to go on (a guest that runs again, or
has room again) wakes it by that event.
"""

import logging
import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from pageferry.core.threads import begin

_log = logging.getLogger(__name__)


class Pump:
    """The thread, from :meth:`start` to :meth:`stop`.

    Args:
        name: of the thread.
        take: has what came taken, and tells whether to wait for more at the descriptor; False: only :meth:`wake` helps.
        announce: called at once and after each of ``pauses_s``, on the thread.
        pauses_s: how long after the start, ascending.
    """

    def __init__(
        self,
        name: str,
        take: Callable[[], bool],
        *,
        announce: Callable[[], None],
        pauses_s: Sequence[float] = (),
    ) -> None:
        self._name = name
        self._take = take
        self._announce = announce
        self._pauses_s = tuple(pauses_s)
        self.event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """The eventfd that wakes it."""
        self._close = weakref.finalize(self, os.close, self.event)
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self, fd: int) -> None:
        """Begin to wait at a descriptor; does nothing when it does already."""
        if self._thread is None:
            self._stopping = False
            self._thread = begin(self._main, self._name, fd)

    def wake(self) -> None:
        """Have it look again, from any thread."""
        os.eventfd_write(self.event, 1)

    def stop(self) -> None:
        """Return when nothing more is taken; does nothing when it was not started."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping = True
            self.wake()
            thread.join()

    def close(self) -> None:
        """Stop, and free the event. May be called twice."""
        self.stop()
        self._close()

    def _main(self, fd: int) -> None:
        began_s = time.monotonic()
        due_s = [began_s, *(began_s + pause_s for pause_s in self._pauses_s)]
        poll, waits = select.poll(), False
        poll.register(self.event, select.POLLIN)
        try:
            while True:
                while due_s and due_s[0] <= time.monotonic():
                    due_s.pop(0)
                    self._announce()
                if self._take() != waits:
                    waits = not waits
                    if waits:
                        poll.register(fd, select.POLLIN)
                    else:
                        poll.unregister(fd)
                self._sleep(poll, due_s[0] if due_s else None)
                if self._stopping:
                    return
        except Exception:
            _log.exception("%s ended by a defect", self._name)

    def _sleep(self, poll: select.poll, until_s: float | None) -> None:
        timeout_ms = None if until_s is None else max(0.0, until_s - time.monotonic()) * 1e3
        for fd, _ in poll.poll(timeout_ms):
            if fd == self.event:
                os.eventfd_read(self.event)
