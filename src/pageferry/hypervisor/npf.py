"""The nested page fault: an access that the P2M denies, and how it is resolved.

The RFC, design 2::

    If it is MMIO space, call handle_mmio().
    Otherwise, call p2m_fix_table() to mark a specific page as WRITABLE. Additionally, we call paging_mark_dirty()
    to update dirty bitmap. By doing this, we only receive one NPF for each dirty page (in each cycle).

:func:`nested_page_fault` is that text. It runs on the faulting vCPU's thread, which counts as inside the guest: no
operator can be at work at the same time, but other vCPUs may fault on the same page, and device models may mark it.
The loser of such a race finds the page writable already: its fault is *spurious* and changes nothing.

For the same reason what a vCPU has looked up stays true until it leaves the guest, except that others may make a page
writable: after a fault it need not walk again.

Source: RFC, "Nested Paging Fault"; Xen ``hvm_hap_nested_page_fault`` for the order of the cases.
"""

from enum import Enum, auto

from pageferry.core.errors import GuestCrash
from pageferry.hypervisor.p2m_types import P2MType
from pageferry.hypervisor.paging import Paging

_MMIO_DM = P2MType.MMIO_DM.value
_RAM_RO = P2MType.RAM_RO.value
_RAM_LOGDIRTY = P2MType.RAM_LOGDIRTY.value


class Resolution(Enum):
    """What to do after a nested page fault."""

    RETRY = auto()
    """The page is RAM that may be written now; its frame is the same."""
    EMULATE = auto()
    """Device space: ``handle_mmio`` performs the access."""
    DISCARD = auto()
    """A write to read-only RAM: the instruction completes and nothing is written."""


def nested_page_fault(paging: Paging, gfn: int, p2m_type: int, *, write: bool) -> Resolution:
    """Resolve a fault of the nested table on ``gfn``.

    Args:
        paging: the domain's.
        gfn: the frame.
        p2m_type: its type, which the walk has found and which denies the access.
        write: whether it is a write.

    Raises:
        GuestCrash: there is nothing there, or the type refuses writes.
    """
    if p2m_type == _MMIO_DM:
        return Resolution.EMULATE
    if p2m_type == _RAM_LOGDIRTY and write:
        paging.fix_and_mark(gfn)
        return Resolution.RETRY
    if p2m_type == _RAM_RO:
        return Resolution.DISCARD
    access = "write to" if write else "access to"
    raise GuestCrash(f"{access} gfn {gfn:#x}, which is {P2MType(p2m_type).name.lower()}")
