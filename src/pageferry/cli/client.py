"""Start a migration over the control socket, follow it to its end, or cancel it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from pageferry.cli.outcome import Interrupted
from pageferry.cli.signals import SIGNALS, Requests
from pageferry.core.command_hints import RECOVER, TAKE_BACK
from pageferry.core.errors import GuestAt, MigrationError, VmError
from pageferry.core.events import Phase
from pageferry.vmm.announcer import ENGINE_EVENT
from pageferry.vmm.qmp_client import QmpClient
from pageferry.vmm.qmp_error import QmpError

Json = dict[str, Any]
_ENDED = ("completed", "failed", "cancelled")
_PAUSED = "postcopy-paused"


def migrate(
    client: QmpClient,
    uri: str,
    options: Json,
    show: Callable[[Json], None],
    noted: Callable[[], AbstractContextManager[Requests]] = SIGNALS.noted,
) -> Json:
    """Migrate, or save, and return the report; ``options`` are the extra arguments of the ``migrate`` command.

    The first signal cancels: the guest stays at the source, and how it ended is still waited for. Others change
    nothing. Where it is too late to cancel, ``show`` is told why (``type`` Notice, ``text``); after a switch a later
    signal then leaves the migration to itself.

    Args:
        client: connected to the source.
        uri: where to.
        options: extra arguments.
        show: sees the engine's events, as JSON-ready values.
        noted: how signals are noted meanwhile.

    Raises:
        QmpError: the guest process refused to begin.
        MigrationFailedError: it did not succeed.
        PostcopyPausedError: it was cut after the switch, and can go on.
        Interrupted: it was cancelled.
        LeftAloneError: it was too late for that, and it goes on.
        GuestProcessEndedError: the guest process was ended meanwhile.
        OutcomeUnknownError: the guest process went away.
    """
    with noted() as requests:
        client.execute("migrate", uri=uri, **options)
        try:
            state = _Following(client, show, requests).to_the_end()
        except QmpError:
            raise
        except VmError as error:
            raise OutcomeUnknownError from error
    report = state.get("x-pageferry-report")
    if report is None and "x-postcopy-paused" in state:
        raise PostcopyPausedError(state["x-postcopy-paused"], GuestAt(state["x-guest-at"]))
    if report is None:
        raise VmError("the migration ended by a defect in the guest process; its log says more")
    if "x-process-ends" in state and report["status"] != "completed" and report["guest_at"] == GuestAt.SOURCE:
        raise GuestProcessEndedError
    if report["status"] == "cancelled":
        raise Interrupted(report)
    if report["status"] != "completed":
        raise MigrationFailedError(report, state["x-pageferry-error"])
    return dict(report)


def cancel_migration(client: QmpClient) -> None:
    """Cancel the migration under way, if there is one, and return when it is over: the next may begin.

    Args:
        client: connected to the source.

    Raises:
        QmpError: it is too late.
        VmError: the guest process went away.
    """
    client.execute("migrate_cancel")
    while "x-eta-reason" in client.execute("query-migrate"):
        if not client.received():
            client.receive()


class OutcomeUnknownError(VmError):
    """The guest process went away while a migration was under way: how that ended is not known."""

    guest_at = GuestAt.UNKNOWN

    def __init__(self) -> None:
        super().__init__(
            "the guest process went away during the migration",
            hint="see whether the destination runs the guest: pageferry status",
        )


class GuestProcessEndedError(VmError):
    """The guest process was ended while it migrated or saved its guest, which has ended with it."""

    def __init__(self) -> None:
        super().__init__(
            "the guest process was ended before the guest had left, and its guest with it",
            hint="to keep the guest, pageferry cancel, or wait, before the process is ended",
        )


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
        hint = f"to go on: {RECOVER}; if this guest process ends before, the guest is lost"
        if guest_at is GuestAt.UNKNOWN:
            what = "whether the guest has switched is not known"
            hint = f"to find out: {RECOVER}; if it surely runs nowhere: {TAKE_BACK}"
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


class _Following:
    """Follows one attempt.

    Args:
        client: connected to the source.
        show: sees the engine's events.
        requests: to end it.
    """

    def __init__(self, client: QmpClient, show: Callable[[Json], None], requests: Requests) -> None:
        self._client = client
        self._show = show
        self._requests = requests
        self._asked = False  # and not answered yet
        self._cancelling = False
        self._too_late = False

    def to_the_end(self) -> Json:
        """Return the answer to ``query-migrate`` when it is over, or waits to be recovered."""
        while True:
            try:
                if (state := self._go_on()) is not None:
                    return state
            except QmpError:
                raise
            except VmError:  # it drops those who read nothing for long, as on a terminal that was stopped
                self._client.reconnect()
                state = dict(self._client.execute("query-migrate"))
                if not state:
                    raise VmError("another guest process serves the control socket now") from None
                if state["status"] in _ENDED or "x-postcopy-paused" in state:
                    return state

    def _go_on(self) -> Json | None:
        events = self._client.received()
        for event in events:
            if (state := self._happened(event)) is not None:
                return state
        if not self._asked and not events:  # with the answer to a question more may have come than is waited for
            self._client.wait(self._requests)
        if self._requests.take() or self._asked:
            self._asked = True
            self._asked_to_end()
            self._asked = False
        return None

    def _happened(self, event: Json) -> Json | None:
        # An event, or an answer that came too late to be of use.
        if event.get("event") == ENGINE_EVENT:
            self._show(event["data"])
        elif event.get("event") == "MIGRATION":
            status = event["data"]["status"]
            if status in (*_ENDED, _PAUSED):
                state: Json = self._client.execute("query-migrate")
                # It may have been recovered meanwhile.
                return state if status != _PAUSED or "x-postcopy-paused" in state else None
            self._show({"type": "Status", **event["data"]})
        return None

    def _asked_to_end(self) -> None:
        if self._cancelling:
            self._notice("cancelling: the outcome is waited for")
        elif not self._too_late:
            self._cancel()
        elif self._client.execute("query-migrate").get("x-guest-at") == GuestAt.DESTINATION:
            raise LeftAloneError(GuestAt.DESTINATION)
        else:
            self._notice("the guest is being handed over: the answer is waited for")

    def _cancel(self) -> None:
        try:
            self._client.execute("migrate_cancel")
        except QmpError as error:
            self._too_late = True
            self._requests.take()  # signals from before the notice could be read
            self._notice(f"{error}; a later Ctrl-C leaves it to go on by itself")
        else:
            self._cancelling = True
            self._notice("cancelling")

    def _notice(self, text: str) -> None:
        self._show({"type": "Notice", "text": text})
