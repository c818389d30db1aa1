"""One line of error and one JSON object, however a command ends."""

import json

import pytest
from ended_command import WrongCommandLine, ending, failing

from pageferry.cli.outcome import Interrupted
from pageferry.cli.signals import Stopped
from pageferry.cli.stdio import print_object
from pageferry.core.errors import GuestAt, MigrationError, UnsupportedError, UsageError
from pageferry.vmm.qmp_error import ErrorKind, QmpError


@pytest.mark.parametrize(
    ("error", "code", "status", "guest_at"),
    [
        (WrongCommandLine(), 2, "failed", None),
        (UsageError("cannot be", hint="do this"), 2, "failed", None),
        (QmpError("not now", hint="do this"), 2, "failed", None),
        (QmpError("not here", kind=ErrorKind.UNSUPPORTED), 5, "failed", None),
        (QmpError("broken", kind=ErrorKind.FAILED), 6, "failed", None),
        (UnsupportedError("kvm", "not here"), 5, "failed", None),
        (MigrationError("cut", phase="setup", guest_at=GuestAt.SOURCE, hint="do this"), 3, "failed", "source"),
        (MigrationError("cut", phase="handoff", guest_at=GuestAt.UNKNOWN), 4, "failed", "unknown"),
        (Interrupted({"status": "cancelled"}), 130, "cancelled", "source"),
        (Stopped(), 130, "cancelled", None),
        (ZeroDivisionError("it"), 1, "failed", None),
    ],
    ids=lambda value: repr(value) if isinstance(value, BaseException) else "",
)
def test_a_failure_is_one_line_and_with_json_one_object(capfd, error, code, status, guest_at):
    assert ending(failing(error), "status") == code
    said = capfd.readouterr()
    assert said.out == ""
    assert sum(line.startswith("pageferry: ") for line in said.err.splitlines()) == 1
    assert ending(failing(error), "status", "--json") == code
    told = capfd.readouterr()
    assert told.err == said.err
    found = json.loads(told.out)
    assert (found["status"], found["guest_at"]) == (status, guest_at)
    assert f"pageferry: {found['error']}\n" in told.err
    assert found["hint"] == getattr(error, "hint", found["hint"])


def test_what_was_told_already_stays_the_only_object(capfd):
    def command():
        print_object({"status": "half"})
        raise UsageError("the rest")

    assert ending(command, "inspect", "--json") == 2
    assert json.loads(capfd.readouterr().out) == {"status": "half"}


def test_an_argument_after_two_dashes_is_not_an_option(capfd):
    assert ending(failing(UsageError("x")), "inspect", "--", "--json") == 2
    assert capfd.readouterr().out == ""
