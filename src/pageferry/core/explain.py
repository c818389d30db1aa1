"""Turns a report into sentences: why it ended as it did, where time went, what was hot, what would have helped.

Pure functions of the report; each number in a sentence is one of the report's, or follows from some of them by what
the function says.
"""

import math

from pageferry.core.command_hints import RECOVER, TAKE_BACK
from pageferry.core.errors import GuestAt
from pageferry.core.events import Explanation, MigrationReport, Phase, PostcopyStats, RoundOutcome
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.guest_time import GuestTime
from pageferry.core.policies import ConvergePolicy, DowntimePolicy
from pageferry.core.policy import Action, Progress, RoundStats
from pageferry.core.sent_pages import HotRange, SentPages
from pageferry.core.units import format_count, format_duration, format_size

#: So many hot ranges are told.
_TOLD_RANGES = 3
#: Ranges with less than this share of what was sent again are not worth a line.
_WORTH_SHARE = 0.05
#: A limit to be proposed is rounded up to whole steps of this: limits are not set by the microsecond.
_LIMIT_STEP_MS = 10
#: A pause that would have cost less than this share of the one that was made is worth telling.
_CHEAPER = 0.8
_LIMIT_POLICIES = (DowntimePolicy().name, ConvergePolicy().name)


def explain(report: MigrationReport) -> Explanation:
    """Return what a report means, in sentences."""
    return Explanation(
        outcome=_outcome(report),
        rates=_rates(report),
        guest_time=() if report.guest_time is None else _guest_time(report, report.guest_time),
        hot=_hot(report.sent),
        advice=_advice(report),
    )


_ASK = f"To find out: {RECOVER}. If the guest surely runs nowhere: {TAKE_BACK}"


def _precopy(report: MigrationReport) -> tuple[RoundStats, ...]:
    return tuple(stats for stats in report.rounds if not stats.final)


def _outcome(report: MigrationReport) -> str:
    rounds = len(_precopy(report))
    after = f"after {rounds} round{'' if rounds == 1 else 's'} of pre-copy"
    if report.guest_at is GuestAt.UNKNOWN:
        return f"Whether the guest moved is not known: {report.reason}."
    if report.status == "cancelled":
        return f"It was cancelled {after}; the guest is at the source."
    if report.status != "completed":
        what = "move" if report.file is None else "save"
        return f"It did not {what} the guest, {after}: {report.reason}."
    if report.postcopy is not None:
        return f"It switched the guest {after}: {report.reason}.{_after_switch(report.postcopy)}"
    return f"It stopped the guest {after}: {report.reason}.{_downtime(report)}"


def _after_switch(postcopy: PostcopyStats) -> str:
    """Return what came after the switch, and how long the guest waited for it."""
    words = f" {postcopy.sent_pages:,} pages came in the {format_duration(postcopy.duration_s)} after that"
    if postcopy.waits and postcopy.waited_s is not None:
        times = "once" if postcopy.waits == 1 else f"{postcopy.waits:,} times"
        words += f"; it waited {times} for some of them, {format_duration(postcopy.waited_s)} in all"
    if postcopy.waits and postcopy.median_wait_s is not None and postcopy.longest_wait_s is not None:
        median, longest = format_duration(postcopy.median_wait_s), format_duration(postcopy.longest_wait_s)
        words += f" (half of them no longer than {median}, none than {longest})"
    if postcopy.cuts:
        times = "once" if postcopy.cuts == 1 else f"{postcopy.cuts} times"
        words += f". The connection was cut {times}, and it stood still for {format_duration(postcopy.cut_s)}"
    return f"{words}."


def _downtime(report: MigrationReport) -> str:
    """Return what the pause cost, against what was expected, and its longest part."""
    if report.downtime_s is None or not report.downtime_parts_s or not report.round_ends:
        return ""
    expected_s = report.round_ends[-1].expected_downtime_s
    part, part_s = max(report.downtime_parts_s.items(), key=lambda item: item[1])
    return (
        f" The pause took {format_duration(report.downtime_s)} where {format_duration(expected_s)} were expected; "
        f"{part_s / report.downtime_s:.0%} of it was {part}."
    )


def _rates(report: MigrationReport) -> tuple[str, ...]:
    """Return the wire's rate over all rounds, and the guest's: pages dirty at their ends over their time."""
    rounds = _precopy(report)
    duration_s = sum(stats.duration_s for stats in rounds)
    sent_bytes = sum(stats.sent_bytes for stats in rounds)
    if not duration_s or not sent_bytes:
        return ()
    dirtied = sum(stats.remaining_pages for stats in rounds) * PAGE_SIZE / duration_s
    cap = report.bandwidth_bytes_per_s
    rate = sent_bytes / duration_s
    wire = f"{format_size(rate)}/s"
    wire += "" if cap is None else f" ({rate / cap:.0%} of the {format_size(cap)}/s that --bandwidth allowed)"
    line = f"The wire moved {wire}, the guest dirtied {format_size(dirtied)}/s or more"
    if report.sent.rewritten_pages:
        line += f", in {format_size(report.sent.rewritten_pages * PAGE_SIZE)} that were sent more than once"
    return (f"{line}.",)


def _guest_time(report: MigrationReport, time: GuestTime) -> tuple[str, ...]:
    lines = []
    if time.lost_s is not None and time.work_before_per_s is not None and time.work_during_per_s is not None:
        before, during = time.work_before_per_s, time.work_during_per_s
        change = during / before - 1.0
        lost = f": {format_duration(time.lost_s)} of its time lost" if time.lost_s > 0 else ""
        lines.append(
            f"In {format_duration(time.precopy_s)} of pre-copy the guest did {abs(change):.0%} "
            f"{'less' if change < 0 else 'more'} work than before it ({before:,.0f} operations a second before, "
            f"{during:,.0f} during){lost}."
        )
    parts = [
        f"throttled by the policy for {format_duration(report.throttled_s)}" if report.throttled_s else "",
        f"frozen for {format_duration(time.rehearsal_s)} to rehearse saving its state" if time.rehearsal_s else "",
        f"ENABLE {format_duration(time.enable_s)}" if time.enable_s else "",
        f"CLEAN {format_duration(time.clean_s)}" if time.clean_s else "",
    ]
    if any(parts):
        lines.append(f"Known stalls: {', '.join(filter(None, parts))}.")
    lines += _faults(report, time)
    return tuple(lines)


def _faults(report: MigrationReport, time: GuestTime) -> list[str]:
    """Return the write faults: as counted, or one for each dirty page that a CLEAN reported (law 8); and their cost.

    The cost is an upper bound: what the guest lost while it was not throttled, divided among them.
    """
    faults = report.fault_count
    if faults is None:
        faults = sum(stats.dirty_pages for stats in report.rounds[1:])
        line = (
            "Its first write to 1 protected page took a fault, or was marked by a device"
            if faults == 1
            else f"Its first writes to {faults:,} protected pages took a fault each, or were marked by a device"
        )
    else:
        line = f"It took {format_count(faults, 'write fault')} to find its dirty pages"
    if not faults:
        return []
    rest_s = 0.0 if time.lost_s is None else time.lost_s - report.throttled_s - time.rehearsal_s
    return [f"{line}: at most {format_duration(rest_s / faults)} of its time each." if rest_s > 0 else f"{line}."]


def _hot(sent: SentPages) -> tuple[str, ...]:
    worth = [each for each in sent.hot[:_TOLD_RANGES] if each.again_pages >= _WORTH_SHARE * sent.again_pages]
    return tuple(_range(each, sent) for each in worth)


def _range(hot: HotRange, sent: SentPages) -> str:
    last = f" to {hot.first_gfn + hot.pages - 1:#x}" if hot.pages > 1 else ""
    were = "was" if sent.again_pages == 1 else "were"
    return (
        f"gfn {hot.first_gfn:#x}{last} ({format_size(hot.pages * PAGE_SIZE)}): "
        f"{hot.again_pages / sent.again_pages:.0%} of the {format_count(sent.again_pages, 'page')} "
        f"that {were} sent again."
    )


def _advice(report: MigrationReport) -> tuple[str, ...]:
    if report.guest_at is GuestAt.UNKNOWN:
        return (_ASK,)
    if not report.round_ends:
        return ()
    last = report.round_ends[-1]
    if last.decision.action is Action.ABORT and report.policy in _LIMIT_POLICIES:
        return (*_limit(report), *_throttle(report, last))
    if last.decision.action is Action.STOP_AND_COPY:
        return _earlier(report) or _verification(report)
    return ()


def _limit(report: MigrationReport) -> tuple[str, ...]:
    """Return the least limit that some round would have met, and the first round that would have met it."""
    expected_ms = [end.expected_downtime_s * 1e3 for end in report.round_ends]
    limit_ms = math.ceil(min(expected_ms) / _LIMIT_STEP_MS) * _LIMIT_STEP_MS
    index = next(index for index, each in enumerate(expected_ms) if each <= limit_ms)
    fixed_ms = report.round_ends[index].fixed_s * 1e3
    return (
        f"A downtime limit of {limit_ms} ms would have been met after round {index}: {expected_ms[index]:.0f} ms "
        f"were expected then, {fixed_ms:.0f} ms of them for state and verification.",
    )


def _throttle(report: MigrationReport, last: RoundOutcome) -> tuple[str, ...]:
    """Return by how much ``converge`` would have throttled the guest after the last round.

    Nothing if it decided this, or if most of the pause would not have been pages: throttling does not help then.
    """
    converge = ConvergePolicy()
    if report.policy == converge.name or last.fixed_s > last.expected_downtime_s / 2:
        return ()
    throttle = converge.throttle_for(
        Progress(
            memory_pages=report.memory_bytes // PAGE_SIZE,
            rounds=_precopy(report),
            fixed_s=last.fixed_s,
            throttle=last.throttle,
        )
    )
    if not throttle:
        return ()
    return (
        f"--policy {converge.name} would have throttled the guest for {throttle:.0%} of its time after that, "
        "so that each round leaves half.",
    )


def _earlier(report: MigrationReport) -> tuple[str, ...]:
    """Return the round after which a pause would have cost clearly less than after the last one."""
    expected_s = [end.expected_downtime_s for end in report.round_ends]
    best_s = min(expected_s)
    if best_s > _CHEAPER * expected_s[-1]:
        return ()
    return (
        f"A pause after round {expected_s.index(best_s)} would have cost less: {format_duration(best_s)} were expected "
        f"then, {format_duration(expected_s[-1])} at the end.",
    )


def _verification(report: MigrationReport) -> tuple[str, ...]:
    """Return what a smaller downtime would need when verification is most of it."""
    if not report.downtime_s or not report.downtime_parts_s:
        return ()
    verify_s = report.downtime_parts_s[str(Phase.VERIFY)]
    if verify_s <= report.downtime_s / 2:
        return ()
    proven = format_size((report.verified_pages - report.audited_pages) * PAGE_SIZE)
    line = f"Another round would not have made the pause much shorter: to prove {proven} equal was most of it"
    audits = report.audited_pages > 0 or report.file is not None  # a save has no --verify
    return (f"{line}{'' if audits else '; --verify audit proves most while the guest runs'}.",)
