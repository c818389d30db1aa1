"""How a command behaves in a shell: results on standard output, all else on standard error; signals; exit codes."""

import json
import re
import signal
from contextlib import suppress
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING, Any

from pageferry.core.errors import (
    GuestAt,
    MigrationError,
    PageferryError,
    RemoteStreamError,
    UnsupportedError,
    UsageError,
)


class Interrupted(Exception):  # no error: the user wanted it
    """The user pressed Ctrl-C and the migration was cancelled; the guest runs on at the source."""

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__("cancelled")
        self.report = report


class ExitCode(IntEnum):
    """Every code that a command ends with; ``meaning`` is what README.md and docs/guide/exit-codes.md say of it.

    A guest process whose guest ends ends with the guest's own code, which may be any of these.
    """

    meaning: str

    def __new__(cls, code: int, meaning: str) -> "ExitCode":
        """Return the code with its meaning."""
        self = int.__new__(cls, code)
        self._value_ = code
        self.meaning = meaning
        return self

    DONE = 0, "done; also a guest ended by Ctrl-C or `quit`"
    DEFECT = 1, "a defect of pageferry (`--debug` shows where), or the reader of standard output closed it"
    USAGE = 2, "wrong usage"
    GUEST_AT_SOURCE = 3, "the migration or save did not happen; the guest is at the source, as it was"
    GUEST_UNKNOWN = 4, "the commit was not answered: whether the guest moved is not known, and the source is frozen"
    UNSUPPORTED = 5, "this host lacks what was asked for"
    PROCESS = 6, "a guest process or its control socket failed"
    STREAM = 7, "`restore`, `inspect`: the stream is wrong or not whole"
    GUEST_FAILED = 8, "`run`, `receive`, `restore`: the guest ended with a code above 255; a smaller one is passed on"
    GUEST_CRASHED = 9, "`run`, `receive`, `restore`: the guest crashed"
    DIFFERENT = 10, "`inspect --diff`: the streams differ"
    GUEST_SWITCHED = 11, "post-copy: the guest is at the destination, and needs pages that are still at the source"
    INTERRUPTED = 130, "`demo`, `migrate`, `save`: interrupted; the guest is at the source"


if TYPE_CHECKING:
    from rich.console import Console

    OUT: Console
    ERR: Console


def __getattr__(name: str) -> "Console":
    """Make ``OUT`` or ``ERR`` when a module that draws on it is loaded: rich takes longer than most commands."""
    if name not in ("OUT", "ERR"):
        raise AttributeError(name)
    return _console(stderr=name == "ERR")


@cache
def _console(*, stderr: bool) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


_BY_GUEST_AT = {
    GuestAt.SOURCE: ExitCode.GUEST_AT_SOURCE,
    GuestAt.UNKNOWN: ExitCode.GUEST_UNKNOWN,
    GuestAt.DESTINATION: ExitCode.GUEST_SWITCHED,
}


def complain(message: str, hint: str = "") -> None:
    """Print the one line that tells an error, and its hint."""
    _console(stderr=True).print(f"pageferry: {message}", style="red", markup=False, soft_wrap=True)
    if hint:
        _console(stderr=True).print(f"hint: {hint}", markup=False, soft_wrap=True)


def tell(message: str) -> None:
    """Print one line of news on standard error, if anybody reads it."""
    with suppress(OSError):  # the reader has gone; the guest goes on
        _console(stderr=True).print(f"pageferry: {message}", markup=False, soft_wrap=True)


def print_object(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output; a list of plain numbers is on one line."""
    # A newline cannot be inside a JSON string.
    text = json.dumps(value, indent=2)
    print(re.sub(r"\[\n[-+.eE\d,\s]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text))


def end_as_by_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP do what Ctrl-C does: cancel, and end whatever was started."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


def exit_code_of(error: BaseException) -> ExitCode:
    """Return the exit code of a command that ends by an error."""
    if isinstance(error, UsageError):
        return ExitCode.USAGE
    if isinstance(error, MigrationError):
        return _BY_GUEST_AT[error.guest_at]
    if isinstance(error, UnsupportedError):
        return ExitCode.UNSUPPORTED
    if isinstance(error, RemoteStreamError):
        return ExitCode.STREAM
    return ExitCode.PROCESS if isinstance(error, PageferryError) else ExitCode.DEFECT
