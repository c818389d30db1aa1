"""Conformance checks of order: a copy that is made at the worst possible moment holds the right content.

Each brings about the interleaving that matters by itself, so it finds a fault on the first try, every time.
"""

import numpy as np

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PAGE_SIZE, GfnArray, gpa_of
from pageferry.testing.lab import Copy, Guest, Lab, require
from pageferry.testing.operators import STRAY_GFN

_TRANSFERS = 4


def stamped_copy(lab: Lab) -> None:
    """After every round a copy made only of reported pages equals memory, the guest's page tables included."""
    with lab.tracked() as guest:  # tracked before the guest's first access: accessed and dirty bits are yet to be set
        copy = Copy(guest.memory)
        copy.take_all()
        for number in (1, 3, 4, 2, 8):
            guest.play(number)
            copy.take(guest.log_dirty.clean())
            copy.require_equal()


def marked_after_the_write(lab: Lab) -> None:
    """A mark comes after the write: a CLEAN that falls into the very mark, and a copy made then, miss nothing.

    ::

    writer                      migration
    bytes land in p
    mark(p)                     clean(): p is in the bitmap; p is copied
    .                           equal (had the mark come first: old bytes copied, and no bit left for the new)
    """
    with lab.tracked() as guest:
        memory, copy = guest.memory, Copy(guest.memory)
        copy.take_all()

        def mark_and_copy(gfns: GfnArray) -> None:
            guest.log_dirty.mark(gfns)
            copy.take(guest.log_dirty.clean())

        memory.on_write(mark_and_copy)
        stray = gpa_of(STRAY_GFN)
        for number in range(1, 4):
            memory.write(stray + PAGE_SIZE - 4, number.to_bytes(8, "big"))
            copy.require_equal()
            memory.copy_within(stray, stray + 4 * PAGE_SIZE, 2 * PAGE_SIZE)
            copy.require_equal()
            last = np.array([memory.gfn_limit - 1], np.uint64)
            memory.page_views(last)[0][-1:] = bytes([number])
            memory.wrote(last)
            copy.require_equal()


def device_marks_after_the_write(lab: Lab) -> None:
    """What a device writes is in memory when it marks: pages copied at that moment, and never again, are right."""
    with lab.guest("dma") as guest:
        copy = Copy(guest.memory)
        guest.log_dirty.enable()
        copy.take_all()
        # On the vCPU's thread, where no operator may be called: the copy stands for a CLEAN that falls here.
        guest.memory.on_write(lambda gfns: copy.take(DirtyBitmap.of(guest.memory.gfn_limit, gfns)))
        _run_a_little(guest)
        copy.take(guest.log_dirty.clean())
        copy.require_equal()


def marks_are_seen_at_once(lab: Lab) -> None:
    """A mark is in the next PEEK, as the final round of a migration takes it, without a CLEAN in between."""
    with lab.tracked() as guest:
        guest.memory.write(gpa_of(STRAY_GFN), b"new")
        require(guest.log_dirty.peek().test(STRAY_GFN), "PEEK does not show a page that a device wrote")
        require(guest.log_dirty.stats().dirty_count == guest.log_dirty.peek().count(), "stats do not count a mark")
        guest.require_exact(guest.log_dirty.clean(), also=(STRAY_GFN,))
    with lab.guest("dma") as guest:
        copy = Copy(guest.memory)
        guest.log_dirty.enable()
        copy.take_all()
        _run_a_little(guest)
        copy.take(guest.log_dirty.peek())
        copy.require_equal()


def _run_a_little(guest: Guest) -> None:
    guest.vm.resume()
    for _ in range(_TRANSFERS):
        guest.progress()
    guest.require_running()
    guest.vm.pause()
