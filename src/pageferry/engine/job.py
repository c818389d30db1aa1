"""Job: what others may ask of a migration or a save while it goes on: cancel, hold, limits, status, recover."""

import math
import threading
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from pageferry.core.command_hints import RECOVER
from pageferry.core.errors import GuestAt, MigrationError, PolicyAbort, RefusedError
from pageferry.core.events import MigrationReport, Phase
from pageferry.core.policy import Policy, downtime_limit_s
from pageferry.core.policy_names import with_limits
from pageferry.core.silence import SILENT_S
from pageferry.engine.guest import TrackedGuest
from pageferry.engine.handoff.custody import Handoff, SourceCustody
from pageferry.engine.host import THIS_HOST, Host
from pageferry.engine.options import WireOptions
from pageferry.engine.pages.send import Outlet
from pageferry.engine.pause import pause_limit_s, waits_for
from pageferry.engine.postcopy.server import Postcopy
from pageferry.engine.progress import Outlook, PhaseClock, Rounds, Traffic
from pageferry.engine.wire.channel import Channel, Endpoint
from pageferry.engine.wire.pacer import Pacer


class JobStatus(StrEnum):
    """How far a job is, in QEMU's words. HELD: it is ready, and waits to be told to go on."""

    SETUP = "setup"
    ACTIVE = "active"
    HELD = "pre-switchover"
    POSTCOPY_ACTIVE = "postcopy-active"
    POSTCOPY_PAUSED = "postcopy-paused"
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Job:
    """One migration or save, as others see it and act on it; from any thread.

    Args:
        guest: at its source.
        policy: decides after each round; its limits may change.
        rounds: how far it is.
        clock: on which it is timed.
        bandwidth_bytes_per_s: a cap on what is sent; None: none.
        pause_limit_s: how long a pause may take, see :func:`~pageferry.engine.pause.pause_limit_s`.
        hold: do not pause the guest before :meth:`go_on`.
        file: where to, for a save.
        host: on which others wait for it.
    """

    def __init__(
        self,
        guest: TrackedGuest,
        policy: Policy,
        rounds: Rounds,
        clock: PhaseClock,
        *,
        bandwidth_bytes_per_s: int | None,
        pause_limit_s: float | None = None,
        hold: bool = False,
        file: Path | None = None,
        host: Host = THIS_HOST,
    ) -> None:
        self.policy = policy
        self.pacer = Pacer(bandwidth_bytes_per_s, host.now_s)
        self.handoff = Handoff()
        self.file = file
        self.status = JobStatus.SETUP
        self.postcopy: Postcopy | None = None
        """Made at the pause when the guest is to switch before all its pages have gone."""
        self.report: MigrationReport | None = None
        """The report, once it has ended."""
        self.error: MigrationError | None = None
        """Why it failed, if it did."""
        self._pause_limit_s = pause_limit_s
        self._given_up_in = Phase.PAUSE
        self._guest = guest
        self._rounds = rounds
        self._clock = clock
        self._channels: list[Outlet] = []
        self._go_on = host.event()
        if not hold:
            self._go_on.set()
        self._ended = host.event()
        self._limits_lock = threading.Lock()  # between two who change limits at once

    # -- status ----------------------------------------------------------------------------------------------------

    @property
    def guest_at(self) -> GuestAt:
        """Where the guest is."""
        return self.handoff.guest_at

    @property
    def open_for_s(self) -> float:
        """How long the destination may still accept a commit that was not answered; 0: it has, or never will."""
        return self.handoff.open_for_s(self._clock.now_s())

    @property
    def frozen(self) -> bool:
        """Whether the guest stands still here for our sake."""
        return self._guest.frozen

    @property
    def handing_over(self) -> bool:
        """Whether the guest was committed and stands still here, so that only the answer says whose it is."""
        return self.handoff.custody is SourceCustody.COMMITTED

    @property
    def keeps_pages(self) -> bool:
        """Whether the guest may run at the destination and need pages that are here only."""
        return self.postcopy is not None and self.handoff.committed and self.report is None

    @property
    def postcopy_paused(self) -> str | None:
        """Why pages that the guest needs at the destination are here without a connection, or None."""
        return None if self.postcopy is None else self.postcopy.paused

    @property
    def elapsed_s(self) -> float:
        """How long it has taken so far, or took."""
        if self.report is not None:
            return self.report.total_s
        began_s = self._clock.began_s.get(Phase.CONNECT)
        return 0.0 if began_s is None else self._clock.now_s() - began_s

    @property
    def downtime_limit_s(self) -> float | None:
        """The pause that the policy allows now; None where it has no limit."""
        return downtime_limit_s(self.policy)

    @property
    def pause_limit_s(self) -> float | None:
        """How long a pause that begins now may take before it is given up; None: as long as it does."""
        return pause_limit_s(self._pause_limit_s, self.downtime_limit_s)

    @property
    def silent_s(self) -> float:
        """For how long the other end has neither taken nor said anything that is waited for."""
        return max((each.silent_s for each in tuple(self._channels) if isinstance(each, Channel)), default=0.0)

    def traffic(self) -> Traffic:
        """Return how far it is."""
        remaining_pages = self._rounds.remaining_pages if self.postcopy is None else self.postcopy.missing.left_pages
        return Traffic(
            memory_bytes=self._guest.vm.memory.size_bytes,
            rounds=self._rounds.index,
            counts=self._rounds.counts,
            remaining_pages=remaining_pages,
            sent_bytes=sum(channel.sent_bytes for channel in tuple(self._channels)),
        )

    def outlook(self) -> Outlook:
        """Return how fast it goes and when it will be over; not while the other end is silent."""
        outlook, silent_s = self._outlook(), self.silent_s
        if silent_s < SILENT_S:
            return outlook
        return replace(outlook, eta_s=None, eta_reason=f"the other end has been silent for {silent_s:.0f} s")

    def _outlook(self) -> Outlook:
        if self.postcopy is not None and self.handoff.committed:
            return self.postcopy.outlook(self._rounds.wire_bytes_per_s())
        return self._rounds.outlook(limit_s=self.downtime_limit_s, held=self.status is JobStatus.HELD)

    # -- what may be asked -----------------------------------------------------------------------------------------

    def change_limits(self, given: dict[str, float | int], bandwidth: WireOptions | None = None) -> None:
        """Change limits while it runs; all of them or none.

        Args:
            given: limits of the policy, by the names of :func:`pageferry.core.policy_names.make_policy`.
            bandwidth: with the new cap; None leaves it as it is.

        Raises:
            UsageError: the policy has no such limit, or a value makes no sense.
        """
        with self._limits_lock:
            self.policy = with_limits(self.policy, given)
            if bandwidth is not None:
                self.pacer.set_rate(bandwidth.bandwidth_bytes_per_s)

    def go_on(self) -> None:
        """Let a migration that was told to hold pause the guest when all is ready."""
        self._go_on.set()

    def cancel(self) -> bool:
        """Ask for an end; the guest stays here.

        Returns:
            False when it is too late: it was committed.
        """
        if not self.handoff.cancel():
            return False
        self._go_on.set()
        self.cut()
        return True

    def recover(self, endpoint: Endpoint) -> bool:
        """Go on at ``endpoint`` with a migration that was cut after the switch.

        Returns:
            False when it does not wait for that.
        """
        return self.postcopy is not None and self.postcopy.recovery.ask(endpoint)

    def abandon(self) -> None:
        """Give up whatever is under way: a guest that has switched without all its pages is lost.

        An answer to the commit is still waited for.
        """
        if self.cancel():
            return
        if self.postcopy is not None:
            self.postcopy.recovery.abandon()
        if self.guest_at is GuestAt.DESTINATION:
            self.cut()

    def take_back(self) -> None:
        """Declare that the guest is here: of a migration that is UNKNOWN, or of a guest that was saved and stopped.

        The caller knows that it runs nowhere else and never will.

        Raises:
            RefusedError: there is no such guest, the destination may still start it or is being asked, or another
                process has the guest's disk.
            VmError: what stands behind one of its devices cannot be taken.
        """
        if left_s := self.open_for_s:
            what = f"the destination may start the guest for another {math.ceil(left_s)} s"
            raise RefusedError(what, hint=f"wait; or ask it: {RECOVER}")
        if self.guest_at is GuestAt.UNKNOWN and self.postcopy is not None and self.postcopy.recovery.end():
            self._ended.wait()
        custody = self.handoff.custody
        if self.report is None and custody is SourceCustody.UNKNOWN:
            hint = "what it answers: pageferry status"
            raise RefusedError("the destination is being asked now whether the guest runs there", hint=hint)
        saved = self.file is not None and self.guest_at is GuestAt.DESTINATION
        if self.report is None or not (saved or self.guest_at is GuestAt.UNKNOWN):
            raise RefusedError("there is no guest to take back")
        self._guest.claim_backends()  # if another process holds a lock, the caller is wrong
        if not self.handoff.taken_back(self._clock.now_s(), custody):
            if self.guest_at is not GuestAt.SOURCE:
                self._guest.release_backends()
            raise RefusedError("the destination has just answered", hint="see where the guest is: pageferry status")
        self._guest.restore()

    def go_on_here(self) -> None:
        """Let a guest run on that stands still because another process had its disk when the attempt failed.

        Raises:
            VmError: the other process still has it.
        """
        if self._guest.stuck is not None:
            self._guest.restore()
        if self._guest.stuck is not None:
            raise self._guest.stuck

    # -- for the attempt itself ------------------------------------------------------------------------------------

    @property
    def may_go_on(self) -> bool:
        """Whether it is not, or no more, told to hold."""
        return self._go_on.is_set()

    def wait_to_go_on(self, timeout_s: float) -> bool:
        """Wait until it may go on; return whether it may."""
        return self._go_on.wait(timeout_s)

    def opened(self, channel: Outlet) -> None:
        """Take in a connection or file, which is cut by a cancel.

        Raises:
            MigrationError: it was cancelled already.
        """
        self._channels.append(channel)
        self.check()

    def check(self) -> None:
        """Raise if it was cancelled, or its pause given up.

        Raises:
            MigrationError: it was.
        """
        if self.handoff.forbidden:
            raise self.stays()

    def give_pause_up(self) -> None:
        """Let the guest run on here, from any thread, if the destination was not told yet that it may run it."""
        self._given_up_in = self._clock.current
        if self.handoff.give_up():
            self.cut()

    def stays(self) -> MigrationError:
        """Return the error that ends an attempt whose guest stays here: it was cancelled, or its pause given up."""
        if self.handoff.cancelled:
            return self.abort("cancelled")
        phase = self._given_up_in
        paused_s = self._clock.now_s() - self._clock.began_s[Phase.PAUSE]
        what = waits_for(phase, saves=self.file is not None)
        return MigrationError(
            f"the pause was given up after {paused_s:.1f} s: it waited for {what}",
            phase=str(phase),
            guest_at=GuestAt.SOURCE,
            hint="see what stood still there; --pause-limit allows a longer pause",
        )

    def abort(self, reason: str) -> PolicyAbort:
        """Return the error that ends it before the commit although nothing failed."""
        return PolicyAbort(reason, phase=str(self._clock.current), guest_at=GuestAt.SOURCE)

    def cut(self) -> None:
        """Wake every thread that sends or receives, with an error."""
        for channel in tuple(self._channels):
            channel.abort()

    def close(self) -> None:
        """Close every connection or file."""
        for channel in tuple(self._channels):
            channel.close()

    def begun(self) -> None:
        """Take in that it has begun, or goes on after it ended UNKNOWN."""
        self.report = self.error = None
        self.status = JobStatus.ACTIVE
        self._ended.clear()

    def ended(self, status: JobStatus, report: MigrationReport) -> None:
        """Take in how it ended."""
        self.report = report
        self.status = status
        self._ended.set()
