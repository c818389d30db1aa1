"""When to go on copying, when to stop and copy, when to give up: pure functions of what was measured.

A policy sees a :class:`Progress` after every round and answers with a :class:`Decision`. It has no clock, no logging
and no I/O, so the engine and any simulator that feed it the same numbers cannot disagree. The policies themselves are
in :mod:`pageferry.core.policies`, their names and options in :mod:`pageferry.core.policy_names`.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.page_counts import PageCounts

#: Rounds that moved less than this say more about latency than about the wire.
RATE_SAMPLE_BYTES = 4 << 20
#: Counts within 5 % of the least so far are equal: noise.
_NEAR = 1.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStats(PageCounts):
    """One round of pre-copy, and what it sent.

    ``dirty_pages``: pages that it found dirty, each part of memory looked at just before it was sent (round 0: pages
    with storage). ``remaining_pages``: pages dirty when it ended. The final round is the stop-and-copy: nothing
    remains.
    """

    index: int
    dirty_pages: int
    duration_s: float
    remaining_pages: int
    final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Everything measured so far.

    ``memory_pages``: the guest's RAM. ``fixed_s``: what a pause costs besides page data: state and verification, as
    measured by the engine. ``elapsed_s``: since the migration began. ``throttle``: the share of its time for which the
    guest was throttled during the last round, 0 to 1.
    """

    memory_pages: int
    rounds: tuple[RoundStats, ...]
    fixed_s: float
    elapsed_s: float = 0.0
    throttle: float = 0.0

    @property
    def last(self) -> RoundStats:
        """The round that just ended."""
        return self.rounds[-1]

    @property
    def sent_pages(self) -> int:
        """Pages sent in all rounds."""
        return sum(stats.sent_pages for stats in self.rounds)

    @property
    def wire_bytes_per_s(self) -> float | None:
        """How fast memory moves: in the latest rounds that together moved enough to tell, or in all if they did not."""
        moved_bytes, duration_s = 0, 0.0
        for stats in reversed(self.rounds):
            moved_bytes += stats.moved_bytes
            duration_s += stats.duration_s
            if moved_bytes >= RATE_SAMPLE_BYTES:
                break
        return moved_bytes / duration_s if moved_bytes and duration_s > 0 else None

    @property
    def dirty_bytes_per_s(self) -> float:
        """How fast the guest dirtied memory during the last round: distinct pages only, so a lower bound."""
        last = self.last
        return last.remaining_pages * PAGE_SIZE / last.duration_s if last.duration_s > 0 else 0.0

    @property
    def expected_downtime_s(self) -> float:
        """The expected cost of a pause now: what remains at the measured rate, and the fixed part."""
        rate = self.wire_bytes_per_s
        return self.fixed_s + (self.last.remaining_pages * PAGE_SIZE / rate if rate else 0.0)

    @property
    def low_water(self) -> RoundStats:
        """The first round that ended within 5 % of the least that ever remained."""
        least = min(stats.remaining_pages for stats in self.rounds)
        return next(stats for stats in self.rounds if stats.remaining_pages <= _NEAR * least)

    @property
    def rounds_since_low_water(self) -> int:
        """How many rounds came no nearer to the end than the best one before them."""
        return self.last.index - self.low_water.index

    @property
    def at_low_water(self) -> bool:
        """Whether what remains now is within 5 % of the least that ever did."""
        return self.last.remaining_pages <= _NEAR * self.low_water.remaining_pages


class Action(StrEnum):
    """The decisions that a policy can make."""

    NEXT_ROUND = "next-round"
    STOP_AND_COPY = "stop-and-copy"
    POST_COPY = "post-copy"
    ABORT = "abort"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """An action, and the reason in words for a person.

    ``throttle``: the share of its time for which the guest is to be throttled during the next round, 0 (not at all) to
    less than 1. It ends with pre-copy, however that ends.
    """

    action: Action
    reason: str
    throttle: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.throttle < 1.0:
            raise UsageError(f"a guest cannot be throttled for {self.throttle:g} of its time", hint="0 to less than 1")


class Policy(Protocol):
    """Decides after every round of pre-copy; the same progress always gives the same decision."""

    @property
    def name(self) -> str:
        """The policy's name in options and reports."""

    def decide(self, progress: Progress) -> Decision:
        """Decide what follows the round that just ended; ``progress.rounds`` is not empty."""


def may_switch(policy: Policy) -> bool:
    """Tell whether a policy may decide for post-copy, which it says by an attribute ``switches``."""
    return bool(getattr(policy, "switches", False))


def downtime_limit_s(policy: Policy) -> float | None:
    """Return the pause that a policy allows, which it says by an attribute ``limit_s``; None where it has none."""
    return _seconds(policy, "limit_s")


def deadline_s(policy: Policy) -> float | None:
    """Return by when a policy is to be done, which it says by an attribute ``deadline_s``; None where it has none."""
    return _seconds(policy, "deadline_s")


def _seconds(policy: Policy, attribute: str) -> float | None:
    value = getattr(policy, attribute, None)
    return float(value) if isinstance(value, int | float) else None
