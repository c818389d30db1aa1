"""Options that several commands share, and what is made of them: a guest's size, arguments of the QMP ``migrate``."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pageferry.cli.control_options import path_option
from pageferry.cli.stdio import say
from pageferry.core.cpuid import CpuModel
from pageferry.core.device_spec import DIRECT, DeviceKind, DeviceSpec
from pageferry.core.errors import UsageError
from pageferry.core.hugepages import HugePages
from pageferry.core.paths import absolute as absolute_path
from pageferry.core.policies import PostcopyPolicy
from pageferry.core.policy_names import POLICIES, make_policy
from pageferry.core.ram import ram_layout
from pageferry.core.units import parse_rate, parse_size
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.engine.options import VerifyMode, WireOptions
from pageferry.engine.wire.channel import MAX_TIMEOUT_S, Endpoint
from pageferry.stream.packing import Packing
from pageferry.vmm.accel import Accel
from pageferry.vmm.local_backends import absolute

MAX_CPUS = 8


def _checked(check: Callable[[Any], object]) -> Callable[[typer.CallbackParam, Any], Any]:
    """Return what has ``check`` raise a UsageError of an option's value, or of each; the option is named."""

    def callback(param: typer.CallbackParam, value: Any) -> Any:  # noqa: ANN401  # as the option has it
        for each in value if isinstance(value, list | tuple) else (value,):
            try:
                if each is not None:
                    check(each)
            except UsageError as error:
                raise UsageError(f"{param.opts[0]}: {error}", hint=error.hint) from error
        return value

    return callback


def _expect_positive(value: float) -> None:
    if not 0 < value < math.inf:
        raise UsageError(f"{value:g} is not a positive limit", hint="a finite number above 0")


SIZE = _checked(parse_size)
_READONLY, _MAC = ",readonly", ",mac="

AccelOption = Annotated[
    Accel, typer.Option(help="What runs the guest: kvm, soft (anywhere), or auto: kvm where it works.")
]
TrackerOption = Annotated[
    str | None,
    typer.Option(
        help="How dirty pages are found, by name or module:Name: "
        "hap or shadow (soft), kvm-bitmap, kvm-ring, uffd-wp or pagemap-scan (kvm)."
    ),
]
WitnessOption = Annotated[
    str | None,
    typer.Option(
        "--oracle", help="Watch the tracker: by a second one (kvm), or by digests of every page. Slow; finds lost bits."
    ),
]
HugePagesOption = Annotated[
    HugePages,
    typer.Option(
        "--hugepages",
        help="Host memory under the guest: auto; private memory in pages of 2 MiB (anonymous; kvm); a memfd, in such "
        "pages by advice (thp) or in small ones (off); or a reserved pool (hugetlb; kvm).",
    ),
]
RATE = _checked(lambda text: WireOptions(bandwidth_bytes_per_s=parse_rate(text)))
BandwidthOption = Annotated[
    str | None, typer.Option(callback=RATE, help="Bytes a second at the most, e.g. 100M; 0: no limit.")
]
TlsDirOption = Annotated[
    Path | None,
    path_option(
        help="Certificates for tls://, named as for QEMU: ca-cert.pem, server- or client-cert.pem and -key.pem."
    ),
]
PeerOption = Annotated[
    str | None, typer.Option(help="Accept only an end whose certificate has this name or address (--tls-dir).")
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Do not warn that tcp:// can be read and changed by others.")
]
PlotOption = Annotated[
    Path | None,
    path_option("--plot", help="Draw the migration into this file, FILE.html: a self-contained HTML page."),
]
MemoryOption = Annotated[str, typer.Option(callback=SIZE, help="Guest memory.")]
CpuOption = Annotated[
    CpuModel,
    typer.Option(help="CPU shown to the guest: baseline x86-64, so it moves anywhere, or all of the host's (kvm)."),
]
MachineOption = Annotated[
    MachineModel,
    typer.Option(help="The machine's model: plain, or pc, with a PC's interrupt controllers and timer."),
]
CpusOption = Annotated[int, typer.Option(min=1, max=MAX_CPUS, help=f"vCPUs, 1 to {MAX_CPUS}.")]
PolicyOption = Annotated[str, typer.Option(help=f"When to stop and copy: {', '.join(POLICIES)}, or module:Name.")]
AllowPolicyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-policy", help="module:Name: a policy of your own that may be asked for here. May be repeated."
    ),
]
LimitOption = Annotated[
    float | None,
    typer.Option(
        callback=_checked(_expect_positive), help="Downtime allowed, in ms (downtime, converge, postcopy; default 300)."
    ),
]
#: A save cannot follow a policy that may switch before all pages are there.
_SAVE_POLICIES = [name for name, (policy, _) in POLICIES.items() if policy is not PostcopyPolicy]
SavePolicyOption = Annotated[
    str,
    typer.Option(help=f"When to stop and copy: {', '.join(_SAVE_POLICIES)}, or module:Name."),
]
SaveLimitOption = Annotated[
    float | None,
    typer.Option(
        callback=_checked(_expect_positive), help="Downtime allowed, in ms (downtime, converge; default 300)."
    ),
]
SaveRoundsOption = Annotated[
    int | None, typer.Option(min=1, help="Rounds at the most (downtime 30, converge 60, xen 5).")
]
SavePlotOption = Annotated[
    Path | None, path_option("--plot", help="Draw the save into this file, FILE.html: a self-contained HTML page.")
]
RoundsOption = Annotated[
    int | None, typer.Option(min=1, help="Rounds at the most (downtime 30, converge 60, xen 5, postcopy 3).")
]
DeadlineOption = Annotated[
    float | None, typer.Option(callback=_checked(_expect_positive), help="Seconds from beginning to end (deadline).")
]
PauseLimitOption = Annotated[
    float | None,
    typer.Option(
        callback=_checked(_expect_positive),
        help="Longest pause, in ms; over it the guest runs on at the source. "
        "Default: ten times the downtime limit, at least 2000; none where the policy has no downtime limit.",
    ),
]
TimeoutOption = Annotated[
    float,
    typer.Option(
        min=0.1, max=MAX_TIMEOUT_S, callback=_checked(_expect_positive), help="Seconds the connection may stand still."
    ),
]
VerifyOption = Annotated[
    VerifyMode | None,
    typer.Option(
        help="Digest all memory at the pause (full) or most of it while the guest runs (audit). "
        "Default: full where that takes at most half of the downtime limit."
    ),
]


DisksOption = Annotated[
    list[str] | None,
    typer.Option("--disk", help="A disk: PATH[,readonly][,direct]; direct: past the page cache. May be repeated (pc)."),
]
NetsOption = Annotated[
    list[str] | None,
    typer.Option("--net", help="A network: tap:NAME, or unix:PATH of passt; ,mac=ADDRESS; may be repeated (pc)."),
]
VirtioConsoleOption = Annotated[
    bool,
    typer.Option("--virtio-console", help="A virtio console besides the UART (hvc0); typed input goes there (pc)."),
]
LocalDisksOption = Annotated[
    list[str] | None,
    typer.Option(
        "--disk", help="NUMBER=PATH[,direct]: the guest's disk of this number, from 0, here. May be repeated."
    ),
]
LocalNetsOption = Annotated[
    list[str] | None,
    typer.Option("--net", help="NUMBER=tap:NAME or NUMBER=unix:PATH: its network here. May be repeated."),
]


def vm_config(
    memory: str, cpus: int, cpu: CpuModel, machine: MachineModel, devices: tuple[DeviceSpec, ...] = ()
) -> VmConfig:
    """Return what the options say of a guest's size and kind.

    Raises:
        UsageError: no guest can be like that.
    """
    memory_bytes = parse_size(memory)
    ram_layout(memory_bytes)
    return VmConfig(memory_bytes=memory_bytes, cpus=cpus, cpu=cpu, machine=machine, devices=devices)


def device_specs(disks: list[str] | None, nets: list[str] | None, *, console: bool) -> tuple[DeviceSpec, ...]:
    """Return the virtio devices that a PC is run with: what was asked for, then entropy and a balloon.

    Raises:
        UsageError: an option makes no sense.
    """
    always = (DeviceSpec(kind=DeviceKind.RNG), DeviceSpec(kind=DeviceKind.BALLOON))
    consoles = (DeviceSpec(kind=DeviceKind.CONSOLE),) if console else ()
    return (*map(_disk, disks or ()), *map(_net, nets or ()), *consoles, *always)


def _disk(text: str) -> DeviceSpec:
    path, flags = text, set()
    while path.endswith((_READONLY, DIRECT)):
        path, comma, flag = path.rpartition(",")
        flags.add(comma + flag)
    backend = absolute(DeviceKind.DISK, path) + (DIRECT if DIRECT in flags else "")
    return DeviceSpec(kind=DeviceKind.DISK, backend=backend, readonly=_READONLY in flags)


def _net(text: str) -> DeviceSpec:
    backend, _, mac = text.partition(_MAC)
    return DeviceSpec(kind=DeviceKind.NET, backend=absolute(DeviceKind.NET, backend), mac=mac or _random_mac())


def _random_mac() -> str:
    return ":".join(f"{byte:02x}" for byte in (0x52, 0x54, 0x00, *os.urandom(3)))  # as QEMU's: locally administered


def policy_options(
    policy: str,
    downtime_limit: float | None,
    max_rounds: int | None,
    deadline: float | None,
    verify: VerifyMode | None,
    pause_limit: float | None = None,
) -> dict[str, Any]:
    """Return the arguments of the QMP command ``migrate`` that say how a policy decides and what is verified.

    Args:
        policy: its name, see :func:`pageferry.core.policy_names.make_policy`; a user's own is made, and its options
            checked, where it decides.
        downtime_limit: in ms.
        max_rounds: rounds at the most.
        deadline: in s.
        verify: how the destination proves its memory.
        pause_limit: in ms.

    Raises:
        UsageError: no such policy, or an option does not belong to it or makes no sense.
    """
    limit_s = None if downtime_limit is None else downtime_limit / 1e3
    if ":" not in policy:
        make_policy(policy, downtime_limit_s=limit_s, max_rounds=max_rounds, deadline_s=deadline)
    options = {
        "x-policy": policy,
        "x-downtime-limit-s": limit_s,
        "x-max-rounds": max_rounds,
        "x-deadline-s": deadline,
        "x-verify": verify,
        "x-pause-limit-s": None if pause_limit is None else pause_limit / 1e3,
    }
    return {name: value for name, value in options.items() if value is not None}


def warn_if_exposed(endpoint: Endpoint, *, insecure: bool) -> None:
    """Warn of an address at which others can read and change what passes, unless the user knows."""
    if endpoint.exposed and not insecure:
        text = f"at {endpoint} others on the network can read and change the guest"
        say(f"warning: {text}; use tls:// (docs/guide/security.md), or --insecure")


def tls_options(tls_dir: Path | None, peer: str | None, secret_file: Path | None) -> dict[str, Any]:
    """Return the arguments of the QMP command ``migrate`` that say who we are and whom we accept."""
    options = {
        "x-tls-dir": None if tls_dir is None else str(absolute_path(tls_dir)),
        "x-peer": peer,
        "x-secret-file": None if secret_file is None else str(absolute_path(secret_file)),
    }
    return {name: value for name, value in options.items() if value is not None}


def rate_option(bandwidth: str | None) -> dict[str, Any]:
    """Return the argument of the QMP command ``migrate`` for a rate in words; none for None, which says nothing."""
    return {} if bandwidth is None else {"x-bandwidth": parse_rate(bandwidth) or 0}


def wire_options(bandwidth: str | None, connections: int, compress: Packing, delta_cache: str | None) -> dict[str, Any]:
    """Return the arguments of the QMP command ``migrate`` that say how bytes travel.

    Args:
        bandwidth: a rate in words, such as ``100M``; ``0``: no limit; None: what the guest process has kept.
        connections: how many.
        compress: how page data are packed.
        delta_cache: a size in words; None: no cache.

    Raises:
        UsageError: a rate or size is wrong, or the options do not go together.
    """
    wire = WireOptions(
        connections=connections,
        compress=compress,
        delta_cache_bytes=0 if delta_cache is None else parse_size(delta_cache),
    )
    options = {
        "x-connections": wire.connections,
        "x-compress": str(wire.compress),
        "x-delta-cache": wire.delta_cache_bytes or None,
    }
    return rate_option(bandwidth) | {name: value for name, value in options.items() if value is not None}
