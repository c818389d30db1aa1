"""Phases as data: one begin and one end event each, timed on one clock, for source and destination alike."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pageferry.core.events import Event, Phase, PhaseBegan, PhaseEnded


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
        self.durations_s: dict[Phase, float] = {}

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Be in ``phase`` for the length of a ``with`` block; an error leaves ``current`` at the phase it came from."""
        self.current = phase
        began_s = self.now_s()
        self._on_event(PhaseBegan(phase=phase))
        try:
            yield
        finally:
            self.durations_s[phase] = self.now_s() - began_s
            self._on_event(PhaseEnded(phase=phase, duration_s=self.durations_s[phase]))
