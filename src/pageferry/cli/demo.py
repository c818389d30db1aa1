"""The demonstration: two real processes, one guest, one migration."""

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from pageferry.cli.client import migrate
from pageferry.cli.progress import ProgressView
from pageferry.cli.status import print_witness
from pageferry.core.errors import VmError
from pageferry.core.libc import libc
from pageferry.core.units import format_size
from pageferry.core.vm import VmConfig
from pageferry.vmm.accel import Machines
from pageferry.vmm.qmp_client import QmpClient

_START_TIMEOUT_S = 30.0
_PR_SET_PDEATHSIG = 1
_WARM_UP_S = 1.0
_POLL_S = 0.05


def run_demo(
    machines: Machines, workload: str, config: VmConfig, options: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Start a guest in one process, migrate it to another, see that it runs on there; return the report.

    Raises:
        PageferryError: something of it failed; both processes are gone.
    """
    console.print(f"machine: {machines.accel} ({machines.reason})", markup=False, soft_wrap=True)
    accel = ["--accel", machines.accel, *(["--tracker", machines.tracker] if machines.tracker else [])]
    accel += ["--hugepages", machines.huge_pages, *(["--oracle", machines.witness] if machines.witness else [])]
    with tempfile.TemporaryDirectory(prefix="pageferry-") as folder:
        size = ["--memory", str(config.memory_bytes), "--cpus", str(config.cpus), "--cpu", str(config.cpu)]
        size += ["--machine", str(config.machine)]
        source = _Child("source", Path(folder), "run", workload, *size, *accel)
        destination = _Child("destination", Path(folder), "receive", "tcp://127.0.0.1:0", *accel)
        with source, destination, source.connect() as guest, destination.connect() as receiver:
            uri = str(receiver.execute("x-query-guest")["listening"])
            console.print(
                f"source: process {source.pid} runs {workload!r} with {format_size(config.memory_bytes)}"
                f"{f' and {config.cpus} vCPUs' if config.cpus > 1 else ''}; "
                f"destination: process {destination.pid} waits at {uri}",
                markup=False,
                soft_wrap=True,
            )
            before, _ = _work(guest, "at the source", console, _WARM_UP_S)
            with ProgressView(console) as view:
                report = migrate(guest, uri, options, view.show)
            print_witness(report, console)
            after, per_s = _work(receiver, "at the destination", console, _WARM_UP_S)
            if report["guest_time"]["work_before_per_s"] is not None:
                report["guest_time"]["work_after_per_s"] = per_s
            if before and after <= before:  # a program of one's own need not count its work
                raise VmError("the guest does not go on at the destination")
    return report


def _work(client: QmpClient, where: str, console: Console, duration_s: float) -> tuple[int, float]:
    """Watch the guest work for a while; return its count of work at the end, and its operations per second."""
    first, began_s = _work_done(client), time.monotonic()
    while (elapsed_s := time.monotonic() - began_s) < duration_s:
        time.sleep(_POLL_S)
    last = _work_done(client)
    per_s = (last - first) / elapsed_s
    console.print(
        f"the guest works {where}: {last:,} operations done, {per_s:,.0f} a second", markup=False, soft_wrap=True
    )
    return last, per_s


def _work_done(client: QmpClient) -> int:
    state = client.execute("x-query-guest")
    if state["crash"] is not None or state["exit_code"] is not None:
        raise VmError(f"the guest ended: {state['crash'] or state['exit_code']}")
    return int(sum(state["work"]))


def _die_with_parent() -> None:
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _Child:
    """A pageferry process of ours; ended, and waited for, when the ``with`` block ends."""

    def __init__(self, name: str, folder: Path, *arguments: str) -> None:
        self._name = name
        self._control = folder / f"{name}.sock"
        self._log = folder / f"{name}.log"
        self._arguments = [sys.executable, "-m", "pageferry", *arguments, "--control", str(self._control)]

    def __enter__(self) -> "_Child":
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
        output = [line for line in lines if not line.startswith("hint: ")]
        raise VmError(f"the {self._name} process did not start: {output[-1] if output else 'it said nothing'}")
