"""Faults of the tracker over KVM's dirty rings: kvm/ring_log.py and what is below it; the kernel's own steps stay."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import GfnArray
from pageferry.kvm import KvmVm
from pageferry.kvm.ring_log import KvmRingLog
from pageferry.kvm.trackers import ring_tracker
from pageferry.testing.mutation.fault import BEHIND_THE_HOLE, Faults, Room, replace
from pageferry.testing.mutation.held import drop_given_back, drop_marks

fault = Faults(Room.KVM)
_RING = "kvm-ring"
#: Rings that the kit goes round in, and that every KVM makes: one on Intel's processors keeps 576 entries to itself.
_SMALL = ring_tracker(16 << 10)

Keep = Callable[[GfnArray], None]


def _log(vm: KvmVm) -> KvmRingLog:
    log = vm.log_dirty
    assert isinstance(log, KvmRingLog)
    return log


def full_before_clean(vm: KvmVm) -> None:
    """Let every vCPU find its ring full just before each CLEAN.

    It stands for the moment that a fault needs, which so comes every time.
    """
    log = _log(vm)

    def wrap(sound: Any) -> Any:  # noqa: ANN401
        def clean_range(gfns: range) -> DirtyBitmap:
            for _ in vm.vcpus:
                log.on_ring_full()
            bitmap: DirtyBitmap = sound(gfns)
            return bitmap

        return clean_range

    replace(log, "clean_range", wrap)


@fault(
    "no bug on record: to harvest a ring is not to protect its pages again",
    law=1,
    found_by=("clean-protects-again", "rounds-are-exact", "stamped-copy"),
    tracker=_RING,
)
def ring_reset_skipped(vm: KvmVm) -> None:
    """CLEAN harvests the rings and does not reset them."""
    replace(_log(vm)._rings, "reset", lambda _: lambda: True)


@fault(
    "no bug on record: an entry is ours until RESET is stored in it, and not a moment longer",
    law=2,
    found_by=("rounds-are-exact", "stamped-copy"),
    tracker=_RING,
)
def ring_reset_before_kept(vm: KvmVm) -> None:
    """Entries are handed back to KVM first, and read when it has freed them."""
    rings = _log(vm)._rings

    def harvest(keep: Keep) -> None:
        for vcpu, ring in enumerate(rings._rings):
            slots, offsets = ring.look()
            ring.harvested(slots.size)
            rings.reset()
            slots, offsets = ring.look()
            keep(rings._gfns_of(vcpu, slots, offsets))

    replace(rings, "harvest", lambda _: harvest)


@fault(
    "no bug on record: what every ring invites",
    law=2,
    found_by=("rounds-are-exact",),
    tracker=_SMALL,
)
def ring_loses_at_the_wrap(vm: KvmVm) -> None:
    """The entries of a harvest just before the ring starts over are counted and not read."""
    rings = _log(vm)._rings

    def wrap(sound: Any) -> Any:  # noqa: ANN401
        def gfns_of(vcpu: int, slots: NDArray[np.uint32], offsets: NDArray[np.uint64]) -> GfnArray:
            ring = rings._rings[vcpu]
            gfns: GfnArray = sound(vcpu, slots, offsets)
            return gfns[:0] if ring._next + slots.size == ring.capacity else gfns

        return gfns_of

    replace(rings, "_gfns_of", wrap)


@fault(
    "no bug on record: a vCPU whose ring is full only wants room",
    law=2,
    found_by=("rounds-are-exact", "stamped-copy"),
    tracker=_RING,
)
def ring_dropped_when_full(vm: KvmVm) -> None:
    """A vCPU with a full ring empties the rings and forgets what was in them."""
    log = _log(vm)

    def on_ring_full() -> None:
        with log._operator:
            log._rings.harvest(lambda gfns: None)
            log._rings.reset()

    replace(log, "on_ring_full", lambda _: on_ring_full)
    full_before_clean(vm)


@fault(
    "no bug on record: what every log with a buffer per vCPU invites",
    law=2,
    found_by=("free-running-smp",),
    tracker=_RING,
    cpus=2,
)
def ring_of_the_first_vcpu_only(vm: KvmVm) -> None:
    """Only vCPU 0's ring is harvested."""
    rings = _log(vm)._rings

    def wrap(sound: Any) -> Any:  # noqa: ANN401
        def harvest(keep: Keep) -> None:
            everyone, rings._rings = rings._rings, rings._rings[:1]
            try:
                sound(keep)
            finally:
                rings._rings = everyone

        return harvest

    replace(rings, "harvest", wrap)


@fault(
    "no bug on record: the rings are of the whole guest, a range is not",
    law=2,
    found_by=("range-leaves-the-others", "stamped-copy-by-range"),
    tracker=_RING,
)
def ring_range_keeps_its_own(vm: KvmVm) -> None:
    """CLEAN of a range takes from the rings what is in the range, and lets the rest go."""
    log = _log(vm)

    def wrap(sound: Any) -> Any:  # noqa: ANN401
        def clean_range(gfns: range) -> DirtyBitmap:
            def keep(harvested: GfnArray) -> None:
                log._held.set(harvested[(harvested >= gfns.start) & (harvested < gfns.stop)])

            with log._operator:
                log._rings.harvest(keep)
            bitmap: DirtyBitmap = sound(gfns)
            return bitmap

        return clean_range

    replace(log, "clean_range", wrap)


@fault(
    "no bug on record: a reset protects more than the range, which invites to leave it to the next whole CLEAN",
    law=1,
    found_by=("range-leaves-the-others", "stamped-copy-by-range"),
    tracker=_RING,
)
def ring_range_not_reset(vm: KvmVm) -> None:
    """CLEAN of a range takes the bits and resets no ring: its pages stay writable."""
    log = _log(vm)

    def wrap(sound: Any) -> Any:  # noqa: ANN401
        def clean_range(gfns: range) -> DirtyBitmap:
            reset = log._rings.reset
            if len(gfns) < vm.memory.gfn_limit:
                replace(log._rings, "reset", lambda _: lambda: True)
            try:
                bitmap: DirtyBitmap = sound(gfns)
            finally:
                replace(log._rings, "reset", lambda _: reset)
            return bitmap

        return clean_range

    replace(log, "clean_range", wrap)


@fault(
    "KVM dirty ring: writes with no running vCPU (the save of device state) missed the ring",
    law=4,
    found_by=("host-writes-are-marked", "marked-after-the-write"),
    tracker=_RING,
)
def ring_only_the_kernels_bits(vm: KvmVm) -> None:
    """CLEAN returns what it finds in the rings, and drops what others marked."""
    drop_marks(_log(vm))


@fault(
    "no bug on record: a ring is read once, so whoever reads it must keep what it said",
    law=None,
    found_by=("peek-changes-nothing", "pausing-is-no-write"),
    tracker=_RING,
)
def ring_peek_keeps_nothing(vm: KvmVm) -> None:
    """PEEK returns what it harvests and keeps no copy."""
    log = _log(vm)

    def wrap(sound: Any) -> Any:  # noqa: ANN401
        def peek() -> DirtyBitmap:
            bitmap: DirtyBitmap = sound()
            log._held.begin()
            return bitmap

        return peek

    replace(log, "peek", wrap)


@fault(
    "Propolis: after a failed attempt the next one started with wrong bits",
    law=None,
    found_by=("off-and-on-again",),
    tracker=_RING,
)
def ring_not_emptied_at_off(vm: KvmVm) -> None:
    """OFF and ENABLE leave in the rings what is there: the next tracking finds old entries."""
    log = _log(vm)
    replace(log, "_harvest", lambda sound: lambda: sound() if log.enabled else None)


@fault(
    "Firecracker: in a guest of more than 3 GiB the pages of the second slot were at wrong offsets",
    law=2,
    found_by=("rounds-are-exact", "stamped-copy"),
    tracker=_RING,
    memory_bytes=BEHIND_THE_HOLE,
)
def ring_offsets_taken_for_frames(vm: KvmVm) -> None:
    """An entry's offset in its slot is taken for the frame's number."""
    _log(vm)._rings._first_gfns[:] = 0


@fault(
    "KVM since Linux 6.16: a reset that a signal cuts short leaves the pages of its last batch writable",
    law=1,
    found_by=("clean-protects-again", "rounds-are-exact"),
    tracker=_RING,
)
def ring_reset_cut_short(vm: KvmVm) -> None:
    """KVM frees the last entry of each ring and does not protect its page; nobody notices."""
    rings = _log(vm)._rings

    def wrap(sound: Any) -> Any:  # noqa: ANN401
        def reset() -> bool:
            for ring in rings._rings:
                if ring.kept:
                    ring._slots[ring._next - 1] = 0xFFFF  # KVM frees an entry of a slot that is not there, no more
            sound()
            return True

        return reset

    replace(rings, "reset", wrap)


@fault(
    "Propolis, Firecracker: the dirty bits of a failed attempt were lost",
    law=5,
    found_by=("given-back-bits-return",),
    tracker=_RING,
)
def ring_bits_not_given_back(vm: KvmVm) -> None:
    """``give_back`` drops the bits of the failed round."""
    drop_given_back(_log(vm))
