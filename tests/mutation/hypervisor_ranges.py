"""Faults of the software hypervisor's CLEAN of a range: which pages of the journal a cycle ends for (paging.py)."""

from typing import Any

from altered import alter

from mutation.fault import Faults, Room
from pageferry.hypervisor.domain import Domain

fault = Faults(Room.HYPERVISOR)


@fault(
    "no bug on record: the list of granted pages is of the whole guest, a range is not",
    law=1,
    found_by=("range-leaves-the-others", "stamped-copy-by-range"),
)
def range_takes_the_whole_journal(domain: Domain) -> None:
    """CLEAN of a range empties the list of granted pages; those beside the range are never protected again."""
    paging = domain.paging

    def wrap(sound: Any) -> Any:
        def end_cycle(gfns: range) -> Any:
            ended = sound(gfns)
            del paging._journal[:]
            return ended

        return end_cycle

    alter(paging, "_end_cycle", wrap)


@fault(
    "no bug on record: a range is cleaned as the whole guest is, with its bits sorted out afterwards",
    law=8,
    found_by=("range-costs-no-other-fault",),
)
def range_protects_all(domain: Domain) -> None:
    """CLEAN of a range protects all dirty pages again; those beside it are dirty, and fault once more."""
    paging = domain.paging

    def wrap(sound: Any) -> Any:
        def end_cycle(gfns: range) -> Any:
            granted = paging.journal()
            dirty, _ = sound(gfns)
            del paging._journal[:]
            return dirty, granted

        return end_cycle

    alter(paging, "_end_cycle", wrap)
