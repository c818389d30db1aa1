"""Which machine holds the guest: ``kvm`` where it works, else ``soft``; found by doing, and told with the reason.

A PC is for an operating system, which needs ring 0: AUTO takes ``kvm`` for one only where KVM runs ring 0 natively.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

from pageferry.core.errors import UnsupportedError, UsageError
from pageferry.core.host_cpu import HostCpu, host_cpu
from pageferry.core.hugepages import HugePages, expect_offered
from pageferry.core.machine import Machine
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.devices.standard_machine import StandardMachine
from pageferry.witness import DIGESTS

if TYPE_CHECKING:
    from pageferry.kvm.trackers import Tracker


class Accel(StrEnum):
    """What a user can ask for."""

    AUTO = "auto"
    KVM = "kvm"
    SOFT = "soft"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """A kind of machine: its name, why it was chosen, and how to make one.

    ``host_cpu``: the CPU under it; None: not known. ``tracker``, ``witness``: what was asked for, if anything.
    ``choose_for_pc``: chooses again, for a PC; None: this is the only choice.
    """

    accel: str
    reason: str
    make_vm: Callable[[VmConfig], Machine]
    host_cpu: HostCpu | None = None
    tracker: str | None = None
    huge_pages: HugePages = HugePages.AUTO
    witness: str | None = None
    choose_for_pc: Callable[[], "Machines"] | None = None

    def suited_to(self, machine: MachineModel) -> "Machines":
        """Return the kind of machine for a guest whose model was not known when this one was chosen.

        Raises:
            UnsupportedError: what was asked for cannot hold a guest of that model here.
        """
        return self.choose_for_pc() if self.choose_for_pc and machine is MachineModel.PC else self

    @property
    def warning(self) -> str | None:
        """What threatens a guest that runs here, in one line; None: nothing known."""
        return None if self.host_cpu is None else self.host_cpu.warning


def choose_machines(
    accel: Accel | str = Accel.AUTO,
    tracker: str | None = None,
    huge_pages: HugePages = HugePages.AUTO,
    witness: str | None = None,
    machine: MachineModel | None = None,
) -> Machines:
    """Return the kind of machine to use.

    Args:
        accel: what was asked for: ``auto``, ``kvm`` or ``soft``.
        tracker: the dirty tracker to use, which decides the machine where ``accel`` does not; ``module:Name`` is a
            user's own (:mod:`pageferry.vmm.users_tracker`); None: the machine's own.
        huge_pages: what to ask of the host for guest memory.
        witness: what watches the tracker: another one, or ``digests``; None: nothing.
        machine: the model of the guest's machine; None: not known yet, see :meth:`Machines.suited_to`.

    Raises:
        UnsupportedError: what was asked for does not work here; says why.
        UsageError: no such kind of machine or tracker, or the user's own tracker is not a tracker.
    """
    try:
        accel = Accel(accel)
    except ValueError as error:
        raise UsageError(f"no machine {accel!r}", hint=f"one of {', '.join(Accel)}") from error
    expect_offered(huge_pages)
    again = partial(choose_machines, accel, tracker, huge_pages, witness, MachineModel.PC)
    kind: str | Tracker | None = tracker
    if tracker is not None and ":" in tracker:
        from pageferry.vmm.users_tracker import load_tracker, tracked_by

        users_own = load_tracker(tracker)
        if callable(users_own):
            own = choose_machines(accel, None, huge_pages, None, machine)
            make_own = _watched(tracked_by(tracker, users_own, own.make_vm), witness)
            choose_for_pc = again if own.choose_for_pc else None
            return replace(own, make_vm=make_own, tracker=tracker, witness=witness, choose_for_pc=choose_for_pc)
        kind = users_own
    elif tracker is not None:
        _expect_known(tracker)
    by_tracker = tracker if witness in (None, DIGESTS) else tracker or witness
    name, reason, keeps_cpuid = _choose(accel, by_tracker, machine)
    make_vm = (_make_kvm if name == "kvm" else _make_soft)(kind, huge_pages, witness)
    if name == "soft" and accel is Accel.AUTO and by_tracker is None:
        make_vm = partial(_make_instead, make_vm, reason)
    return Machines(
        accel=name,
        reason=reason,
        make_vm=make_vm,
        host_cpu=host_cpu(keeps_cpuid=keeps_cpuid),
        tracker=tracker,
        huge_pages=huge_pages,
        witness=witness,
        choose_for_pc=again if name == "kvm" and accel is Accel.AUTO and machine is None else None,
    )


def host_cpu_under(accel: str) -> HostCpu | None:
    """Return the CPU under guests of this kind of machine, ``kvm`` or ``soft``; None: not known."""
    if accel == "soft":
        return host_cpu(keeps_cpuid=True)
    from pageferry.kvm.probe import probe

    return host_cpu(keeps_cpuid=probe().exact_cpuid)


def _expect_known(tracker: str) -> None:
    """Check that some machine has a tracker of that name.

    Raises:
        UsageError: none has.
    """
    from pageferry.hypervisor.paging import PAGING_MODES

    if tracker in PAGING_MODES:
        return
    from pageferry.kvm.trackers import TRACKERS  # which soft does not need

    if tracker not in TRACKERS:
        raise UsageError(f"no tracker {tracker}", hint=f"one of {', '.join((*PAGING_MODES, *TRACKERS))}")


def _choose(accel: Accel, tracker: str | None, machine: MachineModel | None) -> tuple[str, str, bool]:
    # The name, the reason, and whether guests see their own CPUID table.
    from pageferry.hypervisor.paging import PAGING_MODES

    if tracker in PAGING_MODES and accel is Accel.AUTO:
        return "soft", f"of tracker {tracker}", True
    if accel is Accel.SOFT:
        return "soft", "asked for", True
    from pageferry.kvm.probe import probe
    from pageferry.kvm.probe_ring_0 import expect_ring_0

    try:
        keeps_cpuid = probe().exact_cpuid
        if accel is Accel.AUTO and machine is MachineModel.PC:
            expect_ring_0()
    except UnsupportedError as error:
        if accel is Accel.KVM:
            raise
        if tracker is not None:
            hint = f"{tracker} is of kvm only; without it the guest can be on soft"
            raise UnsupportedError(error.capability, str(error), hint=hint) from error
        return "soft", str(error), True
    return "kvm", "asked for" if accel is Accel.KVM else "/dev/kvm works", keeps_cpuid


def _make_instead(make_vm: Callable[[VmConfig], StandardMachine], reason: str, config: VmConfig) -> StandardMachine:
    """Make a machine in place of one of KVM; an error about too many vCPUs also says why it is not KVM's."""
    try:
        return make_vm(config)
    except UnsupportedError as error:
        if error.capability != "vcpus":
            raise
        hint = "choose a host on which pageferry doctor finds accel-kvm and kvm-ring0"
        raise UnsupportedError(error.capability, f"{error}; {reason}", hint=hint) from error


def _make_soft(
    tracker: "str | Tracker | None", huge_pages: HugePages, witness: str | None
) -> Callable[[VmConfig], StandardMachine]:
    from pageferry.hypervisor.domain import Domain
    from pageferry.hypervisor.paging import PAGING_MODES

    if tracker is not None and not isinstance(tracker, str):
        hint = "a class that is called with a machine works on both: docs/guide/trackers.md"
        raise UnsupportedError("tracker", "a Tracker is for KVM's machines, not for soft", hint=hint)
    if tracker not in (None, *PAGING_MODES):
        raise UnsupportedError("tracker", f"no tracker {tracker} on soft", hint=f"one of {', '.join(PAGING_MODES)}")
    if huge_pages is HugePages.HUGETLB:
        raise UnsupportedError(
            "hugetlb", "the soft machine gives memory back by single 4 KiB frames", hint="use --hugepages thp"
        )
    if huge_pages is HugePages.ANONYMOUS:
        raise UnsupportedError(
            "anonymous", "the soft machine maps its memory twice, so it is a file", hint="use --hugepages thp"
        )
    make = partial(Domain, paging_mode=tracker or PAGING_MODES[0], thp=huge_pages is HugePages.THP)
    return _watched(make, witness, where="on soft")


def _watched(
    make_vm: Callable[[VmConfig], StandardMachine], witness: str | None, where: str = "beside a tracker of your own"
) -> Callable[[VmConfig], StandardMachine]:
    if witness is None:
        return make_vm
    if witness != DIGESTS:
        raise UnsupportedError("oracle", f"no oracle {witness} {where}", hint=f"--oracle {DIGESTS}")
    from pageferry.witness.machines import with_digests

    return with_digests(make_vm)


def _make_kvm(
    tracker: "str | Tracker | None", huge_pages: HugePages, witness: str | None
) -> Callable[[VmConfig], StandardMachine]:
    from pageferry.kvm.trackers import DEFAULT_TRACKER, find_tracker
    from pageferry.kvm.vm import KvmVm

    tracker = tracker or DEFAULT_TRACKER
    if witness is None:
        return partial(KvmVm, tracker=find_tracker(tracker), huge_pages=huge_pages)
    from pageferry.witness.machines import with_witness

    return partial(KvmVm, tracker=with_witness(tracker, witness), huge_pages=huge_pages)
