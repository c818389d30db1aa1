"""LatePages: post-copy at the destination: pages come while the guest runs, over as many connections as it takes."""

import logging
import threading
from collections.abc import Callable

from pageferry.core.errors import GuestAt, PageferryError, TransportError
from pageferry.core.events import Event, Phase, PostcopyPaused, PostcopyRecovered
from pageferry.core.vm import Vm
from pageferry.engine.postcopy.fetcher import PageFetcher
from pageferry.engine.postcopy.recovery import Hold, take_back_in
from pageferry.engine.wire.connections import POLL_S, Accept
from pageferry.engine.wire.peer import Peer, PeerFailedError

_log = logging.getLogger(__name__)


class LatePages:
    """The pages of a guest that come after the switch.

    Args:
        vm: the guest, which stands still while there is no connection.
        fetcher: takes the pages.
        accept: where the source comes back from.
        token: that it must show.
        aborted: set when nobody is to wait any longer; :meth:`abort` is called after that.
        on_event: sees pauses and recoveries.
    """

    def __init__(
        self,
        vm: Vm,
        fetcher: PageFetcher,
        *,
        accept: Accept,
        token: str,
        aborted: threading.Event,
        on_event: Callable[[Event], None],
    ) -> None:
        self._vm = vm
        self._fetcher = fetcher
        self._accept = accept
        self._token = token
        self._aborted = aborted
        self._on_event = on_event
        self._released = False
        self._peer: Peer | None = None
        self.waits_for_source = False
        """Whether the guest stands still, for pages of it are at a source that is gone."""

    @property
    def missing_pages(self) -> int:
        """How many pages are still at the source; it only falls."""
        return self._fetcher.left_pages

    def abort(self) -> None:
        """Cut the connection, from any thread."""
        if self._peer is not None:
            self._peer.channel.abort()

    def release(self) -> None:
        """Tell the source, from any thread, that the guest has ended and needs no more of its pages."""
        self._released = True
        if self._peer is not None:
            self._fetcher.release(self._peer)

    def close(self) -> None:
        """Let nobody wait for pages any more; the guest is held and will not run again, or has all of them."""
        self._fetcher.close()

    def fetch(self, peer: Peer) -> None:
        """Have all missing pages come, first over the connection of the switch; the guest stands still between two.

        Raises:
            TransportError: it was aborted, and the guest is lost.
        """
        self._peer = peer
        if self._released:  # by somebody whose turn it was not yet
            self._fetcher.release(peer)
        while True:
            try:
                self._fetcher.take_all(self._peer)
                return
            except Exception as error:  # whatever it is: what has come stays, and another connection may do better
                if not isinstance(error, OSError | PageferryError | PeerFailedError):
                    _log.exception("post-copy was cut by a defect")
                reason = f"the connection was cut: {error}"
            self._peer.channel.close()
            if not self._released:
                hold = Hold(self._vm)
                self.waits_for_source = True
                self._on_event(PostcopyPaused(reason=reason))
            if not self._reconnected():
                break
            hold.end()
            self.waits_for_source = False
            self._on_event(PostcopyRecovered())
        if not self._released:
            why = "given up before all pages had come, and the guest is lost"
            raise TransportError(why, phase=str(Phase.POSTCOPY), guest_at=GuestAt.DESTINATION)
        self.close()  # another vCPU than the one that ended the guest may wait for a page

    def see_off(self) -> None:
        """Tell the source, when all is there, that it may drop its copy, over as many connections as it takes.

        Returns when it has. The guest needs nothing of it any more: if this is aborted, the source believes itself cut.
        """
        while self._peer is not None and not self._is_over():
            try:
                self._fetcher.say_complete(self._peer)
                break
            except (OSError, PageferryError, PeerFailedError):
                self._peer.channel.close()
            if not self._reconnected():
                break
        if self._peer is not None:
            self._peer.channel.close()

    def _is_over(self) -> bool:
        return self._released or self._aborted.is_set()

    def _reconnected(self) -> bool:
        """Wait for the source; tell whether it is there. If not, it is not waited for any more."""
        while not self._is_over():
            try:
                channel = self._accept(POLL_S)
            except OSError:
                break
            peer = None if channel is None else take_back_in(channel, self._token)
            if peer is not None:
                self._peer = peer
                if self._is_over():  # says somebody who knew only the connection before
                    peer.channel.abort()
                return True
        return False
