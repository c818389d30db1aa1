"""Which machine holds the guest: ``kvm`` where it works, else ``soft``; found by doing, and told with the reason."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from pageferry.core.errors import UnsupportedError
from pageferry.core.vm import Vm, VmConfig


class Accel(StrEnum):
    """What a user can ask for."""

    AUTO = "auto"
    KVM = "kvm"
    SOFT = "soft"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """A kind of machine: its name, why it was chosen, and how to make one."""

    accel: str
    reason: str
    make_vm: Callable[[VmConfig], Vm]


def choose_machines(accel: Accel) -> Machines:
    """Return the kind of machine to use.

    Raises:
        UnsupportedError: ``kvm`` was asked for and does not work here; says why.
    """
    if accel is Accel.SOFT:
        return Machines(accel="soft", reason="asked for", make_vm=_make_soft)
    from pageferry.kvm.probe import probe

    try:
        probe()
    except UnsupportedError as error:
        if accel is Accel.KVM:
            raise
        return Machines(accel="soft", reason=f"KVM does not work here: {error}", make_vm=_make_soft)
    reason = "asked for" if accel is Accel.KVM else "/dev/kvm works"
    return Machines(accel="kvm", reason=reason, make_vm=_make_kvm)


def _make_soft(config: VmConfig) -> Vm:
    from pageferry.hypervisor.domain import Domain

    return Domain(config)


def _make_kvm(config: VmConfig) -> Vm:
    from pageferry.kvm.vm import KvmVm

    return KvmVm(config)
