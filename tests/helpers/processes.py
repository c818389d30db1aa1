"""Processes of pageferry: how the tests start, watch and surely end them."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading

import forkserver
import pytest
from at_work import until

from pageferry.cli import main
from pageferry.core.errors import VmError
from pageferry.engine.wire.channel import Endpoint
from pageferry.vmm.qmp_client import QmpClient

PAGEFERRY = [sys.executable, "-m", "pageferry"]
#: How long a process may take for what it is sure to do.
GIVE_UP_S = 120
POLL_S = 0.01


#: Becomes a program that the kernel ends with the process that started it, however that ends.
_DIES_WITH_US = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG\n"
    "if os.getppid() == int(sys.argv[1]): os.execvp(sys.argv[2], sys.argv[2:])"
)


def launch(command, **options):
    """Start a program, which outlives this process by no means; :func:`reap` it. From the main thread only."""
    if command[: len(PAGEFERRY)] == PAGEFERRY and forkserver.can_start():
        return forkserver.start(command[len(PAGEFERRY) :], **options)
    return subprocess.Popen([sys.executable, "-c", _DIES_WITH_US, str(os.getpid()), *map(str, command)], **options)


def reap(popen):
    """End a process, if it has not ended, and leave nothing of it behind."""
    popen.kill()
    popen.wait()
    for stream in (popen.stdin, popen.stdout, popen.stderr):
        if stream is not None:
            stream.close()


#: Commands that only ask a guest's process, or look at files.
_CLIENTS = {"migrate", "switch", "cancel", "limits", "save", "inspect", "status", "pause", "resume", "shutdown", "quit"}


@contextlib.contextmanager
def _handlers_kept():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def command(*arguments):
    """Run a command to its end in this process; from the main thread only. What it says goes where it always does."""
    argv, sys.argv = sys.argv, ["pageferry", *map(str, arguments)]
    try:
        with _handlers_kept(), pytest.raises(SystemExit) as ended:
            main.run()
    finally:
        sys.argv = argv
    return ended.value.code


def cli(*arguments, **options):
    """Run a command of pageferry's to its end.

    One that only asks runs in this process, if nothing is against it: to begin a process takes most of a second.
    """
    if arguments and arguments[0] in _CLIENTS and not options and threading.current_thread() is threading.main_thread():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = command(*arguments)
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
    if not options and forkserver.can_start():
        with forkserver.start(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as popen:
            try:
                out, err = popen.communicate(timeout=GIVE_UP_S)
            except BaseException:
                popen.kill()
                raise
        return subprocess.CompletedProcess(arguments, popen.returncode, out, err)
    options = {"capture_output": True, "text": True, "timeout": GIVE_UP_S, "check": False, **options}
    return subprocess.run([*PAGEFERRY, *map(str, arguments)], **options)


def one_line(result):
    """A failure says one line (and perhaps a hint and what it did so far), no traceback; return the line."""
    assert "Traceback" not in result.stderr
    besides = ("hint:", "report:", "machine:", "warning:", "round", "stop")
    lines = [line for line in result.stderr.splitlines() if not line.startswith(besides)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("pageferry: ")
    return lines[0]


class Process:
    """A process with a control socket; its maker ends it (the fixture ``start`` does).

    ``within`` is what its command is run by. What its guest prints is in the file ``output``, what it says itself in
    ``log``. It finds modules in ``folder``.
    """

    def __init__(self, folder, name, *arguments, within=()):
        self.control = folder / f"{name}.sock"
        self.output = folder / f"{name}.out"
        self.log = folder / f"{name}.log"
        command = [*within, *PAGEFERRY, *map(str, arguments), "--control", str(self.control)]
        path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        with self.output.open("wb") as output, self.log.open("wb") as log:
            self.popen = launch(
                command, stdout=output, stderr=log, env=os.environ | {"PYTHONPATH": path}, start_new_session=True
            )
        try:
            self.until(self._answers, "control socket")
        except BaseException:
            self.end()
            raise

    def _answers(self):
        assert self.popen.poll() is None, self.log.read_text()
        try:
            QmpClient(self.control).close()
        except VmError:
            return False
        return True

    def until(self, condition, what):
        """Wait for what the process is to do."""
        return until(condition, lambda: f"{what}: {self.log.read_text()}", POLL_S)

    def ask(self, command, **arguments):
        """Ask at the control socket."""
        with QmpClient(self.control) as client:
            return client.execute(command, **arguments)

    def status(self):
        """What the guest does."""
        return self.ask("query-status")["status"]

    def work(self):
        """The operations that the guest has done."""
        return sum(self.ask("x-query-guest")["work"])

    def runs_on(self):
        """The guest does more work."""
        before = self.work()
        self.until(lambda: self.work() > before, "work")
        return self.status() == "running"

    def endpoint(self):
        """Where it waits for a guest."""
        return Endpoint.parse(self.ask("x-query-guest")["listening"])

    def end(self):
        """End it, now and without a word; may be repeated."""
        reap(self.popen)
