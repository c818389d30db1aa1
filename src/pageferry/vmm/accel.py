"""Which machine holds the guest: ``kvm`` where it works, else ``soft``; found by doing, and told with the reason."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from pageferry.core.errors import UnsupportedError
from pageferry.core.host_cpu import HostCpu, host_cpu
from pageferry.core.hugepages import HugePages, expect_offered
from pageferry.core.machine import Machine
from pageferry.core.vm import VmConfig
from pageferry.witness.ledger import DIGESTS

#: The paging modes of the software machine; the first is its own.
_SOFT_TRACKERS = ("hap", "shadow")


class Accel(StrEnum):
    """What a user can ask for."""

    AUTO = "auto"
    KVM = "kvm"
    SOFT = "soft"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """A kind of machine: its name, why it was chosen, and how to make one.

    ``host_cpu``: the CPU under it; None: not known. ``tracker``, ``oracle``: what was asked for, if anything.
    """

    accel: str
    reason: str
    make_vm: Callable[[VmConfig], Machine]
    host_cpu: HostCpu | None = None
    tracker: str | None = None
    huge_pages: HugePages = HugePages.OFF
    oracle: str | None = None

    @property
    def warning(self) -> str | None:
        """What threatens a guest that runs here, in one line; None: nothing known."""
        return None if self.host_cpu is None else self.host_cpu.warning


def choose_machines(
    accel: Accel,
    tracker: str | None = None,
    huge_pages: HugePages = HugePages.OFF,
    oracle: str | None = None,
) -> Machines:
    """Return the kind of machine to use.

    Args:
        accel: what was asked for.
        tracker: the dirty tracker to use, which decides the machine where ``accel`` does not; None: the machine's own.
        huge_pages: what to ask of the host for guest memory.
        oracle: who watches the tracker: another one, or ``digests``; None: nobody.

    Raises:
        UnsupportedError: what was asked for does not work here; says why.
    """
    expect_offered(huge_pages)
    name, reason, keeps_cpuid = _choose(accel, tracker if oracle in (None, DIGESTS) else tracker or oracle)
    make = _make_kvm if name == "kvm" else _make_soft
    return Machines(
        accel=name,
        reason=reason,
        make_vm=make(tracker, huge_pages, oracle),
        host_cpu=host_cpu(keeps_cpuid=keeps_cpuid),
        tracker=tracker,
        huge_pages=huge_pages,
        oracle=oracle,
    )


def _choose(accel: Accel, tracker: str | None) -> tuple[str, str, bool]:
    # The name, the reason, and whether guests see their own CPUID table.
    if tracker in _SOFT_TRACKERS and accel is Accel.AUTO:
        return "soft", f"of tracker {tracker}", True
    if accel is Accel.SOFT:
        return "soft", "asked for", True
    from pageferry.kvm.probe import probe

    try:
        keeps_cpuid = probe().exact_cpuid
    except UnsupportedError as error:
        if accel is Accel.KVM or tracker is not None:
            raise
        return "soft", f"KVM does not work here: {error}", True
    return "kvm", "asked for" if accel is Accel.KVM else "/dev/kvm works", keeps_cpuid


def _make_soft(tracker: str | None, huge_pages: HugePages, oracle: str | None) -> Callable[[VmConfig], Machine]:
    from pageferry.hypervisor.domain import Domain

    if tracker not in (None, *_SOFT_TRACKERS):
        raise UnsupportedError("tracker", f"no tracker {tracker} on soft", hint=f"one of {', '.join(_SOFT_TRACKERS)}")
    if huge_pages is HugePages.HUGETLB:
        raise UnsupportedError(
            "hugetlb", "the soft machine gives memory back by single 4 KiB frames", hint="use --hugepages thp"
        )
    make = partial(Domain, paging_mode=tracker or _SOFT_TRACKERS[0], thp=huge_pages is HugePages.THP)
    if oracle is None:
        return make
    if oracle != DIGESTS:
        raise UnsupportedError("oracle", f"no oracle {oracle} on soft", hint=f"--oracle {DIGESTS}")
    from pageferry.witness.oracle import with_digests

    return with_digests(make)


def _make_kvm(tracker: str | None, huge_pages: HugePages, oracle: str | None) -> Callable[[VmConfig], Machine]:
    from pageferry.kvm.trackers import DEFAULT_TRACKER, find_tracker
    from pageferry.kvm.vm import KvmVm

    tracker = tracker or DEFAULT_TRACKER
    if oracle is None:
        return partial(KvmVm, tracker=find_tracker(tracker), huge_pages=huge_pages)
    from pageferry.witness.oracle import both

    return partial(KvmVm, tracker=both(tracker, oracle), huge_pages=huge_pages)
