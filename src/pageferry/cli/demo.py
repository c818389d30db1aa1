"""The demonstrations: two real processes, one guest, one migration."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pageferry.cli.client import migrate
from pageferry.cli.guest_child import GuestChild
from pageferry.cli.linux_work import LinuxWork
from pageferry.cli.progress import ProgressView
from pageferry.cli.status import print_witness
from pageferry.core.errors import VmError
from pageferry.core.units import format_size
from pageferry.core.vm import VmConfig
from pageferry.guests.linux.debian import LinuxImage
from pageferry.vmm.accel import Machines
from pageferry.vmm.qmp_client import QmpClient

_WARM_UP_S = 1.0
_POLL_S = 0.05
_ROUNDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """The two processes, a control connection to each, and where the destination waits."""

    source: GuestChild
    destination: GuestChild
    guest: QmpClient
    receiver: QmpClient
    uri: str


def run_demo(
    machines: Machines, workload: str, config: VmConfig, options: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Start a guest in one process, migrate it to another, see that it runs on there; return the report.

    Raises:
        PageferryError: something of it failed; both processes are gone.
    """
    with _stage(machines, [workload, *_allowed(options)], repr(workload), config, console) as stage:
        before, _ = _work(stage.guest, "at the source", console, _WARM_UP_S)
        report = _migrated(stage, options, console)
        after, per_s = _work(stage.receiver, "at the destination", console, _WARM_UP_S)
        if report["guest_time"]["work_before_per_s"] is not None:
            report["guest_time"]["work_after_per_s"] = per_s
        if before and after <= before:  # a program of one's own need not count its work
            raise VmError("the guest does not go on at the destination")
    return report


def run_linux_demo(
    machines: Machines, image: LinuxImage, config: VmConfig, options: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Boot a Linux that works and checks itself, migrate it to another process, show its console all the while.

    Raises:
        PageferryError: something of it failed; both processes are gone.
    """
    command_line = "console=ttyS0 quiet pageferry=work"
    kernel = ["--kernel", str(image.kernel), "--initrd", str(image.initramfs), "--append", command_line]
    run = [*kernel, *_allowed(options)]
    with _stage(machines, run, "a Linux", config, console) as stage, ExitStack() as stack:
        work = LinuxWork(lambda line: console.print(line, markup=False, soft_wrap=True))
        work.follow("source", stack.enter_context(stage.source.connect()))
        before = work.wait_for_rounds(_ROUNDS)
        report = _migrated(stage, options, console)
        work.follow("destination", stack.enter_context(stage.destination.connect()))
        work.wait_for_rounds(before + 2 * _ROUNDS)
    return report


def _allowed(options: dict[str, Any]) -> list[str]:
    """Return how a source is started that is to heed this policy."""
    policy = str(options["x-policy"])
    return ["--allow-policy", policy] if ":" in policy else []


@contextmanager
def _stage(machines: Machines, run: Sequence[str], what: str, config: VmConfig, console: Console) -> Iterator[_Stage]:
    console.print(f"machine: {machines.accel} ({machines.reason})", markup=False, soft_wrap=True)
    accel = ["--accel", machines.accel, *(["--tracker", machines.tracker] if machines.tracker else [])]
    accel += ["--hugepages", machines.huge_pages, *(["--oracle", machines.witness] if machines.witness else [])]
    size = ["--memory", str(config.memory_bytes), "--cpus", str(config.cpus), "--cpu", str(config.cpu)]
    size += ["--machine", str(config.machine)]
    with tempfile.TemporaryDirectory(prefix="pageferry-") as folder:
        source = GuestChild("source", Path(folder), "run", *run, *size, *accel)
        destination = GuestChild("destination", Path(folder), "receive", "tcp://127.0.0.1:0", *accel)
        with source, destination, source.connect() as guest, destination.connect() as receiver:
            uri = str(receiver.execute("x-query-guest")["listening"])
            console.print(
                f"source: process {source.pid} runs {what} with {format_size(config.memory_bytes)}"
                f"{f' and {config.cpus} vCPUs' if config.cpus > 1 else ''}; "
                f"destination: process {destination.pid} waits at {uri}",
                markup=False,
                soft_wrap=True,
            )
            yield _Stage(source=source, destination=destination, guest=guest, receiver=receiver, uri=uri)


def _migrated(stage: _Stage, options: dict[str, Any], console: Console) -> dict[str, Any]:
    with ProgressView(console) as view:
        report = migrate(stage.guest, stage.uri, options, view.show)
    print_witness(report, console)
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
