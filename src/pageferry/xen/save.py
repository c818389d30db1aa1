"""Saving a domain of Xen to a file, live: what ``xl restore`` takes.

::

    domain                   file
      |                      xl header, configuration, libxl header; libxc headers, CPU policies
      |  ENABLE
      | == pre-copy, round by round, as of any guest =========> a file without a name
      |  suspend the domain .................................. downtime begins
      | == stop-and-copy: the final bitmap ===================>
      |  take its state; map all of memory anew, compare it with the file
      | == what the log missed ===============================>
      | == TSC_INFO, HVM_CONTEXT, HVM_PARAMS, END, libxl END ==>
      |  let it run on (a snapshot) .......................... downtime ends
      |                            on the disk; read back; named FILE

Postcondition on success: FILE is whole, and held all of the domain's memory as it was at the pause; the domain runs on
here, or with ``stop`` stays suspended here. Postcondition on failure: the domain is here, running or paused as it was,
log-dirty is off, its entries in xenstore are as before, and FILE is what it was.
"""

import os
from collections.abc import Callable
from pathlib import Path

from pageferry.core.errors import GuestAt, MigrationError
from pageferry.core.events import Event, MigrationReport, Phase
from pageferry.core.policy import Policy
from pageferry.engine.attempt import Attempt
from pageferry.engine.image.outlet import FileOutlet
from pageferry.engine.image.save_file import as_save_error, commit, expect_all_pages, open_file
from pageferry.engine.options import WireOptions
from pageferry.stream.encoder import Encoder
from pageferry.stream.format import MAX_PAGES_PER_RECORD
from pageferry.stream.walk import pass_over
from pageferry.stream.xl import Inside, libxl_tail, xl_head
from pageferry.xen.domain import XenDomain
from pageferry.xen.live import copy_and_suspend, missed_in_words
from pageferry.xen.missed import PlacedCoder, missed_pages


class XenSave:
    """One attempt to save a domain.

    Args:
        domain: which; it stays the caller's.
        configuration: its, as JSON.
        path: of the file, absolute.
        policy: decides after each round.
        stop: leave it suspended when the file is whole.
        bandwidth_bytes_per_s: a cap on what is written.
        pause_limit_s: how long a pause may take, as :class:`~pageferry.engine.options.MigrationOptions` has it.
        on_event: sees every event, on the thread that calls :meth:`run`.

    Raises:
        UsageError: the policy may switch before all pages are saved.
    """

    def __init__(
        self,
        domain: XenDomain,
        configuration: bytes,
        path: Path,
        policy: Policy,
        *,
        stop: bool = False,
        bandwidth_bytes_per_s: int | None = None,
        pause_limit_s: float | None = None,
        on_event: Callable[[Event], None],
    ) -> None:
        expect_all_pages(policy)
        self._domain = domain
        self._configuration = configuration
        self._path = path
        self._stop = stop
        wire = WireOptions(bandwidth_bytes_per_s=bandwidth_bytes_per_s)
        self._attempt = Attempt(
            domain, policy, wire=wire, pause_limit_s=pause_limit_s, file=path, on_event=on_event, work_before=None
        )
        self.job = self._attempt.job
        self._encoder = Encoder()

    def run(self) -> MigrationReport:
        """Save the domain; call once. ``job.report`` is set afterwards, also when this raises.

        Raises:
            MigrationError: it was not saved; the domain is here.
        """
        attempt, report, phase = self._attempt, self._attempt.report, self._attempt.clock.phase
        domain, encoder = self._domain, self._encoder
        with attempt.under_way(self._as_migration_error):
            with phase(Phase.CONNECT):
                pages = domain.memory.all_ram().count()
                file = open_file(attempt, self._path, what="domain", pages=pages)
                begun = [encoder.header(domain.header()), *map(encoder.record, domain.first_records())]
                file.send([xl_head(self._configuration), *begun])
            coder = PlacedCoder(domain.memory, encoder, file)
            records = copy_and_suspend(attempt, domain, file, encoder, coder)
            with phase(Phase.VERIFY):
                self._send_missed(file, coder)
                file.send([*map(encoder.record, records), libxl_tail()])
            attempt.pause.end()  # also with stop: how long the file takes to settle is no reason to give up
            if not self._stop:
                attempt.guest.thaw()
                report.running_at_s = attempt.clock.now_s()
            attempt.guest.release()
            with phase(Phase.HANDOFF):
                file.settle()
                self._expect_whole(file)
                commit(attempt, file, stop=self._stop)
                if self._stop:
                    domain.gone()
        assert self.job.report is not None
        return self.job.report

    def _send_missed(self, file: FileOutlet, coder: PlacedCoder) -> None:
        """Compare the suspended domain's memory with the file, and write what differs.

        Raises:
            OSError: the disk is full.
        """
        memory = self._domain.map_again()
        try:
            missed = missed_pages(memory, coder.places, file.fileno(), file.sent_bytes)
            again = PlacedCoder(memory, self._encoder, file)
            for at in range(0, missed.size, MAX_PAGES_PER_RECORD):
                file.send(again.code(missed[at : at + MAX_PAGES_PER_RECORD], fresh=False).buffers)
            self._attempt.report.verified_pages = memory.all_ram().count()
        finally:
            memory.close()
        if missed.size:
            self._attempt.warn(missed_in_words(missed, "saved"))

    def _expect_whole(self, file: FileOutlet) -> None:
        """Read the file back from the disk, and check that it is a whole stream.

        Raises:
            RemoteStreamError: it is not.
        """
        with open(os.dup(file.fileno()), "rb") as again:
            again.seek(0)
            inside = Inside(again.readinto)
            pass_over(inside, self.job.check)
            inside.finish()

    def _as_migration_error(self, error: Exception, guest_at: GuestAt) -> MigrationError:
        return as_save_error(error, self._path, phase=self._attempt.clock.current, guest_at=guest_at)
