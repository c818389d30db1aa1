"""What the command line makes of what a guest process says."""

import pytest

from pageferry.cli.client import PostcopyPausedError, migrate


class Client:
    """Says what it was told to: the events of one migration, and how it stands each time it is asked."""

    def __init__(self, statuses, states):
        self.statuses = statuses
        self.states = states
        self.executed = []

    def execute(self, command, **arguments):
        self.executed.append(command)
        return self.states.pop(0) if command == "query-migrate" else {}

    def events(self):
        for status in self.statuses:
            yield {"event": "MIGRATION", "data": {"status": status}}


DONE = {"status": "completed", "x-pageferry-report": {"status": "completed"}}
REASON = "the connection was cut"
PAUSED = {"status": "postcopy-paused", "x-postcopy-paused": {"reason": REASON, "guest_at": "destination"}}


def test_a_pause_after_the_switch_ends_the_command():
    client = Client(["postcopy-active", "postcopy-paused", "completed"], [PAUSED, DONE])
    with pytest.raises(PostcopyPausedError, match="the connection was cut; the guest stands still there"):
        migrate(client, "tcp://x:1", {}, lambda event: None)


def test_a_pause_that_is_over_already_is_passed_by():
    """The word of an earlier pause may reach whoever recovers from it."""
    client = Client(["postcopy-paused", "completed"], [{"status": "postcopy-active"}, DONE])
    assert migrate(client, "tcp://x:1", {"resume": True}, lambda event: None) == {"status": "completed"}
