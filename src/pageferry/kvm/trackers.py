"""The dirty trackers of a KVM machine, by name, and what each needs of the kernel.

A tracker is chosen before the machine is made, because some must be set up while the VM has no vCPU yet. Whatever the
kernel does not offer is an UnsupportedError that says what is missing, from ``prepare`` or from ``make``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pageferry.core.errors import UnsupportedError
from pageferry.core.vm import LogDirty
from pageferry.kvm import uapi
from pageferry.kvm.bitmap_log import KvmBitmapLog
from pageferry.kvm.fds import VmFd
from pageferry.uffd import PagemapScanLog, VcpuView, WriteProtectLog, check_pagemap_scan, check_userfaultfd

if TYPE_CHECKING:
    from pageferry.kvm.vm import KvmVm

DEFAULT_TRACKER = "kvm-bitmap"


@runtime_checkable
class Closeable(Protocol):
    """What a tracker is besides when it owns something, as a thread or a mapping, that must end with the machine."""

    def close(self) -> None:
        """Free it; no vCPU will run again, and every descriptor of the machine is still open. Called once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracker:
    """One kind of tracker.

    ``prepare``: called with the new VM, before it has memory or vCPUs.
    ``make``: called once memory, slots and vCPUs are there and nothing has run. What it returns is closed with the
    machine if it is :class:`Closeable`.
    ``own_mapping``: the vCPUs have a host mapping of RAM to themselves, which the tracker may protect.
    """

    prepare: Callable[[VmFd], None]
    make: Callable[["KvmVm"], LogDirty]
    own_mapping: bool = False


def find_tracker(name: str) -> Tracker:
    """Return the tracker of that name.

    Raises:
        UnsupportedError: KVM machines have no such tracker.
    """
    if name not in TRACKERS:
        raise UnsupportedError("tracker", f"no tracker {name} on kvm", hint=f"one of {', '.join(TRACKERS)}")
    return TRACKERS[name]


def offers_manual_protect(vm: VmFd) -> bool:
    """Tell whether the dirty bitmap can be cleared by hand."""
    offered = vm.check_extension(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)
    return bool(offered & uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)


def _prepare_bitmap(vm: VmFd) -> None:
    if offers_manual_protect(vm):
        vm.enable_cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE)


def _make_bitmap(vm: "KvmVm") -> LogDirty:
    return KvmBitmapLog(vm.vm_fd, vm.memory, vm.slots, manual_protect=offers_manual_protect(vm.vm_fd))


def _make_automatic_bitmap(vm: "KvmVm") -> LogDirty:
    return KvmBitmapLog(vm.vm_fd, vm.memory, vm.slots, manual_protect=False)


def _view(vm: "KvmVm") -> VcpuView:
    return VcpuView(memory=vm.memory, mapping=vm.vcpu_mapping)


TRACKERS: dict[str, Tracker] = {
    DEFAULT_TRACKER: Tracker(prepare=_prepare_bitmap, make=_make_bitmap),
    "uffd-wp": Tracker(
        prepare=lambda _: check_userfaultfd(), make=lambda vm: WriteProtectLog(_view(vm)), own_mapping=True
    ),
    "pagemap-scan": Tracker(
        prepare=lambda _: check_pagemap_scan(), make=lambda vm: PagemapScanLog(_view(vm)), own_mapping=True
    ),
}
#: How ``kvm-bitmap`` works where the kernel has no manual protect; for tests on one that has.
AUTOMATIC_BITMAP = Tracker(prepare=lambda _: None, make=_make_automatic_bitmap)
