"""When to go on copying, when to stop and copy, when to give up: pure functions of what was measured.

A policy sees a :class:`Progress` after every round and answers with a :class:`Decision`. It has no clock, no logging
and no I/O, so the engine and any simulator that feed it the same numbers cannot disagree.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SIZE

#: Rounds that moved less than this say more about latency than about the wire.
_RATE_SAMPLE_BYTES = 4 << 20
#: So often the fixed costs must have been measured before they alone are a reason to give up.
_PATIENCE_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStats:
    """One round of pre-copy.

    ``dirty_pages``: pages that were dirty when the round began (round 0: pages with storage).
    ``sent_pages``/``sent_bytes``: what went over the wire, headers included in the bytes.
    ``remaining_pages``: pages dirty when it ended. The final round is the stop-and-copy: nothing remains.
    """

    index: int
    dirty_pages: int
    sent_pages: int
    sent_bytes: int
    duration_s: float
    remaining_pages: int
    final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Everything measured so far.

    ``memory_pages``: the guest's RAM. ``fixed_s``: what a pause costs besides page data: state, verification and
    handoff, as measured or estimated by the engine.
    """

    memory_pages: int
    rounds: tuple[RoundStats, ...]
    fixed_s: float

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
        """The rate of the latest rounds that together moved enough to tell; of all of them if they moved little."""
        sent_bytes, duration_s = 0, 0.0
        for stats in reversed(self.rounds):
            sent_bytes += stats.sent_bytes
            duration_s += stats.duration_s
            if sent_bytes >= _RATE_SAMPLE_BYTES:
                break
        return sent_bytes / duration_s if sent_bytes and duration_s > 0 else None

    @property
    def dirty_bytes_per_s(self) -> float:
        """How fast the guest dirtied memory during the last round: distinct pages only, so a lower bound."""
        last = self.last
        return last.remaining_pages * PAGE_SIZE / last.duration_s if last.duration_s > 0 else 0.0

    @property
    def expected_downtime_s(self) -> float:
        """What a pause now would cost: what remains at the measured rate, and the fixed part."""
        rate = self.wire_bytes_per_s
        return self.fixed_s + (self.last.remaining_pages * PAGE_SIZE / rate if rate else 0.0)


class Action(StrEnum):
    """What a policy can decide."""

    NEXT_ROUND = "next-round"
    STOP_AND_COPY = "stop-and-copy"
    ABORT = "abort"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do, and why in words for a person."""

    action: Action
    reason: str


class Policy(Protocol):
    """Decides after every round of pre-copy; the same progress always gives the same decision."""

    @property
    def name(self) -> str:
        """The policy's name in options and reports."""

    def decide(self, progress: Progress) -> Decision:
        """Decide what follows the round that just ended; ``progress.rounds`` is not empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class XenPolicy:
    """Xen's rule: stop at ``max_rounds`` rounds, under ``min_dirty_pages`` dirty, or over ``max_factor`` x memory sent.

    It always ends in a stop-and-copy: total time is bounded, downtime is not.
    """

    max_rounds: int = 5
    min_dirty_pages: int = 50
    max_factor: float = 3.0

    def __post_init__(self) -> None:
        if self.max_rounds < 1 or self.min_dirty_pages < 0 or self.max_factor <= 0:
            raise UsageError("the xen policy needs at least one round and a positive factor")

    @property
    def name(self) -> str:
        """``xen``."""
        return "xen"

    def decide(self, progress: Progress) -> Decision:
        """Apply the three limits in turn."""
        last = progress.last
        if last.remaining_pages < self.min_dirty_pages:
            why = f"{last.remaining_pages} pages are dirty, fewer than {self.min_dirty_pages}"
        elif len(progress.rounds) >= self.max_rounds:
            why = f"{len(progress.rounds)} rounds were made"
        elif progress.sent_pages > self.max_factor * progress.memory_pages:
            why = f"more than {self.max_factor:g} x the memory was sent"
        else:
            return Decision(action=Action.NEXT_ROUND, reason=f"{last.remaining_pages} pages are dirty")
        return Decision(action=Action.STOP_AND_COPY, reason=why)


@dataclass(frozen=True, slots=True, kw_only=True)
class DowntimePolicy:
    """Stop when what is left, at the measured rate, plus the measured fixed costs, fits ``limit_s``.

    After ``max_rounds`` rounds that never fitted it gives up and leaves the guest where it is: it does not break the
    promise that its name makes.
    """

    limit_s: float = 0.3
    max_rounds: int = 30

    def __post_init__(self) -> None:
        if not self.limit_s > 0 or self.max_rounds < 1:
            raise UsageError("the downtime policy needs a positive limit and at least one round")

    @property
    def name(self) -> str:
        """``downtime``."""
        return "downtime"

    def decide(self, progress: Progress) -> Decision:
        """Compare the expected downtime with the limit."""
        expected_ms, limit_ms = progress.expected_downtime_s * 1e3, self.limit_s * 1e3
        if progress.expected_downtime_s <= self.limit_s:
            why = f"an expected downtime of {expected_ms:.0f} ms fits the limit of {limit_ms:.0f} ms"
            return Decision(action=Action.STOP_AND_COPY, reason=why)
        if progress.fixed_s > self.limit_s and len(progress.rounds) >= _PATIENCE_ROUNDS:
            why = f"state and verification alone take {progress.fixed_s * 1e3:.0f} ms of the {limit_ms:.0f} ms allowed"
            return Decision(action=Action.ABORT, reason=why)
        if len(progress.rounds) >= self.max_rounds:
            wire = (progress.wire_bytes_per_s or 0.0) / 1e6
            why = (
                f"no convergence in {len(progress.rounds)} rounds: {expected_ms:.0f} ms expected, {limit_ms:.0f} ms "
                f"allowed; the guest dirties {progress.dirty_bytes_per_s / 1e6:.0f} MB/s, "
                f"the wire moves {wire:.0f} MB/s"
            )
            return Decision(action=Action.ABORT, reason=why)
        return Decision(action=Action.NEXT_ROUND, reason=f"expected downtime {expected_ms:.0f} ms")


def make_policy(
    name: str, *, downtime_limit_s: float | None = None, max_rounds: int | None = None
) -> XenPolicy | DowntimePolicy:
    """Return a policy by name, with the options that were given.

    Raises:
        UsageError: the name is unknown, or an option does not belong to it or has no sense.
    """
    if name == "xen":
        if downtime_limit_s is not None:
            raise UsageError("the xen policy has no downtime limit", hint="use the downtime policy")
        return XenPolicy() if max_rounds is None else XenPolicy(max_rounds=max_rounds)
    if name == "downtime":
        default = DowntimePolicy()
        return DowntimePolicy(
            limit_s=default.limit_s if downtime_limit_s is None else downtime_limit_s,
            max_rounds=default.max_rounds if max_rounds is None else max_rounds,
        )
    raise UsageError(f"unknown policy {name!r}", hint="known: downtime, xen")
