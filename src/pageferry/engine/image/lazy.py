"""LazyRestore: a guest that runs before its memory was read from its file.

A thread reads: first the pages that another thread waits for, otherwise the rest in the order of the file. When all
have come, this object has nothing left to do. A page that cannot be read stops the guest where it is, with nothing
lost: :meth:`LazyRestore.retry` tries again.
"""

import logging
import threading
from collections.abc import Callable

import numpy as np

from pageferry.core.errors import PageferryError, VmError
from pageferry.core.frames import PAGE_SIZE, PAGES_PER_2M, GfnArray
from pageferry.core.threads import begin
from pageferry.core.vm import Vm
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.engine.postcopy.pager import DemandPager

_log = logging.getLogger(__name__)

#: How much is read at once: a thread that needs another page may have to wait for it.
PIECE_PAGES = PAGES_PER_2M


class LazyRestore:
    """The missing pages of one guest, in its file; what is needed is read from here on.

    Args:
        saved: the file; closed at the end.
        vm: the guest, which has not run, with untouched memory.
        on_failure: told, on a thread of its own, that a page cannot be read: a vCPU that touches a missing
            page waits from now on.
        piece_pages: how much is read at once.

    Raises:
        UnsupportedError: this host or machine cannot let a guest wait for pages.
    """

    def __init__(
        self,
        saved: SavedGuest,
        vm: Vm,
        *,
        on_failure: Callable[[PageferryError], None],
        piece_pages: int = PIECE_PAGES,
    ) -> None:
        self._saved = saved
        self._on_failure = on_failure
        self._piece_pages = piece_pages
        self._buffer = np.empty(piece_pages * PAGE_SIZE, np.uint8)
        self._changed = threading.Condition()
        self._reads_ahead = False
        self.failure: PageferryError | None = None
        """Why a page cannot be read, until :meth:`retry`."""
        self._pager = DemandPager(vm, saved.data_pages, self._notify)
        try:
            self._thread = begin(self._read_all, "restore")
        except OSError:
            self._pager.close()
            raise

    @property
    def done(self) -> bool:
        """Whether all of it is there (or was given up): the guest is one like any other."""
        return self._pager.over

    @property
    def missing_pages(self) -> int:
        """How many pages are still to be read."""
        return self._pager.missing_pages

    def read_ahead(self) -> None:
        """Begin to read the pages that no vCPU waits for, too."""
        with self._changed:
            self._reads_ahead = True
            self._changed.notify_all()

    def retry(self) -> None:
        """Try again to read what could not be read, if there is such a page; any thread."""
        with self._changed:
            self.failure = None
            self._changed.notify_all()

    def close(self) -> None:
        """Give up what is still to be read, if anything is: the guest stands still and will not run again.

        Any thread; a second call does nothing.
        """
        self._pager.close()
        self._notify()
        self._thread.join()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _read_all(self) -> None:
        while (gfns := self._next()).size:
            try:
                self._pager.install(gfns, np.frombuffer(self._saved.content(gfns, self._buffer), np.uint8))
            except PageferryError as error:
                self._stop_at(error)
            except Exception as error:  # or the guest would wait for ever without a reason given
                _log.exception("reading a guest's memory ended by a defect")
                self._stop_at(VmError(f"internal error: {error!r}"))
        self._pager.close()
        self._saved.close()

    def _next(self) -> GfnArray:
        """Wait until there is something to read, and return it; nothing: it is over."""
        with self._changed:
            while self._pager.missing_pages and not self._pager.over:
                if self.failure is None:
                    gfns = self._pager.needed(self._piece_pages)
                    if not gfns.size and self._reads_ahead:
                        gfns = self._pager.ahead(self._piece_pages)
                    if gfns.size:
                        return gfns
                self._changed.wait()
            return np.empty(0, np.uint64)

    def _stop_at(self, error: PageferryError) -> None:
        with self._changed:
            self._pager.start_over()
            self.failure = error
        try:
            begin(self._on_failure, "restore-failed", error)
        except OSError as no_thread:  # the guest stands still at its page, and is not shown as paused
            _log.error("%s, and that cannot be told: %s", error, no_thread)
