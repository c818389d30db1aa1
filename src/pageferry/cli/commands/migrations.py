"""The commands that move or save a guest, and those that steer one on its way."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pageferry.cli.client import MigrationFailedError, cancel_migration, migrate
from pageferry.cli.control_options import ControlOption, JsonOption, path_option
from pageferry.cli.demo import run_demo, run_linux_demo
from pageferry.cli.options import (
    RATE,
    SIZE,
    AccelOption,
    BandwidthOption,
    CpuOption,
    CpusOption,
    DeadlineOption,
    HugePagesOption,
    InsecureOption,
    LimitOption,
    MachineOption,
    MemoryOption,
    PauseLimitOption,
    PeerOption,
    PlotOption,
    PolicyOption,
    RoundsOption,
    SaveLimitOption,
    SavePlotOption,
    SavePolicyOption,
    SaveRoundsOption,
    TimeoutOption,
    TlsDirOption,
    TrackerOption,
    VerifyOption,
    WitnessOption,
    policy_options,
    rate_option,
    tls_options,
    vm_config,
    warn_if_exposed,
    wire_options,
)
from pageferry.cli.outcome import Interrupted
from pageferry.cli.plot import PlotFile
from pageferry.cli.progress import ProgressView
from pageferry.cli.status import print_witness
from pageferry.cli.stdio import ERR, OUT, complain, print_object, tell
from pageferry.cli.summary import lessons, summary
from pageferry.core.cpuid import CpuModel
from pageferry.core.errors import UsageError
from pageferry.core.hugepages import HugePages
from pageferry.core.policy_names import make_policy
from pageferry.core.units import parse_rate
from pageferry.core.vm import MachineModel
from pageferry.engine.job import JobStatus
from pageferry.engine.wire.channel import DEFAULT_TIMEOUT_S, Endpoint
from pageferry.guests.linux.debian import LinuxImage
from pageferry.guests.linux.image import load_kernel
from pageferry.guests.workloads import WORKLOADS, load_guest
from pageferry.stream.ferry_frames import MAX_CONNECTIONS
from pageferry.stream.packing import Packing
from pageferry.vmm.accel import Accel, choose_machines
from pageferry.vmm.arguments import file_uri
from pageferry.vmm.qmp_client import QmpClient

if TYPE_CHECKING:
    from pageferry.cli.xen_source import Asked

#: What a domain of Xen is written as: ``xen:NAME`` or ``xen:NUMBER``.
XEN_PREFIX = "xen:"


def demo(
    accel: AccelOption = Accel.AUTO,
    tracker: TrackerOption = None,
    huge_pages: HugePagesOption = HugePages.AUTO,
    witness: WitnessOption = None,
    memory: MemoryOption = "256M",
    workload: Annotated[str, typer.Option(help=f"Guest program: {', '.join(WORKLOADS)}, or an ELF file.")] = "kv",
    linux: Annotated[
        Path | None, path_option(help="A Linux at work instead: a directory that `make linux-image` made.")
    ] = None,
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
    """Migrate a running guest between two processes on this host, and show what happened."""
    if linux is None:
        load_guest(workload)
    else:
        load_kernel(LinuxImage.of(linux).kernel)
        machine = MachineModel.PC
    config = vm_config(memory, cpus, cpu, machine)
    options = policy_options(policy, downtime_limit, max_rounds, deadline, verify)
    machines = choose_machines(accel, tracker, huge_pages, witness, machine)
    with _plot_file(plot) as file:
        if linux is None:
            _report(lambda: run_demo(machines, workload, config, options, ERR), as_json, file)
        else:
            _report(lambda: run_linux_demo(machines, LinuxImage.of(linux), config, options, ERR), as_json, file)


def migrate_guest(
    what: Annotated[
        str,
        typer.Argument(
            metavar="URI|xen:DOMAIN",
            help="Where the destination waits: tls://HOST:PORT, tcp://HOST:PORT or unix:PATH. Or a domain of Xen.",
        ),
    ],
    uri: Annotated[
        str | None, typer.Argument(metavar="[ssh://HOST]", help="Of a domain: where xl migrate-receive is run.")
    ] = None,
    control: Annotated[Path | None, path_option(help="The guest process's control socket.")] = None,
    through: Annotated[
        str | None, typer.Option(help="A command that leads to `xl migrate-receive`, instead of ssh://HOST (xen:).")
    ] = None,
    tls_dir: TlsDirOption = None,
    peer: PeerOption = None,
    secret_file: Annotated[
        Path | None, path_option(help="A file with what `receive --secret new` has printed (tls).")
    ] = None,
    insecure: InsecureOption = False,
    policy: PolicyOption = "downtime",
    downtime_limit: LimitOption = None,
    max_rounds: RoundsOption = None,
    deadline: DeadlineOption = None,
    verify: VerifyOption = None,
    pause_limit: PauseLimitOption = None,
    timeout: TimeoutOption = DEFAULT_TIMEOUT_S,
    bandwidth: BandwidthOption = None,
    connections: Annotated[
        int, typer.Option(min=1, max=MAX_CONNECTIONS, help=f"Connections to use, 1 to {MAX_CONNECTIONS}.")
    ] = 1,
    compress: Annotated[
        Packing, typer.Option(help="Pack page data: for a wire that is slower than the CPU.")
    ] = Packing.NONE,
    delta_cache: Annotated[
        str | None,
        typer.Option(
            callback=SIZE, help="Memory to remember sent pages in, e.g. 64M, to send changes only (--compress)."
        ),
    ] = None,
    plot: PlotOption = None,
    hold: Annotated[
        bool, typer.Option("--hold", help="When all is ready, wait for `pageferry switch` before the guest is paused.")
    ] = False,
    recover: Annotated[
        bool,
        typer.Option(
            "--recover",
            help="Go on after a cut in post-copy, or ask where the guest is; needs --control and URI.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Migrate a guest live; Ctrl-C cancels and leaves it running where it is, until the handoff has begun."""
    if what.startswith(XEN_PREFIX):
        from pageferry.cli import xen_source  # only where it is wanted: it brings the whole engine
        from pageferry.xen.receiver import ssh_command, through_command

        if (uri is None) == (through is None):
            what = "no destination was given" if uri is None else "a destination was given twice"
            raise UsageError(what, hint="pageferry migrate xen:DOMAIN ssh://HOST, or --through COMMAND")
        _expect_of_xen(
            {
                "--tls-dir": tls_dir is not None,
                "--peer": peer is not None,
                "--secret-file": secret_file is not None,
                "--insecure": insecure,
                "--verify": verify is not None,
                "--connections": connections != 1,
                "--compress": compress is not Packing.NONE,
                "--delta-cache": delta_cache is not None,
                "--hold": hold,
                "--recover": recover,
            }
        )
        command = ssh_command(uri) if uri is not None else through_command(through or "")
        domain, asked = _of_xen(what, control, policy, downtime_limit, max_rounds, deadline, bandwidth, pause_limit)
        with _plot_file(plot) as picture:
            _report(lambda: xen_source.migrate_domain(domain, command, asked, timeout_s=timeout), as_json, picture)
        return
    if uri is not None or through is not None:
        raise UsageError(f"{what} is no domain", hint="pageferry migrate URI --control PATH, or xen:DOMAIN ssh://HOST")
    if control is None:
        raise UsageError(
            "no guest was given: --control is missing",
            hint="pageferry migrate URI --control PATH, or xen:DOMAIN ssh://HOST",
        )
    uri = what
    warn_if_exposed(Endpoint.parse(uri), insecure=insecure)
    options = policy_options(policy, downtime_limit, max_rounds, deadline, verify, pause_limit)
    options |= {"x-timeout-s": timeout}
    options |= wire_options(bandwidth, connections, compress, delta_cache) | ({"x-hold": True} if hold else {})
    options |= tls_options(tls_dir, peer, secret_file)
    _migrate(control, uri, {"resume": True} if recover else options, as_json, plot)


def save(
    what: Annotated[
        str,
        typer.Argument(
            metavar="FILE|xen:DOMAIN",
            help="The file to make; an earlier one is replaced when this is whole. Or a domain of Xen.",
        ),
    ],
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="The file, when a domain is saved.", readable=False)
    ] = None,
    control: Annotated[Path | None, path_option(help="The guest process's control socket.")] = None,
    stop: Annotated[
        bool, typer.Option("--stop", help="Stop the guest here when it is saved; without it, it runs on: a snapshot.")
    ] = False,
    policy: SavePolicyOption = "downtime",
    downtime_limit: SaveLimitOption = None,
    max_rounds: SaveRoundsOption = None,
    deadline: DeadlineOption = None,
    pause_limit: PauseLimitOption = None,
    bandwidth: BandwidthOption = None,
    as_json: JsonOption = False,
    plot: SavePlotOption = None,
) -> None:
    """Save a guest to a file while it runs, and prove that the file holds it; Ctrl-C cancels."""
    if file is not None and what.startswith(XEN_PREFIX):
        from pageferry.cli import xen_source  # only where it is wanted: it brings the whole engine

        domain, asked = _of_xen(what, control, policy, downtime_limit, max_rounds, deadline, bandwidth, pause_limit)
        with _plot_file(plot) as picture:
            _report(lambda: xen_source.save_domain(domain, file, asked, stop=stop), as_json, picture)
        return
    if file is not None:
        raise UsageError(f"{what} is no guest", hint="pageferry save FILE --control PATH, or save xen:DOMAIN FILE")
    if control is None:
        raise UsageError(
            "no guest was given: --control is missing",
            hint="pageferry save FILE --control PATH, or save xen:DOMAIN FILE",
        )
    options = policy_options(policy, downtime_limit, max_rounds, deadline, None, pause_limit)
    options |= {"x-stop": True} if stop else {}
    options |= rate_option(bandwidth)
    _migrate(control, file_uri(Path(what)), options, as_json, plot)


def _expect_of_xen(given: dict[str, bool]) -> None:
    """Check that no option was given that only another pageferry at the destination understands.

    Raises:
        UsageError: one was.
    """
    wrong = [name for name, is_given in given.items() if is_given]
    if wrong:
        them = "it" if len(wrong) == 1 else "them"
        raise UsageError(
            f"{', '.join(wrong)}: not for a domain of Xen",
            hint=f"leave {them} out: Xen's own receiver takes the domain, through ssh or --through",
        )


def _of_xen(
    what: str,
    control: Path | None,
    policy: str,
    downtime_limit: float | None,
    max_rounds: int | None,
    deadline: float | None,
    bandwidth: str | None,
    pause_limit: float | None,
) -> "tuple[str, Asked]":
    """Return the domain that ``xen:DOMAIN`` names, and what is asked of its source."""
    from pageferry.cli.xen_source import Asked

    if control is not None:
        raise UsageError("a domain of Xen has no control socket", hint="leave --control out")
    limit_s = None if downtime_limit is None else downtime_limit / 1e3
    asked = Asked(
        policy=make_policy(policy, downtime_limit_s=limit_s, max_rounds=max_rounds, deadline_s=deadline),
        bandwidth_bytes_per_s=None if bandwidth is None else parse_rate(bandwidth),
        pause_limit_s=None if pause_limit is None else pause_limit / 1e3,
    )
    return what.removeprefix(XEN_PREFIX), asked


def switch(control: ControlOption) -> None:
    """Let a migration that was told to hold pause its guest and finish."""
    with QmpClient(control) as client:
        held = client.execute("query-migrate").get("status") == JobStatus.HELD
        client.execute("migrate-continue", state=JobStatus.HELD)
    if not held:
        tell("the migration is not held now: it pauses its guest as soon as it is ready")


def cancel(control: ControlOption) -> None:
    """Cancel the migration under way; the guest stays where it is."""
    with QmpClient(control) as client:
        under_way = "x-eta-reason" in client.execute("query-migrate")
        cancel_migration(client)
    if not under_way:
        tell("no migration is under way")


def limits(
    control: ControlOption,
    downtime_limit: LimitOption = None,
    max_rounds: RoundsOption = None,
    deadline: DeadlineOption = None,
    bandwidth: Annotated[
        str | None, typer.Option(callback=RATE, help="Bytes a second at the most, e.g. 100M; 0: no limit.")
    ] = None,
) -> None:
    """Change the limits of the migration under way, and of those to come."""
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
        if "x-eta-reason" not in client.execute("query-migrate"):
            only = "; a deadline is for --policy deadline only" if deadline is not None else ""
            if client.execute("query-status")["status"] == "postmigrate":
                tell("the guest is not here any more: the limits change nothing")
            else:
                tell(f"no migration is under way: the limits are kept for the next one{only}")


def _migrate(control: Path, uri: str, options: dict[str, Any], as_json: bool, plot: Path | None) -> None:
    with _plot_file(plot) as file, QmpClient(control) as client:

        def follow() -> dict[str, Any]:
            with ProgressView(ERR) as view:
                report = migrate(client, uri, options, view.show)
            print_witness(report, ERR)
            return report

        _report(follow, as_json, file)


def _report(attempt: Callable[[], dict[str, Any]], as_json: bool, plot: PlotFile | None) -> None:
    """Make a migration, print its report and draw it; of one that failed the error carries the report on."""
    try:
        report = attempt()
    except (MigrationFailedError, Interrupted) as error:
        for line in lessons(error.report):
            ERR.print(f"report: {line}", markup=False, soft_wrap=True)
        _draw(plot, error.report)
        raise
    if as_json:
        print_object(report)
    else:
        OUT.print(summary(report))
    _draw(plot, report)


def _draw(plot: PlotFile | None, report: dict[str, Any]) -> None:
    if plot is None:
        return
    try:
        plot.draw(report)
        tell(f"picture: {plot.path}")
    except OSError as error:  # the exit code is the migration's
        complain(f"the picture could not be written to {plot.path}: {error.strerror}")


def _plot_file(path: Path | None) -> AbstractContextManager[PlotFile | None]:
    return nullcontext() if path is None else PlotFile(path)
