"""Saving or moving a domain of Xen, in this very process: there is no guest process to ask."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pageferry.cli.client import MigrationFailedError
from pageferry.cli.dom0 import dom0
from pageferry.cli.progress import ProgressView
from pageferry.cli.shell import ERR, SIGNALS, Interrupted
from pageferry.core.errors import MigrationError
from pageferry.core.events import Event
from pageferry.core.policy import Policy
from pageferry.core.threads import begin
from pageferry.engine.job import JobStatus
from pageferry.xen.domain import XenDomain, expect_movable, find_domain, read_configuration
from pageferry.xen.migrate import XenMigration
from pageferry.xen.save import XenSave

_LOOK_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a save or a migration of a domain is asked for."""

    policy: Policy
    bandwidth_bytes_per_s: int | None
    pause_limit_s: float | None


def save_domain(name: str, file: Path, asked: Asked, *, stop: bool) -> dict[str, Any]:
    """Save a domain to a file; return the report as JSON-ready values.

    Raises:
        PageferryError: there is no such domain, or it cannot be saved here.
        MigrationFailedError: it was not saved.
        Interrupted: it was cancelled by a signal.
    """
    with _movable(name) as (domain, configuration, on_event):
        return _run(
            XenSave(
                domain,
                configuration,
                file.absolute(),
                asked.policy,
                stop=stop,
                bandwidth_bytes_per_s=asked.bandwidth_bytes_per_s,
                pause_limit_s=asked.pause_limit_s,
                on_event=on_event,
            )
        )


def migrate_domain(name: str, command: Sequence[str], asked: Asked, *, timeout_s: float) -> dict[str, Any]:
    """Move a domain to the ``xl migrate-receive`` that a command leads to; return the report as JSON-ready values.

    Raises:
        PageferryError: there is no such domain, or it cannot be moved here.
        MigrationFailedError: it was not moved, or that is not known.
        Interrupted: it was cancelled by a signal.
    """
    with _movable(name) as (domain, configuration, on_event):
        return _run(
            XenMigration(
                domain,
                configuration,
                command,
                asked.policy,
                bandwidth_bytes_per_s=asked.bandwidth_bytes_per_s,
                pause_limit_s=asked.pause_limit_s,
                timeout_s=timeout_s,
                on_event=on_event,
            )
        )


@contextmanager
def _movable(name: str) -> Iterator[tuple[XenDomain, bytes, Callable[[Event], None]]]:
    """Lend a domain that can be moved, its configuration, and what shows the events of its attempt."""
    with dom0() as (control, store), ProgressView(ERR) as view:
        info = find_domain(control, store, name)
        configuration = read_configuration(info)
        expect_movable(info, configuration)
        domain = XenDomain(control, store, info)
        try:
            yield domain, configuration, lambda event: view.show(_json(event))
        finally:
            domain.close()


def _json(event: Event) -> dict[str, Any]:
    return {"type": type(event).__name__, **asdict(event)}


def _run(attempt: XenSave | XenMigration) -> dict[str, Any]:
    """Run an attempt on a thread of its own; a signal cancels it, until it is too late."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            attempt.run()
        except BaseException as error:
            failures.append(error)

    with SIGNALS.noted() as requests:
        thread = begin(run, "attempt")
        while thread.is_alive():
            if requests.wait(_LOOK_S) and requests.take():
                attempt.job.cancel()
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
