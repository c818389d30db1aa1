"""AttemptNews: tells how one migration or save goes, in QMP's words for the clients and in ours for a person."""

import time

from pageferry.core.errors import GuestAt, MigrationError
from pageferry.core.events import (
    Event,
    MigrationReport,
    Phase,
    PhaseBegan,
    PostcopyPaused,
    PostcopyProgress,
    RoundEnded,
    RoundProgress,
    Warned,
)
from pageferry.engine.job import Job, JobStatus
from pageferry.vmm.announcer import Announcer
from pageferry.vmm.guest import Guest
from pageferry.vmm.incoming import RECOVER_HINT

_PROGRESS_INTERVAL_S = 0.05


class AttemptNews:
    """What is told of one attempt; made for it, and called on its thread.

    Args:
        guest: which runs, or does not.
        announcer: the way out.
    """

    def __init__(self, guest: Guest, announcer: Announcer) -> None:
        self._guest = guest
        self._announcer = announcer
        self._said_stop = False
        self._said_status = ""
        self._next_progress_s = 0.0

    def happened(self, job: Job, event: Event) -> None:
        """Tell of one of the engine's events, of ``job``."""
        self._announcer.postcopy(event)
        if isinstance(event, Warned):
            self._announcer.warn(event.text)
        if isinstance(event, PostcopyPaused):
            self._say_cut(job, event)
        if isinstance(event, PhaseBegan):
            self._phase_began(job, event.phase)
        if isinstance(event, RoundEnded):
            self._announcer.event("MIGRATION_PASS", {"pass": event.stats.index + 1})
            self._tell_held(job.status)
        if not isinstance(event, RoundProgress | PostcopyProgress):
            self._announcer.engine_event(event)
        elif time.monotonic() >= self._next_progress_s:
            self._next_progress_s = time.monotonic() + _PROGRESS_INTERVAL_S
            outlook = job.outlook()
            self._announcer.engine_event(event, {"eta_s": outlook.eta_s, "eta_reason": outlook.eta_reason})

    def succeeded(self, report: MigrationReport) -> None:
        """Tell that the guest is there, or in the file."""
        self._announcer.migration("completed")
        what = "moved" if report.file is None else f"been saved to {report.file}"
        down = "" if report.downtime_s is None else f", {report.downtime_s * 1e3:.1f} ms down"
        self._announcer.say(f"the guest has {what}: {report.total_s:.2f} s in total{down}")

    def failed(self, job: Job, error: MigrationError) -> None:
        """Tell that it did not come to that, and whether the guest runs on."""
        status = job.report.status if job.report is not None else "failed"
        self._announcer.migration(status)
        if self._said_stop and error.guest_at is GuestAt.SOURCE and self._guest.running:
            self._announcer.event("RESUME")
        self._announcer.say(f"migration {status}: {error}")

    def _say_cut(self, job: Job, event: PostcopyPaused) -> None:
        where = "the guest stands still there and needs pages that are here"
        if job.guest_at is GuestAt.UNKNOWN:
            where = "whether the guest runs there is not known; if it does, it needs pages that are here"
        self._announcer.say(f"{event.reason}; {where} ({RECOVER_HINT})")

    def _phase_began(self, job: Job, phase: Phase) -> None:
        if phase is Phase.PRECOPY:
            self._announcer.migration("active")
        if phase is Phase.PAUSE and self._guest.running:
            self._said_stop = True
            self._announcer.event("STOP")
        if phase is Phase.HANDOFF and self._said_stop and not job.frozen and self._guest.running:
            self._said_stop = False  # it runs on while the file that holds it as it was is finished
            self._announcer.event("RESUME")

    def _tell_held(self, status: str) -> None:
        if status != self._said_status and JobStatus.HELD in (status, self._said_status):
            self._announcer.migration(status)
        self._said_status = status
