"""What the command line makes of what a guest process says."""

import pytest

from pageferry.cli.client import LeftAloneError, PostcopyPausedError, migrate
from pageferry.cli.shell import Interrupted
from pageferry.core.errors import GuestAt
from pageferry.vmm.qmp import QmpError


class Client:
    """Says what it was told to: the events of one migration, and how it stands each time it is asked."""

    def __init__(self, statuses, states, too_late=False):
        self.statuses = statuses
        self.states = states
        self.too_late = too_late
        self.executed = []

    def execute(self, command, **arguments):
        self.executed.append(command)
        if command == "migrate_cancel" and self.too_late:
            raise QmpError("too late to cancel: so")
        return self.states.pop(0) if command == "query-migrate" else {}

    def events(self):
        while self.statuses:
            status = self.statuses.pop(0)
            if status is KeyboardInterrupt:
                raise status
            yield {"event": "MIGRATION", "data": {"status": status}}


DONE = {"status": "completed", "x-pageferry-report": {"status": "completed"}}
REASON = "the connection was cut"
PAUSED = {"status": "postcopy-paused", "x-postcopy-paused": REASON, "x-guest-at": "destination"}


def test_a_pause_after_the_switch_ends_the_command():
    client = Client(["postcopy-active", "postcopy-paused", "completed"], [PAUSED, DONE])
    with pytest.raises(PostcopyPausedError, match="the connection was cut; the guest stands still there"):
        migrate(client, "tcp://x:1", {}, lambda event: None)


def test_a_pause_that_is_over_already_is_passed_by():
    """The word of an earlier pause may reach whoever recovers from it."""
    client = Client(["postcopy-paused", "completed"], [{"status": "postcopy-active"}, DONE])
    assert migrate(client, "tcp://x:1", {"resume": True}, lambda event: None) == {"status": "completed"}


def test_ctrl_c_cancels():
    cancelled = {"status": "cancelled", "x-pageferry-report": {"status": "cancelled"}}
    client = Client([KeyboardInterrupt, "cancelled"], [cancelled])
    with pytest.raises(Interrupted):
        migrate(client, "tcp://x:1", {}, lambda event: None)
    assert "migrate_cancel" in client.executed


def test_ctrl_c_after_the_switch_says_that_it_is_too_late_and_follows_on():
    shown = []
    client = Client([KeyboardInterrupt, "completed"], [DONE], too_late=True)
    assert migrate(client, "tcp://x:1", {}, shown.append) == {"status": "completed"}
    text = "too late to cancel: so; Ctrl-C again leaves it to go on by itself"
    assert shown == [{"type": "Notice", "text": text}]


def test_a_second_ctrl_c_leaves_it_to_itself():
    state = {"status": "postcopy-active", "x-guest-at": "destination"}
    client = Client([KeyboardInterrupt, KeyboardInterrupt], [state], too_late=True)
    with pytest.raises(LeftAloneError, match="goes on by itself") as left:
        migrate(client, "tcp://x:1", {}, lambda event: None)
    assert left.value.guest_at is GuestAt.DESTINATION
