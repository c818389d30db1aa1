"""What a vCPU of the software hypervisor does at a TLB miss, without the vCPU."""

from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.npf import Resolution, nested_page_fault
from pageferry.hypervisor.p2m_types import READABLE, WRITABLE


def access(domain: Domain, gfn: int, *, write: bool) -> Resolution | None:
    """Return how the nested fault was resolved that an access took; None: the P2M allowed it."""
    _, p2m_type = domain.p2m.lookup(gfn)
    if p2m_type in (WRITABLE if write else READABLE):
        return None
    return nested_page_fault(domain.paging, gfn, p2m_type, write=write)
