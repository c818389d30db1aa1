"""FaultHandler: the thread that hears of a userfaultfd's faults and has them resolved, as many at once as wait.

Source: userfaultfd(2); kernel ``admin-guide/mm/userfaultfd.rst``.
"""

import errno
import os
import select
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pageferry.core.errors import UffdError
from pageferry.core.threads import begin
from pageferry.uffd.fds import UffdFd


class FaultHandler:
    """Reads faults until :meth:`stop`; its thread runs from the beginning.

    Args:
        uffd: whose faults; stays the caller's, open until ``stop`` has returned.
        resolve: called with ``UFFD_MSG[n]``, n at least 1: all faults that wait. The threads that caused them
            wait until it returns.
        failed: called when ``resolve`` or the kernel fails, with the error; faults are not resolved any more.

    Raises:
        UffdError: no descriptor is left for it.
    """

    def __init__(
        self, uffd: UffdFd, resolve: Callable[[NDArray[np.void]], None], failed: Callable[[Exception], None]
    ) -> None:
        self._uffd = uffd
        self._resolve = resolve
        self._failed = failed
        try:
            self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        except OSError as error:
            raise UffdError("eventfd", error.errno or errno.EIO) from error
        try:
            self._thread = begin(self._main, "uffd-handler")
        except OSError:
            os.close(self._wake)
            raise

    def stop(self) -> None:
        """End the thread; faults that come from now on wait for another handler. Called once, not by the thread."""
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def _main(self) -> None:
        poll = select.poll()
        for fd in (self._uffd.fileno(), self._wake):
            poll.register(fd, select.POLLIN)
        try:
            while all(fd != self._wake for fd, _ in poll.poll()):
                faults = self._uffd.read_faults()
                if faults.size:  # none: the thread that waited was interrupted
                    self._resolve(faults)
        except Exception as error:
            self._failed(error)
