"""Faults of the software hypervisor's log-dirty: bitmap, journal and operators (paging.py)."""

from array import array
from typing import Any

import numpy as np
from altered import alter
from soft import access

from mutation.fault import BEHIND_THE_HOLE, Faults, Room
from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PCI_HOLE_END, PCI_HOLE_START, GfnArray, gfn_of
from pageferry.core.vm import LogDirtyStats
from pageferry.guests.abi import STACK_BYTES, STACKS_TOP
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.p2m_types import P2MType

fault = Faults(Room.HYPERVISOR)

_HOLE_PAGES = gfn_of(PCI_HOLE_END) - gfn_of(PCI_HOLE_START)
#: The lowest page of the first stack: no guest of the kit gets there, and the kit grants that any guest may write it.
_STACK_GFN = gfn_of(STACKS_TOP - STACK_BYTES)


def store_from_a_vcpu(domain: Domain) -> None:
    """Do what a vCPU's store does that falls just here, between two steps: a nested fault if need be, then the bytes.

    It stands for the interleaving that a fault needs, which so comes every time.
    """
    while domain.p2m.lookup(_STACK_GFN)[1] != P2MType.RAM_RW:
        access(domain, _STACK_GFN, write=True)
    (page,) = domain.memory.page_views(np.array([_STACK_GFN], np.uint64))
    page[0] = (page[0] + 1) & 0xFF


@fault(
    "KVM: the log was write-protected before the bitmaps were swapped; a page ended both writable and clean",
    law=1,
    found_by=("stamped-copy", "audit-each-round", "audit-while-running"),
)
def protect_before_swap(domain: Domain) -> None:
    """CLEAN protects first and swaps the bitmap later; a write in between is granted, and its bit swapped away."""
    paging, locks = domain.paging, domain.locks

    def clean_range(gfns: range) -> DirtyBitmap:
        with locks.domain:
            with domain.run_control.stopped(), locks.p2m:
                with locks.log_dirty:
                    paging._complete()
                paging._ops.clean(paging.journal())
                paging.flush_tlbs()
            store_from_a_vcpu(domain)
            with domain.run_control.stopped(), locks.p2m, locks.log_dirty:
                return paging._end_cycle(gfns)[0]

    alter(paging, "clean_range", lambda _: clean_range)


@fault(
    "KVM: dirty state lost while a page was being synchronised",
    law=2,
    found_by=("stamped-copy",),
)
def clear_after_copy(domain: Domain) -> None:
    """CLEAN copies the bitmap and clears it later: bits set in between are cleared unread."""
    paging = domain.paging

    def wrap(sound: Any) -> Any:
        def clean_range(gfns: range) -> DirtyBitmap:
            copied = paging.peek().take(gfns)
            store_from_a_vcpu(domain)
            sound(gfns)
            return copied

        return clean_range

    alter(paging, "clean_range", wrap)


@fault(
    "no bug on record: the RFC's order of words, first the grant and then the mark, without one lock around both",
    law=1,
    found_by=("rounds-are-exact", "clean-protects-again", "audit-each-round"),
)
def grant_before_mark(domain: Domain) -> None:
    """A fault grants its page at once and queues the mark, which the next fault records: CLEAN may come between."""
    paging, late = domain.paging, array("Q")

    def fix_and_mark(gfn: int) -> None:
        with domain.locks.p2m:
            domain.p2m.change_type(gfn, P2MType.RAM_LOGDIRTY, P2MType.RAM_RW)
            with domain.locks.log_dirty:
                paging._fault_count += 1
                for queued in late:
                    paging._words[queued >> 6] |= 1 << (queued & 63)
                    paging._journal.append(queued)
            late[:] = array("Q", [gfn])

    alter(paging, "fix_and_mark", lambda _: fix_and_mark)


@fault(
    "KVM: the nested guest's page-modification log named pages of the wrong address space",
    law=2,
    found_by=("rounds-are-exact", "stamped-copy"),
)
def mfn_logged(domain: Domain) -> None:
    """A fault sets the bit of the machine frame instead of the guest frame."""
    paging, limit = domain.paging, domain.memory.gfn_limit

    def fix_and_mark(gfn: int) -> None:
        mfn, _ = domain.p2m.lookup(gfn)
        with domain.locks.p2m:
            with domain.locks.log_dirty:
                paging._fault_count += 1
                paging._bitmap.set(mfn % limit)  # type: ignore[union-attr]  # set whenever a page is log-dirty
            if domain.p2m.change_type(gfn, P2MType.RAM_LOGDIRTY, P2MType.RAM_RW):
                paging._journal.append(gfn)

    alter(paging, "fix_and_mark", lambda _: fix_and_mark)


@fault(
    "no bug on record: what every log with a buffer per vCPU invites (page-modification logging, the dirty ring)",
    law=2,
    found_by=("rounds-are-exact", "peek-changes-nothing"),
)
def vcpu_log_not_drained(domain: Domain) -> None:
    """Faults are logged in batches of 64; PEEK and CLEAN do not ask for the batch that is not full."""
    paging = domain.paging
    batch: list[int] = []

    def fix_and_mark(gfn: int) -> None:
        with domain.locks.p2m:
            if domain.p2m.change_type(gfn, P2MType.RAM_LOGDIRTY, P2MType.RAM_RW):
                paging._journal.append(gfn)
            batch.append(gfn)
            with domain.locks.log_dirty:
                paging._fault_count += 1
                if len(batch) == 64:
                    paging._bitmap.set(batch)  # type: ignore[union-attr]  # set whenever a page is log-dirty
                    batch.clear()

    alter(paging, "fix_and_mark", lambda _: fix_and_mark)


@fault(
    "Xen: the dirty count was truncated to 0, so a round was skipped",
    law=None,
    found_by=("stats-count-the-bits",),
)
def count_truncated(domain: Domain) -> None:
    """``dirty_count`` is kept in a byte."""

    def wrap(sound: Any) -> Any:
        def stats() -> LogDirtyStats:
            found = sound()
            return LogDirtyStats(fault_count=found.fault_count, dirty_count=found.dirty_count & 0xFF)

        return stats

    alter(domain.paging, "stats", wrap)


@fault(
    "QEMU: a bitmap word that spans two RAM blocks belonged to neither: its pages stayed dirty for ever",
    law=None,
    found_by=("clean-clears", "rounds-are-exact"),
)
def shared_word_never_cleared(domain: Domain) -> None:
    """CLEAN clears whole words only; the bits of the last, partial one stay."""
    paging = domain.paging

    def wrap(sound: Any) -> Any:
        def end_cycle(gfns: range) -> Any:
            last = paging._on().words[-1]
            ended = sound(gfns)
            paging._on().words[-1] = last
            return ended

        return end_cycle

    alter(paging, "_end_cycle", wrap)


@fault(
    "QEMU: cleared bits that it had not read",
    law=2,
    found_by=("rounds-are-exact", "clean-protects-again", "stamped-copy"),
)
def cleared_unread(domain: Domain) -> None:
    """CLEAN reads the bitmap in pieces of whole words and clears all of it."""

    def wrap(sound: Any) -> Any:
        def clean_range(gfns: range) -> DirtyBitmap:
            bitmap: DirtyBitmap = sound(gfns)
            bitmap.words[-1] = 0
            return bitmap

        return clean_range

    alter(domain.paging, "clean_range", wrap)


@fault(
    "no bug on record: PEEK and CLEAN share most of their code, here and in Xen",
    law=None,
    found_by=("peek-changes-nothing", "pausing-is-no-write"),
)
def peek_clears(domain: Domain) -> None:
    """PEEK clears what it returns."""
    alter(domain.paging, "peek", lambda _: domain.paging.clean)


@fault(
    "Xen: tracking of the display's memory raced log-dirty",
    law=None,
    found_by=("peek-changes-nothing",),
)
def second_reader_takes_bits(domain: Domain) -> None:
    """A display that looks (PEEK) takes the bits of its own frames, at the end of RAM, and protects them again."""
    paging, locks = domain.paging, domain.locks

    def wrap(sound: Any) -> Any:
        def peek() -> DirtyBitmap:
            shown: DirtyBitmap = sound()
            with locks.domain, domain.run_control.stopped(), locks.p2m, locks.log_dirty:
                if paging._bitmap is not None:
                    paging._bitmap.words[-2:] = 0
                    frames = np.arange((shown.nbits >> 6 << 6) - 64, shown.nbits, dtype=np.uint64)
                    domain.p2m.change_types(frames, P2MType.RAM_RW, P2MType.RAM_LOGDIRTY)
                paging.flush_tlbs()
            return shown

        return peek

    alter(paging, "peek", wrap)


@fault(
    "Firecracker: a full snapshot did not reset the dirty bits",
    law=None,
    found_by=("off-and-on-again",),
)
def bits_outlive_off(domain: Domain) -> None:
    """OFF keeps the bitmap, and the next ENABLE starts with it."""
    paging = domain.paging
    kept: list[DirtyBitmap] = []

    def wrap_off(sound: Any) -> Any:
        def off() -> None:
            if paging.enabled:
                kept[:] = [paging.peek()]
            sound()

        return off

    def wrap_enable(sound: Any) -> Any:
        def enable() -> None:
            sound()
            for bitmap in kept:
                paging.mark(bitmap.gfns())

        return enable

    alter(paging, "off", wrap_off)
    alter(paging, "enable", wrap_enable)


@fault(
    "Firecracker: in a guest of more than 3 GiB the pages above the hole were at wrong offsets",
    law=2,
    found_by=("rounds-are-exact", "stamped-copy"),
    memory_bytes=BEHIND_THE_HOLE,
)
def hole_not_counted(domain: Domain) -> None:
    """The bitmap counts pages of RAM, not frames: above the PCI hole every bit is shifted."""

    def wrap(sound: Any) -> Any:
        def clean_range(gfns: range) -> DirtyBitmap:
            bitmap: DirtyBitmap = sound(gfns)
            found = bitmap.gfns()
            above = found >= np.uint64(gfn_of(PCI_HOLE_END))
            return DirtyBitmap.of(bitmap.nbits, found - above.astype(np.uint64) * np.uint64(_HOLE_PAGES))

        return clean_range

    alter(domain.paging, "clean_range", wrap)


def _mark_and_grant(domain: Domain, gfns: GfnArray) -> None:
    with domain.locks.p2m:
        for gfn in gfns.tolist():
            domain.p2m.change_type(gfn, P2MType.RAM_LOGDIRTY, P2MType.RAM_RW)


@fault(
    "no bug on record: a second way to grant a page, which the list for CLEAN does not know",
    law=1,
    found_by=("marks-and-writes-mix",),
)
def journal_forgotten_for_marks(domain: Domain) -> None:
    """A mark grants its page too, but not in the list that CLEAN protects again."""
    paging = domain.paging

    def wrap(sound: Any) -> Any:
        def mark(gfns: GfnArray) -> None:
            if paging.enabled:
                _mark_and_grant(domain, gfns[domain.memory.are_ram(gfns)])
            sound(gfns)

        return mark

    alter(paging, "mark", wrap)
    domain.memory.on_write(paging.mark)
