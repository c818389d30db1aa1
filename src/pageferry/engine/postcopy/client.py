"""Post-copy at the destination: the guest runs here, and its missing pages come from the source.

::

    destination                                           source
      | -- WANTED(urgent): a thread waits for these ------> |
      | -- WANTED: others, a few at a time ---------------> |
      | <------------------------------- PAGES, content -- |  and so on
      |    a cut: the guest stands still
      |    a new connection: RECOVER, RECOVERED, and on it goes
      | -- COMPLETE --------------------------------------> |
      | <------------------------------------- DROPPED -- |

A duplicate, unsolicited or corrupt page drops the connection, as if it had been cut. A cut loses no page: each that has
not come is still missing, and the source keeps it.
"""

import contextlib
import logging
import threading
from collections.abc import Callable

import numpy as np

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import (
    GuestAt,
    LocalStreamError,
    PageferryError,
    RecordError,
    RemoteStreamError,
    TransportError,
)
from pageferry.core.events import Event, Phase, PostcopyPaused, PostcopyRecovered
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.vm import Vm
from pageferry.engine.handoff.take import see_off
from pageferry.engine.host import THIS_HOST, Host
from pageferry.engine.postcopy.pager import DemandPager
from pageferry.engine.wire.channel import Channel
from pageferry.engine.wire.connections import Accept, wait_for_return
from pageferry.engine.wire.peer import Peer
from pageferry.stream.ferry_bodies import digest_of
from pageferry.stream.ferry_frames import (
    MAX_WANTED_PAGES,
    Complete,
    Pages,
    Recovered,
    Wanted,
)

_log = logging.getLogger(__name__)

#: How many pages may be under way that no vCPU waits for: 512 KiB, what an urgent page may wait behind. Measured: more
#: of them make the waits longer, and the whole no faster.
_AHEAD_PAGES = 128


class PostcopyClient:
    """The missing pages of a guest that is about to switch.

    The constructor discards the present content of these frames.

    Args:
        vm: the guest, which has not run.
        missing: its frames whose content is at the source.
        accept: where the source comes back from.
        token: that it must prove to know.
        aborted: set when all waiting is to end; :meth:`abort` is called after that.
        on_event: sees pauses and recoveries.
        host: on which it waits.

    Raises:
        VmError: the host or the machine refused.
    """

    def __init__(
        self,
        vm: Vm,
        missing: DirtyBitmap,
        *,
        accept: Accept,
        token: str,
        aborted: threading.Event,
        on_event: Callable[[Event], None],
        host: Host = THIS_HOST,
    ) -> None:
        self._vm = vm
        self._host = host
        self._accept = accept
        self._token = token
        self._aborted = aborted
        self._on_event = on_event
        self._content = np.empty(MAX_WANTED_PAGES * PAGE_SIZE, np.uint8)
        self._released = False
        self._peer: Peer | None = None
        self._asking = host.lock()  # held while what is asked for, and of which peer, changes
        self.waits_for_source = False
        """Whether the guest stands still because pages of it are at a source that is gone."""
        self._pager = DemandPager(vm, missing.gfns(), self._ask_urgently, host)

    @property
    def missing_pages(self) -> int:
        """How many pages are still at the source; it only falls."""
        return self._pager.missing_pages

    @property
    def channel(self) -> Channel | None:
        """The connection to the source; None: there was none yet."""
        peer = self._peer
        return None if peer is None else peer.channel

    def take_all(self, peer: Peer) -> None:
        """Have all missing pages come, first over the connection of the switch; the guest stands still between two.

        On failure no thread waits for pages, and the connection is closed.

        Raises:
            TransportError: it was aborted, and the guest is lost.
        """
        try:
            cut = self._take_until_cut(peer)
            while cut is not None and (returned := self._source_that_returns(cut)) is not None:
                cut = self._take_until_cut(returned)
            if cut is not None and not self._released:
                why = "given up before all pages had come, and the guest is lost"
                raise TransportError(why, phase=str(Phase.POSTCOPY), guest_at=GuestAt.DESTINATION)
        finally:
            self.close()  # a guest that has ended may have another vCPU that waits for a page

    def see_off(self) -> None:
        """Tell the source, when all is there, that it may drop its copy, over as many connections as it takes.

        Returns when it has. The guest needs nothing of it any more: if this is aborted, the source believes itself cut.
        """
        if self._peer is not None and not self._is_over():
            see_off(self._peer, self.say_complete, self._accepted)

    def release(self) -> None:
        """Tell the source, from any thread, that the guest has ended and needs no more of its pages."""
        with self._asking:
            self._released = True
        if self._peer is not None:
            self._release(self._peer)

    def abort(self) -> None:
        """Cut the connection, from any thread."""
        if self._peer is not None:
            self._peer.channel.abort()

    def close(self) -> None:
        """End all waits for pages; the guest stands still for ever, or has all of them."""
        self._pager.close()

    # -- one connection --------------------------------------------------------------------------------------------

    def _take_until_cut(self, peer: Peer) -> str | None:
        """Take pages over one connection; return None when all are there, or why it was cut."""
        try:
            self.take_from(peer)
        except Exception as error:  # whatever it is: what has come stays, and another connection may do better
            if not isinstance(error, OSError | PageferryError):
                _log.exception("post-copy was cut by a defect")
            peer.channel.close()
            return f"the connection was cut: {error}"
        return None

    def take_from(self, peer: Peer) -> None:
        """Ask for pages and take them until all are there; on one thread at a time.

        Raises:
            RemoteStreamError: the source sent something else, or another page than its own.
            OSError: cut or stalled. What has come stays; call it again with another connection.
        """
        with self._asking:
            self._peer = peer
            self._pager.start_over()
        if self._released:  # said when there was another connection, or none
            self._release(peer)
        elif self._aborted.is_set():
            peer.channel.abort()
        self._ask_urgently()
        while self._pager.missing_pages:
            self._ask_ahead(peer)
            frame = peer.receive()
            if not isinstance(frame, Pages):
                raise RemoteStreamError(f"the source sent {type(frame).__name__} in place of pages")
            self._install(peer, frame)
        self._pager.close()

    def _ask_urgently(self) -> None:
        # Under the lock, and yet it does not block: what is under way at once is too little to fill a socket.
        with self._asking:
            peer = self._peer
            if peer is None or self._released:
                return  # the next connection begins with it
            while (gfns := self._pager.needed(MAX_WANTED_PAGES)).size:
                with contextlib.suppress(OSError):  # the receiving thread meets the same cut
                    peer.send(Wanted(gfns=gfns, urgent=True))

    def _ask_ahead(self, peer: Peer) -> None:
        with self._asking:
            while self._pager.coming_pages < _AHEAD_PAGES and (gfns := self._pager.ahead(MAX_WANTED_PAGES)).size:
                peer.send(Wanted(gfns=gfns))

    def _install(self, peer: Peer, frame: Pages) -> None:
        if not self._pager.are_coming(frame.gfns):
            raise RecordError("a page came that was not asked for", record="PAGES")
        gfns, zeros = frame.gfns[~frame.zero], frame.gfns[frame.zero]
        content = self._content[: gfns.size * PAGE_SIZE]
        peer.receive_content(content.data)
        if digest_of(frame.gfns, frame.zero, [content.data]) != frame.digest:
            raise RecordError("pages are not what they were at the source", record="PAGES")
        if gfns.size:
            self._pager.install(gfns, content)
        if zeros.size:
            self._pager.install(zeros, np.zeros(zeros.size * PAGE_SIZE, np.uint8))

    def say_complete(self, peer: Peer) -> None:
        """Tell the source, over this connection, that all is there and that it may drop its copy.

        Raises:
            OSError: cut or stalled.
        """
        self._peer = peer
        peer.send(self._complete())

    def _release(self, peer: Peer) -> None:
        try:
            peer.send(self._complete())
        except LocalStreamError:
            return  # not our turn yet, or everything has come: the thread that takes pages says it
        except OSError:
            _log.debug("the source of a guest that has ended is gone")
        peer.channel.finish()

    def _complete(self) -> Complete:
        waits_ns = self._pager.waits_ns()
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

    # -- between two connections -----------------------------------------------------------------------------------

    def _is_over(self) -> bool:
        return self._released or self._aborted.is_set()

    def _source_that_returns(self, reason: str) -> Peer | None:
        """Let the guest stand still until its source is back; None: it is not waited for any longer."""
        if self._released:
            return None
        freeze = _Freeze(self._vm, self._host)
        self.waits_for_source = True
        self._on_event(PostcopyPaused(reason=reason))
        peer = self._accepted()
        if peer is not None:
            freeze.thaw()
            self.waits_for_source = False
            self._on_event(PostcopyRecovered())
        return peer

    def _accepted(self) -> Peer | None:
        return wait_for_return(self._accept, self._token, Recovered(), self._is_over)


class _Freeze:
    """Freezes a guest from now on, on a thread of its own: on the caller's it would be a deadlock.

    ``freeze`` returns when every vCPU has stopped. A vCPU that waits for a page stops when it has the page, which comes
    over the connection that the caller is about to accept.
    """

    def __init__(self, vm: Vm, host: Host) -> None:
        self._vm = vm
        self._lock = threading.Lock()
        self._frozen = self._over = False
        with contextlib.suppress(OSError):  # without it each vCPU still stops at a page that is missing
            host.begin(self._freeze, "freeze")

    def thaw(self) -> None:
        """Let it run again, as soon as every vCPU has stopped: pages come again."""
        with self._lock:
            self._over = True
            if self._frozen:
                self._vm.thaw()

    def _freeze(self) -> None:
        self._vm.freeze()
        with self._lock:
            self._frozen = True
            if self._over:
                self._vm.thaw()
