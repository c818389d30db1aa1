"""A guest's process as a child of a command that shows something."""

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path

from pageferry.core.errors import VmError
from pageferry.core.libc import libc
from pageferry.vmm.qmp_client import QmpClient

_START_TIMEOUT_S = 30.0
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.05
_HINT = "hint: "


def _die_with_parent() -> None:
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class GuestChild:
    """A pageferry process of ours; ended, and waited for, when the ``with`` block ends."""

    def __init__(self, name: str, folder: Path, *arguments: str) -> None:
        self._name = name
        self._control = folder / f"{name}.sock"
        self._log = folder / f"{name}.log"
        self._arguments = [sys.executable, "-m", "pageferry", *arguments, "--control", str(self._control)]

    def __enter__(self) -> "GuestChild":
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # however the demo ends
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def connect(self) -> QmpClient:
        """Return a control connection as soon as the process serves one.

        Raises:
            VmError: it ended, or took too long.
        """
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while self._process.poll() is None and time.monotonic() < deadline_s:
            with contextlib.suppress(VmError):
                return QmpClient(self._control)
            time.sleep(_POLL_S)
        lines = self._log.read_text(errors="replace").strip().splitlines()
        output = [line for line in lines if not line.startswith(_HINT)]
        hints = [line.removeprefix(_HINT) for line in lines if line.startswith(_HINT)]
        said = output[-1] if output else "it said nothing"
        raise VmError(f"the {self._name} process did not start: {said}", hint=hints[-1] if hints else "")
