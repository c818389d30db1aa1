"""LazyRestore: a guest that runs before its memory was read; its pages come from the file when they are touched.

Whoever touches a page first (a vCPU, a device, the engine) waits until it has been read; meanwhile a thread reads the
rest, in the order of the file, and stands back for whoever waits. When all is there nothing of this is left.

A page that cannot be read stops the guest where it is, with nothing lost: :meth:`LazyRestore.retry` tries again.
"""

import threading
from collections.abc import Callable

import numpy as np

from pageferry.core.errors import PageferryError, VmError
from pageferry.core.frames import PAGE_SIZE, PAGES_PER_2M, GfnArray
from pageferry.core.vm import Vm
from pageferry.engine.image.saved_guest import SavedGuest

#: How much is read at once: what somebody who needs a page now may have to wait for.
_PIECE_PAGES = PAGES_PER_2M


class LazyRestore:
    """The memory of one guest on its way.

    Args:
        saved: where it is; closed at the end.
        vm: the guest, which has not run; all of its memory is absent from here on.
        on_failure: told, on a thread of its own, that a page cannot be read: whoever touches one now waits.

    Raises:
        UnsupportedError: this host or machine cannot wait for pages.
    """

    def __init__(self, saved: SavedGuest, vm: Vm, *, on_failure: Callable[[PageferryError], None]) -> None:
        self._saved = saved
        self._memory = vm.memory
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._in_need: set[object] = set()
        self._absent = vm.memory.all_ram()
        self._buffer = np.empty(_PIECE_PAGES * PAGE_SIZE, np.uint8)
        self.done = False
        """Whether all of it is there (or was given up): the guest is one like any other."""
        self._abandoned = False
        self.failure: PageferryError | None = None
        self.left_pages = saved.data_pages.size
        """Pages with content that are still to be read."""
        self._arrival = vm.await_memory(self.fetch)
        self._thread = threading.Thread(target=self._read_all, name="restore", daemon=True)

    def start(self) -> None:
        """Begin to read, on a thread; called once."""
        self._thread.start()

    def fetch(self, gfns: GfnArray) -> None:
        """Return when these frames (uint64[n]) are there: at once, or when they were read; any thread.

        Raises:
            VmError: the guest was given up.
        """
        gfns = gfns[gfns < self._absent.nbits]
        if not self._absent.test_many(gfns).any():  # a bit is cleared when the page is there, and never set again
            return
        me = object()
        self._in_need.add(me)
        with self._changed:
            try:
                self._bring(np.unique(gfns))
            finally:
                self._in_need.discard(me)
                self._changed.notify_all()
        if self._abandoned:
            raise VmError("the guest was given up before its memory was read")

    def retry(self) -> None:
        """Try again to read what could not be read, if there is such a page; any thread."""
        with self._changed:
            self.failure = None
            self._changed.notify_all()

    def close(self) -> None:
        """Give up what is still to be read, if anything is. The guest is held and will not run again."""
        with self._changed:
            early = not self.done
            self._abandoned |= early
            self._finish()
        if self._thread.ident is not None:
            self._thread.join()
        if early:
            self._free()

    def _free(self) -> None:
        self._arrival.close()
        self._saved.close()

    def _bring(self, gfns: GfnArray) -> None:
        """Have frames there; the lock is held, and let go while reading fails."""
        while not self.done:
            wanted = gfns[self._absent.test_many(gfns)]
            if not wanted.size:
                return
            if self.failure is None:
                try:
                    self._install(wanted[:_PIECE_PAGES])
                except PageferryError as error:
                    self.failure = error
                    threading.Thread(target=self._on_failure, args=(error,), name="restore-failed", daemon=True).start()
            else:
                self._changed.wait()

    def _install(self, gfns: GfnArray) -> None:
        content = np.frombuffer(self._saved.content(gfns, self._buffer), np.uint8)
        self._arrival.install(gfns, content)
        self._absent.clear(gfns)
        self.left_pages -= int(np.count_nonzero(self._saved.has_data(gfns)))

    def _read_all(self) -> None:
        gfns = self._saved.data_pages
        for at in range(0, gfns.size, _PIECE_PAGES):
            piece = np.sort(gfns[at : at + _PIECE_PAGES])
            with self._changed:
                self._changed.wait_for(lambda: self.done or not self._in_need)
                if self.done:
                    return
                self._bring(piece)
        with self._changed:
            self._finish()
        self._free()

    def _finish(self) -> None:
        """Let the rest, which has no content, be as it is; the lock is held."""
        if not self.done:
            self._arrival.finish()
            self.done = True
            self._changed.notify_all()
