"""The ``pageferry`` command.

Exit codes: 0 done, also a guest ended by Ctrl-C or ``quit``; 1 a defect; 2 wrong usage; 3 the migration or save did not
happen and the guest is at the source; 4 nobody knows whether the guest moved; 5 this machine lacks what was asked for;
6 a guest process or its socket failed; 7 a stream, as in a file, is wrong or not whole; 8 the guest ended with a code
other than 0; 9 the guest crashed; 10 two streams differ; 11 the guest has switched, and needs pages that are still at
the source; 130 a demo, migration or save was interrupted, and the guest is at the source.
"""

import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pageferry import __version__
from pageferry.cli import demo as demo_room
from pageferry.cli.client import Interrupted, MigrationFailedError, migrate
from pageferry.cli.console import ConsoleSession, raw_input
from pageferry.cli.inspect import compared, print_differences, print_json, print_table, print_verdict
from pageferry.cli.plot import PlotFile
from pageferry.cli.progress import ProgressView, ReadingView
from pageferry.cli.status import print_oracle, print_status
from pageferry.cli.streams import STANDARD_INPUT, opened
from pageferry.cli.summary import lessons, summary
from pageferry.core.cpuid import CpuModel
from pageferry.core.errors import (
    GuestAt,
    MigrationError,
    PageferryError,
    RemoteStreamError,
    UnsupportedError,
    UsageError,
)
from pageferry.core.hugepages import HugePages
from pageferry.core.memory import ram_layout
from pageferry.core.policy_names import POLICIES, make_policy
from pageferry.core.units import parse_rate, parse_size
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.engine.attempt import HELD
from pageferry.engine.prove import VerifyMode
from pageferry.engine.saved_guest import SavedGuest
from pageferry.engine.transport import DEFAULT_TIMEOUT_S, MAX_TIMEOUT_S, Endpoint
from pageferry.engine.wire import WireOptions
from pageferry.guests.boot import GuestParams
from pageferry.guests.workloads import WORKLOADS, load_guest
from pageferry.stream.ferry_frames import MAX_CONNECTIONS
from pageferry.stream.packing import Packing
from pageferry.vmm.accel import Accel, Machines, choose_machines
from pageferry.vmm.arguments import file_uri
from pageferry.vmm.console import ConsoleOutput
from pageferry.vmm.doctor import examine
from pageferry.vmm.process import GuestProcess
from pageferry.vmm.qmp_client import QmpClient

app = typer.Typer(
    name="pageferry",
    help="Move running virtual machines between processes and hosts, and prove that nothing was lost.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# Which click this is, typer's own or the package, depends on typer's version; BadParameter -> UsageError -> this.
_BadOption: Any = typer.BadParameter.__mro__[2]
_err = Console(stderr=True, highlight=False)
_out = Console(highlight=False)

AccelOption = Annotated[Accel, typer.Option(help="Machine: kvm where it works, soft runs anywhere.")]
TrackerOption = Annotated[
    str | None,
    typer.Option(
        help="How dirty pages are found: hap or shadow (soft), kvm-bitmap, kvm-ring, uffd-wp or pagemap-scan (kvm)."
    ),
]
OracleOption = Annotated[
    str | None,
    typer.Option(help="Watch the tracker: by a second one (kvm), or by digests of every page. Slow; finds lost bits."),
]
HugePagesOption = Annotated[
    HugePages,
    typer.Option("--hugepages", help="Host pages of 2 MiB: thp (advice), hugetlb (a reserved pool; kvm), or off."),
]
BandwidthOption = Annotated[str, typer.Option(help="Bytes a second at the most, e.g. 100M; 0: no limit.")]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", help="Draw the migration into this file: .html, or .svg or .png (these need matplotlib)."),
]
ControlOption = Annotated[Path, typer.Option(help="The guest process's control socket.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, all else on stderr.")
]
MAX_CPUS = 8
CpuOption = Annotated[
    CpuModel,
    typer.Option(help="CPU shown to the guest: baseline x86-64, so it moves anywhere, or all of the host's (kvm)."),
]
MachineOption = Annotated[
    MachineModel,
    typer.Option(help="plain, or irqchip: with a PC's interrupt controllers and PIT, which KVM has inside (kvm)."),
]
CpusOption = Annotated[int, typer.Option(min=1, max=MAX_CPUS, help=f"vCPUs, 1 to {MAX_CPUS}.")]
PolicyOption = Annotated[str, typer.Option(help=f"When to stop and copy: {', '.join(POLICIES)}, or module:Name.")]
LimitOption = Annotated[
    float | None, typer.Option(help="Downtime allowed, in ms (downtime, converge, postcopy; default 300).")
]
RoundsOption = Annotated[
    int | None, typer.Option(help="Rounds at the most (downtime 30, converge 60, xen 5, postcopy 3).")
]
DeadlineOption = Annotated[float | None, typer.Option(help="Seconds from beginning to end (deadline).")]
VerifyOption = Annotated[
    VerifyMode | None,
    typer.Option(
        help="Digest all memory at the pause (full) or most of it while the guest runs (audit). "
        "Default: full where that takes at most half of the downtime limit."
    ),
]


def _exit_code(error: BaseException) -> int:
    if isinstance(error, UsageError):
        return 2
    if isinstance(error, MigrationError):
        return {GuestAt.SOURCE: 3, GuestAt.UNKNOWN: 4, GuestAt.DESTINATION: 11}[error.guest_at]
    if isinstance(error, UnsupportedError):
        return 5
    if isinstance(error, RemoteStreamError):
        return 7
    return 6 if isinstance(error, PageferryError) else 1


def _complain(message: str, hint: str = "") -> None:
    _err.print(f"pageferry: {message}", style="red", markup=False, soft_wrap=True)
    if hint:
        _err.print(f"hint: {hint}", markup=False, soft_wrap=True)


def run() -> None:
    """Run the command and end the process with its exit code; errors are one line and a hint, never a traceback."""
    try:
        code = app(standalone_mode=False)
    except _BadOption as error:
        _complain(error.format_message(), "pageferry --help tells more")
        code = 2
    except (KeyboardInterrupt, typer.Abort, Interrupted) as error:
        _complain("cancelled; the guest runs on at the source" if isinstance(error, Interrupted) else "interrupted")
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if logging.getLogger().isEnabledFor(logging.DEBUG):
            raise
        if isinstance(error, PageferryError):
            _complain(str(error), error.hint)
        else:
            _complain(f"internal error: {error!r}", "this is a defect: pageferry --debug ... shows where")
        code = _exit_code(error)
    sys.exit(code if isinstance(code, int) else 0)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pageferry {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the log.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    if context.invoked_subcommand is None:
        _err.print(context.get_help(), markup=False, soft_wrap=True)
        raise typer.Exit(2)


def _json(value: Any) -> None:  # noqa: ANN401  # any JSON value
    # Lists of plain numbers on one line each: a newline cannot be inside a JSON string.
    text = json.dumps(value, indent=2)
    print(re.sub(r"\[\n[-+.eE\d,\s]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]), text))


def _report(attempt: Callable[[], dict[str, Any]], as_json: bool, plot: PlotFile | None) -> None:
    """Make a migration, print its report and draw it; also when it failed, before the error goes its way."""
    try:
        report = attempt()
    except (MigrationFailedError, Interrupted) as error:
        if as_json:
            _json(error.report)
        for line in lessons(error.report):
            _err.print(f"report: {line}", markup=False, soft_wrap=True)
        _draw(plot, error.report)
        raise
    if as_json:
        _json(report)
    else:
        _out.print(summary(report))
    _draw(plot, report)


def _draw(plot: PlotFile | None, report: dict[str, Any]) -> None:
    if plot is None:
        return
    try:
        plot.draw(report)
        _tell(f"picture: {plot.path}")
    except OSError as error:  # the exit code is the migration's
        _complain(f"the picture could not be written to {plot.path}: {error.strerror}")


def _plot_file(path: Path | None) -> AbstractContextManager[PlotFile | None]:
    return nullcontext() if path is None else PlotFile(path)


def _policy_options(
    policy: str,
    downtime_limit: float | None,
    max_rounds: int | None,
    deadline: float | None,
    verify: VerifyMode | None,
) -> dict[str, Any]:
    limit_s = None if downtime_limit is None else downtime_limit / 1e3
    if ":" not in policy:  # a user's own is made where it decides
        make_policy(policy, downtime_limit_s=limit_s, max_rounds=max_rounds, deadline_s=deadline)
    options = {
        "x-policy": policy,
        "x-downtime-limit-s": limit_s,
        "x-max-rounds": max_rounds,
        "x-deadline-s": deadline,
        "x-verify": verify,
    }
    return {name: value for name, value in options.items() if value is not None}


def _wire_options(bandwidth: str, connections: int, compress: Packing, delta_cache: str | None) -> dict[str, Any]:
    wire = WireOptions(
        bandwidth_bytes_per_s=parse_rate(bandwidth),
        connections=connections,
        compress=compress,
        delta_cache_bytes=0 if delta_cache is None else parse_size(delta_cache),
    )
    options = {
        "x-bandwidth": wire.bandwidth_bytes_per_s,
        "x-connections": wire.connections,
        "x-compress": str(wire.compress),
        "x-delta-cache": wire.delta_cache_bytes or None,
    }
    return {name: value for name, value in options.items() if value is not None}


def _config(memory: str, cpus: int, cpu: CpuModel, machine: MachineModel) -> VmConfig:
    memory_bytes = parse_size(memory)
    ram_layout(memory_bytes)
    return VmConfig(memory_bytes=memory_bytes, cpus=cpus, cpu=cpu, machine=machine)


@app.command()
def demo(
    accel: AccelOption = Accel.AUTO,
    tracker: TrackerOption = None,
    huge_pages: HugePagesOption = HugePages.OFF,
    oracle: OracleOption = None,
    memory: Annotated[str, typer.Option(help="Guest memory.")] = "256M",
    workload: Annotated[str, typer.Option(help=f"Guest program: {', '.join(WORKLOADS)}, or an ELF file.")] = "kv",
    cpus: CpusOption = 1,
    cpu: CpuOption = CpuModel.BASELINE,
    machine: MachineOption = MachineModel.PLAIN,
    policy: PolicyOption = "downtime",
    downtime_limit: LimitOption = None,
    max_rounds: RoundsOption = None,
    deadline: DeadlineOption = None,
    verify: VerifyOption = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Migrate a running guest between two processes on this machine, and show what happened."""
    load_guest(workload)
    config = _config(memory, cpus, cpu, machine)
    options = _policy_options(policy, downtime_limit, max_rounds, deadline, verify)
    machines = choose_machines(accel, tracker, huge_pages, oracle)
    _end_as_by_ctrl_c()
    with _plot_file(plot) as file:
        _report(lambda: demo_room.run_demo(machines, workload, config, options, _err), as_json, file)


def _end_as_by_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP do what Ctrl-C does: cancel, and end whatever was started."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


def _tell(message: str) -> None:
    with suppress(OSError):  # nobody reads any more; the guest does not care
        _err.print(f"pageferry: {message}", markup=False, soft_wrap=True)


@contextmanager
def _guest_process(machines: Machines, control: Path | None) -> Iterator[GuestProcess]:
    _err.print(f"machine: {machines.accel} ({machines.reason})", markup=False, soft_wrap=True)
    output = ConsoleOutput(open(os.dup(sys.stdout.fileno()), "wb"))  # noqa: SIM115  # closed with the process
    process = GuestProcess(machines, control, on_console=output, on_message=_tell)

    def stop(*_: object) -> None:
        process.quit()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        yield process
    finally:
        process.close()
        output.close()


@app.command(name="run")
def run_guest(
    guest: Annotated[str, typer.Argument(help=f"A built-in workload ({', '.join(WORKLOADS)}) or an ELF file.")],
    memory: Annotated[str, typer.Option(help="Guest memory.")] = "256M",
    cpus: CpusOption = 1,
    cpu: CpuOption = CpuModel.BASELINE,
    machine: MachineOption = MachineModel.PLAIN,
    accel: AccelOption = Accel.AUTO,
    tracker: TrackerOption = None,
    huge_pages: HugePagesOption = HugePages.OFF,
    oracle: OracleOption = None,
    control: Annotated[Path | None, typer.Option(help="Make a control socket here (QMP).")] = None,
    working_set: Annotated[str | None, typer.Option(help="Memory the workload writes, e.g. 64M.")] = None,
    rate: Annotated[int, typer.Option(min=0, help="Operations per second; 0: as many as it can.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is random in the workload.")] = 1,
    argument: Annotated[
        list[str] | None, typer.Option(help="A number or size for the workload itself; may be repeated.")
    ] = None,
) -> None:
    """Run a guest; its console is standard output. Ctrl-C ends it."""
    program = load_guest(guest)
    config = _config(memory, cpus, cpu, machine)
    params = GuestParams(
        working_set_bytes=None if working_set is None else parse_size(working_set),
        rate=rate,
        seed=seed,
        arguments=tuple(map(parse_size, argument or ())),
    )
    with _guest_process(choose_machines(accel, tracker, huge_pages, oracle), control) as process:
        process.boot(program, config, params)
        process.start()
        code = process.wait()
    raise typer.Exit(code)


@app.command()
def receive(
    uri: Annotated[str, typer.Argument(help="Where to wait: tcp://HOST:PORT (port 0: any) or unix:PATH.")],
    control: ControlOption,
    accel: AccelOption = Accel.AUTO,
    tracker: TrackerOption = None,
    huge_pages: HugePagesOption = HugePages.OFF,
    oracle: OracleOption = None,
) -> None:
    """Wait for a guest to be migrated here, then run it. A failed attempt leaves it waiting for the next."""
    endpoint = Endpoint.parse(uri)
    with _guest_process(choose_machines(accel, tracker, huge_pages, oracle), control) as process:
        bound = process.listen(endpoint)
        _err.print(f"waiting for a guest at {bound}", markup=False)
        process.start()
        code = process.wait()
    raise typer.Exit(code)


@app.command(name="migrate")
def migrate_guest(
    uri: Annotated[str, typer.Argument(help="Where the destination waits: tcp://HOST:PORT or unix:PATH.")],
    control: ControlOption,
    policy: PolicyOption = "downtime",
    downtime_limit: LimitOption = None,
    max_rounds: RoundsOption = None,
    deadline: DeadlineOption = None,
    verify: VerifyOption = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=MAX_TIMEOUT_S, help="Seconds the connection may stand still.")
    ] = DEFAULT_TIMEOUT_S,
    bandwidth: BandwidthOption = "0",
    connections: Annotated[
        int, typer.Option(min=1, max=MAX_CONNECTIONS, help=f"Connections to use, 1 to {MAX_CONNECTIONS}.")
    ] = 1,
    compress: Annotated[
        Packing, typer.Option(help="Pack page data: for a wire that is slower than the CPU.")
    ] = Packing.NONE,
    delta_cache: Annotated[
        str | None, typer.Option(help="Memory to remember sent pages in, e.g. 64M, to send changes only (--compress).")
    ] = None,
    plot: PlotOption = None,
    hold: Annotated[
        bool, typer.Option("--hold", help="When all is ready, wait for `pageferry switch` before the guest is paused.")
    ] = False,
    recover: Annotated[
        bool, typer.Option("--recover", help="Go on with a post-copy whose connection was cut; needs no other option.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Migrate a guest live; Ctrl-C cancels and leaves it running where it is, until the handoff has begun."""
    Endpoint.parse(uri)
    options = _policy_options(policy, downtime_limit, max_rounds, deadline, verify) | {"x-timeout-s": timeout}
    options |= _wire_options(bandwidth, connections, compress, delta_cache) | ({"x-hold": True} if hold else {})
    _migrate(control, uri, {"resume": True} if recover else options, as_json, plot)


def _migrate(control: Path, uri: str, options: dict[str, Any], as_json: bool, plot: Path | None) -> None:
    _end_as_by_ctrl_c()
    with _plot_file(plot) as file, QmpClient(control) as client:

        def follow() -> dict[str, Any]:
            with ProgressView(_err) as view:
                report = migrate(client, uri, options, view.show)
            print_oracle(report, _err)
            return report

        _report(follow, as_json, file)


@app.command()
def switch(control: ControlOption) -> None:
    """Let a migration that was told to hold pause its guest and finish."""
    with QmpClient(control) as client:
        client.execute("migrate-continue", state=HELD)


@app.command()
def cancel(control: ControlOption) -> None:
    """Cancel the migration under way; the guest stays where it is."""
    with QmpClient(control) as client:
        client.execute("migrate_cancel")


@app.command()
def limits(
    control: ControlOption,
    downtime_limit: LimitOption = None,
    max_rounds: RoundsOption = None,
    deadline: DeadlineOption = None,
    bandwidth: Annotated[str | None, typer.Option(help="Bytes a second at the most, e.g. 100M; 0: no limit.")] = None,
) -> None:
    """Change the limits of the migration under way."""
    given = {
        "downtime-limit": downtime_limit,
        "x-max-rounds": max_rounds,
        "x-deadline-s": deadline,
        "max-bandwidth": None if bandwidth is None else parse_rate(bandwidth) or 0,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        raise UsageError("no limit was given", hint="--downtime-limit, --max-rounds, --deadline or --bandwidth")
    with QmpClient(control) as client:
        client.execute("migrate-set-parameters", **given)


@app.command()
def save(
    file: Annotated[Path, typer.Argument(help="The file to make; an earlier one is replaced when this is whole.")],
    control: ControlOption,
    stop: Annotated[
        bool, typer.Option("--stop", help="Stop the guest here when it is saved; without it, it runs on: a snapshot.")
    ] = False,
    policy: PolicyOption = "downtime",
    downtime_limit: LimitOption = None,
    max_rounds: RoundsOption = None,
    deadline: DeadlineOption = None,
    bandwidth: BandwidthOption = "0",
    as_json: JsonOption = False,
    plot: PlotOption = None,
) -> None:
    """Save a guest to a file while it runs, and prove that the file holds it; Ctrl-C cancels."""
    options = _policy_options(policy, downtime_limit, max_rounds, deadline, None) | ({"x-stop": True} if stop else {})
    wire = WireOptions(bandwidth_bytes_per_s=parse_rate(bandwidth))
    options |= {} if wire.bandwidth_bytes_per_s is None else {"x-bandwidth": wire.bandwidth_bytes_per_s}
    _migrate(control, file_uri(file), options, as_json, plot)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="What `pageferry save` made.")],
    lazy: Annotated[
        bool, typer.Option("--lazy", help="Let it run at once; its memory is read when it is touched, and meanwhile.")
    ] = False,
    accel: AccelOption = Accel.AUTO,
    tracker: TrackerOption = None,
    huge_pages: HugePagesOption = HugePages.OFF,
    oracle: OracleOption = None,
    control: Annotated[Path | None, typer.Option(help="Make a control socket here (QMP).")] = None,
) -> None:
    """Run a guest from a file, from where it was saved. The file stays as it is."""
    machines = choose_machines(accel, tracker, huge_pages, oracle)
    with SavedGuest(file) as saved, _guest_process(machines, control) as process:
        if lazy:
            process.restore_lazily(saved)
        else:
            with ReadingView(_err) as view:
                process.restore(saved, view.show)
            saved.close()
        process.start()
        code = process.wait()
    raise typer.Exit(code)


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(help="A stream, also packed by xz or gzip; - is standard input.")],
    diff: Annotated[str | None, typer.Option(help="Another one: tell what differs.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check it: no table.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show, check or compare libxc migration streams, Xen's own included; name the record and byte of what is wrong."""
    if diff is not None:
        if check or file == diff == STANDARD_INPUT:
            raise UsageError("--diff compares two streams", hint="it checks both; only one can be standard input")
        found = compared(file, diff, _err)
        _json(found) if as_json else print_differences(found, file, diff, _out)
        raise typer.Exit(0 if found["same"] else 10)
    with opened(file, _err) as read:
        if as_json:
            print_json(file, read, records=not check)
        elif check:
            print_verdict(file, read, _out)
        else:
            print_table(file, read, _out)


@app.command()
def status(control: ControlOption, as_json: JsonOption = False) -> None:
    """Tell what a guest process is doing."""
    with QmpClient(control) as client:
        state = client.execute("query-status") | client.execute("x-query-guest")
        migration = client.execute("query-migrate")
    state.pop("singlestep", None)
    state["migration"] = migration if "x-eta-reason" in migration else None
    if as_json:
        _json(state)
        return
    print_status(state, _out)


@app.command()
def console(control: ControlOption) -> None:
    """Attach to a guest's console: its recent output, then live; what you type goes to it. Ctrl-] detaches."""
    _end_as_by_ctrl_c()
    input_fd = os.open(os.devnull, os.O_RDONLY) if sys.stdin is None else sys.stdin.fileno()
    with QmpClient(control) as client, raw_input(input_fd):
        ConsoleSession(client, input_fd, sys.stdout.fileno(), _tell).run()


def _command(control: Path, name: str, **arguments: Any) -> None:  # noqa: ANN401  # any JSON value
    with QmpClient(control) as client:
        client.execute(name, **arguments)


@app.command()
def pause(control: ControlOption) -> None:
    """Pause a guest."""
    _command(control, "stop")


@app.command()
def resume(
    control: ControlOption,
    force: Annotated[
        bool, typer.Option(help="Take back a guest whose migration ended unknown, if it surely runs nowhere else.")
    ] = False,
) -> None:
    """Let a paused guest run on."""
    _command(control, "cont", **({"x-force": True} if force else {}))


@app.command(name="quit")
def quit_guest(control: ControlOption) -> None:
    """End a guest process, and the guest with it."""
    _command(control, "quit")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Find out, by doing it, what this machine can do, and what to do about what is missing."""
    findings = examine()
    if as_json:
        _json({finding.capability: finding.to_json() for finding in findings})
        return
    for finding in findings:
        mark = "[green]yes[/]" if finding.works else "[yellow]no [/]"
        _out.print(f"{mark} {finding.capability:<22}", end="")
        _out.print(finding.detail, markup=False)
        if finding.advice:
            _out.print(f"    {'':<22}→ {finding.advice}", markup=False)
