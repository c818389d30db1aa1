"""Phases as data: one begin and one end event each, timed on one clock, for source and destination alike."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pageferry.core.events import Event, Phase, PhaseBegan, PhaseEnded

_log = logging.getLogger(__name__)


def guarded(on_event: Callable[[Event], None]) -> Callable[[Event], None]:
    """Return the observer with its own failures logged: nobody who looks on may end a migration."""

    def observe(event: Event) -> None:
        try:
            on_event(event)
        except Exception:
            _log.exception("an observer of the migration failed")

    return observe


class PhaseClock:
    """Tells which phase is on and how long each took.

    Args:
        on_event: sees the begin and end of each phase.
        now_s: a monotonic clock in seconds.
    """

    def __init__(self, on_event: Callable[[Event], None], now_s: Callable[[], float] = time.monotonic) -> None:
        self._on_event = on_event
        self.now_s = now_s
        self.current = Phase.CONNECT
        self.began_s: dict[Phase, float] = {}

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Be in ``phase`` for the length of a ``with`` block; an error leaves ``current`` at the phase it came from."""
        self.current = phase
        began_s = self.began_s[phase] = self.now_s()
        self._on_event(PhaseBegan(phase=phase))
        try:
            yield
        finally:
            self._on_event(PhaseEnded(phase=phase, duration_s=self.now_s() - began_s))

    def parts_s(self, phases: Sequence[Phase], end_s: float) -> dict[str, float]:
        """Divide the time from the begin of the first of ``phases`` to ``end_s`` among them, without a gap.

        Args:
            phases: in the order in which they were.
            end_s: when the last of them ended, on the clock of ``now_s``.
        """
        edges = [*(self.began_s[phase] for phase in phases), end_s]
        return {str(phase): after - before for phase, before, after in zip(phases, edges, edges[1:], strict=False)}
