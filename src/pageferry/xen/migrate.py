"""Moving a domain of Xen live to another host, where ``xl migrate-receive`` takes it.

::

    domain                   receiver (:mod:`pageferry.xen.receiver`)
      |  <== its banner
      |                      xl header, configuration, libxl header; libxc headers, CPU policies
      |  ENABLE
      | == pre-copy, round by round, as of any guest =========>
      |  suspend the domain .................................. downtime begins
      | == stop-and-copy: the final bitmap ===================>
      |  take its state; map all of memory anew, compare it with digests of what was sent
      | == what the log missed ===============================>
      | == TSC_INFO, HVM_CONTEXT, HVM_PARAMS, END, libxl END ==>
      |  <== ready; the domain here is renamed
      | == it is yours ========================================>
      |  <== it runs ......................................... downtime ends

What is sent is copied first and the copy digested, so the second reading compares with the very bytes that went out.
The receiver proves nothing: what it was sent is what it has as far as its transport keeps it.

Postcondition on success: the domain runs there; here it is suspended for good, named NAME--migratedaway as Xen's tools
do it, to be destroyed. On failure before it was given away: as for a save. Without an answer after that: it stays
suspended here and ``guest_at`` is UNKNOWN.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from pageferry.core.errors import GuestAt, MigrationError, PageferryError, PeerError, TransportError, UsageError
from pageferry.core.events import Event, MigrationReport, Phase
from pageferry.core.policy import Policy, may_switch
from pageferry.engine.attempt import Attempt
from pageferry.engine.options import WireOptions
from pageferry.stream.encoder import Encoder
from pageferry.stream.format import MAX_PAGES_PER_RECORD
from pageferry.stream.xl import libxl_tail, xl_head
from pageferry.xen.domain import XenDomain
from pageferry.xen.live import copy_and_suspend, missed_in_words
from pageferry.xen.missed import DigestedCoder, differing_pages
from pageferry.xen.receiver import BANNER, GO, READY, REPORT, Receiver

TIMEOUT_S = 60.0
_AWAY = "--migratedaway"


class XenMigration:
    """One attempt to move a domain.

    Args:
        domain: which; it stays the caller's.
        configuration: its, as JSON.
        command: that is, or leads to, ``xl migrate-receive`` on the destination.
        policy: decides after each round.
        bandwidth_bytes_per_s: a cap on what is sent.
        pause_limit_s: how long a pause may take, as :class:`~pageferry.engine.options.MigrationOptions` has it.
        timeout_s: how long the receiver may stand still.
        on_event: sees every event, on the thread that calls :meth:`run`.

    Raises:
        UsageError: the policy may switch before all pages are sent.
    """

    def __init__(
        self,
        domain: XenDomain,
        configuration: bytes,
        command: Sequence[str],
        policy: Policy,
        *,
        bandwidth_bytes_per_s: int | None = None,
        pause_limit_s: float | None = None,
        timeout_s: float = TIMEOUT_S,
        on_event: Callable[[Event], None],
    ) -> None:
        if may_switch(policy):
            hint = "Xen's receiver cannot ask for pages; choose another policy"
            raise UsageError(f"a domain cannot move by the {policy.name} policy", hint=hint)
        self._domain = domain
        self._configuration = configuration
        self._command = command
        self._timeout_s = timeout_s
        wire = WireOptions(bandwidth_bytes_per_s=bandwidth_bytes_per_s)
        self._attempt = Attempt(
            domain, policy, wire=wire, pause_limit_s=pause_limit_s, on_event=on_event, work_before=None
        )
        self.job = self._attempt.job
        self._encoder = Encoder()

    def run(self) -> MigrationReport:
        """Move the domain; call once. ``job.report`` is set afterwards, also when this raises.

        Raises:
            MigrationError: it did not move (``guest_at`` SOURCE), or that is not known (UNKNOWN).
        """
        attempt, report, phase = self._attempt, self._attempt.report, self._attempt.clock.phase
        domain, encoder = self._domain, self._encoder
        with ExitStack() as at_last, attempt.under_way(self._as_migration_error):
            with phase(Phase.CONNECT):
                receiver = Receiver(self._command, self._timeout_s)
                at_last.callback(receiver.see_off)  # when the guest runs again, if it is to
                receiver.pacer = self.job.pacer
                self.job.opened(receiver)
                receiver.expect(BANNER)
            with phase(Phase.HELLO):
                attempt.rounds.expect(domain.memory.all_ram().count())
                begun = [encoder.header(domain.header()), *map(encoder.record, domain.first_records())]
                receiver.send([xl_head(self._configuration), *begun])
            coder = DigestedCoder(domain.memory, encoder)
            records = copy_and_suspend(attempt, domain, receiver, encoder, coder)
            with phase(Phase.VERIFY):
                self._send_missed(receiver, coder)
                receiver.send([*map(encoder.record, records), libxl_tail()])
            with phase(Phase.HANDOFF):
                self._hand_over(receiver)
                report.running_at_s = attempt.clock.now_s()
                report.destination_accel = domain.accel
            attempt.guest.release()
            self.job.close()
        assert self.job.report is not None
        return self.job.report

    def _send_missed(self, receiver: Receiver, coder: DigestedCoder) -> None:
        """Compare the suspended domain's memory with what was sent, and send what differs."""
        memory = self._domain.map_again()
        try:
            missed = differing_pages(memory, coder)
            again = DigestedCoder(memory, self._encoder)
            for at in range(0, missed.size, MAX_PAGES_PER_RECORD):
                receiver.send(again.code(missed[at : at + MAX_PAGES_PER_RECORD], fresh=False).buffers)
        finally:
            memory.close()
        if missed.size:
            self._attempt.warn(missed_in_words(missed, "sent"))

    def _hand_over(self, receiver: Receiver) -> None:
        """Give the domain to the receiver, once it has said that it has all of it.

        Raises:
            MigrationError: it was cancelled, or does not run there.
            OSError: the receiver is gone.
        """
        handoff, domain = self.job.handoff, self._domain
        receiver.expect(READY)
        name = domain.rename(_AWAY)
        if not handoff.commit():
            domain.take_back(name)
            raise self.job.stays()
        self._attempt.pause.end()
        domain.give_away()
        receiver.send([GO])
        receiver.expect(REPORT)
        (code,) = receiver.read(1)
        if not code:
            domain.gone()
            handoff.running()
            return
        receiver.expect(GO)
        handoff.refused()
        domain.take_back(name)
        raise PeerError(
            "the domain could not be started there, and its copy was destroyed",
            phase=str(self._attempt.clock.current),
            guest_at=GuestAt.SOURCE,
            hint="the destination's /var/log/xen tells why",
        )

    def _as_migration_error(self, error: Exception, guest_at: GuestAt) -> MigrationError:
        phase = str(self._attempt.clock.current)
        if isinstance(error, PageferryError):
            return MigrationError(str(error), phase=phase, guest_at=guest_at, hint=error.hint)
        if isinstance(error, OSError):
            hint = "try the command by itself: it should print a banner"
            if guest_at is not GuestAt.SOURCE:
                hint = "see whether it runs there: xl list; if it surely does not: pageferry xen resume "
                hint += f"{self._domain.info.domid} here"
            return TransportError(str(error), phase=phase, guest_at=guest_at, hint=hint)
        return MigrationError(f"internal error: {error!r}", phase=phase, guest_at=guest_at)
