"""The commands that make a guest process and stay with it to its end: ``run``, ``receive``, ``restore``."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from pageferry.cli.options import (
    AccelOption,
    ControlOption,
    CpuOption,
    CpusOption,
    HugePagesOption,
    MachineOption,
    MemoryOption,
    OwnControlOption,
    TrackerOption,
    WitnessOption,
    vm_config,
)
from pageferry.cli.progress import ReadingView
from pageferry.cli.shell import ERR, ExitCode, tell
from pageferry.core.cpuid import CpuModel
from pageferry.core.hugepages import HugePages
from pageferry.core.units import parse_size
from pageferry.core.vm import MachineModel
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.engine.wire.channel import Endpoint
from pageferry.guests.boot import GuestParams
from pageferry.guests.workloads import WORKLOADS, load_guest
from pageferry.vmm.accel import Accel, Machines, choose_machines
from pageferry.vmm.console import ConsoleOutput
from pageferry.vmm.process import GuestProcess


def run_guest(
    guest: Annotated[str, typer.Argument(help=f"A built-in workload ({', '.join(WORKLOADS)}) or an ELF file.")],
    memory: MemoryOption = "256M",
    cpus: CpusOption = 1,
    cpu: CpuOption = CpuModel.BASELINE,
    machine: MachineOption = MachineModel.PLAIN,
    accel: AccelOption = Accel.AUTO,
    tracker: TrackerOption = None,
    huge_pages: HugePagesOption = HugePages.OFF,
    witness: WitnessOption = None,
    control: OwnControlOption = None,
    working_set: Annotated[str | None, typer.Option(help="Memory the workload writes, e.g. 64M.")] = None,
    rate: Annotated[int, typer.Option(min=0, help="Operations per second; 0: as many as it can.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is random in the workload.")] = 1,
    argument: Annotated[
        list[str] | None, typer.Option(help="A number or size for the workload itself; may be repeated.")
    ] = None,
) -> None:
    """Run a guest; its console is standard output. Ctrl-C ends it."""
    program = load_guest(guest)
    config = vm_config(memory, cpus, cpu, machine)
    params = GuestParams(
        working_set_bytes=None if working_set is None else parse_size(working_set),
        rate=rate,
        seed=seed,
        arguments=tuple(map(parse_size, argument or ())),
    )
    with _guest_process(choose_machines(accel, tracker, huge_pages, witness, machine), control) as process:
        process.boot(program, config, params)
        process.start()
        code = process.wait()
    raise typer.Exit(ExitCode(code))


def receive(
    uri: Annotated[str, typer.Argument(help="Where to wait: tcp://HOST:PORT (port 0: any) or unix:PATH.")],
    control: ControlOption,
    accel: AccelOption = Accel.AUTO,
    tracker: TrackerOption = None,
    huge_pages: HugePagesOption = HugePages.OFF,
    witness: WitnessOption = None,
) -> None:
    """Wait for a guest to be migrated here, then run it. A failed attempt leaves it waiting for the next."""
    endpoint = Endpoint.parse(uri)
    with _guest_process(choose_machines(accel, tracker, huge_pages, witness), control) as process:
        bound = process.listen(endpoint)
        ERR.print(f"waiting for a guest at {bound}", markup=False)
        process.start()
        code = process.wait()
    raise typer.Exit(ExitCode(code))


def restore(
    file: Annotated[Path, typer.Argument(help="What `pageferry save` made.")],
    lazy: Annotated[
        bool, typer.Option("--lazy", help="Let it run at once; its memory is read when it is touched, and meanwhile.")
    ] = False,
    accel: AccelOption = Accel.AUTO,
    tracker: TrackerOption = None,
    huge_pages: HugePagesOption = HugePages.OFF,
    witness: WitnessOption = None,
    control: OwnControlOption = None,
) -> None:
    """Run a guest from a file, from where it was saved. The file stays as it is."""
    with SavedGuest(file) as saved:
        machines = choose_machines(accel, tracker, huge_pages, witness, saved.config.machine)
        with _guest_process(machines, control) as process:
            if lazy:
                process.restore_lazily(saved)
            else:
                with ReadingView(ERR) as view:
                    process.restore(saved, view.show)
                saved.close()
            process.start()
            code = process.wait()
    raise typer.Exit(ExitCode(code))


@contextmanager
def _guest_process(machines: Machines, control: Path | None) -> Iterator[GuestProcess]:
    ERR.print(f"machine: {machines.accel} ({machines.reason})", markup=False, soft_wrap=True)
    if machines.warning is not None:
        ERR.print(f"warning: {machines.warning}", markup=False, soft_wrap=True)
    output = ConsoleOutput(open(os.dup(sys.stdout.fileno()), "wb"))  # noqa: SIM115  # closed with the process
    process = GuestProcess(machines, control, on_console=output, on_message=tell)

    def stop(*_: object) -> None:
        process.quit()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        yield process
    finally:
        process.close()
        output.close()
