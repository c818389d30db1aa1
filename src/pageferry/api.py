"""What a program calls to run, move, save and restore guests; exported as ``pageferry``.

Each function is the whole of what it names, made of the parts that the ``pageferry`` command is made of. A program
that wants more (to cancel, to hold, to change limits, to see missing pages) uses
:class:`~pageferry.engine.source.Source` and :class:`~pageferry.engine.destination.Destination` themselves.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pageferry.core.events import Event, MigrationReport, PostcopyPaused
from pageferry.core.machine import Machine
from pageferry.core.paths import absolute
from pageferry.core.policy import Policy
from pageferry.core.policy_names import make_policy
from pageferry.core.vm import MachineModel, Vm, VmConfig
from pageferry.engine.destination import Destination
from pageferry.engine.image import restore as image_restore
from pageferry.engine.image.save import Save
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.engine.options import DEFAULT_OPTIONS, MigrationOptions
from pageferry.engine.source import Source
from pageferry.engine.wire.acceptor import Acceptor
from pageferry.engine.wire.channel import Endpoint
from pageferry.guests.boot import GuestParams
from pageferry.guests.loader import KernelOptions, named
from pageferry.vmm.accel import Machines, host_cpu_under

#: After a cut in post-copy the destination is tried again so often.
_RETRY_S = 1.0


def _ignore(_: Event) -> None:
    """See nothing."""


def _ignore_arrival(_: Machine, __: str) -> None:
    """Do nothing."""


def boot(
    guest: str | Path,
    machines: Machines,
    *,
    memory_bytes: int = 256 << 20,
    cpus: int = 1,
    params: GuestParams | None = None,
    kernel: KernelOptions | None = None,
) -> Machine:
    """Make a machine with a guest in it, paused; ``resume()`` runs it, ``close()`` ends it and frees the machine.

    Args:
        guest: a built-in workload's name, or the file of a program (ELF) or a kernel.
        machines: the kind of machine, from :func:`~pageferry.vmm.accel.choose_machines`.
        memory_bytes: its RAM, a multiple of 4,096.
        cpus: its vCPUs.
        params: what a workload is told.
        kernel: what a kernel is given: an initrd, a command line.

    Raises:
        UsageError: no such guest, or it does not fit.
        UnsupportedError: this machine cannot hold it, as a kernel where KVM cannot run ring 0.
        VmError: the machine could not be made. In each case nothing is left behind.
    """
    loader = named(str(guest), params, kernel)
    model = loader.machine or MachineModel.PLAIN
    config = VmConfig(memory_bytes=memory_bytes, cpus=cpus, machine=model)
    return loader.make(partial(_make, machines), config)


def migrate(
    guest: Vm,
    to: Endpoint | str,
    policy: Policy | str = "downtime",
    options: MigrationOptions = DEFAULT_OPTIONS,
    *,
    on_event: Callable[[Event], None] = _ignore,
) -> MigrationReport:
    """Move a guest to where a process waits for it (:func:`receive`, ``pageferry receive``), and return what it took.

    Postcondition on success: the guest is there, with all of its memory, as running or paused as it was; here it is
    frozen for ever, and only to be closed. Postcondition on failure: see ``guest_at`` of the error.

    With a policy that switches to post-copy this returns when all pages have gone. A connection that is cut meanwhile
    is made anew, once a second for as long as it takes: the guest stands still there until then, and giving up would
    lose it. ``on_event`` is told (:class:`~pageferry.core.events.PostcopyPaused`); a program that wants to give up, or
    to go on at another address, uses :class:`~pageferry.engine.source.Source` and its ``job``.

    Args:
        guest: running or paused.
        to: where, or its URI: ``tcp://HOST:PORT``, ``unix:PATH``.
        policy: decides after each round, or the name of one, with its default limits.
        options: how to move it.
        on_event: sees every event, on the calling thread.

    Raises:
        UsageError: the address or the policy is wrong.
        MigrationError: the guest did not move and goes on here (``guest_at`` SOURCE), or whether it moved is not known
            and it is frozen here (UNKNOWN).
    """
    endpoint = Endpoint.parse(to) if isinstance(to, str) else to

    def seen(event: Event) -> None:
        on_event(event)
        if isinstance(event, PostcopyPaused):
            time.sleep(_RETRY_S)
            source.job.recover(endpoint)

    source = Source(guest, endpoint, _policy(policy), options, host_cpu=host_cpu_under(guest.accel), on_event=seen)
    return source.run()


def receive(
    acceptor: Acceptor,
    machines: Machines,
    *,
    before_run: Callable[[Machine, str], None] = _ignore_arrival,
    on_event: Callable[[Event], None] = _ignore,
) -> Machine:
    """Wait for one guest, take it in, and return it when all of it is here and its source knows that.

    Postcondition on success: the guest is here, as running or paused as it was. On failure none is here, and none ever
    ran; call it again to wait for the next. In post-copy the guest runs before this returns; a source that is cut comes
    back through the same acceptor, so keep it open.

    Args:
        acceptor: where it comes to. Closing it, from any thread, ends a wait.
        machines: the kind of machine to make for it.
        before_run: called with the machine and the guest's name just before the guest runs, as to follow its console.
        on_event: sees every event, on the calling thread.

    Raises:
        MigrationError: the guest has not arrived and is at its source (``guest_at`` SOURCE), or it was lost with its
            source in post-copy (DESTINATION).
        ConnectionAbortedError: the acceptor was closed before a source came.
    """
    peer = acceptor.wait()
    destination = Destination(
        peer,
        partial(_make, machines),
        host_cpu=lambda vm: host_cpu_under(vm.accel),
        accept=acceptor.accept,
        never_ran=acceptor.never_ran,
        before_run=before_run,
        on_event=on_event,
    )
    try:
        return destination.run()
    finally:
        acceptor.free()


def save(
    guest: Vm,
    path: str | Path,
    policy: Policy | str = "downtime",
    *,
    stop: bool = False,
    on_event: Callable[[Event], None] = _ignore,
) -> MigrationReport:
    """Save a guest to a file, live, as a libxc migration stream; the file is read back and compared before it is named.

    Postcondition on success: the file is whole, and the guest goes on here; with ``stop`` it stays frozen, and only the
    file may be restored. Postcondition on failure: the guest goes on here, and the file is what it was.

    Args:
        guest: running or paused.
        path: of the file; replaced as a whole.
        policy: decides after each round, or the name of one, with its default limits; none that switches.
        stop: leave the guest frozen here.
        on_event: sees every event, on the calling thread.

    Raises:
        UsageError: the policy is not for a save.
        MigrationError: it was not saved.
    """
    job = Save(
        guest,
        absolute(path),
        _policy(policy),
        stop=stop,
        host_cpu=host_cpu_under(guest.accel),
        on_event=on_event,
    )
    return job.run()


def restore(path: str | Path, machines: Machines) -> Machine:
    """Make the machine of a guest in a file and fill it; return it, paused. The file stays as it is.

    Args:
        path: of the file that :func:`save` or ``pageferry save`` made.
        machines: the kind of machine.

    Raises:
        UsageError: the file does not exist, or the host has no room.
        RemoteStreamError: it is not a whole stream; names record and offset.
        VmError: no machine here can hold this guest, or the file cannot be read.
    """
    with SavedGuest(Path(path)) as saved:
        return image_restore.restore(saved, partial(_make, machines))


def _make(machines: Machines, config: VmConfig) -> Machine:
    return machines.suited_to(config.machine).make_vm(config)


def _policy(policy: Policy | str) -> Policy:
    return make_policy(policy) if isinstance(policy, str) else policy
