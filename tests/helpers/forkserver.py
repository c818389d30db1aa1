"""Processes of pageferry that begin as forks of one that has loaded all of it: to load it takes most of a second.

What :func:`start` gives stands where ``python -m pageferry`` would be started. It is a process with all that makes one,
and goes on as ``python -m pageferry`` does from its first line; only its command line reads otherwise in ``/proc``.
"""

import contextlib
import ctypes
import functools
import gc
import importlib
import inspect
import json
import os
import pkgutil
import runpy
import socket
import subprocess
import sys
import threading
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SIGKILL = 9
#: The modules that the process that is forked from has loaded; all of pageferry where none are named.
PRELOADED: list[str] = []
_MESSAGE_BYTES = 1 << 17
#: The child's end of each pipe, and ours, by their names in ``subprocess.Popen``.
_PIPES = {"p2cread": "p2cwrite", "c2pwrite": "c2pread", "errwrite": "errread"}


def can_start() -> bool:
    """Whether a fork is what a new interpreter would be: some of the environment counts only when one begins."""
    return _Server.of_this_process().environment == _read_by_an_interpreter()


def start(arguments, **options) -> subprocess.Popen:
    """Start ``pageferry ARGUMENTS``, which ends with this process at the latest.

    Of what ``subprocess.Popen`` takes, ``options`` may have the streams and all that is about them, ``cwd``, ``env``
    and ``start_new_session``.
    """
    return _Forked([str(argument) for argument in arguments], **options)


class _Forked(subprocess.Popen):
    """What its base is, but for the way in which its process begins."""

    def _execute_child(self, *arguments):
        given = inspect.signature(subprocess.Popen._execute_child).bind(self, *arguments).arguments
        request = {
            "arguments": given["args"],
            "environment": dict(os.environ if given["env"] is None else given["env"]),
            "folder": os.fspath(given["cwd"] or os.getcwd()),
            "session": given["start_new_session"],
            "parent": os.getpid(),
        }
        streams = [given[end] if given[end] != -1 else number for number, end in enumerate(_PIPES)]
        self.pid = _Server.of_this_process().fork(request, streams)
        self._child_created = True
        pipes = {given[end] for end, other in _PIPES.items() if given[other] != -1}
        for fd in pipes | {getattr(self, "_devnull", -1)} - {-1}:
            os.close(fd)
        self._closed_child_pipe_fds = True


class _Server:
    """The process that is forked from, at the other end of a connection; it ends when that is closed."""

    def __init__(self):
        self.environment = _read_by_an_interpreter()
        self._turn = threading.Lock()
        self._channel, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            command = [sys.executable, __file__, str(there.fileno()), *PRELOADED]
            self._process = subprocess.Popen(command, pass_fds=[there.fileno()])

    @staticmethod
    @functools.cache
    def of_this_process():
        return _Server()

    def fork(self, request, streams):
        """Return the pid of a new child of this process."""
        with self._turn:
            # It is born an orphan, and this process adopts orphans for as long as that takes.
            _prctl(_PR_SET_CHILD_SUBREAPER, 1)
            try:
                socket.send_fds(self._channel, [json.dumps(request).encode()], streams)
                answer = self._channel.recv(_MESSAGE_BYTES)
            finally:
                _prctl(_PR_SET_CHILD_SUBREAPER, 0)
        assert answer, "the process that tests fork from has ended"
        return int(answer)


def _read_by_an_interpreter():
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("PYTHON", "LC_", "LANG")) and name != "PYTHONPATH"
    }


def _prctl(option, value):
    if ctypes.CDLL(None, use_errno=True).prctl(option, value) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _serve(channel):
    """Fork for each request; return, in the fork, what was requested."""
    while True:
        message, streams, _, _ = socket.recv_fds(channel, _MESSAGE_BYTES, 3)
        if not message:
            os._exit(0)
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            if child := os.fork():
                os.write(writer, str(child).encode())
                os._exit(0)
            channel.close()
            os.close(reader)
            os.close(writer)
            return json.loads(message), streams
        os.waitpid(between, 0)
        channel.send(os.read(reader, 64))
        for fd in (reader, writer, *streams):
            os.close(fd)


def _become(request, streams):
    """Make this process what it was asked for as."""
    while os.getppid() != request["parent"]:  # the one between may not have been waited for yet
        time.sleep(0.0001)
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != request["parent"]:
        os._exit(1)
    if request["session"]:
        os.setsid()
    for fd, number in zip(streams, range(3), strict=True):
        os.dup2(fd, number)
        os.close(fd)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        new = os.fdopen(number, "r" if number == 0 else "w", encoding=old.encoding, errors=old.errors, closefd=False)
        new.reconfigure(line_buffering=number == 2 or new.isatty())
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    os.chdir(request["folder"])
    before = os.environ.get("PYTHONPATH", "")
    os.environ.clear()
    os.environ.update(request["environment"])
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [os.getcwd(), *given, *(path for path in sys.path[1:] if path not in before.split(os.pathsep))]
    importlib.invalidate_caches()
    sys.argv[1:] = request["arguments"]


def _load(modules):
    for module in modules:
        importlib.import_module(module)
    for module in () if modules else _all_modules():
        with contextlib.suppress(ImportError):  # what an extra is for, which is not installed
            importlib.import_module(module)
    gc.collect()
    gc.freeze()


def _all_modules():
    pageferry = importlib.import_module("pageferry")
    modules = pkgutil.walk_packages(pageferry.__path__, "pageferry.")
    return [module.name for module in modules if not module.name.endswith("__main__")]


if __name__ == "__main__":
    connection = socket.socket(fileno=int(sys.argv[1]))
    _load(sys.argv[2:])
    del sys.argv[2:]
    _become(*_serve(connection))
    runpy.run_module("pageferry", run_name="__main__", alter_sys=True)
