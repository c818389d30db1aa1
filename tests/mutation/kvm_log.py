"""Faults of the tracker over KVM's bitmap: kvm/bitmap_log.py and kvm/slots.py; the kernel's own steps stay."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from altered import alter
from numpy.typing import NDArray

from mutation.fault import BEHIND_THE_HOLE, Faults, Room
from mutation.held_bits import drop_marks
from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PCI_HOLE_START, gfn_of
from pageferry.kvm.bitmap_log import KvmBitmapLog
from pageferry.kvm.slots import MemorySlot
from pageferry.kvm.vm import KvmVm

fault = Faults(Room.KVM)


def _log(vm: KvmVm) -> KvmBitmapLog:
    log = vm.log_dirty
    assert isinstance(log, KvmBitmapLog)
    return log


@fault(
    "QEMU: a memory slot was destroyed before its bitmap was read",
    law=2,
    found_by=("rounds-are-exact", "stamped-copy"),
)
def kvm_slot_remade_before_read(vm: KvmVm) -> None:
    """Reading the bitmap first turns logging off and on again for each slot, which frees the bitmap."""
    log = _log(vm)

    def wrap(sound: Any) -> Any:
        def get(slots: Iterable[MemorySlot]) -> DirtyBitmap:
            for slot in slots:
                slot.set(log._vm)
                log._start_logging(slot)
            bitmap: DirtyBitmap = sound(slots)
            return bitmap

        return get

    alter(log, "_get", wrap)


@fault(
    "QEMU: cleared bits that it had not read",
    law=2,
    found_by=("rounds-are-exact", "clean-protects-again"),
)
def kvm_cleared_unread(vm: KvmVm) -> None:
    """The bitmap is read in pieces of whole words; KVM_CLEAR_DIRTY_LOG is asked to clear everything."""
    log = _log(vm)

    def wrap_get(sound: Any) -> Any:
        def get(slots: Iterable[MemorySlot]) -> DirtyBitmap:
            bitmap: DirtyBitmap = sound(slots)
            bitmap.words[-1] = 0
            return bitmap

        return get

    def wrap_clear(sound: Any) -> Any:
        def clear(slot: MemorySlot, words: NDArray[np.uint64]) -> None:
            sound(slot, np.full_like(words, 0xFFFF_FFFF_FFFF_FFFF))

        return clear

    alter(log, "_get", wrap_get)
    alter(log, "_clear", wrap_clear)


@fault(
    "no bug on record: under manual protect to read the log is not to clear it",
    law=None,
    found_by=("clean-clears", "rounds-are-exact"),
)
def kvm_clear_forgotten(vm: KvmVm) -> None:
    """CLEAN reads the bitmap and does not call KVM_CLEAR_DIRTY_LOG."""
    alter(_log(vm), "_clear", lambda _: lambda slot, words: None)


@fault(
    "Firecracker: in a guest of more than 3 GiB the pages of the second slot were at wrong offsets",
    law=2,
    found_by=("rounds-are-exact", "stamped-copy"),
    memory_bytes=BEHIND_THE_HOLE,
)
def kvm_second_slot_shifted(vm: KvmVm) -> None:
    """The bits of the slot behind the hole are put right before it, as if there were none."""
    log = _log(vm)

    def wrap(sound: Any) -> Any:
        def clean_range(gfns: range) -> DirtyBitmap:
            bitmap: DirtyBitmap = sound(gfns)
            behind = log._slots[-1].words
            words = bitmap.words[behind].copy()
            bitmap.words[behind] = 0
            bitmap.words[gfn_of(PCI_HOLE_START) // 64 :][: words.size] |= words
            return bitmap

        return clean_range

    alter(log, "clean_range", wrap)


@fault(
    "QEMU: cleared bits that it had not read",
    law=2,
    found_by=("range-returns-its-own", "range-leaves-the-others", "stamped-copy-by-range"),
)
def kvm_range_clears_the_slot(vm: KvmVm) -> None:
    """CLEAN of a range has KVM clear all bits of the slots that it touches, read or not."""
    log = _log(vm)

    def wrap(sound: Any) -> Any:
        def clear(slot: MemorySlot, words: NDArray[np.uint64]) -> None:
            sound(slot, np.full_like(words, 0xFFFF_FFFF_FFFF_FFFF))

        return clear

    alter(log, "_clear", wrap)


@fault(
    "Firecracker: in a guest of more than 3 GiB the pages of the second slot were at wrong offsets",
    law=2,
    found_by=("range-returns-its-own", "stamped-copy-by-range"),
    memory_bytes=BEHIND_THE_HOLE,
)
def kvm_range_of_the_first_slot(vm: KvmVm) -> None:
    """CLEAN of a range looks for it in the first slot only."""
    log = _log(vm)

    def wrap(sound: Any) -> Any:
        def clean_range(gfns: range) -> DirtyBitmap:
            slots = log._slots
            if len(gfns) < vm.memory.gfn_limit:
                log._slots = slots[:1]
            try:
                bitmap: DirtyBitmap = sound(gfns)
            finally:
                log._slots = slots
            return bitmap

        return clean_range

    alter(log, "clean_range", wrap)


@fault(
    "KVM dirty ring: writes with no running vCPU (the save of device state) missed the ring",
    law=4,
    found_by=("host-writes-are-marked", "marked-after-the-write"),
)
def kvm_only_the_kernels_bits(vm: KvmVm) -> None:
    """CLEAN returns what KVM logged, and drops what others marked."""
    drop_marks(_log(vm))


@fault(
    "no bug on record: without manual protect to read the log is to clear it",
    law=None,
    found_by=("peek-changes-nothing", "pausing-is-no-write"),
)
def kvm_peek_takes(vm: KvmVm) -> None:
    """PEEK clears in KVM what it returns, and keeps no copy."""
    log = _log(vm)

    def wrap(sound: Any) -> Any:
        def peek() -> DirtyBitmap:
            bitmap: DirtyBitmap = sound()
            for slot in log._slots:
                log._clear(slot, bitmap.words[slot.words])
            return bitmap

        return peek

    alter(log, "_peek", wrap)
