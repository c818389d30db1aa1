"""A pause has a budget: one that takes too long is given up while the guest is still ours, and it runs on here.

A policy pauses the guest when it expects the pause to be short. What it cannot expect is a destination, a network or a
disk that stands still just then.
"""

import threading
from collections.abc import Callable

from pageferry.core.events import Phase
from pageferry.engine.host import THIS_HOST, Host

_TIMES_THE_DOWNTIME_LIMIT = 10
_LEAST_S = 2.0
#: What a pause waits for, by phase.
_DESTINATION = {
    Phase.PAUSE: "the guest to stand still",
    Phase.STOP_AND_COPY: "the destination to take the last pages",
    Phase.STATE: "the destination to take the machine's state",
    Phase.VERIFY: "the destination to prove the memory",
    Phase.HANDOFF: "the guest to be handed over",
}
#: The same of a save, which is not watched any more once its file has all of the guest.
_FILE = {
    Phase.PAUSE: _DESTINATION[Phase.PAUSE],
    Phase.STOP_AND_COPY: "the file to take the last pages",
    Phase.STATE: "the file to take the machine's state",
    Phase.VERIFY: "the memory to be digested",
}


def pause_limit_s(asked_s: float | None, downtime_limit_s: float | None) -> float | None:
    """Return how long a pause may take; None: as long as it does.

    Args:
        asked_s: what the user allows; None: ten times the downtime limit, at least 2 s.
        downtime_limit_s: of the policy; None: it has none, and the pause none by itself.
    """
    if asked_s is not None or downtime_limit_s is None:
        return asked_s
    return max(_LEAST_S, _TIMES_THE_DOWNTIME_LIMIT * downtime_limit_s)


def waits_for(phase: Phase, *, saves: bool) -> str:
    """Return what a guest that is paused waits for in ``phase``."""
    return (_FILE if saves else _DESTINATION)[phase]


class PauseWatch:
    """Calls ``on_end``, on a thread of its own, when a pause has taken too long; once at the most.

    Args:
        on_end: gives it up.
        host: on which it waits.
    """

    def __init__(self, on_end: Callable[[], None], host: Host = THIS_HOST) -> None:
        self._on_end = on_end
        self._host = host
        self._over = host.event()
        self._thread: threading.Thread | None = None

    def begin(self, limit_s: float | None) -> None:
        """The pause begins, and may take so long; None: as long as it does."""
        if limit_s is not None and limit_s < threading.TIMEOUT_MAX:
            self._thread = self._host.begin(self._watch, "pause", limit_s)

    def end(self) -> None:
        """The pause is over, or cannot be ended any more. May be repeated."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, limit_s: float) -> None:
        if not self._over.wait(limit_s):
            self._on_end()
