"""Faults of the software hypervisor's tables: the P2M, its splits and lazy changes, the TLBs (p2m.py, paging.py)."""

from typing import Any

import numpy as np
from altered import alter

from mutation.fault import Faults, Room
from pageferry.core.frames import PAGES_PER_2M
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.p2m_types import P2MType

fault = Faults(Room.HYPERVISOR)


@fault(
    "no bug on record: tables are changed, and the processor still holds what it read from them before",
    law=2,
    found_by=("clean-protects-again", "rounds-are-exact", "stamped-copy"),
)
def tlb_not_flushed(domain: Domain) -> None:
    """CLEAN protects the pages and leaves writable translations in the vCPUs' TLBs."""
    _without_flush(domain, "clean_range")


@fault(
    "no bug on record: the same at ENABLE",
    law=2,
    found_by=("off-and-on-again",),
)
def tlb_not_flushed_at_enable(domain: Domain) -> None:
    """ENABLE protects the pages and leaves writable translations in the vCPUs' TLBs."""
    _without_flush(domain, "enable")


def _without_flush(domain: Domain, operator: str) -> None:
    paging = domain.paging

    def wrap(sound: Any) -> Any:
        def operate(*arguments: object) -> Any:
            flush, paging.flush_tlbs = paging.flush_tlbs, lambda: None
            try:
                return sound(*arguments)
            finally:
                paging.flush_tlbs = flush

        return operate

    alter(paging, operator, wrap)


@fault(
    "no bug on record: what splitting a superpage by hand invites",
    law=1,
    found_by=("rounds-are-exact", "stamped-copy", "audit-each-round"),
)
def split_forgets_neighbours(domain: Domain) -> None:
    """A split superpage's 511 other pages come out writable, not log-dirty."""
    p2m = domain.p2m

    def wrap(sound: Any) -> Any:
        def split(gfn: int, *where: int) -> Any:
            result = sound(gfn, *where)
            table = np.arange(gfn & -PAGES_PER_2M, (gfn & -PAGES_PER_2M) + PAGES_PER_2M, dtype=np.uint64)
            p2m.change_types(table[table != gfn], P2MType.RAM_LOGDIRTY, P2MType.RAM_RW)
            return result

        return split

    alter(p2m, "_split", wrap)


@fault(
    "Xen: enabling log-dirty recalculated MMIO entries; the nested fault was taken for fatal",
    law=None,
    found_by=("free-running-dma", "marks-are-seen-at-once"),
)
def mmio_recalculated(domain: Domain) -> None:
    """Under log-dirty device space reads as nothing at all: an access is the guest's end instead of handle_mmio."""
    p2m = domain.p2m

    def wrap(sound: Any) -> Any:
        def lookup(gfn: int) -> tuple[int, int]:
            mfn, p2m_type = sound(gfn)
            return mfn, P2MType.INVALID if p2m.global_logdirty and p2m_type == P2MType.MMIO_DM else p2m_type

        return lookup

    alter(p2m, "lookup", wrap)


@fault(
    "Xen: shadow preallocation ignored log-dirty's own needs, and an allocation that failed went unnoticed",
    law=2,
    found_by=("exhausted-pool",),
)
def failed_split_ignored(domain: Domain) -> None:
    """With no frame to split a superpage, its 512 pages become writable and one of them is marked."""
    paging = domain.paging
    alter(paging, "_fix_whole_superpage", lambda _: lambda gfn: domain.p2m.change_superpage_type(gfn, P2MType.RAM_RW))


@fault(
    "no bug on record: what a lazy change of the whole table invites",
    law=1,
    found_by=("off-and-on-again", "audit-each-round"),
)
def recalculation_lost(domain: Domain) -> None:
    """ENABLE marks the table for recalculation; the first change below forgets the other entries of that table."""
    p2m = domain.p2m

    def wrap(sound: Any) -> Any:
        def recalculate(at: int, entry: int, *, below_is_l1: bool) -> int:
            if below_is_l1 and not entry & 1 << 7:
                from_now_on: int = entry | 1 << 2
                p2m._words[at] = from_now_on
                return from_now_on
            result: int = sound(at, entry, below_is_l1=below_is_l1)
            return result

        return recalculate

    alter(p2m, "_recalculate", wrap)
