"""Which machine holds the guest: ``kvm`` where it works, else ``soft``; found by doing, and told with the reason."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from pageferry.core.errors import UnsupportedError
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


def choose_machines(accel: Accel, tracker: str | None = None) -> Machines:
    """Return the kind of machine to use.

    Args:
        accel: what was asked for.
        tracker: the dirty tracker to use, which decides the machine where ``accel`` does not; None: the machine's own.

    Raises:
        UnsupportedError: what was asked for does not work here; says why.
    """
    if tracker in _SOFT_TRACKERS and accel is Accel.AUTO:
        return Machines(accel="soft", reason=f"of tracker {tracker}", make_vm=_make_soft(tracker), tracker=tracker)
    if accel is Accel.SOFT:
        return Machines(accel="soft", reason="asked for", make_vm=_make_soft(tracker), tracker=tracker)
    from pageferry.kvm.probe import probe

    try:
        probe()
    except UnsupportedError as error:
        if accel is Accel.KVM or tracker is not None:
            raise
        return Machines(accel="soft", reason=f"KVM does not work here: {error}", make_vm=_make_soft(None))
    reason = "asked for" if accel is Accel.KVM else "/dev/kvm works"
    return Machines(accel="kvm", reason=reason, make_vm=_make_kvm(tracker), tracker=tracker)


def _make_soft(tracker: str | None) -> Callable[[VmConfig], Vm]:
    from pageferry.hypervisor.domain import Domain

    if tracker not in (None, *_SOFT_TRACKERS):
        raise UnsupportedError("tracker", f"no tracker {tracker} on soft", hint=f"one of {', '.join(_SOFT_TRACKERS)}")
    return partial(Domain, paging_mode=tracker or _SOFT_TRACKERS[0])


def _make_kvm(tracker: str | None) -> Callable[[VmConfig], Vm]:
    from pageferry.kvm.trackers import DEFAULT_TRACKER, find_tracker
    from pageferry.kvm.vm import KvmVm

    return partial(KvmVm, tracker=find_tracker(tracker or DEFAULT_TRACKER))
