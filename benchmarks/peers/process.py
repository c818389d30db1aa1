"""One process of a virtual machine monitor: started, asked by QMP, measured through /proc, ended."""

import contextlib
import select
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from pageferry.core.errors import VmError
from pageferry.vmm.qmp_client import QmpClient

_START_S = 60.0
_END_S = 20.0
_POLL_S = 0.02
_CPUCLOCK_SCHED = 2
_RESET_PEAK = "5"


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put Ctrl-C and SIGTERM off to the end of a block; on the main thread."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda number, _: came.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


class Peer(ABC):
    """One end of a migration; a context manager that ends the process.

    Args:
        name: what it is called; its files are in ``folder`` under this name.
        command: how to start it, but for the control socket.
        folder: for its control socket and its output.
    """

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name = name
        self._command = command
        self._control = folder / f"{name}.sock"
        self._output = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: QmpClient | None = None

    @abstractmethod
    def _control_options(self, control: Path) -> Sequence[str]:
        """Return the options that make a QMP socket."""

    @abstractmethod
    def hva(self, gpa: int) -> int | None:
        """Return where guest memory lies in the process's own addresses; None while there is none yet."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with _uninterrupted():
            self._end()

    def start(self) -> None:
        """Start the process and connect; the ``with`` block is entered before, so nothing can come in between.

        Raises:
            VmError: it ended at once, or does not answer.
        """
        # A session of its own: Ctrl-C reaches the benchmark, which ends its children in order.
        command = [*self._command, *self._control_options(self._control)]
        with _uninterrupted(), self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        self._qmp = self._connect(self._process)

    def _connect(self, process: subprocess.Popen[bytes]) -> QmpClient:
        deadline_s = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(VmError):
                return QmpClient(self._control)
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise VmError(f"{self.name} did not start: {self.last_words()}")
            time.sleep(_POLL_S)

    def _end(self) -> None:
        if self._process is None:
            return
        if self._qmp is not None:
            self._qmp.close()
        self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def last_words(self) -> str:
        """Return the end of what the process printed, on one line."""
        return " / ".join(self._output.read_text(errors="replace").splitlines()[-3:]) or "it said nothing"

    @property
    def qmp(self) -> QmpClient:
        """The connection to its control socket, once it was started."""
        if self._qmp is None:
            raise VmError(f"{self.name} was not started")
        return self._qmp

    @property
    def pid(self) -> int:
        """The process, once it was started."""
        if self._process is None:
            raise VmError(f"{self.name} was not started")
        return self._process.pid

    # -- measures --------------------------------------------------------------------------------------------------

    @property
    def _proc(self) -> Path:
        return Path("/proc", str(self.pid))

    def cpu_s(self) -> float:
        """Return the processor time, user and system, of all its threads, ended ones included."""
        return time.clock_gettime(~self.pid << 3 | _CPUCLOCK_SCHED)

    def vcpu_s(self) -> float:
        """Return the processor time of the threads that run vCPUs."""
        threads = [cpu["thread-id"] for cpu in self.qmp.execute("query-cpus-fast")]
        files = [self._proc / "task" / str(thread) / "schedstat" for thread in threads if thread is not None]
        return sum(int(file.read_text().split()[0]) for file in files) / 1e9

    def reset_peak(self) -> None:
        """Let :meth:`peak_bytes` begin anew."""
        (self._proc / "clear_refs").write_text(_RESET_PEAK)

    def peak_bytes(self) -> int:
        """Return the most memory that was resident since the last reset."""
        status = (self._proc / "status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10

    def memory_file(self) -> Path:
        """Return the file through which the process's memory is read."""
        return self._proc / "mem"

    def maps(self) -> str:
        """Return the kernel's list of its mappings."""
        return (self._proc / "maps").read_text()

    # -- migration -------------------------------------------------------------------------------------------------

    def wait_migrated(self, deadline_s: float) -> float:
        """Wait for the source's word that its migration is over; return when it came, on the monotonic clock.

        Raises:
            VmError: it failed, or the deadline passed.
        """
        while True:
            for event in self._events_until(deadline_s):
                status = event.get("data", {}).get("status") if event.get("event") == "MIGRATION" else None
                if status == "completed":
                    return time.monotonic()
                if status in ("failed", "cancelled"):
                    raise VmError(f"{self.name}: migration {status}: {self.last_words()}")

    def _events_until(self, deadline_s: float) -> list[dict[str, Any]]:
        if received := self.qmp.received():
            return received
        if not select.select([self.qmp], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
            raise VmError(f"{self.name}: the migration was not over in time")
        return self.qmp.receive()
