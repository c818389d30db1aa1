"""Predicts when a migration will be over, from measured rates; pure, the caller tells the time.

A forecast plays the rounds to come: each moves what is left at the wire's rate, and leaves what the guest writes
meanwhile, until the pause fits. :class:`Eta` is what a person is told: it counts down, and where it has to go back it
says why.
"""

from dataclasses import dataclass

from pageferry.core.frames import PAGE_SIZE
from pageferry.core.units import format_size

#: So many rounds are played; a migration that needs more has no end that is worth telling.
_MAX_ROUNDS = 60
#: Less than this is left when the policy has no downtime limit to fit.
_FEW_BYTES = 50 * PAGE_SIZE
#: An end that moves by less than this share of what is left is noise.
_NOISE = 0.1
#: Near the end less than a tenth of this is.
_SHORT_S = 0.1
#: A rate has changed when it is beyond this factor.
_CHANGED = 1.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The measurements.

    ``remaining_bytes``: still to be sent now. ``wire_bytes_per_s``: None before anything was sent.
    ``dirty_bytes_per_s``: how fast the guest dirtied memory in the last round that ended; 0 before. ``fixed_s``: what a
    pause costs besides pages. ``limit_s``: the downtime limit, if there is one.
    """

    remaining_bytes: float
    wire_bytes_per_s: float | None
    dirty_bytes_per_s: float
    fixed_s: float
    limit_s: float | None


def left_s(pace: Pace) -> float | None:
    """Return how long a migration at this pace still takes, pause included; None when it does not come to an end."""
    wire = pace.wire_bytes_per_s
    if not wire:
        return None
    left, total_s = pace.remaining_bytes, 0.0
    for _ in range(_MAX_ROUNDS):
        pause_s = pace.fixed_s + left / wire
        if left <= _FEW_BYTES if pace.limit_s is None else pause_s <= pace.limit_s:
            return total_s + pause_s
        round_s = left / wire
        total_s += round_s
        left = min(left, pace.dirty_bytes_per_s * round_s)
    return None


class Eta:
    """The time that is told; one for each migration."""

    def __init__(self) -> None:
        self._end_s: float | None = None
        self._pace: Pace | None = None
        self.reason = "nothing is known yet"
        """Why the end was moved back last, or why there is none; empty while it only counts down."""

    def tell(self, pace: Pace, now_s: float) -> float | None:
        """Return how long it still takes, in seconds; None when no end is in sight (``reason`` says why).

        Args:
            pace: as measured now.
            now_s: on any monotonic clock.
        """
        forecast_s = left_s(pace)
        if forecast_s is None:
            self._end_s, self._pace, self.reason = None, pace, self._why_none(pace)
            return None
        end_s = now_s + forecast_s
        if self._end_s is None:
            self._end_s, self._pace, self.reason = end_s, pace, ""
        elif end_s <= self._end_s:
            self._end_s, self._pace = end_s, pace
        elif end_s > self._end_s + _NOISE * max(self._end_s - now_s, _SHORT_S):
            self._end_s, self._pace, self.reason = end_s, pace, self._why_later(pace)
        return max(0.0, self._end_s - now_s)

    def _why_none(self, pace: Pace) -> str:
        if not pace.wire_bytes_per_s:
            return "nothing was sent yet"
        return f"the guest writes {_rate(pace.dirty_bytes_per_s)}, the wire moves {_rate(pace.wire_bytes_per_s)}"

    def _why_later(self, pace: Pace) -> str:
        before = self._pace
        if before is None or not before.wire_bytes_per_s or not pace.wire_bytes_per_s:
            return "the first rates are known now"
        if before.limit_s != pace.limit_s:
            return "the downtime limit was changed"
        if pace.dirty_bytes_per_s > _CHANGED * before.dirty_bytes_per_s:
            return f"the guest writes {_rate(pace.dirty_bytes_per_s)}; it was {_rate(before.dirty_bytes_per_s)}"
        if pace.wire_bytes_per_s * _CHANGED < before.wire_bytes_per_s:
            return f"the wire moves {_rate(pace.wire_bytes_per_s)}; it was {_rate(before.wire_bytes_per_s)}"
        if pace.fixed_s > _CHANGED * before.fixed_s:
            return f"state and verification take {pace.fixed_s * 1e3:.0f} ms; it was {before.fixed_s * 1e3:.0f} ms"
        return "a round left more than was expected"


def _rate(bytes_per_s: float) -> str:
    return f"{format_size(bytes_per_s)}/s"
