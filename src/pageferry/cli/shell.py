"""A command as a process: its exit code, its standard streams, signals, and its one JSON object.

Every command runs inside :func:`run`, and none handles any of this itself. Results go to standard output, all else to
standard error. What happened decides the exit code, whatever becomes of the streams: progress and results that cannot
be written are dropped.
"""

import codecs
import contextlib
import errno
import fcntl
import io
import json
import locale
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Self, TextIO

from pageferry.cli.printable import printable
from pageferry.core.descriptors import write_all
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


if TYPE_CHECKING:
    from rich.console import Console

    from pageferry.core.vm import GuestEnd

    OUT: Console
    ERR: Console


def __getattr__(name: str) -> "Console":
    """Make ``OUT`` or ``ERR`` when a module that draws on it is loaded: rich takes longer than most commands."""
    if name not in ("OUT", "ERR"):
        raise AttributeError(name)
    return _console(stderr=name == "ERR")


@cache
def _console(*, stderr: bool) -> "Console":
    from pageferry.cli.plain_console import PlainConsole

    return PlainConsole(stderr=stderr, highlight=False)


def is_watched(console: "Console") -> bool:
    """Tell whether a person watches while it is written: a terminal, whatever colours were asked for in a log."""
    return console.is_terminal and console.file.isatty()


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


# -- what is said ------------------------------------------------------------------------------------------------------


def complain(message: str, hint: str = "") -> None:
    """Print the one line that tells an error, and its hint."""
    _console(stderr=True).print(f"pageferry: {message}", style="red", markup=False, soft_wrap=True)
    if hint:
        _console(stderr=True).print(f"hint: {hint}", markup=False, soft_wrap=True)


def tell(message: str) -> None:
    """Print one line of news on standard error."""
    say(f"pageferry: {message}")


def say(line: str) -> None:
    """Print one line on standard error, without rich: a guest's process begins before that would be loaded."""
    print(printable(line), file=sys.stderr, flush=True)


def print_object(value: Json) -> None:
    """Print one JSON object on standard output; a list of plain numbers is on one line."""
    # A newline cannot be inside a JSON string.
    text = json.dumps(value, indent=2)
    print(re.sub(r"\[\n[-+.eE\d,\s]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text))


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


# -- signals -----------------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """A signal asked the command to end, and nothing was under way that had to be ended with care."""


class Requests:
    """Signals that came while they were only noted; to be waited for by ``select``."""

    def __init__(self) -> None:
        self._readable, self._writable = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        """Return what is readable when a signal has come."""
        return self._readable

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Have the interpreter note each signal that has a handler, whichever thread the kernel gives it to."""
        before = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)

    def take(self) -> int:
        """Return how many have come since the last call."""
        try:
            return len(os.read(self._readable, 4096))
        except BlockingIOError:
            return 0

    def wait(self, timeout_s: float) -> bool:
        """Wait for one, or for so long; return whether one has come."""
        return bool(select.select([self], [], [], timeout_s)[0])

    def close(self) -> None:
        """Note nothing more."""
        os.close(self._readable)
        os.close(self._writable)


def _do_nothing() -> None:
    """Let a signal be noted, and no more."""


class _Signals:
    """SIGINT, SIGTERM and SIGHUP, inside a ``with`` block; one that is ignored already stays ignored.

    The first raises :class:`Stopped` in the main thread, unless a block of :meth:`calling` or :meth:`noted` has it
    otherwise. After it, and after such a block, others change nothing.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._instead: Callable[[], None] | None = None
        self._stopped = False
        self._afterwards: signal.Handlers | None = None

    def __enter__(self) -> Self:
        self._stopped = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        afterwards, self._afterwards = self._afterwards, None
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before if afterwards is None else afterwards)

    def _came(self, number: int, frame: FrameType | None) -> None:
        if self._instead is not None:
            self._instead()
        elif not self._stopped:
            self._stopped = True
            raise Stopped
        else:
            with contextlib.suppress(OSError):  # no print: it may have interrupted one
                os.write(2, b"pageferry: ending already\n")

    def outlive(self) -> None:
        """Have the next block leave them ignored at its end: the process ends with an outcome that it has told."""
        self._afterwards = signal.SIG_IGN

    def end(self) -> None:
        """Let no more of them raise."""
        self._stopped = True

    @contextlib.contextmanager
    def calling(self, function: Callable[[], None]) -> Iterator[None]:
        """Have each signal call ``function``, which may do nothing but a plain store or a write."""
        self._instead, before = function, self._instead
        try:
            yield
        finally:
            self.end()
            self._instead = before

    @contextlib.contextmanager
    def noted(self) -> Iterator[Requests]:
        """Have each signal only noted."""
        with contextlib.closing(Requests()) as requests, self.calling(_do_nothing), requests.noting():
            yield requests


SIGNALS = _Signals()


# -- standard streams --------------------------------------------------------------------------------------------------


class OutputLostError(Exception):
    """Standard output cannot be written, and it is all that the command is for."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Descriptor(io.RawIOBase):
    """An output that may be gone: from the first failure on everything is dropped.

    A descriptor that does not block is waited for; one that was ``closed`` fails.
    """

    def __init__(self, fd: int, *, needed: bool, closed: bool) -> None:
        self._fd = fd
        self._closed = closed
        self.needed = needed
        """Whether the first failure is raised."""
        self.written = False
        self.dropped: OSError | None = None
        """Why something was dropped without a word."""
        self._lost = False

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def fileno(self) -> int:
        return self._fd

    def write(self, data: Any) -> int:  # noqa: ANN401  # any buffer
        self.written = self.written or bool(len(data))
        if not self._lost:
            try:
                if self._closed and len(data):
                    raise OSError(errno.EBADF, "it is closed")
                write_all(self._fd, data)
            except OSError as error:
                self._lost = True
                if self.needed:
                    raise OutputLostError(error) from error
                self.dropped = error
        return len(data)


#: What stands for characters that an encoding has not: one each, so that frames stay straight; others are escaped.
_PLAIN = {"→": ">", "…": ".", "µ": "u", "·": ".", **dict.fromkeys("█▉▊▋▌▍▎▏▐▕", "#")}


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """Put something readable in the place of what cannot be encoded; a byte of a file's name is shown in hex."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = ""
    for character in error.object[error.start : error.end]:
        byte = ord(character) - 0xDC00
        shown += f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else _PLAIN.get(character) or ascii(character)[1:-1]
    return shown, error.end


codecs.register_error("pageferry.plainly", _plainly)


class _Streams:
    """Standard output and error as the commands use them, inside a ``with`` block.

    Descriptors that were closed are ``/dev/null``, so that nothing else that is opened gets their numbers. A stream
    without a descriptor, which a caller in this process put there, is used as it is.
    """

    def __enter__(self) -> Self:
        self._before = sys.stdout, sys.stderr
        for fd, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
            _reserve(fd, flags)
        self.output_is_closed = sys.stdout is None
        sys.stdout, self._results = _outlet(sys.stdout, 1, needed=True)
        sys.stderr, _ = _outlet(sys.stderr, 2, needed=False)
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout, sys.stderr = self._before

    def make_results_a_courtesy(self) -> None:
        """Let the command end as it does though standard output cannot be written: it does more than tell."""
        if self._results is not None:
            self._results.needed = False

    def said_anything(self) -> bool:
        """Tell whether anything was written on standard output."""
        self.flush()
        return sys.stdout.tell() > 0 if self._results is None else self._results.written

    def flush(self) -> None:
        """Let out what is buffered."""
        sys.stdout.flush()
        sys.stderr.flush()

    def complain_of_loss(self) -> None:
        """Say that results were dropped, if they were."""
        self.flush()
        if self._results is not None and (error := self._results.dropped) is not None:
            complain(f"the result could not be written to standard output: {error.strerror}")
            self.flush()


STREAMS = _Streams()


def standard_input(needed_by: str = "") -> int:
    """Return the descriptor of standard input; ``/dev/null`` if it was closed.

    Args:
        needed_by: what makes no sense without; "": nothing does.

    Raises:
        UsageError: it was closed, and is needed.
    """
    if sys.stdin is None and needed_by:
        raise UsageError(f"{needed_by} needs a standard input", hint="it is closed")
    return 0 if sys.stdin is None else sys.stdin.fileno()


def standard_output(carries: str = "") -> int:
    """Return the descriptor of standard output; ``/dev/null`` if it was closed.

    Args:
        carries: what is written there, and is said to be dropped if it was closed; "": nothing is to be said.
    """
    if STREAMS.output_is_closed and carries:
        tell(f"standard output is closed: {carries} is dropped")
    return sys.stdout.fileno()


def _reserve(fd: int, flags: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        null = os.open(os.devnull, flags)
        if null != fd:
            os.dup2(null, fd)
            os.close(null)


def _outlet(stream: TextIO | None, fd: int, *, needed: bool) -> tuple[TextIO, _Descriptor | None]:
    # What to write on in the place of a standard stream; None if it was closed.
    encoding, closed = locale.getencoding(), stream is None
    if stream is not None:
        encoding = stream.encoding
        try:
            fd = stream.fileno()
        except OSError:
            return stream, None
        with contextlib.suppress(OSError):
            stream.flush()
    outlet = _Descriptor(fd, needed=needed, closed=closed)
    buffer = io.BufferedWriter(outlet)
    return io.TextIOWrapper(buffer, encoding, "pageferry.plainly", line_buffering=not needed), outlet
