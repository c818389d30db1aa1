"""Reports of migrations that never happened."""

from dataclasses import replace

from pageferry.core.errors import GuestAt
from pageferry.core.events import MigrationReport, RoundOutcome
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.policy import Action, Decision, Progress, RoundStats
from pageferry.core.sent_pages import HeatMap, SentPages

MiB = 1 << 20
NOTHING_SENT = SentPages(
    pages=0,
    rewritten_pages=0,
    again_pages=0,
    hot=(),
    heat=HeatMap(first_gfns=(), last_gfns=(), pages=(), rounds_per_row=1, rows=()),
)
PARTS = {"pause": 0.001, "stop-and-copy": 0.004, "state": 0.001, "verify": 0.003, "handoff": 0.001}


def stats(index, sent, remaining, *, duration_s=1.0, final=False):
    return RoundStats(
        index=index,
        dirty_pages=sent,
        sent_pages=sent,
        sent_bytes=sent * PAGE_SIZE,
        duration_s=duration_s,
        remaining_pages=remaining,
        final=final,
    )


def report(*rounds, fixed_s=0.01, action=Action.STOP_AND_COPY, policy="downtime", **changes):
    """A report of rounds of (sent, remaining) pages that took a second each."""
    made = tuple(stats(index, *each) for index, each in enumerate(rounds))
    ends = []
    for index in range(len(made)):
        progress = Progress(memory_pages=65536, rounds=made[: index + 1], fixed_s=fixed_s)
        last = index == len(made) - 1
        ends.append(
            RoundOutcome(
                ended_s=index + 1.0,
                work=None,
                fixed_s=fixed_s,
                expected_downtime_s=progress.expected_downtime_s,
                throttle=0.0,
                decision=Decision(action=action if last else Action.NEXT_ROUND, reason="so"),
            )
        )
    plain = MigrationReport(
        status="completed",
        guest_at=GuestAt.DESTINATION,
        source_accel="soft",
        destination_accel="soft",
        tracker="hap",
        policy=policy,
        memory_bytes=256 * MiB,
        rounds=made,
        total_s=9.0,
        downtime_s=0.01,
        downtime_parts_s=PARTS,
        state_bytes=1000,
        devices=(),
        verified=True,
        verified_pages=16384,
        audited_pages=0,
        shared_memory=False,
        connections=1,
        compress="none",
        delta_cache_bytes=0,
        sent_bytes=sum(each.sent_bytes for each in made),
        bandwidth_bytes_per_s=None,
        fault_count=None,
        throttled_s=0.0,
        reason="it fits",
        round_ends=tuple(ends),
        sent=NOTHING_SENT,
        paused_at_s=8.0,
        guest_time=None,
        explanation=None,
    )
    return replace(plain, **changes)


def failed(*rounds, **changes):
    given = {"status": "failed", "guest_at": GuestAt.SOURCE, "downtime_s": None, "downtime_parts_s": None}
    return report(*rounds, **{"action": Action.ABORT, "reason": "no convergence", **given, **changes})
