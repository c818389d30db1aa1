"""Outgoing: the one migration or save at a time, and where the guest is because of it."""

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from pageferry.core.command_hints import RECOVER, TAKE_BACK
from pageferry.core.errors import GuestAt, MigrationError
from pageferry.core.events import Event, MigrationReport
from pageferry.core.threads import begin
from pageferry.engine.image.save import Save
from pageferry.engine.job import Job, JobStatus
from pageferry.engine.options import WireOptions
from pageferry.engine.source import Source
from pageferry.engine.wire.channel import Endpoint
from pageferry.vmm.announcer import Announcer
from pageferry.vmm.attempt_news import AttemptNews
from pageferry.vmm.attempts import Departing, MakeAttempt
from pageferry.vmm.guest import Guest
from pageferry.vmm.migrate_info import migrate_info
from pageferry.vmm.qmp_error import QmpError

_log = logging.getLogger(__name__)

#: How long a process stays for a client that has not asked yet how a migration ended.
_LINGER_S = 5.0
_POLL_S = 0.02

#: Why a migration that has committed is not cancelled, by where the guest is.
_TOO_LATE = {
    GuestAt.SOURCE: "the guest is being handed over",
    GuestAt.UNKNOWN: "whether the guest has switched is not known",
    GuestAt.DESTINATION: "the guest has switched, and its pages follow",
}


class Clients(Protocol):
    """Those who may ask."""

    @property
    def connected(self) -> bool:
        """Whether there are any."""


class Outgoing:
    """The latest attempt to migrate or save the guest, which runs on a thread of its own; none at first.

    It has no lock of its own: one begins under the guest's, and the attempt is replaced as a whole.

    Args:
        guest: the guest.
        announcer: hears how each attempt goes.
    """

    def __init__(self, guest: Guest, announcer: Announcer) -> None:
        self._guest = guest
        self._announcer = announcer
        self._attempt: Source | Save | None = None
        self._thread: threading.Thread | None = None
        self._follower: threading.Thread | None = None  # serves the client that began the latest attempt, see qmp
        self._told = threading.Event()  # how that attempt ended, to that client
        self._told.set()
        self._ended_with_process = False

    @property
    def _job(self) -> Job | None:
        return None if self._attempt is None else self._attempt.job

    # -- where the guest is ----------------------------------------------------------------------------------------

    @property
    def under_way(self) -> bool:
        """Whether one is neither done nor failed."""
        thread_lives = self._thread is not None and self._thread.is_alive()
        return thread_lives and self._job is not None and self._job.report is None

    @property
    def guest_at(self) -> GuestAt:
        """Where the guest is, as far as this process knows; SOURCE is here."""
        job = self._job
        return GuestAt.SOURCE if job is None else job.guest_at

    @property
    def holds_guest(self) -> bool:
        """Whether the guest stands still for an attempt's sake."""
        job = self._job
        return job is not None and job.frozen

    @property
    def keeps_pages(self) -> bool:
        """Whether the guest may run at the destination and need pages that are here only."""
        job = self._job
        return job is not None and job.keeps_pages

    def check_here(self) -> None:
        """Check that the guest is here and ours to stop, to resume or to migrate; the guest's lock is held.

        Raises:
            QmpError: it is elsewhere, is being handed over, or that is not known.
        """
        self.check_not_moved()
        if self.guest_at is GuestAt.UNKNOWN:
            hint = f"to find out: {RECOVER}; if it surely runs nowhere: {TAKE_BACK}"
            raise QmpError("whether the guest has moved is not known", hint=hint)
        if self.under_way and self._job is not None and self._job.handing_over:
            raise QmpError("the guest is being handed over")

    def check_not_moved(self) -> None:
        """Check that the guest is not known to be elsewhere.

        Raises:
            QmpError: it is; says where.
        """
        if self.guest_at is GuestAt.DESTINATION:
            file = None if self._job is None else self._job.file
            hint = "" if file is None else f"if it was not restored: {TAKE_BACK}"
            raise QmpError(self._where_it_went(), hint=hint)

    def take_back(self) -> None:
        """Have a guest here that left, if it may be; the guest's lock is held.

        The caller says that it runs nowhere else.

        Raises:
            VmError: the attempt was not one whose guest may be here.
        """
        job = self._job
        if job is None:
            return
        if job.guest_at is GuestAt.UNKNOWN or (job.guest_at is GuestAt.DESTINATION and job.file is not None):
            job.take_back()

    def go_on_here(self) -> None:
        """Let a guest run on that an attempt left standing still; the guest's lock is held.

        Raises:
            VmError: what stands behind its devices is in use elsewhere.
        """
        if self._job is not None and not self.under_way:
            self._job.go_on_here()

    # -- what can be done with an attempt --------------------------------------------------------------------------

    def begin(self, make: MakeAttempt) -> None:
        """Begin an attempt with the guest, which is all here; the guest's lock is held.

        Raises:
            QmpError: there is one under way, or the guest is not here.
            OutOfThreadsError: it has not begun.
        """
        vm = self._guest.here()
        if self.under_way:
            hint = "pageferry status tells how far it is; pageferry cancel ends it"
            raise QmpError("There's a migration process in progress", hint=hint)
        self.check_here()
        news = AttemptNews(self._guest, self._announcer)

        def on_event(event: Event) -> None:
            news.happened(attempt.job, event)

        attempt = make(
            Departing(
                vm=vm,
                name=self._guest.name,
                host_cpu=self._guest.machines.host_cpu,
                on_event=on_event,
                work_before=self._guest.work.oldest(),
            )
        )
        self._start(attempt.run, attempt.job, news)
        self._attempt = attempt
        self._has_follower()
        self._guest.work.forget()
        self._announcer.migration("setup")

    def _start(self, run: Callable[[], MigrationReport], job: Job, news: AttemptNews) -> None:
        """Begin an attempt's thread, which waits until the guest's lock is free; what has to be set is set then."""
        self._thread = begin(self._main, "migrate", run, job, news)

    def recover(self, endpoint: Endpoint) -> None:
        """Go on at ``endpoint`` with a migration that was cut after the commit or the switch.

        Raises:
            QmpError: no migration was cut there.
        """
        with self._guest.lock:
            attempt = self._attempt
            if attempt is not None and attempt.job.recover(endpoint):
                return
            self.check_not_moved()
            if self.under_way or self.guest_at is not GuestAt.UNKNOWN or not isinstance(attempt, Source):
                raise QmpError("no migration here was cut after its commit", hint="start one without --recover")
            self._start(partial(attempt.find_out, endpoint), attempt.job, AttemptNews(self._guest, self._announcer))
            self._has_follower()
            attempt.job.begun()

    def _has_follower(self) -> None:
        self._follower = threading.current_thread()
        self._told.clear()

    def cancel(self) -> None:
        """Cancel the attempt under way, if there is one.

        Raises:
            QmpError: it is too late.
        """
        if self._job is not None and self.under_way and not self._job.cancel():
            raise QmpError(f"too late to cancel: {_TOO_LATE[self.guest_at]}")

    def change_limits(self, limits: dict[str, float | int], bandwidth: WireOptions | None) -> None:
        """Change limits of the attempt under way; see :meth:`~pageferry.engine.job.Job.change_limits`.

        Raises:
            QmpError: no attempt is under way.
            UsageError: its policy has no such limit, or a value makes no sense.
        """
        self._current().change_limits(limits, bandwidth)

    def go_on(self, state: str) -> None:
        """Let the attempt that is held, or is to be, pause the guest when all is ready.

        Args:
            state: that the caller believes it to be in.

        Raises:
            QmpError: no attempt is under way, or it is in another state.
        """
        job = self._current()
        if state != JobStatus.HELD or job.status not in (JobStatus.HELD, JobStatus.ACTIVE):
            raise QmpError(f"the migration is not in state {state!r} but {job.status!r}")
        job.go_on()

    def info(self) -> dict[str, Any]:
        """Return the answer to ``query-migrate``; empty if nothing was attempted."""
        job, over = self._job, not self.under_way
        info = {} if job is None else migrate_info(job)
        if self._ended_with_process:
            info["x-process-ends"] = True
        if over and self._is_follower():
            self._told.set()
        return info

    def _is_follower(self) -> bool:
        # One whose connection is gone may ask again on another, so then it may be any client.
        follower = self._follower
        return follower is None or follower is threading.current_thread() or not follower.is_alive()

    def abandon(self) -> None:
        """Give up the attempt under way, because the process ends.

        A guest that is still here ends with it; one that has switched without all its pages is lost.
        """
        self._ended_with_process = self.under_way
        if self._job is not None:
            self._job.abandon()

    def join(self) -> None:
        """Return when no attempt is under way."""
        if self._thread is not None:
            self._thread.join()

    def wait_until_told(self, clients: Clients) -> None:
        """Return when the client that began the latest attempt has asked how it ended, or is gone or too slow.

        An attempt and its guest may end at the same time; the client asks only then.
        """
        deadline_s = time.monotonic() + _LINGER_S
        while clients.connected and not self._told.wait(_POLL_S) and time.monotonic() < deadline_s:
            pass

    def _current(self) -> Job:
        if self._job is None or not self.under_way:
            raise QmpError("there is no migration in progress")
        return self._job

    def _where_it_went(self) -> str:
        file = None if self._job is None else self._job.file
        if file is not None:
            return f"the guest was saved to {file} and stopped here; restore it from there"
        where = f" for {self._attempt.endpoint}" if isinstance(self._attempt, Source) else ""
        return f"the guest has left{where}: use the control socket of that process"

    def _main(self, run: Callable[[], MigrationReport], job: Job, news: AttemptNews) -> None:
        with self._guest.lock:
            pass
        try:
            report = run()
        except MigrationError as error:
            self._guest.work.forget()
            news.failed(job, error)
            return
        except Exception:
            _log.exception("a migration ended by a defect")
            self._announcer.migration("failed")
            return
        if report.guest_at is GuestAt.DESTINATION:
            with self._guest.lock:  # a client that follows later is refused
                self._guest.console.end(self._where_it_went())
        news.succeeded(report)
