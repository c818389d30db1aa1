"""How the command line follows a guest process, and handles signals meanwhile."""

import contextlib

import pytest

from pageferry.cli.client import LeftAloneError, OutcomeUnknownError, PostcopyPausedError, cancel_migration, migrate
from pageferry.cli.outcome import Interrupted
from pageferry.core.errors import GuestAt, VmError
from pageferry.vmm.qmp_error import QmpError

SIGNAL = "a signal"
GONE = "the process is gone"
DROPPED = "the connection is gone"


class Client:
    """Says what it was told to: events of one migration, signals between them, and how it stands when it is asked."""

    def __init__(self, news, states, too_late=False):
        self.news = [*news]
        self.states = states
        self.too_late = too_late
        self.executed = []
        self.signals = 0

    def execute(self, command, **arguments):
        self.executed.append(command)
        if command == "migrate_cancel" and self.too_late:
            raise QmpError("too late to cancel: so")
        return self.states.pop(0) if command == "query-migrate" else {}

    def received(self):
        statuses, self.statuses = self.statuses, []
        return [{"event": "MIGRATION", "data": {"status": status}} for status in statuses]

    def receive(self):
        self.waited += 1
        return []

    statuses = ()
    waited = 0
    lives = True

    def reconnect(self):
        if not self.lives:
            raise VmError("no guest process answers")

    def wait(self, requests):
        assert requests is self
        new = self.news.pop(0)
        if new in (GONE, DROPPED):
            self.lives = new == DROPPED
            raise VmError("the guest process went away")
        if isinstance(new, list):  # several signals at once
            self.signals += len(new)
        elif new == SIGNAL:
            self.signals += 1
        else:
            self.statuses = [new]

    def take(self):
        taken, self.signals = self.signals, 0
        return taken


def follow(client, show=lambda event: None, **options):
    return migrate(client, "tcp://x:1", options, show, noted=lambda: contextlib.nullcontext(client))


def notices(shown):
    return [event["text"] for event in shown if event["type"] == "Notice"]


DONE = {"status": "completed", "x-pageferry-report": {"status": "completed"}}
CANCELLED = {"status": "cancelled", "x-pageferry-report": {"status": "cancelled"}}
REASON = "the connection was cut"
PAUSED = {"status": "postcopy-paused", "x-postcopy-paused": REASON, "x-guest-at": "destination"}


def test_a_pause_after_the_switch_ends_the_command():
    client = Client(["postcopy-active", "postcopy-paused", "completed"], [PAUSED, DONE])
    with pytest.raises(PostcopyPausedError, match="the connection was cut; the guest stands still there"):
        follow(client)


def test_a_pause_that_is_over_already_is_passed_by():
    """The message about an earlier pause may reach the client that recovers from it."""
    client = Client(["postcopy-paused", "completed"], [{"status": "postcopy-active"}, DONE])
    assert follow(client, resume=True) == {"status": "completed"}


def test_an_end_that_comes_with_the_answer_to_a_question_is_seen():
    """It was recovered and came to its end meanwhile; nothing more is sent, so nothing is to be waited for."""

    class Quick(Client):
        def execute(self, command, **arguments):
            answer = super().execute(command, **arguments)
            if self.executed == ["migrate", "query-migrate"]:
                self.statuses, self.news = ["completed"], [SIGNAL]
            return answer

    client = Quick(["postcopy-paused"], [DONE, DONE])
    assert follow(client)["status"] == "completed"
    assert client.news == [SIGNAL]


def test_another_process_at_the_same_socket_knows_nothing_of_the_migration():
    client = Client([DROPPED], [{}])
    with pytest.raises(OutcomeUnknownError):
        follow(client)


def test_the_first_signal_cancels_and_others_change_nothing():
    shown = []
    client = Client([SIGNAL, SIGNAL, [SIGNAL] * 5, "cancelled"], [CANCELLED])
    with pytest.raises(Interrupted, match="the guest stays at the source") as interrupted:
        follow(client, shown.append)
    assert interrupted.value.report == {"status": "cancelled"}
    assert client.executed.count("migrate_cancel") == 1
    assert notices(shown) == ["cancelling", *["cancelling: the outcome is waited for"] * 2]


def test_a_cancel_from_elsewhere_returns_when_the_migration_is_over():
    under_way = {"status": "active", "x-eta-reason": ""}
    client = Client([], [under_way, under_way, CANCELLED])
    client.statuses = ["active"]  # has come already, and is no end
    cancel_migration(client)
    assert client.executed == ["migrate_cancel", "query-migrate", "query-migrate", "query-migrate"]
    assert client.waited == 1


def test_a_cancel_of_nothing_waits_for_nothing():
    for state in ({}, DONE):
        client = Client([], [state])
        cancel_migration(client)
        assert client.waited == 0
    with pytest.raises(QmpError, match="too late"):
        cancel_migration(Client([], [], too_late=True))


def test_a_cancel_that_comes_too_late_is_told_as_what_happened():
    client = Client([SIGNAL, SIGNAL, "completed"], [DONE])
    assert follow(client) == {"status": "completed"}


def test_a_signal_after_the_switch_says_that_it_is_too_late_and_follows_on():
    shown = []
    client = Client([[SIGNAL] * 3, "completed"], [DONE], too_late=True)
    assert follow(client, shown.append) == {"status": "completed"}
    assert notices(shown) == ["too late to cancel: so; a later Ctrl-C leaves it to go on by itself"]


def test_a_later_signal_after_the_switch_leaves_it_to_itself():
    state = {"status": "postcopy-active", "x-guest-at": "destination"}
    client = Client([SIGNAL, SIGNAL], [state], too_late=True)
    with pytest.raises(LeftAloneError, match="goes on by itself") as left:
        follow(client)
    assert left.value.guest_at is GuestAt.DESTINATION


def test_no_signal_leaves_a_guest_that_is_being_handed_over():
    """Its process says SOURCE as long as the answer is awaited: to leave with that would be to guess."""
    shown = []
    client = Client([SIGNAL, SIGNAL, "completed"], [{"status": "active", "x-guest-at": "source"}, DONE], too_late=True)
    assert follow(client, shown.append) == {"status": "completed"}
    assert notices(shown)[1:] == ["the guest is being handed over: the answer is waited for"]


def test_a_process_that_goes_away_leaves_the_outcome_unknown():
    with pytest.raises(OutcomeUnknownError) as unknown:
        follow(Client([SIGNAL, GONE], []))
    assert unknown.value.guest_at is GuestAt.UNKNOWN
    assert unknown.value.hint


def test_a_client_that_was_dropped_comes_back_for_the_outcome():
    """The process drops a client that reads nothing for long: a terminal stopped by Ctrl-S, or a stopped command."""
    assert follow(Client([DROPPED], [DONE])) == {"status": "completed"}
    with pytest.raises(PostcopyPausedError):
        follow(Client([DROPPED], [PAUSED]))
    active = {"status": "active"}
    assert follow(Client([DROPPED, DROPPED, "completed"], [active, active, DONE])) == {"status": "completed"}


def test_a_cancel_that_a_drop_has_swallowed_is_said_again():
    client, swallowed = Client([SIGNAL, "cancelled"], [{"status": "active"}, CANCELLED]), []

    def execute(command, sound=client.execute):
        if command == "migrate_cancel" and not swallowed:
            swallowed.append(command)
            raise VmError("the guest process did not take it")
        return sound(command)

    client.execute = lambda command, **arguments: execute(command)
    with pytest.raises(Interrupted):
        follow(client)
    assert client.executed.count("migrate_cancel") == 1
