"""The dirty trackers of a KVM machine, by name, and what each needs of the kernel.

A tracker is chosen before the machine is made, because some must be set up while the VM has no vCPU yet. Whatever the
kernel does not offer is an UnsupportedError that says what is missing, from ``prepare`` or from ``make``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pageferry.core.errors import UnsupportedError
from pageferry.core.hostmem import HostMapping
from pageferry.core.memory import GuestMemory
from pageferry.core.run import RunControl
from pageferry.core.vm import LogDirty
from pageferry.kvm import uapi
from pageferry.kvm.bitmap_log import KvmBitmapLog
from pageferry.kvm.dirty_rings import DirtyRing, DirtyRings
from pageferry.kvm.fds import VmFd
from pageferry.kvm.ring_log import KvmRingLog
from pageferry.kvm.slots import MemorySlot
from pageferry.kvm.vcpu import KvmVcpu
from pageferry.uffd.fds import check_pagemap_scan, check_userfaultfd
from pageferry.uffd.pagemap_log import PagemapScanLog
from pageferry.uffd.view import VcpuView
from pageferry.uffd.write_protect_log import WriteProtectLog

DEFAULT_TRACKER = "kvm-bitmap"


class TrackedVm(Protocol):
    """What a tracker is made from: a KVM machine that has its memory, slots and vCPUs, and has not run."""

    vm_fd: VmFd
    memory: GuestMemory
    slots: tuple[MemorySlot, ...]
    vcpus: tuple[KvmVcpu, ...]
    vcpu_mapping: HostMapping
    """RAM as the slots have it: ``memory.mapping``, or the vCPUs' own where the tracker asked for one."""
    run_control: RunControl
    """Not there yet when the tracker is made."""


@runtime_checkable
class Closeable(Protocol):
    """What a tracker is besides when it owns something, as a thread or a mapping, that must end with the machine."""

    def close(self) -> None:
        """Free it; no vCPU will run again, and every descriptor of the machine is still open. Called once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracker:
    """One kind of tracker.

    ``prepare``: called with the new VM, before it has memory or vCPUs.
    ``make``: what it returns is closed with the machine if it is :class:`Closeable`.
    ``own_mapping``: the vCPUs have a host mapping of RAM to themselves, which the tracker may protect.
    """

    prepare: Callable[[VmFd], None]
    make: Callable[[TrackedVm], LogDirty]
    own_mapping: bool = False


def find_tracker(name: str | Tracker) -> Tracker:
    """Return the tracker of that name; one that is given as it is, is that.

    Raises:
        UnsupportedError: KVM machines have no such tracker.
    """
    if isinstance(name, Tracker):
        return name
    if name not in TRACKERS:
        raise UnsupportedError("tracker", f"no tracker {name} on kvm", hint=f"one of {', '.join(TRACKERS)}")
    return TRACKERS[name]


def bitmap_tracker(
    wanted: int = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | uapi.KVM_DIRTY_LOG_INITIALLY_SET,
) -> Tracker:
    """Return the tracker ``kvm-bitmap``.

    Args:
        wanted: what of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 to use where the kernel offers it; 0 is the automatic way.
    """
    return Tracker(prepare=lambda vm: _prepare_bitmap(vm, wanted), make=lambda vm: _make_bitmap(vm, wanted))


def _prepare_bitmap(vm: VmFd, wanted: int) -> None:
    if used := vm.check_extension(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & wanted:
        vm.enable_cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, used)


def _make_bitmap(vm: TrackedVm, wanted: int) -> LogDirty:
    used = vm.vm_fd.check_extension(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & wanted
    if used != vm.vm_fd.enabled.get(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0):
        raise _unprepared("kvm-bitmap")
    return KvmBitmapLog(
        vm.vm_fd,
        vm.memory,
        vm.slots,
        manual_protect=bool(used & uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE),
        initially_set=bool(used & uapi.KVM_DIRTY_LOG_INITIALLY_SET),
    )


def _unprepared(name: str) -> UnsupportedError:
    """Return the refusal of a tracker that is made part of another, which has left out what it must be prepared by.

    A KVM that was not told takes bits away where the tracker believes them to stay: they would be lost.
    """
    return UnsupportedError(
        "tracker",
        f"{name} was made for a machine that was not prepared for it",
        hint=f"a Tracker that makes {name} has its prepare, too, and its own_mapping: docs/guide/trackers.md",
    )


def ring_tracker(ring_bytes: int | None = None) -> Tracker:
    """Return the tracker ``kvm-ring``.

    Args:
        ring_bytes: the size of each vCPU's ring, a power of two; None: as large as the kernel makes it.
    """
    return Tracker(prepare=lambda vm: _prepare_rings(vm, ring_bytes), make=lambda vm: _make_rings(vm, ring_bytes))


def _offered_rings(vm: VmFd) -> tuple[int, int]:
    """Return the capability by which rings are enabled, and how many bytes the largest has."""
    for capability in (uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL, uapi.KVM_CAP_DIRTY_LOG_RING):
        if size_bytes := vm.check_extension(capability):
            return capability, size_bytes
    raise UnsupportedError(
        "KVM_CAP_DIRTY_LOG_RING",
        "this KVM has no dirty rings (KVM_CAP_DIRTY_LOG_RING)",
        hint="Linux 5.11 or newer has them on x86; or use --tracker kvm-bitmap",
    )


def _prepare_rings(vm: VmFd, ring_bytes: int | None) -> None:
    capability, largest_bytes = _offered_rings(vm)
    vm.enable_cap(capability, ring_bytes or largest_bytes)


def _make_rings(vm: TrackedVm, ring_bytes: int | None) -> LogDirty:
    capability, largest_bytes = _offered_rings(vm.vm_fd)
    size_bytes = ring_bytes or largest_bytes
    if vm.vm_fd.enabled.get(capability) != size_bytes:
        raise _unprepared("kvm-ring")
    rings = tuple(DirtyRing(vcpu.fd.map_dirty_ring(size_bytes)) for vcpu in vm.vcpus)
    log = KvmRingLog(vm.vm_fd, vm.memory, vm.slots, DirtyRings(vm.vm_fd, vm.slots, rings))
    for vcpu in vm.vcpus:
        vcpu.exit_handlers[uapi.KVM_EXIT_DIRTY_RING_FULL] = log.on_ring_full
    return log


def _view(vm: TrackedVm, name: str) -> VcpuView:
    if vm.vcpu_mapping is vm.memory.mapping:  # to protect it would stop devices, too
        raise _unprepared(name)
    return VcpuView(memory=vm.memory, mapping=vm.vcpu_mapping)


TRACKERS: dict[str, Tracker] = {
    DEFAULT_TRACKER: bitmap_tracker(),
    "kvm-ring": ring_tracker(),
    "uffd-wp": Tracker(
        prepare=lambda _: check_userfaultfd(), make=lambda vm: WriteProtectLog(_view(vm, "uffd-wp")), own_mapping=True
    ),
    "pagemap-scan": Tracker(
        prepare=lambda _: check_pagemap_scan(),
        make=lambda vm: PagemapScanLog(_view(vm, "pagemap-scan")),
        own_mapping=True,
    ),
}
