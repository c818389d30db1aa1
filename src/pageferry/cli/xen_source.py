"""Saving or moving a domain of Xen, in this very process: there is no guest process to ask."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pageferry.cli.client import MigrationFailedError
from pageferry.cli.dom0 import dom0
from pageferry.cli.outcome import Interrupted
from pageferry.cli.progress import ProgressView
from pageferry.cli.signals import SIGNALS, Requests
from pageferry.cli.stdio import ERR
from pageferry.core.errors import GuestAt, MigrationError
from pageferry.core.events import Event
from pageferry.core.policy import Policy
from pageferry.core.threads import begin
from pageferry.engine.job import Job, JobStatus
from pageferry.xen.domain import XenDomain, expect_movable, expect_not_shut_down, find_domain, read_configuration
from pageferry.xen.migrate import XenMigration
from pageferry.xen.save import XenSave

Json = dict[str, Any]
_LOOK_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a save or a migration of a domain is asked for."""

    policy: Policy
    bandwidth_bytes_per_s: int | None
    pause_limit_s: float | None


def save_domain(name: str, file: Path, asked: Asked, *, stop: bool) -> Json:
    """Save a domain to a file; return the report as JSON-ready values.

    Raises:
        PageferryError: there is no such domain, or it cannot be saved here.
        MigrationFailedError: it was not saved.
        Interrupted: it was cancelled by a signal.
    """
    with _movable(name) as (domain, configuration, show):
        return _run(
            XenSave(
                domain,
                configuration,
                file.absolute(),
                asked.policy,
                stop=stop,
                bandwidth_bytes_per_s=asked.bandwidth_bytes_per_s,
                pause_limit_s=asked.pause_limit_s,
                on_event=lambda event: show(_json(event)),
            ),
            show,
        )


def migrate_domain(name: str, command: Sequence[str], asked: Asked, *, timeout_s: float) -> Json:
    """Move a domain to the ``xl migrate-receive`` that a command leads to; return the report as JSON-ready values.

    Raises:
        PageferryError: there is no such domain, or it cannot be moved here.
        MigrationFailedError: it was not moved, or that is not known.
        Interrupted: it was cancelled by a signal.
    """
    with _movable(name) as (domain, configuration, show):
        return _run(
            XenMigration(
                domain,
                configuration,
                command,
                asked.policy,
                bandwidth_bytes_per_s=asked.bandwidth_bytes_per_s,
                pause_limit_s=asked.pause_limit_s,
                timeout_s=timeout_s,
                on_event=lambda event: show(_json(event)),
            ),
            show,
        )


@contextmanager
def _movable(name: str) -> Iterator[tuple[XenDomain, bytes, Callable[[Json], None]]]:
    """Lend a domain that can be moved, its configuration, and what shows events of its attempt."""
    with dom0() as (control, store), ProgressView(ERR) as view:
        info = find_domain(control, store, name)
        configuration = read_configuration(info)
        expect_movable(info, configuration)
        domain = XenDomain(control, store, info)
        try:
            expect_not_shut_down(info)
            yield domain, configuration, view.show
        finally:
            domain.close()


def _cancel(job: Job) -> str:
    """Cancel an attempt if it is not too late; return what there is to say of it."""
    again = job.handoff.cancelled
    if job.cancel():
        return "cancelling: the outcome is waited for" if again else "cancelling"
    if job.file is not None:
        return "too late to cancel: the file is whole"
    if job.guest_at is GuestAt.DESTINATION:
        return "too late to cancel: the domain runs at the destination"
    return "too late to cancel: the domain is being handed over, and the answer is waited for"


def _json(event: Event) -> Json:
    return {"type": type(event).__name__, **asdict(event)}


def _run(
    attempt: XenSave | XenMigration,
    show: Callable[[Json], None],
    noted: Callable[[], AbstractContextManager[Requests]] = SIGNALS.noted,
) -> Json:
    """Run an attempt on a thread of its own; a signal cancels it, until it is too late. ``show`` is told which."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            attempt.run()
        except BaseException as error:
            failures.append(error)

    with noted() as requests:
        thread = begin(run, "attempt")
        while thread.is_alive():
            if requests.wait(_LOOK_S) and requests.take():
                show({"type": "Notice", "text": _cancel(attempt.job)})
            thread.join(0)
    report = attempt.job.report
    if failures and (report is None or not isinstance(failures[0], MigrationError)):
        raise failures[0]
    assert report is not None
    if not failures:
        return report.to_json()
    error = failures[0]
    assert isinstance(error, MigrationError)
    if report.status == JobStatus.CANCELLED:
        raise Interrupted(report.to_json()) from error
    told = {"reason": error.reason, "phase": error.phase, "guest_at": error.guest_at, "hint": error.hint}
    raise MigrationFailedError(report.to_json(), told) from error
