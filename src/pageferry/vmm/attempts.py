"""The attempt that a ``migrate`` command asks for: a migration to another process, or a save to a file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pageferry.core.events import Event
from pageferry.core.guest_time import WorkSample
from pageferry.core.host_cpu import HostCpu
from pageferry.core.policy import Policy
from pageferry.core.policy_names import UsersPolicies, make_policy
from pageferry.core.vm import Vm
from pageferry.engine.image.save import Save
from pageferry.engine.options import MigrationOptions, VerifyMode, WireOptions
from pageferry.engine.source import Source
from pageferry.engine.wire.channel import DEFAULT_TIMEOUT_S, MAX_TIMEOUT_S, Endpoint
from pageferry.engine.wire.credentials import Credentials, read_secret
from pageferry.stream.ferry_order import Side
from pageferry.stream.packing import Packing
from pageferry.vmm.arguments import Arguments, saved_to
from pageferry.vmm.qmp_error import QmpError

DEFAULT_POLICY = "downtime"


@dataclass(frozen=True, slots=True, kw_only=True)
class Departing:
    """A guest that is about to be moved or saved.

    ``name``: what it is called, for people. ``host_cpu``: the CPU that it runs on; None: not known. ``on_event``: sees
    the attempt's events. ``work_before``: see :class:`~pageferry.engine.attempt.Attempt`.
    """

    vm: Vm
    name: str
    host_cpu: HostCpu | None
    on_event: Callable[[Event], None]
    work_before: WorkSample | None


MakeAttempt = Callable[[Departing], Source | Save]
"""Makes the attempt once the guest is known, with everything else settled."""


def asked_for(uri: str, args: Arguments, users_own: UsersPolicies) -> MakeAttempt:
    """Return what makes the attempt to ``uri``; takes all of the arguments that it may have.

    Args:
        uri: where to.
        args: the command's.
        users_own: the policies that this process was told to allow besides the built-in ones.

    Raises:
        QmpError: an argument is missing, unknown or makes no sense.
        UsageError: as for an address or a policy.
    """
    file = saved_to(uri)
    policy = _policy(args, users_own)
    make = _moving(args, Endpoint.parse(uri), policy) if file is None else _saving(args, file, policy)
    args.done()
    return make


def _moving(args: Arguments, endpoint: Endpoint, policy: Policy) -> MakeAttempt:
    verify = args.choice("x-verify", VerifyMode)
    timeout_s = min(args.number("x-timeout-s") or DEFAULT_TIMEOUT_S, MAX_TIMEOUT_S)
    wire = WireOptions(
        bandwidth_bytes_per_s=args.count("x-bandwidth") or None,
        connections=args.integer("x-connections") or 1,
        compress=args.choice("x-compress", Packing) or Packing.NONE,
        delta_cache_bytes=args.integer("x-delta-cache") or 0,
    )
    hold = args.flag("x-hold")
    credentials = _credentials(args)
    endpoint.expect_suits(credentials)
    pause_limit_s = args.number("x-pause-limit-s")

    def make(guest: Departing) -> Source | Save:
        return Source(
            guest.vm,
            endpoint,
            policy,
            MigrationOptions(
                name=guest.name,
                timeout_s=timeout_s,
                verify=verify,
                wire=wire,
                hold=hold,
                credentials=credentials,
                pause_limit_s=pause_limit_s,
            ),
            host_cpu=guest.host_cpu,
            on_event=guest.on_event,
            work_before=guest.work_before,
        )

    return make


def _credentials(args: Arguments) -> Credentials | None:
    """Return who we are to a destination, and whom we accept; the files are read by this process."""
    directory, secret = args.path("x-tls-dir"), args.path("x-secret-file")
    peer = args.text("x-peer", "")
    if directory is not None and secret is not None:
        raise QmpError("certificates and a secret exclude each other", hint="--tls-dir or --secret-file")
    if secret is not None:
        if peer:
            raise QmpError("with a secret an end has no name", hint="--peer goes with --tls-dir")
        return Credentials.from_secret(read_secret(secret), Side.SOURCE)
    if directory is not None:
        return Credentials.from_dir(directory, Side.SOURCE, peer or None)
    if peer:
        raise QmpError("without certificates an end has no name", hint="--peer goes with --tls-dir")
    return None


def _saving(args: Arguments, file: Path, policy: Policy) -> MakeAttempt:
    stop = args.flag("x-stop")
    pause_limit_s = args.number("x-pause-limit-s")
    wire = WireOptions(bandwidth_bytes_per_s=args.count("x-bandwidth") or None)

    def make(guest: Departing) -> Source | Save:
        return Save(
            guest.vm,
            file,
            policy,
            stop=stop,
            host_cpu=guest.host_cpu,
            bandwidth_bytes_per_s=wire.bandwidth_bytes_per_s,
            pause_limit_s=pause_limit_s,
            on_event=guest.on_event,
            work_before=guest.work_before,
        )

    return make


def _policy(args: Arguments, users_own: UsersPolicies) -> Policy:
    return make_policy(
        args.text("x-policy", DEFAULT_POLICY),
        users_own=users_own,
        downtime_limit_s=args.number("x-downtime-limit-s"),
        max_rounds=args.integer("x-max-rounds"),
        deadline_s=args.number("x-deadline-s"),
    )
