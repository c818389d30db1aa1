"""PageFetcher: the destination's side of post-copy: a guest that runs while some of its pages are still at the source.

Whoever touches a missing page waits: its page is asked for at once. Meanwhile the others are asked for one after
another, with no more under way than what a page in need may wait behind. The source only answers.

A page is installed once, when it comes, by a step that also ends its being missing; who writes to it, vCPU or device,
does so afterwards. So nothing that is written here is ever overwritten by a page that comes late, and a page that
comes twice, unasked or with another digest than its own is no page: the connection is given up, and nothing is lost.
"""

import logging
import threading
import time
from array import array

import numpy as np

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import LocalStreamError, RecordError, RemoteStreamError, VmError
from pageferry.core.frames import PAGE_SIZE, GfnArray
from pageferry.core.vm import Vm
from pageferry.engine.wire.peer import Peer
from pageferry.stream.ferry import Complete, Dropped, Pages, Wanted
from pageferry.stream.ferry_postcopy import MAX_WANTED_PAGES, digest_of

_log = logging.getLogger(__name__)

#: How many pages may be under way for nobody in need: 512 KiB, what a page in need may wait behind. Measured: more of
#: them make the waits longer, and the whole no faster.
_AHEAD_PAGES = 128


def can_wait(vm: Vm) -> bool:
    """Find out by doing it whether a machine can let its guest wait for pages; nobody touches its memory meanwhile."""
    try:
        arrival = vm.await_memory(_ask_nobody, DirtyBitmap(vm.memory.gfn_limit))
    except VmError:
        return False
    arrival.finish()
    arrival.close()
    return True


def _ask_nobody(_: GfnArray) -> None:
    """Bring nothing: nothing is absent."""


class PageFetcher:
    """The missing pages of one guest.

    Args:
        vm: the guest, which has not run.
        missing: its frames whose content is at the source; what they hold here is given up.

    Raises:
        UnsupportedError: this host or machine cannot wait for pages.
        VmError: the host refused otherwise.
    """

    def __init__(self, vm: Vm, missing: DirtyBitmap) -> None:
        self._vm = vm
        self._changed = threading.Condition()
        self._missing = missing
        self.left_pages = missing.count()
        """How many pages are still missing."""
        self._absent = vm.memory.all_ram()
        there = DirtyBitmap(missing.nbits)
        there.set_runs(*vm.memory.populated())
        self._absent -= there
        self._absent |= missing  # the others have no storage: they are zeros, and wait for no source
        self._asked = DirtyBitmap(missing.nbits)
        self._asked_pages = 0
        self._in_need: list[GfnArray] = []
        self._order = missing.gfns()
        self._next = 0
        self._peer: Peer | None = None
        self._abandoned = False
        self._over = False
        self._waits_ns = array("Q")  # at most one for each page that was missing
        self._content = np.empty(MAX_WANTED_PAGES * PAGE_SIZE, np.uint8)
        self._zeros = np.zeros(MAX_WANTED_PAGES * PAGE_SIZE, np.uint8)
        self._arrival = vm.await_memory(self.fetch, missing)

    def fetch(self, gfns: GfnArray) -> None:
        """Return when these frames (uint64[n]) are there; any thread but the one that is in :meth:`take_all`.

        Raises:
            VmError: the guest was given up.
        """
        gfns = gfns[gfns < self._absent.nbits]
        gfns = np.unique(gfns[self._absent.test_many(gfns)])  # a bit is cleared when the page is there, for ever
        for at in range(0, gfns.size, MAX_WANTED_PAGES):
            self._fetch(gfns[at : at + MAX_WANTED_PAGES])

    def _fetch(self, gfns: GfnArray) -> None:
        with self._changed:
            self._make_zero(gfns)
            wanted = gfns[self._missing.test_many(gfns)]
            if not wanted.size:
                return
            self._in_need.append(wanted)
            began_ns = time.monotonic_ns()
            try:
                self._ask(wanted, urgent=True)
                self._changed.wait_for(lambda: self._abandoned or not self._missing.test_many(wanted).any())
            finally:
                self._in_need = [each for each in self._in_need if each is not wanted]
                self._waits_ns.append(time.monotonic_ns() - began_ns)
        if self._abandoned:
            raise VmError("the guest was given up before all its pages had come")

    def take_all(self, peer: Peer) -> None:
        """Ask for pages and take them until all are there; on one thread at a time.

        Raises:
            RemoteStreamError: the source sent something else, or another page than its own.
            OSError: cut or stalled. What has come stays; call it again with another connection.
        """
        with self._changed:
            self._peer = peer
            self._asked.clear(self._asked.gfns())
            self._asked_pages, self._next, self._order = 0, 0, self._missing.gfns()
            if self._in_need:
                self._ask_in_need(np.unique(np.concatenate(self._in_need)))
        try:
            while self.left_pages:
                with self._changed:
                    self._ask_ahead()
                frame = peer.receive()
                if not isinstance(frame, Pages):
                    raise RemoteStreamError(f"the source sent {type(frame).__name__} in place of pages")
                self._take(peer, frame)
        finally:
            with self._changed:
                self._peer = None
        self.close()

    def say_complete(self, peer: Peer) -> None:
        """Tell the source, after :meth:`take_all`, that it may drop its copy; return when it has.

        Raises:
            RemoteStreamError: the source sent something else.
            OSError: cut or stalled: whether it has heard is not known. Call it again with another connection.
        """
        peer.send(self._complete())
        answer = peer.receive()
        if not isinstance(answer, Dropped):
            raise RemoteStreamError(f"the source sent {type(answer).__name__} after it was told that all is here")

    def _complete(self) -> Complete:
        with self._changed:
            waits_ns = np.sort(np.array(self._waits_ns, np.uint64))
        if not waits_ns.size:
            return Complete()
        median_ns, p99_ns = waits_ns[[(waits_ns.size - 1) // 2, (waits_ns.size - 1) * 99 // 100]].tolist()
        return Complete(
            waits=waits_ns.size,
            waited_ns=int(waits_ns.sum()),
            median_ns=median_ns,
            p99_ns=p99_ns,
            longest_ns=int(waits_ns[-1]),
        )

    def close(self) -> None:
        """End the waiting: all pages have come, or the guest, which is held and will not run again, is given up."""
        with self._changed:
            if self._over:
                return
            self._over = True
            self._abandoned = self.left_pages > 0
            self._arrival.finish()
            self._changed.notify_all()
        self._arrival.close()

    def release(self, peer: Peer) -> None:
        """Tell the source that no more pages are needed, since the guest has ended; :meth:`take_all` ends."""
        try:
            peer.send(self._complete())
        except LocalStreamError:
            return  # it is not our turn yet, or everything has come: whoever's turn it is says it
        except OSError:
            _log.debug("the source of a guest that has ended is gone")
        peer.channel.finish()

    def _make_zero(self, gfns: GfnArray) -> None:
        zero = gfns[self._absent.test_many(gfns) & ~self._missing.test_many(gfns)]
        if zero.size and not self._over:
            self._install_zero(zero)
            self._absent.clear(zero)

    def _ask_in_need(self, gfns: GfnArray) -> None:
        for at in range(0, gfns.size, MAX_WANTED_PAGES):
            self._ask(gfns[at : at + MAX_WANTED_PAGES], urgent=True)

    def _ask_ahead(self) -> None:
        while self._next < self._order.size and self._asked_pages < _AHEAD_PAGES:
            piece = self._order[self._next : self._next + MAX_WANTED_PAGES]
            self._next += piece.size
            self._ask(piece, urgent=False)

    def _ask(self, gfns: GfnArray, *, urgent: bool) -> None:
        # Under the lock, and yet it waits for nobody: what is under way at once is too little to fill a socket.
        gfns = gfns[self._missing.test_many(gfns) & ~self._asked.test_many(gfns)]
        if self._peer is None or not gfns.size:
            return  # whoever is in need is remembered, and asked for by the next connection
        self._asked.set(gfns)
        self._asked_pages += gfns.size
        try:
            self._peer.send(Wanted(gfns=gfns, urgent=urgent))
        except OSError:
            self._peer = None  # whoever receives finds it out as well

    def _take(self, peer: Peer, frame: Pages) -> None:
        gfns, others = frame.gfns, frame.gfns[~frame.zero]
        if int(gfns[-1]) >= self._asked.nbits or not self._asked.test_many(gfns).all():
            raise RecordError("a page came that was not asked for", record="PAGES")
        content = self._content[: others.size * PAGE_SIZE]
        peer.receive_content(content.data)
        if digest_of(gfns, frame.zero, [content.data]) != frame.digest:
            raise RecordError("pages are not what they were at the source", record="PAGES")
        # Nobody else installs these, and who waits for them looks only when their bits are clear.
        self._arrival.install(others, content)
        self._install_zero(gfns[frame.zero])
        with self._changed:
            self._missing.clear(gfns)
            self.left_pages -= gfns.size
            self._absent.clear(gfns)
            self._asked.clear(gfns)
            self._asked_pages -= gfns.size
            self._changed.notify_all()
        self._vm.memory.wrote(gfns)

    def _install_zero(self, gfns: GfnArray) -> None:
        self._arrival.install(gfns, self._zeros[: gfns.size * PAGE_SIZE])
