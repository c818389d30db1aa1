"""Faults of the tracker over KVM's dirty rings at the CLEAN of a range: the rings are of the whole guest."""

from typing import Any

from altered import alter

from mutation.fault import Faults, Room
from mutation.kvm_ring import RING, log_of, without_collector
from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import GfnArray
from pageferry.kvm.vm import KvmVm

fault = Faults(Room.KVM)


@fault(
    "no bug on record: the rings are of the whole guest, a range is not",
    law=2,
    found_by=("range-leaves-the-others", "stamped-copy-by-range"),
    tracker=RING,
)
def ring_range_keeps_its_own(vm: KvmVm) -> None:
    """CLEAN of a range takes from the rings what is in the range, and lets the rest go."""
    log = log_of(vm)
    without_collector(vm)

    def wrap(sound: Any) -> Any:
        def clean_range(gfns: range) -> DirtyBitmap:
            def keep(harvested: GfnArray) -> None:
                log._held.set(harvested[(harvested >= gfns.start) & (harvested < gfns.stop)])

            with log._operator:
                log._rings.harvest(keep)
            bitmap: DirtyBitmap = sound(gfns)
            return bitmap

        return clean_range

    alter(log, "clean_range", wrap)


@fault(
    "no bug on record: a reset protects more than the range, which invites to leave it to the next whole CLEAN",
    law=1,
    found_by=("range-leaves-the-others", "stamped-copy-by-range"),
    tracker=RING,
)
def ring_range_not_reset(vm: KvmVm) -> None:
    """CLEAN of a range takes the bits and resets no ring: its pages stay writable."""
    log = log_of(vm)

    def wrap(sound: Any) -> Any:
        def clean_range(gfns: range) -> DirtyBitmap:
            reset = log._rings.reset
            if len(gfns) < vm.memory.gfn_limit:
                alter(log._rings, "reset", lambda _: lambda: True)
            try:
                bitmap: DirtyBitmap = sound(gfns)
            finally:
                alter(log._rings, "reset", lambda _: reset)
            return bitmap

        return clean_range

    alter(log, "clean_range", wrap)
