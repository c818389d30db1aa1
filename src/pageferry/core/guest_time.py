"""Where the guest's time went besides downtime: the time that pre-copy cost it."""

from dataclasses import dataclass

#: Fewer operations than this in the time before a migration are too few to tell a rate by.
_MIN_OPERATIONS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkSample:
    """The guest had done ``work`` operations, by its own count, at ``at_s`` of some monotonic clock."""

    at_s: float
    work: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestTime:
    """The cost of pre-copy to a guest that ran on.

    ``precopy_s``: from the end of the handshake to the pause, or to the failure.
    ``rehearsal_s``: how long the guest was frozen to measure what saving its state costs.
    ``enable_s``, ``clean_s``: how long ENABLE and all CLEANs took; the guest is stopped, or its first writes wait, for
    a part of them, so each is at least the stall that it caused.
    ``work_before_per_s``, ``work_during_per_s``, ``work_after_per_s``: operations per second by the guest's own count
    (docs/reference/guest-abi.md): before the migration, during pre-copy, and at the destination. None: the guest does
    not count, was paused, or was not watched.
    ``lost_s``: how much of ``precopy_s`` the guest lost by that count: whatever slowed it is in it, also write faults
    and the processors that it shared with the copying. Below 0 when it happened to do more. None as the rates.
    """

    precopy_s: float
    rehearsal_s: float
    enable_s: float
    clean_s: float
    work_before_per_s: float | None
    work_during_per_s: float | None
    work_after_per_s: float | None
    lost_s: float | None


def work_per_s(first: WorkSample | None, last: WorkSample | None) -> float | None:
    """Return the rate between two samples; None when one is missing or no time lies between them."""
    if first is None or last is None or last.at_s <= first.at_s:
        return None
    return (last.work - first.work) / (last.at_s - first.at_s)


def rate_before(first: WorkSample | None, last: WorkSample | None) -> float | None:
    """Return the rate that a migration's is compared with; None also when the guest did too little to tell."""
    if first is None or last is None or last.work - first.work < _MIN_OPERATIONS:
        return None
    return work_per_s(first, last)


def lost_s(precopy_s: float, before_per_s: float | None, during_per_s: float | None) -> float | None:
    """Return the part of ``precopy_s`` in which a guest of the rate before would have done what it did not do."""
    if before_per_s is None or during_per_s is None or before_per_s <= 0:
        return None
    return precopy_s * (1.0 - during_per_s / before_per_s)
