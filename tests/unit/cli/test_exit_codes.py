"""Exit codes: the README, the command's own text and the code name the same ones."""

import re
from pathlib import Path

import pytest

from pageferry.cli import main
from pageferry.cli.shell import ExitCode, exit_code_of
from pageferry.core.errors import (
    GuestAt,
    KvmError,
    MigrationError,
    OrderError,
    PageferryError,
    UnsupportedError,
    UsageError,
)

README = Path(__file__).parents[3] / "README.md"


def test_the_readme_and_the_command_list_every_code():
    table = README.read_text().partition("| exit code | meaning |")[2].partition("\n\n")[0]
    in_readme = [int(code) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.M) for code in row.split(",")]
    in_command = [int(code) for code in re.findall(r"(?:Exit codes:|;)\s+(\d+)\s", main.__doc__)]
    assert in_readme == in_command == list(ExitCode)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError(), 1),
        (UsageError("no such name"), 2),
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
