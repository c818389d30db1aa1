"""The source's part of the handoff, from READY on.

::

    COMMIT or SWITCH -- RUNNING --------> it runs there; DROPPED, when it needs nothing of ours any more
                     -- FAILED ---------> it never will: it is here
                     -- no answer ------> UNKNOWN, and a new connection
             RECOVER -- RUNNING, FAILED - as above; RECOVERED: it runs there, and asks for pages
                     -- REFUSE, nothing - UNKNOWN still

A word that did not leave whole was not given: a part of it cannot be accepted.
"""

import contextlib
from collections.abc import Callable
from typing import Generic, TypeVar

from pageferry.core.errors import PageferryError
from pageferry.engine.failures import StalledError
from pageferry.engine.handoff.custody import Handoff, SourceCustody
from pageferry.engine.handoff.talk import Talk
from pageferry.engine.wire.peer import PeerFailedError, PeerRefusedError
from pageferry.stream.ferry_frames import Commit, Complete, Dropped, Recovered, Running, Switch

#: How long after a destination was not reached it is tried again.
_AGAIN_S = 0.2
#: How long to ask when the lease is over already, and to see that the last word was heard.
_ASK_AT_LEAST_S, _LAST_WORD_S = 2.0, 1.0
#: How often the last word is said.
_LAST_WORDS = 3


_T = TypeVar("_T", bound=Talk)


class Giver(Generic[_T]):
    """Gives one guest away.

    Args:
        handoff: who may run it.
        come_back: opens a new connection to the destination, within so many seconds, and asks there: the answer comes
            next. Raises PeerRefusedError if the migration is not known there, and OSError.
        patience_s: how long a destination may take to answer where nothing else is said.
        now_s: a monotonic clock in seconds.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        handoff: Handoff,
        come_back: Callable[[float], _T],
        *,
        patience_s: float,
        now_s: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self._handoff = handoff
        self._come_back = come_back
        self._patience_s = patience_s
        self._now_s = now_s
        self._sleep = sleep
        self._switched = False

    def give(self, peer: _T, word: Commit | Switch) -> _T:
        """Give the guest, which stands still and is COMMITTED, to a destination that said READY.

        Returns:
            The connection to go on with: where SWITCH was said, the destination asks there for pages.

        Raises:
            PeerFailedError: the destination promises that the guest never runs there.
            OSError, PageferryError: the word did not leave, and the guest is here; or it was not answered: UNKNOWN.
        """
        self._switched = isinstance(word, Switch)
        try:
            peer.send(word)
        except OSError:
            self._handoff.refused()
            raise
        try:
            answer = peer.receive()
            if not isinstance(answer, Running):
                raise peer.out_of_turn(answer)
        except PeerFailedError:
            self._handoff.refused()
            raise
        except (OSError, PageferryError):
            self._handoff.lost()
            raise
        self._handoff.running()
        return peer

    def ask(self, within_s: float | None = None) -> _T:
        """Ask once, over a new connection, for a guest that was given away; return the connection to go on with.

        Args:
            within_s: how long to wait for a connection, and then for the answer; None: as long as there is patience.

        Raises:
            PeerRefusedError: the guest of another migration is there, or none.
            PeerFailedError: the destination promises that the guest never runs there.
            OSError, PageferryError: no answer.
        """
        within_s = self._patience_s if within_s is None else within_s
        try:
            peer = self._come_back(within_s)
            with contextlib.ExitStack() as undo:
                undo.callback(peer.close)
                self._expect_answer(peer, within_s)
                undo.pop_all()
                return peer
        except TimeoutError as error:
            raise StalledError(within_s) from error

    def _expect_answer(self, peer: _T, within_s: float) -> None:
        unknown = self._handoff.custody is SourceCustody.UNKNOWN
        try:
            answer = peer.receive(within_s)
        except PeerFailedError as error:
            if unknown and not isinstance(error, PeerRefusedError):
                self._handoff.refused()
            raise
        if not isinstance(answer, Recovered if self._switched else Running):
            raise peer.out_of_turn(answer)
        if unknown:
            self._handoff.running()

    def take_leave(self, peer: _T) -> None:
        """Tell the destination, which needs nothing more, that our copy is dropped; return when it has heard.

        If it cannot be reached, it goes without: the guest is there.
        """
        with contextlib.suppress(OSError, PageferryError):
            for _ in range(_LAST_WORDS):
                with contextlib.suppress(OSError):
                    peer.send(Dropped())
                    peer.wait_for_end(_LAST_WORD_S)
                    return
                peer = self.ask(_LAST_WORD_S)
                if self._switched and not isinstance(complete := peer.receive(), Complete):
                    raise peer.out_of_turn(complete)

    def ask_until_answered(self) -> _T:
        """Ask again and again while the lease lasts, and for a moment in any case; raises as :meth:`ask` did last."""
        until_s = self._now_s() + max(self._handoff.open_for_s(self._now_s()), _ASK_AT_LEAST_S)
        while True:
            try:
                return self.ask(max(until_s - self._now_s(), _ASK_AT_LEAST_S))
            except (OSError, PageferryError):
                if self._handoff.custody is SourceCustody.HERE or self._now_s() >= until_s:
                    raise
            self._sleep(_AGAIN_S)
