"""DemandPager: lets a guest run while some of its pages are missing. Lazy restore and post-copy share it.

A page is *missing* while its content is elsewhere: in the file of a restore, at the source of a migration. It is
*absent* while it has no storage here: a missing page, and one that is zero and was never touched. A thread that touches
an absent page waits in :meth:`DemandPager.fetch`; the user of the pager brings the content::

    vCPU, device, engine                      the user of the pager
      | fetch: missing, so note the need
      | on_need -----------------------------> |
      | wait                                   | needed(), or else ahead(): what to read or to ask for
      |                                        | install(): content, and the page is missing no more
      | <------------------------------------- |
      | go on: write, and mark

A page is installed once, by the step that ends its being missing; writes to it come afterwards. So content that
comes never overwrites what was written here.
"""

import threading
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import VmError
from pageferry.core.frames import PAGE_SIZE, GfnArray
from pageferry.core.vm import Vm
from pageferry.engine.host import THIS_HOST, Host

#: How many pages one who touches more than that waits for at once: 256 KiB. It bounds what is asked for ahead of a
#: page that a vCPU needs meanwhile.
_STEP_PAGES = 64
_GIVEN_UP = "the guest was given up before all its pages had come"
_NONE = np.empty(0, np.uint64)


def can_wait(vm: Vm) -> bool:
    """Find out by doing it whether a machine can let its guest wait for pages; its memory stays untouched."""
    try:
        trial = vm.await_memory(_bring_nothing, DirtyBitmap(vm.memory.gfn_limit))
    except VmError:
        return False
    trial.finish()
    trial.close()
    return True


def _bring_nothing(_: GfnArray) -> None:
    """Nothing is missing."""


@dataclass(frozen=True, slots=True, eq=False)
class _Need:
    """Frames (uint64[n]) that a thread waits for; ``met``: they have come, or it is over."""

    gfns: GfnArray
    met: threading.Event


class DemandPager:
    """The missing pages of one guest, and who waits for them. Any thread may call any method.

    Args:
        vm: the guest, which has not run.
        missing: its missing frames, uint64[n], in the order in which they are best brought; what they hold is given up.
        on_need: called by a thread that is about to wait, with no lock held; must not wait for a page.
        host: on which threads wait.

    Raises:
        UnsupportedError: this host or machine cannot let a guest wait for pages.
        VmError: the host refused otherwise.
    """

    def __init__(self, vm: Vm, missing: GfnArray, on_need: Callable[[], None], host: Host = THIS_HOST) -> None:
        self._host = host
        self._memory = vm.memory
        self._on_need = on_need
        self._lock = host.lock()
        self._order = missing
        self._next = 0
        self._missing = DirtyBitmap.of(vm.memory.gfn_limit, missing)
        self.missing_pages = int(missing.size)
        """How many pages are missing; it only falls."""
        self._coming = DirtyBitmap(vm.memory.gfn_limit)
        self.coming_pages = 0
        """How many of them are being brought."""
        with_storage = DirtyBitmap(vm.memory.gfn_limit)
        with_storage.set_runs(*vm.memory.populated())
        self._absent = (vm.memory.all_ram() - with_storage) | self._missing
        self._needs: list[_Need] = []
        self._waits_ns = array("Q")
        self.over = False
        """Whether all pages have come, or the guest was given up: all waits are over."""
        self._installer = vm.await_memory(self.fetch, self._missing.copy())

    def fetch(self, gfns: GfnArray) -> None:
        """Return when these frames (uint64[n]) are there; not on a thread that brings content.

        Raises:
            VmError: the guest was given up.
        """
        gfns = gfns[gfns < self._absent.nbits]
        gfns = np.unique(gfns[self._absent.test_many(gfns)])  # a bit is cleared when the page is there, for ever
        for at in range(0, gfns.size, _STEP_PAGES):
            self._fetch(gfns[at : at + _STEP_PAGES])

    def _fetch(self, gfns: GfnArray) -> None:
        with self._lock:
            missing = self._missing.test_many(gfns)
            self._install_zeros(gfns[~missing & self._absent.test_many(gfns)])
            if not missing.any():
                return
            if self.over:
                raise VmError(_GIVEN_UP)
            need = _Need(gfns[missing], self._host.event())
            self._needs.append(need)
        began_s = self._host.now_s()
        try:
            self._on_need()
            need.met.wait()
        finally:
            with self._lock:
                self._needs.remove(need)
                self._waits_ns.append(int((self._host.now_s() - began_s) * 1e9))
        if self._missing.test_many(need.gfns).any():
            raise VmError(_GIVEN_UP)

    def needed(self, at_most: int) -> GfnArray:
        """Return missing frames that threads wait for, uint64[n] ascending; none twice until :meth:`start_over`."""
        with self._lock:
            if not self._needs:
                return _NONE
            return self._take(np.unique(np.concatenate([need.gfns for need in self._needs])), at_most)

    def ahead(self, at_most: int) -> GfnArray:
        """Return the next missing frames in the order of bringing, uint64[n] ascending; none twice, as above."""
        with self._lock:
            while self._next < self._order.size:
                piece = self._order[self._next : self._next + at_most]
                self._next += piece.size
                if (gfns := self._take(np.sort(piece), at_most)).size:
                    return gfns
            return _NONE

    def start_over(self) -> None:
        """Forget what is being brought, for it does not come: after a cut, or a failure to read."""
        with self._lock:
            self._coming, self.coming_pages = DirtyBitmap(self._coming.nbits), 0
            self._order, self._next = self._order[self._missing.test_many(self._order)], 0

    def are_coming(self, gfns: GfnArray) -> bool:
        """Tell whether all these frames (uint64[n]) are being brought."""
        with self._lock:
            return int(gfns.max()) < self._coming.nbits and bool(self._coming.test_many(gfns).all())

    def install(self, gfns: GfnArray, content: NDArray[np.uint8]) -> None:
        """Give frames that are being brought their content; nothing happens when it is over.

        Args:
            gfns: uint64[n], ascending.
            content: uint8[4096 n], one after another.

        Raises:
            VmError: the host refused; all of them are as missing as before.
        """
        with self._lock:
            if self.over:
                return
            self._installer.install(gfns, content)
            for bitmap in (self._missing, self._coming, self._absent):
                bitmap.clear(gfns)
            self.missing_pages -= gfns.size
            self.coming_pages -= gfns.size
            for need in self._needs:
                if not self._missing.test_many(need.gfns).any():
                    need.met.set()
        self._memory.wrote(gfns)

    def waits_ns(self) -> NDArray[np.uint64]:
        """Return how long each wait for missing pages took so far, ascending; one for each step of 64 pages."""
        with self._lock:
            return np.sort(np.array(self._waits_ns, np.uint64))

    def close(self) -> None:
        """End all waits: all pages have come, or the guest, which will not run again, is given up.

        Not on a thread that is in :meth:`fetch`. A second call does nothing.
        """
        with self._lock:
            if self.over:
                return
            self.over = True
            self._installer.finish()
            for need in self._needs:
                need.met.set()
        self._installer.close()

    def _take(self, gfns: GfnArray, at_most: int) -> GfnArray:
        if self.over:
            return _NONE
        gfns = gfns[self._missing.test_many(gfns) & ~self._coming.test_many(gfns)][:at_most]
        self._coming.set(gfns)
        self.coming_pages += gfns.size
        return gfns

    def _install_zeros(self, gfns: GfnArray) -> None:
        if gfns.size and not self.over:
            self._installer.install(gfns, np.zeros(gfns.size * PAGE_SIZE, np.uint8))
            self._absent.clear(gfns)
