"""Attempt: the parts that a migration and a save have in common, and what holds when either ends.

Postcondition on success: the guest runs (or is paused, if it was) at the destination and stays frozen here; a save
leaves it running here. Postcondition on failure before the commit: the guest is here, running or paused as it was,
log-dirty is off, and another attempt starts afresh (law 5). After a commit without an answer: frozen here, and
``guest_at`` is UNKNOWN.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from pageferry.core.errors import GuestAt, MigrationError
from pageferry.core.events import Event, MigrationEnded, Phase, Warned
from pageferry.core.guest_time import WorkSample
from pageferry.core.policy import Policy, deadline_s
from pageferry.core.units import format_duration
from pageferry.core.vm import Vm
from pageferry.engine.accounts import PageAccounts
from pageferry.engine.guest import TrackedGuest
from pageferry.engine.host import THIS_HOST, Host
from pageferry.engine.job import Job, JobStatus
from pageferry.engine.options import WireOptions
from pageferry.engine.pause import PauseWatch
from pageferry.engine.progress import PhaseClock, Rounds, guarded
from pageferry.engine.report import ReportBuilder
from pageferry.engine.stall_meter import StallMeter
from pageferry.engine.throttle import Throttle


class Attempt:
    """One attempt to copy a running guest, wherever to.

    Args:
        vm: the guest; running or paused.
        policy: decides after each round.
        wire: how pages may travel.
        pause_limit_s: how long a pause may take, see :func:`~pageferry.engine.pause.pause_limit_s`.
        hold: do not pause the guest before it is told to go on.
        file: where to, for a save.
        on_event: sees every event, on the thread that runs the attempt.
        work_before: what the guest had done some time ago, on the host's clock, to compare with; it was not paused
            since. None: the rate is taken from the handshake.
        host: under this end.
    """

    def __init__(
        self,
        vm: Vm,
        policy: Policy,
        *,
        wire: WireOptions,
        pause_limit_s: float | None = None,
        hold: bool = False,
        file: Path | None = None,
        on_event: Callable[[Event], None],
        work_before: WorkSample | None,
        host: Host = THIS_HOST,
    ) -> None:
        self.on_event = guarded(on_event)
        self.clock = PhaseClock(self.on_event, host.now_s)
        self.guest = TrackedGuest(vm)
        self.rounds = Rounds(vm.memory.pages, self.on_event, self.clock.now_s)
        self.accounts = PageAccounts(vm.memory.gfn_limit, host)
        self.throttle = Throttle(vm, host)
        self.stall = StallMeter(vm, self.clock.now_s, work_before)
        self.state_s = 0.0
        """The time that saving the state here and loading it there will take, as rehearsed."""
        self.job = Job(
            self.guest,
            policy,
            self.rounds,
            self.clock,
            bandwidth_bytes_per_s=wire.bandwidth_bytes_per_s,
            pause_limit_s=pause_limit_s,
            hold=hold,
            file=file,
            host=host,
        )
        self.pause = PauseWatch(self.job.give_pause_up, host)
        self.report = ReportBuilder(
            self.guest,
            self.job,
            wire,
            clock=self.clock,
            rounds=self.rounds,
            accounts=self.accounts,
            stall=self.stall,
            throttle=self.throttle,
        )

    @contextlib.contextmanager
    def under_way(self, as_error: Callable[[Exception, GuestAt], MigrationError]) -> Iterator[None]:
        """Be under way for the length of a ``with`` block, which goes through the phases; again only if it is UNKNOWN.

        Args:
            as_error: returns what to raise from an error that is not a MigrationError.

        Raises:
            MigrationError: the guest did not move (``guest_at`` SOURCE), or that is not known (UNKNOWN).
        """
        try:
            yield
        except Exception as error:
            self._fall_back()
            failure = self._failure(error, as_error)
            self.job.error = failure
            self._end(JobStatus.CANCELLED if self.job.handoff.cancelled else JobStatus.FAILED, failure.reason)
            if failure is error:
                raise
            raise failure from error
        except BaseException:
            self._fall_back()
            self._end(JobStatus.FAILED, "interrupted")
            raise
        self.pause.end()
        self._warn_of_deadline()
        self._end(JobStatus.COMPLETED, self.report.stop_reason)

    def precopy(self) -> contextlib.AbstractContextManager[None]:
        """Be in pre-copy for the length of a ``with`` block: from here on it is known what is to be sent."""
        self.job.status = JobStatus.ACTIVE
        return self.clock.phase(Phase.PRECOPY)

    def warn(self, text: str) -> None:
        """Tell of something that may hurt the guest later, in one line; the report has it too."""
        self.report.warnings.append(text)
        self.on_event(Warned(text=text))

    def stop_guest(self) -> None:
        """Freeze the guest: pre-copy is over, and the pause's budget runs.

        Raises:
            PolicyAbort: it has ended.
        """
        self.pause.begin(self.job.pause_limit_s)
        self.guest.freeze()
        self.stall.end()
        self.throttle.close()  # only now: a guest that is let go for a moment writes
        self.expect_alive()

    def expect_alive(self) -> None:
        """Check that the guest has not ended.

        Raises:
            PolicyAbort: it has.
        """
        how = self.guest.end()
        if how is not None:
            raise self.job.abort(f"the guest ended meanwhile ({how})")

    def _failure(self, error: Exception, as_error: Callable[[Exception, GuestAt], MigrationError]) -> MigrationError:
        if isinstance(error, MigrationError):
            return error
        guest_at = self.job.guest_at
        if self.job.handoff.forbidden:
            return self.job.stays()
        return as_error(error, guest_at)

    def _fall_back(self) -> None:
        """After a failure: everything as it was, unless the guest is committed. Whatever else fails, it runs on."""
        self.pause.end()
        self.stall.end()
        self.job.close()
        self.throttle.close()
        if self.job.handing_over:
            self.job.handoff.lost()
        if not self.job.handoff.committed:
            self.guest.restore()
            if self.guest.stuck is not None:
                self.warn(f"the guest stands still here: {self.guest.stuck}; when that is over: pageferry resume")

    def _warn_of_deadline(self) -> None:
        limit_s = deadline_s(self.job.policy)
        if limit_s is not None and (late_s := self.job.elapsed_s - limit_s) > 0:
            self.warn(
                f"the deadline of {limit_s:g} s was missed by {format_duration(late_s)}: "
                "more bandwidth, or --policy postcopy, is what helps"
            )

    def _end(self, status: JobStatus, reason: str) -> None:
        if self.job.postcopy is not None:
            self.accounts.send_counts.add(self.rounds.index, self.job.postcopy.missing.gone.gfns())
        report = self.report.build(status, reason)
        self.job.ended(status, report)
        self.on_event(MigrationEnded(report=report))
