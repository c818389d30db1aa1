"""The standard streams of a command, and what is said on them.

Results go to standard output, all else to standard error. Progress and results that cannot be written are dropped.
"""

import codecs
import contextlib
import errno
import fcntl
import io
import json
import locale
import os
import re
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, Self, TextIO

from pageferry.cli.printable import printable
from pageferry.core.descriptors import write_all
from pageferry.core.errors import UsageError

Json = dict[str, Any]

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
    from pageferry.cli.plain_console import PlainConsole

    return PlainConsole(stderr=stderr, highlight=False)


def is_watched(console: "Console") -> bool:
    """Tell whether a person watches while it is written: a terminal, whatever colours were asked for in a log."""
    return console.is_terminal and console.file.isatty()


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


# -- the streams themselves --------------------------------------------------------------------------------------------


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
