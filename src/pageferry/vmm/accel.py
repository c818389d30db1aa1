"""Which machine holds the guest: ``kvm`` where it works, else ``soft``; found by doing, and told with the reason."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from pageferry.core.errors import UnsupportedError
from pageferry.core.hugepages import HugePages, expect_offered
from pageferry.core.vm import Vm, VmConfig

#: The paging modes of the software machine; the first is its own.
_SOFT_TRACKERS = ("hap", "shadow")


class Accel(StrEnum):
    """What a user can ask for."""

    AUTO = "auto"
    KVM = "kvm"
    SOFT = "soft"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """A kind of machine: its name, why it was chosen, and how to make one. ``tracker``: the one asked for, if any."""

    accel: str
    reason: str
    make_vm: Callable[[VmConfig], Vm]
    tracker: str | None = None
    huge_pages: HugePages = HugePages.OFF


def choose_machines(accel: Accel, tracker: str | None = None, huge_pages: HugePages = HugePages.OFF) -> Machines:
    """Return the kind of machine to use.

    Args:
        accel: what was asked for.
        tracker: the dirty tracker to use, which decides the machine where ``accel`` does not; None: the machine's own.
        huge_pages: what to ask of the host for guest memory.

    Raises:
        UnsupportedError: what was asked for does not work here; says why.
    """
    expect_offered(huge_pages)
    name, reason = _choose(accel, tracker)
    make = _make_kvm if name == "kvm" else _make_soft
    return Machines(
        accel=name, reason=reason, make_vm=make(tracker, huge_pages), tracker=tracker, huge_pages=huge_pages
    )


def _choose(accel: Accel, tracker: str | None) -> tuple[str, str]:
    if tracker in _SOFT_TRACKERS and accel is Accel.AUTO:
        return "soft", f"of tracker {tracker}"
    if accel is Accel.SOFT:
        return "soft", "asked for"
    from pageferry.kvm.probe import probe

    try:
        probe()
    except UnsupportedError as error:
        if accel is Accel.KVM or tracker is not None:
            raise
        return "soft", f"KVM does not work here: {error}"
    return "kvm", "asked for" if accel is Accel.KVM else "/dev/kvm works"


def _make_soft(tracker: str | None, huge_pages: HugePages) -> Callable[[VmConfig], Vm]:
    from pageferry.hypervisor.domain import Domain

    if tracker not in (None, *_SOFT_TRACKERS):
        raise UnsupportedError("tracker", f"no tracker {tracker} on soft", hint=f"one of {', '.join(_SOFT_TRACKERS)}")
    if huge_pages is HugePages.HUGETLB:
        raise UnsupportedError(
            "hugetlb", "the soft machine gives memory back by single 4 KiB frames", hint="use --hugepages thp"
        )
    return partial(Domain, paging_mode=tracker or _SOFT_TRACKERS[0], thp=huge_pages is HugePages.THP)


def _make_kvm(tracker: str | None, huge_pages: HugePages) -> Callable[[VmConfig], Vm]:
    from pageferry.kvm.trackers import DEFAULT_TRACKER, find_tracker
    from pageferry.kvm.vm import KvmVm

    return partial(KvmVm, tracker=find_tracker(tracker or DEFAULT_TRACKER), huge_pages=huge_pages)
