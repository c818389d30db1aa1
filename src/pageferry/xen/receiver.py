"""Receiver: ``xl migrate-receive`` on another host, behind a command that carries its standard streams.

::

    source                                receiver
      | <== "xl migration receiver ready, send binary domain data." and a newline
      | == xl header, configuration, libxl stream ==>
      | <== "domain received, ready to unpause"
      | == "domain is yours, you are cleared to unpause" ==>    from here on it may run there
      | <== "my copy unpause results are as follows", one byte: 0 it runs
      |                                                         else it does not, and is destroyed there:
      | <== "domain is yours, you are cleared to unpause"

Each of these but the banner ends with a NUL. A receiver whose input ends before it was given the domain says so, and
then destroys its copy. One that is killed, or cannot say it, leaves its copy behind, paused, as NAME--incoming: so a
receiver that is to end is not killed, and heard to its end.

Source: Xen, ``xl migrate-receive`` of 4.17; the words are its protocol.
"""

import contextlib
import fcntl
import os
import select
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence

from pageferry.core.errors import UsageError
from pageferry.core.gather import MAX_BUFFERS, first_left
from pageferry.engine.wire.pacer import Pacer

BANNER = b"xl migration receiver ready, send binary domain data.\n"
READY = b"domain received, ready to unpause\0"
GO = b"domain is yours, you are cleared to unpause\0"
REPORT = b"my copy unpause results are as follows\0"
_LAST_BYTES = 2000
#: How long a receiver may take to destroy its copy and end.
_END_S = 60.0
_PIPE_BYTES = 1 << 20


class ReceiverError(OSError):
    """The receiver ended, said something else, or nothing for too long; the text is for a person."""


class Receiver:
    """One receiver; an :class:`~pageferry.engine.pages.send.Outlet`.

    Args:
        command: what to run; its standard input and output are the receiver's.
        timeout_s: how long it may neither take nor say anything that is waited for.

    Raises:
        UsageError: there is no such program.
    """

    def __init__(self, command: Sequence[str], timeout_s: float) -> None:
        self.pacer: Pacer | None = None
        self.sent_bytes = 0
        self._command = command[0]
        self._timeout_s = timeout_s
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed by see_off()
        self._aborted = threading.Event()
        self._lock = threading.Lock()  # of the pipe that wakes
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, start_new_session=True
            )
        except OSError as error:
            self._said.close()
            raise UsageError(f"cannot run {command[0]}: {error.strerror}") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        with contextlib.suppress(OSError):  # it is slower without
            fcntl.fcntl(self._to, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._woken, self._wake = os.pipe()

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send all of ``buffers`` in order, when the pacer allows it.

        Raises:
            ReceiverError: it ended, or takes nothing.
        """
        queue = [memoryview(buffer) for buffer in buffers if len(buffer)]
        if self.pacer is not None:
            self._aborted.wait(self.pacer.reserve(sum(map(len, queue))))
        at = 0
        while at < len(queue):
            self._wait([], [self._to])
            try:
                written = os.writev(self._to, queue[at : at + MAX_BUFFERS])
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._failure("ended") from error
            self.sent_bytes += written
            at = first_left(queue, at, written)

    def expect(self, words: bytes) -> None:
        """Read what it says next, which is to be this.

        Raises:
            ReceiverError: it is not.
        """
        said = self.read(len(words))
        if said != words:
            raise ReceiverError(f"{self._command} answers what no xl migrate-receive does: {said[:40]!r}")

    def read(self, size_bytes: int) -> bytes:
        """Read so many bytes of what it says.

        Raises:
            ReceiverError: it ended, or says nothing.
        """
        said = b""
        while len(said) < size_bytes:
            self._wait([self._from], [])
            more = os.read(self._from, size_bytes - len(said))
            if not more:
                raise self._failure("ended")
            said += more
        return said

    def abort(self) -> None:
        """Have a thread that sends or waits come back soon; from any thread."""
        self._aborted.set()
        with self._lock:
            if self._wake >= 0:
                os.write(self._wake, b"x")

    def close(self) -> None:
        """Send no more, and return at once: one that was not given the domain ends. May be called twice."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()

    def see_off(self, end_s: float = _END_S) -> None:
        """Wait until it has ended; one that does not within ``end_s`` is killed. May be called twice."""
        self.close()
        with self._lock:
            if self._wake < 0:
                return
            os.close(self._wake)
            os.close(self._woken)
            self._wake = -1
        until_s = time.monotonic() + end_s
        while (left_s := until_s - time.monotonic()) > 0 and select.select([self._from], [], [], left_s)[0]:
            if not os.read(self._from, _LAST_BYTES):
                break
        try:
            self._process.wait(max(0.0, until_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._said.close()

    def _wait(self, readable: list[int], writable: list[int]) -> None:
        until_s = time.monotonic() + self._timeout_s
        found = select.select([*readable, self._woken], writable, [], self._timeout_s)
        if self._aborted.is_set():
            raise self._failure("was not waited for any longer")
        if not any(found) and time.monotonic() >= until_s:
            raise self._failure(f"said or took nothing for {self._timeout_s:g} s")

    def _failure(self, what: str) -> ReceiverError:
        """Return an error with the last line that the receiver has written on its standard error."""
        self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, self._said.tell() - _LAST_BYTES))
        lines = self._said.read().decode("utf-8", "replace").strip().splitlines()
        return ReceiverError(f"{self._command} {what}" + (f", its last words: {lines[-1].strip()}" if lines else ""))


def ssh_command(uri: str) -> list[str]:
    """Return the command that reaches the receiver at ``ssh://[USER@]HOST[:PORT]``.

    Raises:
        UsageError: it is no such address.
    """
    where, port = uri.removeprefix("ssh://"), ""
    host, colon, last = where.rpartition(":")
    if colon and last.isdecimal():
        where, port = host, last
    if not uri.startswith("ssh://") or not where or where.startswith("-") or "/" in where or where.isspace():
        raise UsageError(f"{uri} is no address of another dom0", hint="ssh://HOST, or --through COMMAND")
    return ["ssh", *(["-p", port] if port else []), "--", where, "xl", "migrate-receive"]


def through_command(command: str) -> list[str]:
    """Return the words of a command that a user gave.

    Raises:
        UsageError: they cannot be told apart, or there are none.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--through {command!r}: {error}") from error
    if not words:
        raise UsageError("--through has no command")
    return words
