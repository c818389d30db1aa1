"""The outcome of a command: its exit code, its one line of error, and its one JSON object.

Every command runs inside :func:`run`, and none handles any of this itself. What happened decides the exit code,
whatever becomes of the standard streams (:mod:`pageferry.cli.stdio`).
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NoReturn

from pageferry.cli.signals import SIGNALS, Stopped
from pageferry.cli.stdio import STREAMS, OutputLostError, complain, print_object
from pageferry.core.errors import (
    GuestAt,
    MigrationError,
    PageferryError,
    RefusedError,
    RemoteStreamError,
    UnsupportedError,
    UsageError,
)
from pageferry.vmm.qmp_error import ErrorKind, QmpError

if TYPE_CHECKING:
    from pageferry.core.vm import GuestEnd

_log = logging.getLogger(__name__)
Json = dict[str, Any]
_MAX_EXIT_CODE = 255


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
    DEFECT = (
        1,
        "a defect (`--debug` shows where); "
        "`status`, `inspect`, `doctor`, `console`, `xen`: standard output could not be written",
    )
    USAGE = 2, "wrong usage, or refused by a guest process as it is now"
    GUEST_AT_SOURCE = 3, "the migration or save did not happen; the guest is at the source, as it was"
    GUEST_UNKNOWN = 4, "the commit was not answered: whether the guest moved is not known, and the source is frozen"
    UNSUPPORTED = 5, "this host lacks what was asked for"
    PROCESS = 6, "a guest process or its control socket failed"
    STREAM = 7, "`restore`, `inspect`: the stream is wrong or not whole"
    GUEST_FAILED = 8, "`run`, `receive`, `restore`: the guest ended with a code above 255; a smaller one is passed on"
    GUEST_CRASHED = 9, "`run`, `receive`, `restore`: the guest crashed"
    DIFFERENT = 10, "`inspect --diff`: the streams differ"
    GUEST_SWITCHED = 11, "post-copy: the guest is at the destination, and needs pages that are still at the source"
    INTERRUPTED = (
        130,
        "interrupted: nothing was begun, or `migrate`, `save`, `demo`: cancelled; the guest is at the source",
    )


_BY_GUEST_AT = {
    GuestAt.SOURCE: ExitCode.GUEST_AT_SOURCE,
    GuestAt.UNKNOWN: ExitCode.GUEST_UNKNOWN,
    GuestAt.DESTINATION: ExitCode.GUEST_SWITCHED,
}
_BY_KIND = {
    ErrorKind.USAGE: ExitCode.USAGE,
    ErrorKind.UNSUPPORTED: ExitCode.UNSUPPORTED,
    ErrorKind.FAILED: ExitCode.PROCESS,
}


def exit_code_of(error: BaseException) -> ExitCode:
    """Return the exit code of a command that ends by an error."""
    if isinstance(error, QmpError):
        return _BY_KIND[error.kind]
    if isinstance(error, UsageError | RefusedError):
        return ExitCode.USAGE
    if isinstance(error, MigrationError):
        return _BY_GUEST_AT[error.guest_at]
    if isinstance(error, UnsupportedError):
        return ExitCode.UNSUPPORTED
    if isinstance(error, RemoteStreamError):
        return ExitCode.STREAM
    return ExitCode.PROCESS if isinstance(error, PageferryError) else ExitCode.DEFECT


def exit_code_of_guest(end: "GuestEnd | None") -> int:
    """Return the exit code of a guest process by how its guest ended; None: it was told to quit before."""
    if end is None:
        return ExitCode.DONE
    if end.crash is not None:
        return ExitCode.GUEST_CRASHED
    code = end.exit_code or 0
    return ExitCode.GUEST_FAILED if code > _MAX_EXIT_CODE else code


# -- a command from its begin to its end -------------------------------------------------------------------------------


class Interrupted(Exception):  # no error: the user wanted it
    """A migration or save was cancelled; the guest is at the source. ``report`` is that of the attempt."""

    def __init__(self, report: Json) -> None:
        super().__init__("cancelled; the guest stays at the source")
        self.report = report


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ending:
    """How a command ended.

    ``message``: one line, empty if all is well; ``guest_at``: None where no migration is concerned; ``report``: of a
    migration that failed.
    """

    code: int
    message: str = ""
    hint: str = ""
    status: str = "failed"
    guest_at: GuestAt | None = None
    report: Json = field(default_factory=dict)

    def to_json(self) -> Json:
        return self.report | {
            "status": self.status,
            "error": self.message,
            "hint": self.hint,
            "guest_at": self.guest_at,
        }


def run(command: Callable[[], object], refusal: type[Exception]) -> NoReturn:
    """Run a command and end the process with its exit code; an error is one line and a hint, never a traceback.

    With ``--json`` among the arguments there is one object on standard output, however the command ends.

    Args:
        command: does it all, and returns the exit code, or something else for DONE.
        refusal: what it raises when the command line is wrong.
    """
    with STREAMS, SIGNALS:
        try:
            ending = _ending_of(command, refusal)
        except Stopped as error:  # at the very end
            ending = _ending_by(error, refusal)
        STREAMS.make_results_a_courtesy()
        if ending.message:
            complain(ending.message, ending.hint)
            if _wants_json() and not STREAMS.said_anything():
                print_object(ending.to_json())
        STREAMS.complain_of_loss()
    sys.exit(ending.code)


def _ending_of(command: Callable[[], object], refusal: type[Exception]) -> _Ending:
    try:
        result = command()
        STREAMS.flush()  # before it counts as done: what is buffered may be all that was asked for
    except BaseException as error:
        _log.debug("the command ended by an error", exc_info=error)
        return _ending_by(error, refusal)
    finally:
        SIGNALS.end()
    return _Ending(code=result if isinstance(result, int) else ExitCode.DONE)


def _usage_hint(refusal: str) -> str:
    for accel in ("kvm", "soft"):
        if f"'--machine': '{accel}'" in refusal:
            return f"--machine is the guest's model, plain or pc; what runs it is --accel {accel}"
    return "pageferry --help tells more"


def _ending_by(error: BaseException, refusal: type[Exception]) -> _Ending:
    if isinstance(error, refusal):
        refused: Any = error  # its class depends on the version of the parser
        return _Ending(
            code=ExitCode.USAGE, message=refused.format_message(), hint=_usage_hint(refused.format_message())
        )
    if isinstance(error, Interrupted):
        return _Ending(
            code=ExitCode.INTERRUPTED,
            message=str(error),
            status="cancelled",
            guest_at=GuestAt.SOURCE,
            report=error.report,
        )
    if isinstance(error, Stopped):
        return _Ending(code=ExitCode.INTERRUPTED, message="interrupted", status="cancelled")
    if isinstance(error, OutputLostError):
        message = "" if isinstance(error.cause, BrokenPipeError) else f"standard output: {error.cause.strerror}"
        return _Ending(code=ExitCode.DEFECT, message=message)
    if isinstance(error, SystemExit):
        return _Ending(code=error.code if isinstance(error.code, int) else ExitCode.DEFECT)
    if isinstance(error, PageferryError):
        return _Ending(
            code=exit_code_of(error),
            message=str(error),
            hint=error.hint,
            guest_at=getattr(error, "guest_at", None),
            report=getattr(error, "report", {}),
        )
    if isinstance(error, OSError):
        from pageferry.core.os_hints import is_resource, resource_hint  # which few commands need

        if is_resource(error):
            message = f"this process or host is out of a resource: {error.strerror}"
            return _Ending(code=ExitCode.PROCESS, message=message, hint=resource_hint(error))
    hint = "this is a defect: pageferry --debug ... shows where"
    return _Ending(code=ExitCode.DEFECT, message=f"internal error: {error!r}", hint=hint)


def _wants_json() -> bool:
    arguments = sys.argv[1:]
    return "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)
