"""Faults of the tracker over KVM's dirty rings: kvm/ring_log.py and what is below it; the kernel's own steps stay."""

from collections.abc import Callable
from typing import Any

import numpy as np
from altered import alter
from numpy.typing import NDArray

from mutation.fault import BEHIND_THE_HOLE, Faults, Room
from mutation.held_bits import drop_marks
from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import GfnArray
from pageferry.core.vm import VmStatus
from pageferry.guests.abi import read_status
from pageferry.kvm.ring_log import KvmRingLog
from pageferry.kvm.trackers import ring_tracker
from pageferry.kvm.vm import KvmVm

fault = Faults(Room.KVM)
RING = "kvm-ring"
#: Rings that the kit goes round in, and that every KVM makes: one on Intel's processors keeps 576 entries to itself.
_SMALL = ring_tracker(16 << 10)

_WAIT_S = 0.002
_WAITS = 5000

Keep = Callable[[GfnArray], None]


def log_of(vm: KvmVm) -> KvmRingLog:
    """Return the machine's tracker, one over dirty rings."""
    log = vm.log_dirty
    assert isinstance(log, KvmRingLog)
    return log


def without_collector(vm: KvmVm) -> None:
    """Leave the rings to the operators: what the guest wrote since the last one is in them, however slow the host."""
    alter(log_of(vm), "_collect", lambda _: lambda: None)


def full_before_clean(vm: KvmVm) -> None:
    """Let every vCPU find its ring full just before each CLEAN.

    It stands for the moment that a fault needs, which so comes every time.
    """
    log = log_of(vm)

    def wrap(sound: Any) -> Any:
        def clean_range(gfns: range) -> DirtyBitmap:
            for _ in vm.vcpus:
                log.on_ring_full()
            bitmap: DirtyBitmap = sound(gfns)
            return bitmap

        return clean_range

    alter(log, "clean_range", wrap)


def _second_vcpu_sends_between_cleans(vm: KvmVm) -> None:
    """Let vCPU 1 of `smp` send an item after the first CLEAN and before a later one, however busy the host is."""
    log = log_of(vm)
    before: list[int] = []
    waits = iter(range(1, _WAITS))  # in all: other guests count other things there

    def sent() -> int:
        return read_status(vm.memory, 2)[1].values[0]

    def wrap(sound: Any) -> Any:
        def clean_range(gfns: range) -> DirtyBitmap:
            while before and sent() == before[0] and vm.wait(_WAIT_S) is VmStatus.RUNNING and next(waits, None):
                pass
            before[:] = before or [sent()]
            bitmap: DirtyBitmap = sound(gfns)
            return bitmap

        return clean_range

    alter(log, "clean_range", wrap)


@fault(
    "no bug on record: to harvest a ring is not to protect its pages again",
    law=1,
    found_by=("clean-protects-again", "rounds-are-exact", "stamped-copy"),
    tracker=RING,
)
def ring_reset_skipped(vm: KvmVm) -> None:
    """CLEAN harvests the rings and does not reset them."""
    alter(log_of(vm)._rings, "reset", lambda _: lambda: True)


@fault(
    "no bug on record: an entry is ours until RESET is stored in it, and not a moment longer",
    law=2,
    found_by=("rounds-are-exact", "stamped-copy"),
    tracker=RING,
)
def ring_reset_before_kept(vm: KvmVm) -> None:
    """Entries are handed back to KVM first, and read when it has freed them."""
    rings = log_of(vm)._rings

    def harvest(keep: Keep) -> None:
        for vcpu, ring in enumerate(rings._rings):
            slots, offsets = ring.look()
            ring.harvested(slots.size)
            rings.reset()
            slots, offsets = ring.look()
            keep(rings._gfns_of(vcpu, slots, offsets))

    alter(rings, "harvest", lambda _: harvest)


@fault(
    "no bug on record: what every ring invites",
    law=2,
    found_by=("rounds-are-exact",),
    tracker=_SMALL,
)
def ring_loses_at_the_wrap(vm: KvmVm) -> None:
    """The entries of a harvest just before the ring starts over are counted and not read."""
    rings = log_of(vm)._rings

    def wrap(sound: Any) -> Any:
        def gfns_of(vcpu: int, slots: NDArray[np.uint32], offsets: NDArray[np.uint64]) -> GfnArray:
            ring = rings._rings[vcpu]
            gfns: GfnArray = sound(vcpu, slots, offsets)
            return gfns[:0] if ring._next + slots.size == ring.capacity else gfns

        return gfns_of

    alter(rings, "_gfns_of", wrap)


@fault(
    "no bug on record: a vCPU whose ring is full only wants room",
    law=2,
    found_by=("rounds-are-exact", "stamped-copy"),
    tracker=RING,
)
def ring_dropped_when_full(vm: KvmVm) -> None:
    """A vCPU with a full ring empties the rings and forgets what was in them."""
    log = log_of(vm)

    def on_ring_full() -> None:
        with log._operator:
            log._rings.harvest(lambda gfns: None)
            log._rings.reset()

    alter(log, "on_ring_full", lambda _: on_ring_full)
    without_collector(vm)
    full_before_clean(vm)


@fault(
    "no bug on record: what every log with a buffer per vCPU invites",
    law=2,
    found_by=("free-running-smp",),
    tracker=RING,
    cpus=2,
)
def ring_of_the_first_vcpu_only(vm: KvmVm) -> None:
    """Only vCPU 0's ring is harvested."""
    _second_vcpu_sends_between_cleans(vm)
    rings = log_of(vm)._rings

    def wrap(sound: Any) -> Any:
        def harvest(keep: Keep) -> None:
            everyone, rings._rings = rings._rings, rings._rings[:1]
            try:
                sound(keep)
            finally:
                rings._rings = everyone

        return harvest

    alter(rings, "harvest", wrap)


@fault(
    "KVM dirty ring: writes with no running vCPU (the save of device state) missed the ring",
    law=4,
    found_by=("host-writes-are-marked", "marked-after-the-write"),
    tracker=RING,
)
def ring_only_the_kernels_bits(vm: KvmVm) -> None:
    """CLEAN returns what it finds in the rings, and drops what others marked."""
    drop_marks(log_of(vm))


@fault(
    "no bug on record: a ring is read once, so its reader must keep what it said",
    law=None,
    found_by=("peek-changes-nothing", "pausing-is-no-write"),
    tracker=RING,
)
def ring_peek_keeps_nothing(vm: KvmVm) -> None:
    """PEEK returns what it harvests and keeps no copy."""
    log = log_of(vm)

    def wrap(sound: Any) -> Any:
        def peek() -> DirtyBitmap:
            bitmap: DirtyBitmap = sound()
            log._held.begin()
            return bitmap

        return peek

    alter(log, "peek", wrap)


@fault(
    "Propolis: after a failed attempt the next one started with wrong bits",
    law=None,
    found_by=("off-and-on-again",),
    tracker=RING,
)
def ring_not_emptied_at_off(vm: KvmVm) -> None:
    """OFF and ENABLE leave in the rings what is there: the next tracking finds old entries."""
    log = log_of(vm)
    without_collector(vm)
    alter(log, "_harvest", lambda sound: lambda: sound() if log.enabled else None)


@fault(
    "Firecracker: in a guest of more than 3 GiB the pages of the second slot were at wrong offsets",
    law=2,
    found_by=("rounds-are-exact", "stamped-copy"),
    tracker=RING,
    memory_bytes=BEHIND_THE_HOLE,
)
def ring_offsets_taken_for_frames(vm: KvmVm) -> None:
    """An entry's offset in its slot is taken for the frame's number."""
    log_of(vm)._rings._first_gfns[:] = 0


@fault(
    "KVM since Linux 6.16: a reset that a signal cuts short leaves the pages of its last batch writable",
    law=1,
    found_by=("clean-protects-again", "rounds-are-exact"),
    tracker=RING,
)
def ring_reset_cut_short(vm: KvmVm) -> None:
    """KVM frees the last entry of each ring and does not protect its page, unnoticed."""
    rings = log_of(vm)._rings

    def wrap(sound: Any) -> Any:
        def reset() -> bool:
            for ring in rings._rings:
                if ring.kept:
                    ring._slots[ring._next - 1] = 0xFFFF  # KVM frees an entry of a slot that is not there, no more
            sound()
            return True

        return reset

    alter(rings, "reset", wrap)
