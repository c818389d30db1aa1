"""The commands that make a guest process and stay with it to its end: ``run``, ``receive``, ``restore``."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pageferry.cli.console import LocalConsole
from pageferry.cli.control_options import ControlOption, OwnControlOption, path_argument, path_option
from pageferry.cli.options import (
    MAX_CPUS,
    SIZE,
    AccelOption,
    AllowPolicyOption,
    CpuOption,
    CpusOption,
    DisksOption,
    HugePagesOption,
    InsecureOption,
    LocalDisksOption,
    LocalNetsOption,
    MemoryOption,
    NetsOption,
    PeerOption,
    TimeoutOption,
    TlsDirOption,
    TrackerOption,
    VirtioConsoleOption,
    WitnessOption,
    device_specs,
    vm_config,
    warn_if_exposed,
)
from pageferry.cli.outcome import exit_code_of_guest
from pageferry.cli.signals import SIGNALS
from pageferry.cli.stdio import say, standard_input, standard_output, tell
from pageferry.core.cpuid import CpuModel
from pageferry.core.errors import UsageError
from pageferry.core.hostmem import total_bytes
from pageferry.core.hugepages import HugePages
from pageferry.core.policy_names import UsersPolicies, load_policies
from pageferry.core.units import parse_number, parse_size
from pageferry.core.vm import MachineModel
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.engine.room import GuestLimits
from pageferry.engine.wire.channel import DEFAULT_TIMEOUT_S, Endpoint
from pageferry.engine.wire.credentials import Credentials, new_secret
from pageferry.guests.boot import GuestParams
from pageferry.guests.loader import KernelOptions, Loader, linux, named
from pageferry.guests.workloads import WORKLOADS
from pageferry.stream.ferry_order import Side
from pageferry.vmm.accel import Accel, Machines, choose_machines
from pageferry.vmm.console import ConsoleOutput
from pageferry.vmm.local_backends import AS_AT_THE_SOURCE, LocalBackends
from pageferry.vmm.process import GuestProcess

_CONSOLE = "the guest's console"


class ConsoleMode(StrEnum):
    """How standard input serves a guest whose console is standard output."""

    OUTPUT = "output"
    STDIO = "stdio"


def run_guest(
    guest: Annotated[
        str | None,
        typer.Argument(
            help=f"A workload ({', '.join(WORKLOADS)}), or a file: a program (ELF), or a kernel of any kind."
        ),
    ] = None,
    kernel: Annotated[Path | None, path_option(help="A Linux kernel: a bzImage (vmlinuz) or a vmlinux.")] = None,
    initrd: Annotated[Path | None, path_option(help="The kernel's initrd or initramfs, or its module.")] = None,
    append: Annotated[str | None, typer.Option(help='The kernel\'s command line, e.g. "console=ttyS0".')] = None,
    disk: DisksOption = None,
    net: NetsOption = None,
    virtio_console: VirtioConsoleOption = False,
    memory: MemoryOption = "256M",
    cpus: CpusOption = 1,
    cpu: CpuOption = CpuModel.BASELINE,
    machine: Annotated[
        MachineModel | None,
        typer.Option(help="pc, as kernels need it, or plain: without interrupt controllers. Default: what fits."),
    ] = None,
    accel: AccelOption = Accel.AUTO,
    tracker: TrackerOption = None,
    huge_pages: HugePagesOption = HugePages.AUTO,
    witness: WitnessOption = None,
    control: OwnControlOption = None,
    allow_policy: AllowPolicyOption = None,
    console: Annotated[
        ConsoleMode, typer.Option(help="stdio: what you type goes to the guest, Ctrl-] gives the terminal back.")
    ] = ConsoleMode.OUTPUT,
    working_set: Annotated[
        str | None, typer.Option(callback=SIZE, help="Memory the workload writes, e.g. 64M.")
    ] = None,
    rate: Annotated[int | None, typer.Option(min=0, help="Operations per second; 0: as many as possible.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the workload's random choices.")] = None,
    argument: Annotated[
        list[str] | None, typer.Option(callback=SIZE, help="A number or size for the workload itself; may be repeated.")
    ] = None,
) -> None:
    """Run a guest; its console is standard output. Ctrl-C ends it. Ends with the guest's own exit code."""
    params = _workload_params(working_set, rate, seed, argument)
    loader = _loader(guest, kernel, params, _kernel_options(initrd, append))
    model = machine or loader.machine or MachineModel.PLAIN
    if model is not MachineModel.PC and (disk or net or virtio_console):
        raise UsageError(f"a machine that is {model} has no virtio devices", hint="--machine pc")
    devices = device_specs(disk, net, console=virtio_console) if model is MachineModel.PC else ()
    config = vm_config(memory, cpus, cpu, model, devices)
    policies = load_policies(allow_policy or ())
    machines = choose_machines(accel, tracker, huge_pages, witness, config.machine)
    with _guest_process(machines, control, policies) as process:
        process.boot(loader, config)
        with _console_input(process) if console is ConsoleMode.STDIO else nullcontext():
            code = _lived(process)
    raise typer.Exit(code)


def _workload_params(
    working_set: str | None, rate: int | None, seed: int | None, arguments: list[str] | None
) -> GuestParams | None:
    if (working_set, rate, seed, arguments) == (None, None, None, None):
        return None
    return GuestParams(
        working_set_bytes=None if working_set is None else parse_size(working_set),
        rate=rate or 0,
        seed=1 if seed is None else seed,
        arguments=tuple(map(parse_number, arguments or ())),
    )


def _kernel_options(initrd: Path | None, append: str | None) -> KernelOptions | None:
    return None if initrd is None and append is None else KernelOptions(initrd=initrd, command_line=append or "")


def _loader(
    guest: str | None, kernel: Path | None, params: GuestParams | None, options: KernelOptions | None
) -> Loader:
    if kernel is None:
        if guest is None:
            raise UsageError("nothing to run", hint="name a workload or a file, or a Linux kernel by --kernel")
        return named(guest, params, options)
    if guest is not None:
        raise UsageError(f"{guest!r} and --kernel are two guests", hint="a process has one")
    if params is not None:
        raise UsageError("--working-set, --rate, --seed and --argument are for a workload, not for --kernel")
    return linux(kernel, options or KernelOptions())


@contextmanager
def _console_input(process: GuestProcess) -> Iterator[None]:
    with LocalConsole(standard_input("--console stdio"), standard_output(), process.type_console, tell):
        yield


def _lived(process: GuestProcess, *, paused: bool = False) -> int:
    """Let a process live to its end, which a signal asks for; return its exit code."""
    with SIGNALS.calling(process.quit):
        process.start(paused=paused)
        return exit_code_of_guest(process.wait())


def receive(
    uri: Annotated[
        str, typer.Argument(help="Where to wait: tls://HOST:PORT, tcp://HOST:PORT (port 0: any) or unix:PATH.")
    ],
    control: ControlOption,
    tls_dir: TlsDirOption = None,
    peer: PeerOption = None,
    secret: Annotated[
        str | None, typer.Option(help="`new`: print a one-time secret, and accept only whom you give it to (tls).")
    ] = None,
    insecure: InsecureOption = False,
    max_memory: Annotated[
        str | None,
        typer.Option(callback=SIZE, help="Take no guest with more memory, e.g. 8G. Default: what this host has."),
    ] = None,
    max_cpus: Annotated[int, typer.Option(min=1, max=MAX_CPUS, help="Take no guest with more vCPUs.")] = MAX_CPUS,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    accel: AccelOption = Accel.AUTO,
    tracker: TrackerOption = None,
    huge_pages: HugePagesOption = HugePages.AUTO,
    witness: WitnessOption = None,
    allow_policy: AllowPolicyOption = None,
    disk: LocalDisksOption = None,
    net: LocalNetsOption = None,
) -> None:
    """Wait for a guest to be migrated here, then run it. A failed attempt leaves it waiting for the next."""
    endpoint = Endpoint.parse(uri)
    warn_if_exposed(endpoint, insecure=insecure)
    credentials = _credentials(endpoint, tls_dir, peer, secret)
    limits = GuestLimits(memory_bytes=total_bytes() if max_memory is None else parse_size(max_memory), cpus=max_cpus)
    backends = LocalBackends.parse(disk or (), net or ())
    policies = load_policies(allow_policy or ())
    machines = choose_machines(accel, tracker, huge_pages, witness)
    with _guest_process(machines, control, policies, backends) as process:
        bound = process.incoming.listen(endpoint, credentials, limits, timeout)
        say(f"waiting for a guest at {bound}")
        code = _lived(process)
    raise typer.Exit(code)


def _credentials(endpoint: Endpoint, tls_dir: Path | None, peer: str | None, secret: str | None) -> Credentials | None:
    """Return who a destination is and whom it accepts; a new secret is printed."""
    if secret is not None:
        if secret != "new" or tls_dir is not None or peer is not None:
            raise UsageError("--secret takes the word new, and neither --tls-dir nor --peer", hint="--secret new")
        text = new_secret()
        credentials = Credentials.from_secret(text, Side.DESTINATION)
        endpoint.expect_suits(credentials)
        say(f"secret: {text}")
        return credentials
    if tls_dir is None:
        if peer is not None:
            raise UsageError("without certificates an end has no name", hint="--peer goes with --tls-dir")
        return None
    return Credentials.from_dir(tls_dir, Side.DESTINATION, peer)


def restore(
    file: Annotated[Path, path_argument(help="What `pageferry save` made.")],
    lazy: Annotated[
        bool,
        typer.Option("--lazy", help="Let the guest run at once: memory is read in the background, or when touched."),
    ] = False,
    paused: Annotated[
        bool | None,
        typer.Option(
            "--paused/--run", help="Leave the guest paused, or let it run. Default: as it was when it was saved."
        ),
    ] = None,
    accel: AccelOption = Accel.AUTO,
    tracker: TrackerOption = None,
    huge_pages: HugePagesOption = HugePages.AUTO,
    witness: WitnessOption = None,
    control: OwnControlOption = None,
    allow_policy: AllowPolicyOption = None,
    disk: LocalDisksOption = None,
    net: LocalNetsOption = None,
) -> None:
    """Run a guest from a file, from where it was saved. The file stays as it is."""
    backends = LocalBackends.parse(disk or (), net or ())
    policies = load_policies(allow_policy or ())
    with SavedGuest(file) as saved:
        machines = choose_machines(accel, tracker, huge_pages, witness, saved.config.machine)
        with _guest_process(machines, control, policies, backends) as process:
            if lazy:
                process.restore_lazily(saved)
            else:
                from pageferry.cli.progress import ReadingView  # loads rich, which takes as long as all else of `run`
                from pageferry.cli.stdio import ERR

                with ReadingView(ERR) as view:
                    process.restore(saved, view.show)
                saved.close()
            code = _lived(process, paused=saved.state.paused if paused is None else paused)
    raise typer.Exit(code)


def _console_lost(error: OSError) -> None:
    tell(f"{_CONSOLE} is dropped from here on: {error.strerror}")


@contextmanager
def _guest_process(
    machines: Machines,
    control: Path | None,
    policies: UsersPolicies,
    backends: LocalBackends = AS_AT_THE_SOURCE,
) -> Iterator[GuestProcess]:
    say(f"machine: {machines.accel} ({machines.reason})")
    if machines.warning is not None:
        say(f"warning: {machines.warning}")
    output = ConsoleOutput(standard_output(_CONSOLE), _console_lost)
    process = GuestProcess(
        machines, control, backends=backends, users_policies=policies, on_console=output, on_message=tell
    )
    try:
        yield process
    finally:
        process.close()
        output.close()
