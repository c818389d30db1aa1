"""Start a migration over the control socket, and follow it to its end."""

from collections.abc import Callable
from typing import Any

from pageferry.cli.shell import Interrupted
from pageferry.core.errors import GuestAt, MigrationError, VmError
from pageferry.core.events import Phase
from pageferry.vmm.announcer import ENGINE_EVENT
from pageferry.vmm.qmp import QmpError
from pageferry.vmm.qmp_client import QmpClient

Json = dict[str, Any]


def migrate(client: QmpClient, uri: str, options: Json, show: Callable[[Json], None]) -> Json:
    """Migrate, or save, and return the report; ``options`` are the extra arguments of the ``migrate`` command.

    Ctrl-C cancels: the guest stays at the source. Where it is too late for that, ``show`` is told why (``type``
    Notice, ``text``), and a second one leaves the migration to itself.

    Raises:
        QmpError: the guest process refused to begin.
        MigrationFailedError: it did not succeed.
        PostcopyPausedError: it was cut after the switch, and can go on.
        Interrupted: it was cancelled by Ctrl-C.
        LeftAloneError: it was too late for that, and it goes on.
        VmError: the guest process went away.
    """
    try:
        client.execute("migrate", uri=uri, **options)
        state = _follow(client, show)
    except KeyboardInterrupt:
        state = _cancelled(client, show)
    report = state.get("x-pageferry-report")
    if report is None and "x-postcopy-paused" in state:
        raise PostcopyPausedError(state["x-postcopy-paused"], GuestAt(state["x-guest-at"]))
    if report is None:
        raise VmError("the migration ended by a defect in the guest process; its log says more")
    if report["status"] == "cancelled":
        raise Interrupted(report)
    if report["status"] != "completed":
        error = state["x-pageferry-error"]
        raise MigrationFailedError(report, error)
    return dict(report)


class MigrationFailedError(MigrationError):
    """A migration in another process failed. ``report`` is its report; its advice is the hint if the error has none."""

    def __init__(self, report: Json, error: Json) -> None:
        at = GuestAt(error["guest_at"])
        hint = error["hint"] or " ".join((report["explanation"] or {}).get("advice", ()))
        super().__init__(error["reason"], phase=error["phase"], guest_at=at, hint=hint)
        self.report = report


class PostcopyPausedError(MigrationError):
    """A migration in another process was cut at the switch or after it, and waits to be recovered."""

    def __init__(self, reason: str, guest_at: GuestAt) -> None:
        what = "the guest stands still there, and pages of it are only here"
        hint = "pageferry migrate --recover; if this guest process ends before, the guest is lost"
        if guest_at is GuestAt.UNKNOWN:
            what = "whether the guest has switched is not known"
            hint = "pageferry migrate --recover finds out; if it surely runs nowhere: pageferry resume --force"
        super().__init__(f"{reason}; {what}", phase=str(Phase.POSTCOPY), guest_at=guest_at, hint=hint)


class LeftAloneError(MigrationError):
    """A migration in another process is past its switch; it goes on although this client leaves."""

    def __init__(self, guest_at: GuestAt) -> None:
        super().__init__(
            "it is too late to cancel, and the migration goes on by itself",
            phase=str(Phase.POSTCOPY),
            guest_at=guest_at,
            hint="pageferry status tells how far it is",
        )


def _cancelled(client: QmpClient, show: Callable[[Json], None]) -> Json:
    # Cancel and follow to the end, or follow on if that is refused.
    try:
        client.execute("migrate_cancel")
    except QmpError as error:
        show({"type": "Notice", "text": f"{error}; Ctrl-C again leaves it to go on by itself"})
        try:
            return _follow(client, show)
        except KeyboardInterrupt:
            raise LeftAloneError(GuestAt(client.execute("query-migrate")["x-guest-at"])) from None
    return _follow(client, show)


def _follow(client: QmpClient, show: Callable[[Json], None]) -> Json:
    # The answer to query-migrate when it is over, or waits to be recovered.
    for event in client.events():
        if event["event"] == ENGINE_EVENT:
            show(event["data"])
        elif event["event"] == "MIGRATION":
            status = event["data"]["status"]
            if status in ("completed", "failed", "cancelled", "postcopy-paused"):
                state: Json = client.execute("query-migrate")
                if status != "postcopy-paused" or "x-postcopy-paused" in state:
                    return state
                continue  # it was recovered meanwhile
            show({"type": "Status", **event["data"]})
    raise AssertionError("events never end")
