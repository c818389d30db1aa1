"""The destination's part of the handoff, from READY on.

::

    READY -- COMMIT or SWITCH, within the lease --> RUNNING      the guest is ours, whether or not the source hears it
          -- anything else, or nothing -----------> FAILED       it never runs here
    RECOVER, over a new connection ---------------> RUNNING or RECOVERED; FAILED; REFUSE, for a guest not known here
    DROPPED                                                      the source has heard
"""

import contextlib
from collections.abc import Callable
from typing import TypeVar

from pageferry.core.command_hints import TAKE_BACK
from pageferry.core.errors import GuestAt, PageferryError, TransportError
from pageferry.core.events import Phase
from pageferry.engine.handoff.custody import Takeover
from pageferry.engine.handoff.talk import Talk
from pageferry.stream.ferry_frames import Commit, Dropped, Failed, Ready, Refuse, Running, Switch

_T = TypeVar("_T", bound=Talk)


def take(
    peer: Talk,
    takeover: Takeover,
    ready: Ready,
    word: type[Commit | Switch],
    claim: Callable[[], None],
    release: Callable[[], None],
    start: Callable[[bool], None],
    now_s: Callable[[], float],
) -> None:
    """Say READY, wait for the word that gives the guest away, start it and say so.

    Args:
        peer: the source.
        takeover: who may run the guest; OURS at the end.
        ready: what to say.
        word: which word is due.
        claim: claims the guest's backends, with their disks' locks.
        release: gives them back where the guest is not started after all, before the source hears of that.
        start: lets the guest run, or not if it is told that its user had paused it. If it raises, it has not run.
        now_s: a monotonic clock in seconds.

    Raises:
        TransportError: no word came while the source stood by it.
        OSError, PageferryError: something else came, or the guest cannot be started. It is not OURS.
    """
    takeover.ready(now_s())
    peer.send(ready)
    try:
        given = peer.receive(takeover.left_s(now_s()))
    except TimeoutError as error:
        raise _too_late() from error
    if not isinstance(given, word):
        raise peer.out_of_turn(given)
    if not takeover.accept(now_s()):
        raise _too_late()
    claim()
    try:
        if not takeover.left_s(now_s()):  # the disks were long in coming
            raise _too_late()
        start(given.paused)
    except Exception:
        release()
        raise
    takeover.run()
    with contextlib.suppress(OSError):
        peer.send(Running())


def see_off(
    peer: _T, say: Callable[[_T], None], returned: Callable[[], _T | None], within_s: float | None = None
) -> bool:
    """Return whether the source has heard that all is here, over as many connections as it takes; the last is closed.

    Args:
        peer: the source.
        say: says what is to be said first on a connection.
        returned: waits for the source to come back; None: it is not waited for any longer.
        within_s: how long to listen on one connection; None: as long as a connection may stand still.
    """
    back: _T | None = peer
    while back is not None:
        with contextlib.suppress(OSError, PageferryError), contextlib.closing(back):
            say(back)
            frame = back.receive(within_s)
            if isinstance(frame, Dropped):
                return True
            raise back.out_of_turn(frame)
        back = returned()
    return False


def answer_return(peer: Talk, *, never_ran: bool) -> None:
    """Answer a source that comes back for a guest that is not here, and which has sent RECOVER.

    Args:
        peer: the source.
        never_ran: the guest was to come to this process, and never ran here and never will.

    Raises:
        OSError: cut or stalled.
    """
    if never_ran:
        peer.send(Failed(reason="the guest had not been handed over when the attempt ended, and never ran there"))
    else:
        hint = f"if it surely runs nowhere, at the source: {TAKE_BACK}"
        peer.send(Refuse(reason="no guest of that migration is here", hint=hint))


def _too_late() -> TransportError:
    what = "the source did not hand the guest over in time"
    return TransportError(what, phase=str(Phase.HANDOFF), guest_at=GuestAt.SOURCE)
