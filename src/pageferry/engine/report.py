"""Builds the report of a migration or a save from what becomes known on the way."""

import logging
from dataclasses import replace

from pageferry.core.errors import GuestAt
from pageferry.core.events import DOWNTIME_PHASES, MigrationReport, Phase, RoundOutcome
from pageferry.core.explain import explain
from pageferry.engine.accounts import PageAccounts
from pageferry.engine.guest import TrackedGuest
from pageferry.engine.job import Job, JobStatus
from pageferry.engine.options import WireOptions
from pageferry.engine.progress import PhaseClock, Rounds
from pageferry.engine.stall_meter import StallMeter
from pageferry.engine.throttle import Throttle

_log = logging.getLogger(__name__)

#: A save has no handoff that the guest waits for.
_SAVE_DOWNTIME_PHASES = (Phase.PAUSE, Phase.STOP_AND_COPY, Phase.STATE, Phase.VERIFY)


class ReportBuilder:
    """Gathers what the report of one attempt tells.

    Args:
        guest: at its source.
        job: how it ended.
        wire: how pages were to travel.
        clock: its phases.
        rounds: its rounds.
        accounts: of its pages.
        stall: where the guest's time went.
        throttle: for how long the guest was throttled.
    """

    def __init__(
        self,
        guest: TrackedGuest,
        job: Job,
        wire: WireOptions,
        *,
        clock: PhaseClock,
        rounds: Rounds,
        accounts: PageAccounts,
        stall: StallMeter,
        throttle: Throttle,
    ) -> None:
        self.destination_accel: str | None = None
        self.shared_memory = False
        self.round_ends: list[RoundOutcome] = []
        self.stop_reason = ""
        """Why pre-copy ended."""
        self.verified_pages = 0
        self.audited_pages = 0
        self.warnings: list[str] = []
        self.running_at_s: float | None = None
        """When the guest ran again, on the clock of the phases."""
        self._guest = guest
        self._job = job
        self._wire = wire
        self._clock = clock
        self._rounds = rounds
        self._accounts = accounts
        self._stall = stall
        self._throttle = throttle

    def build(self, status: JobStatus, reason: str) -> MigrationReport:
        """Return the report of an attempt that ends now.

        Args:
            status: COMPLETED, FAILED or CANCELLED.
            reason: in words.
        """
        ended_s = self._clock.now_s()
        vm, wire, job, began_s = self._guest.vm, self._wire, self._job, self._clock.began_s
        moved = self.running_at_s is not None and (status is JobStatus.COMPLETED or job.guest_at is GuestAt.DESTINATION)
        running_at_s = self.running_at_s if moved else None
        phases = DOWNTIME_PHASES if job.file is None else _SAVE_DOWNTIME_PHASES
        missing = None if job.postcopy is None else job.postcopy.missing
        postcopy_stats = None
        if job.postcopy is not None and running_at_s is not None:
            postcopy_stats = job.postcopy.stats(running_at_s, ended_s)
        paused_at_s = began_s.get(Phase.PAUSE)
        report = MigrationReport(
            status=status,
            guest_at=job.guest_at,
            source_accel=vm.accel,
            destination_accel=self.destination_accel,
            tracker=vm.log_dirty.tracker,
            policy=job.policy.name,
            memory_bytes=vm.memory.size_bytes,
            rounds=self._rounds.ended,
            total_s=ended_s - began_s[Phase.CONNECT],
            sent_bytes=job.traffic().sent_bytes,
            connections=wire.connections,
            compress=str(wire.compress),
            delta_cache_bytes=wire.delta_cache_bytes,
            bandwidth_bytes_per_s=job.pacer.rate_bytes_per_s,
            downtime_s=None if running_at_s is None else running_at_s - began_s[Phase.PAUSE],
            downtime_parts_s=None if running_at_s is None else self._clock.parts_s(phases, running_at_s),
            state_bytes=self._guest.state_bytes,
            devices=self._guest.devices,
            verified=self.verified_pages > 0,
            verified_pages=self.verified_pages + (0 if missing is None else missing.sent_pages),
            audited_pages=self.audited_pages,
            shared_memory=self.shared_memory,
            fault_count=self._guest.fault_count,
            throttled_s=self._throttle.throttled_s,
            reason=reason,
            round_ends=tuple(self.round_ends),
            sent=self._accounts.send_counts.result(),
            paused_at_s=None if paused_at_s is None else paused_at_s - began_s[Phase.CONNECT],
            guest_time=self._stall.result(),
            explanation=None,
            file=None if job.file is None else str(job.file),
            warnings=tuple(self.warnings),
            postcopy=postcopy_stats,
        )
        try:
            return replace(report, explanation=explain(report))
        except Exception:  # words for a person; the outcome does not depend on them
            _log.exception("the report could not be explained")
            return report
