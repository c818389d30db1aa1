"""Exit codes: the documents and the code say the same of them."""

import re
from pathlib import Path

import pytest

from pageferry.cli import main
from pageferry.cli.outcome import ExitCode, exit_code_of, exit_code_of_guest
from pageferry.core.errors import (
    GuestAt,
    KvmError,
    MigrationError,
    OrderError,
    PageferryError,
    RefusedError,
    UnsupportedError,
    UsageError,
)
from pageferry.core.vm import GuestEnd

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("document", ["README.md", "docs/guide/exit-codes.md"])
def test_a_document_lists_every_code_with_its_meaning(document):
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / document).read_text(), re.M)
    assert rows == [(str(int(code)), code.meaning) for code in ExitCode]


def test_the_first_code_names_every_command_that_only_tells_something():
    assert {*re.findall("`([a-z]+)`", ExitCode.DEFECT.meaning)} == main._TELL | {"console"}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError(), 1),
        (UsageError("no such name"), 2),
        (RefusedError("the disk is in use"), 2),
        (MigrationError("cut", phase="setup", guest_at=GuestAt.SOURCE), 3),
        (MigrationError("cut", phase="handoff", guest_at=GuestAt.UNKNOWN), 4),
        (MigrationError("cut", phase="postcopy", guest_at=GuestAt.DESTINATION), 11),
        (UnsupportedError("kvm", "not here"), 5),
        (KvmError("KVM_RUN", 5), 6),
        (PageferryError("gone"), 6),
        (OrderError("too early"), 7),
    ],
)
def test_an_error_ends_the_command_with_its_code(error, code):
    assert exit_code_of(error) == code


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (None, 0),
        (GuestEnd(exit_code=0), 0),
        (GuestEnd(exit_code=255), 255),
        (GuestEnd(exit_code=256), 8),
        (GuestEnd(crash="triple fault"), 9),
        (GuestEnd(exit_code=0, reset=True), 0),
    ],
)
def test_a_guest_process_ends_with_the_code_of_its_guest_s_end(end, code):
    assert exit_code_of_guest(end) == code
