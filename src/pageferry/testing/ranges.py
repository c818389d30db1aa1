"""Conformance checks of CLEAN of a range: a guest that is cleaned part by part, each just before it is read.

Law 3 is why it is done so, and what it must not do is disturb the frames beside the range.
"""

import numpy as np

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PCI_HOLE_END, PCI_HOLE_START, gfn_of
from pageferry.testing.lab import Copy, Guest, Lab, Violation, listed, require

_WORD = 64


def range_returns_its_own(lab: Lab) -> None:
    """CLEAN of a range returns the bits of that range and clears them; all others stay, as PEEK shows."""
    with lab.tracked() as guest:
        for number, parts in ((3, guest.parts()), (8, guest.parts()[::-1])):
            guest.play(number)
            collected = DirtyBitmap(guest.memory.gfn_limit)
            for part in parts:
                before = guest.log_dirty.peek()
                cleaned = guest.log_dirty.clean_range(part)
                beside = cleaned.copy()
                beside.take(part)
                require(not beside.any(), f"CLEAN of {part} returns others: {listed(beside.gfns())}")
                require(cleaned == before.copy().take(part), f"CLEAN of {part} does not return what PEEK showed there")
                require(guest.log_dirty.peek() == before - cleaned, f"CLEAN of {part} disturbs bits beside it")
                collected |= cleaned
            guest.require_exact(collected)


def range_leaves_the_others(lab: Lab) -> None:
    """After CLEAN of a range its pages are protected again; those beside it are dirty, and are reported later."""
    with lab.tracked() as guest:
        for part in guest.parts():
            guest.play(3)
            cleaned = guest.log_dirty.clean_range(part)
            left = guest.log_dirty.peek()
            guest.require_exact(cleaned | left)
            guest.play(5)
            guest.require_exact(guest.log_dirty.clean(), also=left.gfns().tolist())


def range_costs_no_other_fault(lab: Lab) -> None:
    """CLEAN of a range makes no page beside it fault again before its own CLEAN."""
    with lab.tracked() as guest:
        for part in guest.parts():
            guest.play(3)
            guest.log_dirty.clean_range(part)
            left, before = guest.log_dirty.peek(), guest.log_dirty.stats().fault_count
            guest.play(8)
            after, now = guest.log_dirty.stats().fault_count, guest.log_dirty.peek()
            guest.log_dirty.clean()
            if before is None or after is None:
                return
            faults, pages = after - before, (now - left).count()
            require(faults <= pages * lab.cpus, f"{faults} faults for {pages} pages after a CLEAN of {part}")


def strange_ranges(lab: Lab) -> None:
    """A range that is not whole words is refused, an empty one has no bits, and neither disturbs anything."""
    with lab.tracked() as guest:
        guest.play(3)
        before = guest.log_dirty.peek()
        for wrong in (range(1, _WORD), range(100), range(3, before.nbits), range(0, 128, 2), range(-_WORD, _WORD)):
            _require_value_error(guest, wrong)
        end = -(-before.nbits // _WORD) * _WORD
        empty = [
            range(0),
            range(_WORD, _WORD),
            range(2 * _WORD, _WORD),
            range(end, end + _WORD),
            range(1 << 40, 1 << 41),
        ]
        if before.nbits > gfn_of(PCI_HOLE_START):
            empty.append(range(gfn_of(PCI_HOLE_START), gfn_of(PCI_HOLE_END)))
        for part in empty:
            cleaned = guest.log_dirty.clean_range(part)
            require(cleaned.nbits == before.nbits and not cleaned.any(), f"CLEAN of {part} is not empty: {cleaned}")
        require(guest.log_dirty.peek() == before, "CLEAN of a range without RAM, or a refused one, changed the bitmap")
        guest.require_exact(guest.log_dirty.clean_range(range(1 << 40)))


def _require_value_error(guest: Guest, gfns: range) -> None:
    try:
        guest.log_dirty.clean_range(gfns)
    except ValueError:
        return
    raise Violation(f"CLEAN of {gfns} is not refused")


def marks_by_range(lab: Lab) -> None:
    """A mark is reported by the CLEAN of the range it is in, and by no other."""
    with lab.tracked() as guest:
        parts = guest.parts()
        edges = np.array([gfn for part in parts for gfn in (part.start, part[-1])], np.uint64)
        edges = edges[guest.memory.are_ram(edges)]
        for part in parts:
            guest.log_dirty.mark(edges)
            inside = [gfn for gfn in edges.tolist() if gfn in part]
            guest.require_exact(guest.log_dirty.clean_range(part), also=inside)
            guest.require_exact(guest.log_dirty.clean(), also=[gfn for gfn in edges.tolist() if gfn not in part])


def stamped_copy_by_range(lab: Lab) -> None:
    """A copy made range by range, while the guest writes between them, equals memory after the last round."""
    with lab.tracked() as guest:
        copy = Copy(guest.memory)
        copy.take_all()
        for number in range(1, 9):
            for part in guest.parts():
                guest.play(number)
                copy.take(guest.log_dirty.clean_range(part))
            guest.played.clear()
        for part in guest.parts():
            copy.take(guest.log_dirty.clean_range(part))
        copy.require_equal()
