"""The events of a migration, frozen records, and the report that sums them up.

One vocabulary for progress bars, the control socket, plots and traces.
"""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from pageferry.core.errors import GuestAt
from pageferry.core.guest_time import GuestTime
from pageferry.core.policy import Decision, RoundStats
from pageferry.core.sent_pages import SentPages


class Phase(StrEnum):
    """The phases of a migration, in order; the source goes through all, the destination through its own.

    POSTCOPY only where pages are missing at the handoff.
    """

    CONNECT = "connect"
    HELLO = "hello"
    PRECOPY = "pre-copy"
    PAUSE = "pause"
    STOP_AND_COPY = "stop-and-copy"
    STATE = "state"
    VERIFY = "verify"
    HANDOFF = "handoff"
    POSTCOPY = "post-copy"


#: The phases in which the guest stands still: the parts of the downtime.
DOWNTIME_PHASES = (Phase.PAUSE, Phase.STOP_AND_COPY, Phase.STATE, Phase.VERIFY, Phase.HANDOFF)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseBegan:
    """A phase began."""

    phase: Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEnded:
    """A phase ended, well or not."""

    phase: Phase
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """Something that may hurt the guest later, in one line for a person; the migration goes on."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundBegan:
    """A round of pre-copy, or the stop-and-copy, begins; ``dirty_pages`` are dirty now."""

    index: int
    dirty_pages: int
    final: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundProgress:
    """So much of the round has been sent."""

    index: int
    sent_pages: int
    sent_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEnded:
    """A round ended; ``decision`` is what the policy made of it (None for the final round)."""

    stats: RoundStats
    decision: Decision | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOutcome:
    """Where things stood when a round of pre-copy ended.

    ``ended_s``: since the migration began. ``work``: operations that the guest had done, by its own count; None unless
    it ran and counts. ``fixed_s``, ``expected_downtime_s``, ``throttle``: as the policy saw them
    (:class:`pageferry.core.policy.Progress`). ``decision``: what it made of it.
    """

    ended_s: float
    work: int | None
    fixed_s: float
    expected_downtime_s: float
    throttle: float
    decision: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The meaning of a report, in sentences for a person.

    ``outcome``: why the migration ended as it did. ``rates``: what the wire moved against what the guest wrote.
    ``guest_time``: where the guest's time went. ``hot``: what was sent again and again. ``advice``: what would have
    helped.
    """

    outcome: str
    rates: tuple[str, ...]
    guest_time: tuple[str, ...]
    hot: tuple[str, ...]
    advice: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PostcopyProgress:
    """Some pages have gone after the switch.

    ``missing_pages``: how many had not been sent then, of which ``sent_pages`` have gone by now; ``urgent_pages`` of
    these because a thread waited for them.
    """

    missing_pages: int
    sent_pages: int
    urgent_pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PostcopyPaused:
    """The connection was cut after the switch: the guest stands still at the destination, its pages are kept here."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PostcopyRecovered:
    """There is a connection again, and the guest runs on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PostcopyStats:
    """Post-copy in numbers: from the switch on.

    ``missing_pages``: pages that had not been sent when the guest switched. Of these, ``sent_pages`` have gone (all,
    unless the guest ended or was given up), ``zero_pages`` of them by name only, and ``urgent_pages`` because a thread
    waited for them. ``duration_s``: from when the guest ran at the destination until the end.
    ``cuts``: how often the connection was lost, for ``cut_s`` in all: there the guest stood still.
    ``waits``: how often a vCPU, or a device for it, waited for a page; ``waited_s``: guest time lost so, all vCPUs
    together, a wait during a cut to its end. ``median_wait_s``, ``p99_wait_s``, ``longest_wait_s``: half of them, 99 in
    100, and all of them were no longer than that. None: the destination never told.
    """

    missing_pages: int
    sent_pages: int
    zero_pages: int
    urgent_pages: int
    duration_s: float
    cuts: int
    cut_s: float
    waits: int | None
    waited_s: float | None
    median_wait_s: float | None
    p99_wait_s: float | None
    longest_wait_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCost:
    """The downtime that one device caused at the source: the size of its state and how long saving it took."""

    name: str
    size_bytes: int
    save_ns: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationReport:
    """The report of a migration, whether it succeeded or not.

    ``downtime_s``: from the source's pause to the acknowledgement that the guest runs at the destination, on the
    source's monotonic clock; ``downtime_parts_s`` sums to it. Both None unless the guest moved.
    ``verified``: the destination proved its memory equal; ``verified_pages``: how many pages that were, of which
    ``audited_pages`` were digested while the guest ran and not again at the pause.
    ``shared_memory``: the destination took over the very memory of the source; no page was copied, a few looked at.
    ``state_bytes``: all state but memory, as sent; ``devices``: each device's part of it. None and empty when the
    attempt ended before. (Loading at the destination is in the part *verify*, which waits for it.)
    ``fault_count``: write faults that tracking cost the guest; None if the tracker cannot know.
    ``sent_bytes``: over the wire from the first byte to the last; those of the
    rounds are page data, its records, and the digests sent between them.
    ``connections``: how many it went over, or was to. ``compress``: how page data was packed,
    or was to. ``bandwidth_bytes_per_s``: the cap on that, None without one.
    ``throttled_s``: for how long the policy had the guest throttled during pre-copy.
    ``round_ends``: one for each of ``rounds`` that ended with a decision. ``sent``: how often which pages were sent.
    ``paused_at_s``: when the pause began, since the migration began; None if it never did.
    ``guest_time``: where the guest's time went besides the downtime; None if there was no pre-copy.
    ``postcopy``: what came after the switch; None where nothing was missing then.
    ``explanation``: the same in words; None until they were found (:mod:`pageferry.core.explain`).
    ``warnings``: what was warned of, in lines for a person.
    ``file``: where to, if it was a save and not a migration; the downtime of one that let the guest run on ends there.
    """

    status: str
    guest_at: GuestAt
    source_accel: str
    destination_accel: str | None
    tracker: str
    policy: str
    memory_bytes: int
    rounds: tuple[RoundStats, ...]
    total_s: float
    sent_bytes: int
    connections: int
    compress: str
    delta_cache_bytes: int
    bandwidth_bytes_per_s: int | None
    downtime_s: float | None
    downtime_parts_s: dict[str, float] | None
    state_bytes: int | None
    devices: tuple[DeviceCost, ...]
    verified: bool
    verified_pages: int
    audited_pages: int
    shared_memory: bool
    fault_count: int | None
    throttled_s: float
    reason: str
    round_ends: tuple[RoundOutcome, ...]
    sent: SentPages
    paused_at_s: float | None
    guest_time: GuestTime | None
    explanation: Explanation | None
    file: str | None = None
    postcopy: PostcopyStats | None = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationEnded:
    """The migration is over; nothing follows."""

    report: MigrationReport


Event = (
    PhaseBegan
    | PhaseEnded
    | Warned
    | RoundBegan
    | RoundProgress
    | RoundEnded
    | PostcopyProgress
    | PostcopyPaused
    | PostcopyRecovered
    | MigrationEnded
)
