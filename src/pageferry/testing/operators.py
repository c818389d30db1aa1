"""Conformance checks of the operators, one at a time, with a guest that stands at a sync point between them."""

import numpy as np

from pageferry.core.bitmap import runs_of
from pageferry.core.errors import LogDirtyError
from pageferry.core.frames import PAGE_SIZE, PCI_HOLE_START, gfn_of, gpa_of
from pageferry.core.ram import byte_ranges
from pageferry.core.state import MachineState
from pageferry.testing.lab import Extra, Guest, Lab, Violation, require


def off_at_first(lab: Lab) -> None:
    """A new machine has log-dirty off: PEEK, CLEAN and the others refuse, OFF and marks do nothing."""
    with lab.stamping() as guest:
        _require_off(guest)
        guest.log_dirty.off()
        guest.log_dirty.mark(np.array([STRAY_GFN], np.uint64))
        _require_off(guest)
        guest.play(1)
        guest.log_dirty.enable()
        require(guest.log_dirty.enabled, "enabled is not set after ENABLE")


STRAY_GFN = 0x3
"""A frame of RAM that no guest ever touches by itself."""


def _require_off(guest: Guest) -> None:
    log_dirty = guest.log_dirty
    require(not log_dirty.enabled, "enabled is set while log-dirty is off")
    for name, call in (
        ("PEEK", log_dirty.peek),
        ("CLEAN", log_dirty.clean),
        ("CLEAN of a range", lambda: log_dirty.clean_range(range(64))),
        ("stats", log_dirty.stats),
    ):
        _require_refused(name, call, "while log-dirty is off")


def _require_refused(name: str, call: object, when: str) -> None:
    assert callable(call)
    try:
        call()
    except LogDirtyError:
        return
    raise Violation(f"{name} is not refused {when}")


def enable_starts_clear(lab: Lab) -> None:
    """ENABLE starts with no bit set, whatever was written before."""
    with lab.stamping() as guest:
        guest.play(3)
        guest.memory.write(gpa_of(STRAY_GFN), b"before")
        guest.log_dirty.enable()
        peeked = guest.log_dirty.peek()
        require(not peeked.any(), f"{peeked.count()} bits are set right after ENABLE", Extra)
        require(guest.log_dirty.stats().dirty_count == 0, "dirty_count is not 0 right after ENABLE", Extra)
        guest.played.clear()
        guest.require_exact(guest.log_dirty.clean())


def enable_twice(lab: Lab) -> None:
    """A second ENABLE is refused and disturbs nothing."""
    with lab.tracked() as guest:
        guest.play(1)
        _require_refused("a second ENABLE", guest.log_dirty.enable, "while log-dirty is on")
        guest.play(2)
        guest.require_exact(guest.log_dirty.clean())


def peek_changes_nothing(lab: Lab) -> None:
    """PEEK returns the bitmap and leaves bits and protection as they are."""
    with lab.tracked() as guest:
        guest.play(5)
        first, second = guest.log_dirty.peek(), guest.log_dirty.peek()
        require(first == second, "two PEEKs of a paused guest differ")
        guest.play(3)
        third = guest.log_dirty.peek()
        require(not (first - third).any(), "a bit that PEEK had shown is gone without a CLEAN")
        cleaned = guest.log_dirty.clean()
        require(cleaned == third, "CLEAN returns another bitmap than the PEEK before it")
        guest.require_exact(cleaned)
        guest.log_dirty.peek()
        guest.play(3)
        guest.require_exact(guest.log_dirty.clean())


def clean_clears(lab: Lab) -> None:
    """CLEAN leaves no bit set."""
    with lab.tracked() as guest:
        guest.play(3)
        guest.log_dirty.clean()
        guest.played.clear()
        for name, bitmap in (("PEEK", guest.log_dirty.peek()), ("CLEAN", guest.log_dirty.clean())):
            require(not bitmap.any(), f"{name} after CLEAN shows {bitmap.count()} bits of a paused guest", Extra)


def clean_protects_again(lab: Lab) -> None:
    """A page that is written in every round is reported by every CLEAN."""
    with lab.tracked() as guest:
        for number in (3, 8, 13, 18):  # all pages each time
            guest.play(number)
            guest.require_exact(guest.log_dirty.clean())


def rounds_are_exact(lab: Lab) -> None:
    """Each CLEAN reports the pages of its round: no page less, and none more that is not explained."""
    with lab.tracked(pages=256) as guest:
        for number in (*range(1, 9), 0xFFFF_FFFF, 12, 3):
            guest.play(number)
            guest.require_exact(guest.log_dirty.clean())
            wrong = guest.oracle.wrong_gfns(guest.memory)
            require(not wrong.size, f"the guest's memory does not hold its stamps ({wrong.size} pages)")


def rounds_add_up(lab: Lab) -> None:
    """Without a CLEAN between them, the bits of several rounds add up."""
    with lab.tracked() as guest:
        for number in (2, 5, 7, 1):
            guest.play(number)
        guest.require_exact(guest.log_dirty.clean())


def bitmaps_are_the_callers(lab: Lab) -> None:
    """What the caller does with a returned bitmap changes nothing inside."""
    with lab.tracked() as guest:
        guest.play(3)
        peeked = guest.log_dirty.peek()
        peeked.words[:] = 0
        cleaned = guest.log_dirty.clean()
        kept = cleaned.copy()
        cleaned.set(STRAY_GFN)
        require(not guest.log_dirty.peek().any(), "setting bits of a returned bitmap sets them inside", Extra)
        guest.play(5)
        guest.log_dirty.clean()
        cleaned.clear(STRAY_GFN)
        require(cleaned == kept, "a bitmap that CLEAN had returned changed later")


def off_and_on_again(lab: Lab) -> None:
    """OFF ends tracking, may be repeated, and the next ENABLE starts afresh and misses nothing."""
    with lab.tracked() as guest:
        guest.play(3)
        guest.log_dirty.off()
        _require_off(guest)
        guest.log_dirty.off()
        guest.play(8)
        guest.log_dirty.enable()
        guest.played.clear()
        require(not guest.log_dirty.peek().any(), "bits of an earlier tracking are set after OFF and ENABLE", Extra)
        for number in (13, 1):
            guest.play(number)
            guest.require_exact(guest.log_dirty.clean())


def stats_count_the_bits(lab: Lab) -> None:
    """``dirty_count`` is the number of bits set, and looking does not disturb them."""
    with lab.tracked(pages=300) as guest:  # more bits than a byte counts
        for number in (5, 3, 6):
            guest.play(number)
            counts = {guest.log_dirty.stats().dirty_count, guest.log_dirty.peek().count()}
            require(len(counts) == 1, f"stats and PEEK count differently: {sorted(counts)}")
        guest.require_exact(guest.log_dirty.clean())
        require(guest.log_dirty.stats().dirty_count == 0, "dirty_count is not 0 after CLEAN", Extra)


def one_fault_per_page(lab: Lab) -> None:
    """Between two CLEANs a page costs at most one write fault per vCPU, however often it is written."""
    with lab.tracked() as guest:
        for _ in range(3):
            before = guest.log_dirty.stats().fault_count
            for number in (3, 8, 13):
                guest.play(number)
            after = guest.log_dirty.stats().fault_count
            reported = guest.log_dirty.clean()
            guest.require_exact(reported)
            if before is None or after is None:
                continue
            faults, limit = after - before, reported.count() * lab.cpus
            require(0 < faults <= limit, f"{faults} faults for {reported.count()} dirty pages")


def pausing_is_no_write(lab: Lab) -> None:
    """Pausing, freezing and saving the state set and clear no bit."""
    with lab.tracked() as guest:
        guest.play(5)
        before = guest.log_dirty.peek()
        guest.vm.pause()
        guest.vm.save_state()
        require(guest.log_dirty.peek() == before, "pausing and saving changed the bitmap")
        guest.vm.freeze()
        guest.vm.save_state()
        frozen = guest.log_dirty.peek()
        guest.vm.thaw()
        require(frozen == before, "freezing and saving changed the bitmap")
        guest.require_exact(guest.log_dirty.clean())


def host_writes_are_marked(lab: Lab) -> None:
    """Each way to write guest memory from outside marks exactly the frames that it wrote."""
    with lab.tracked() as guest:
        memory, stray = guest.memory, gpa_of(STRAY_GFN)
        memory.write(stray + PAGE_SIZE - 1, b"ab")
        guest.require_exact(guest.log_dirty.clean(), also=(STRAY_GFN, STRAY_GFN + 1))
        memory.copy_within(stray, stray + 4 * PAGE_SIZE, 2 * PAGE_SIZE)
        guest.require_exact(guest.log_dirty.clean(), also=(STRAY_GFN + 4, STRAY_GFN + 5))
        last = np.array([memory.gfn_limit - 1], np.uint64)
        memory.page_views(last)[0][:4] = b"last"
        memory.wrote(last)
        guest.require_exact(guest.log_dirty.clean(), also=last.tolist())
        memory.write(stray, b"")
        guest.require_exact(guest.log_dirty.clean())


def released_pages_are_tracked(lab: Lab) -> None:
    """A page whose storage was given back to the host is dirty, and is reported when the guest writes it again."""
    with lab.tracked() as guest:
        guest.play(3)
        guest.require_exact(guest.log_dirty.clean())
        gfns = guest.oracle.written(3)
        released = gfns[: gfns.size // 2]
        if guest.memory.release(byte_ranges(*runs_of(released))):
            guest.require_exact(guest.log_dirty.clean(), also=released.tolist())
        for number in (8, 13):
            guest.play(number)
            guest.require_exact(guest.log_dirty.clean())


def marks_and_writes_mix(lab: Lab) -> None:
    """A page is reported whichever writer it has, in whatever order device and guest do."""
    with lab.tracked() as guest:
        gfns = guest.oracle.written(3)
        guest.log_dirty.mark(gfns)
        guest.play(8)
        guest.require_exact(guest.log_dirty.clean())
        guest.play(13)
        guest.log_dirty.mark(gfns)
        guest.require_exact(guest.log_dirty.clean())
        guest.log_dirty.mark(gfns)
        guest.require_exact(guest.log_dirty.clean(), also=gfns.tolist())
        guest.play(18)
        guest.require_exact(guest.log_dirty.clean())


def marks_outside_ram(lab: Lab) -> None:
    """Marks of frames that are not RAM are ignored, those beside them in one call are not."""
    with lab.tracked() as guest:
        limit = guest.memory.gfn_limit
        strange = [limit, limit + 12345, (1 << 52) - 1]
        if limit > gfn_of(PCI_HOLE_START):
            strange += [gfn_of(PCI_HOLE_START), 0xFEB00]
        guest.log_dirty.mark(np.array([*strange, STRAY_GFN, limit - 1, STRAY_GFN], np.uint64))
        guest.log_dirty.mark(np.empty(0, np.uint64))
        guest.require_exact(guest.log_dirty.clean(), also=(STRAY_GFN, limit - 1))


def state_restore_keeps_tracking(lab: Lab) -> None:
    """Loading a machine state loses no bit and no protection."""
    with lab.tracked() as guest:
        guest.play(3)
        guest.log_dirty.clean()
        guest.played.clear()
        guest.play(5)
        state = guest.vm.save_state()
        guest.vm.load_state(MachineState(vcpus=state.vcpus, devices=state.devices))
        guest.play(8)
        guest.require_exact(guest.log_dirty.clean())
