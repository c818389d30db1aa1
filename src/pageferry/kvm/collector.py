"""Collector: a thread that does one thing over and over, in a period, until it is ended."""

import logging
import threading
from collections.abc import Callable

from pageferry.core.errors import VmError

_log = logging.getLogger(__name__)


class Collector:
    """Calls ``collect`` on a thread of its own once in each period; started when made.

    If that fails it is logged and the thread ends: whoever needs what is collected finds the same failure.

    Args:
        collect: what to do; may be called once more while :meth:`end` returns.
        period_s: the pause between two calls, in seconds.
    """

    def __init__(self, collect: Callable[[], None], period_s: float) -> None:
        self._collect = collect
        self._period_s = period_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._main, name="dirty-ring-collector", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Ask the thread to end; does not wait."""
        self._ended.set()

    def join(self) -> None:
        """Wait until the thread has ended, which was asked for."""
        self._thread.join()

    def _main(self) -> None:
        while not self._ended.wait(self._period_s):
            try:
                self._collect()
            except VmError as error:
                _log.error("the dirty rings are not collected any more: %s", error)
                return
