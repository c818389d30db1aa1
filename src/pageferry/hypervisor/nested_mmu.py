"""One vCPU under nested paging: gva -> gfn through the guest's tables, gfn -> mfn through the P2M.

Law 1 at this level: a page is writable in the TLB only if its P2M type is writable *now* (and the guest's own dirty bit
is set). Frames that were found writable are remembered until the next flush: a type that becomes less permissive always
comes with one, while all vCPUs are outside the guest (law 2).

Source: RFC, "Nested Paging Fault"; AMD APM volume 2, nested paging.
"""

from pageferry.core.errors import GuestCrash
from pageferry.core.frames import PAGE_SHIFT
from pageferry.hypervisor import unicorn_api as api
from pageferry.hypervisor.guest_walk import GuestWalker
from pageferry.hypervisor.mmio import MMIO_WINDOW
from pageferry.hypervisor.npf import Resolution, nested_page_fault
from pageferry.hypervisor.p2m import P2M
from pageferry.hypervisor.p2m_types import READABLE, WRITABLE
from pageferry.hypervisor.paging import Paging

_READ_WRITE = api.READ | api.WRITE
#: Permissions by (may be written, may be executed).
_PERMISSIONS = (
    (api.READ, api.READ | api.EXECUTE),
    (_READ_WRITE, _READ_WRITE | api.EXECUTE),
)


class NestedMmu:
    """One vCPU's two-dimensional walk.

    ``walker`` walks the guest's tables; its own accesses go through :meth:`table_access` in this mode.

    Args:
        words: machine memory as u64s.
        p2m: the domain's.
        paging: the domain's.
    """

    def __init__(self, words: memoryview, p2m: P2M, paging: Paging) -> None:
        self.walker = GuestWalker(words, self.table_access)
        self._p2m = p2m
        self._paging = paging
        self._writable_frames: dict[int, int] = {}  # gfn -> maddr

    def flush(self) -> None:
        """Forget what the P2M said; with every TLB flush."""
        self._writable_frames.clear()

    def translate(self, gva: int, write: bool, fetch: bool) -> tuple[int, int]:
        """Return ``(maddr, permissions)`` for the TLB, once the access is allowed.

        Raises:
            GuestPageFault: the guest's tables refuse.
            GuestCrash: the P2M does.
        """
        gfn, writable, executable = self.walker.translate(gva, write=write, fetch=fetch)
        maddr = self._writable_frames.get(gfn)
        if maddr is not None:
            return maddr, _PERMISSIONS[writable][executable]
        mfn, p2m_type = self._p2m.lookup(gfn)
        writes = p2m_type in WRITABLE
        if not (writes if write else p2m_type in READABLE):
            resolution = nested_page_fault(self._paging, gfn, p2m_type, write=write)
            if resolution is Resolution.DISCARD:  # no device has this gpa, so the bus ignores it; reads fill again
                return MMIO_WINDOW + (gfn << PAGE_SHIFT), api.WRITE
            if resolution is Resolution.EMULATE:
                if fetch:
                    raise GuestCrash(f"instruction fetch from device space, gpa {gfn << PAGE_SHIFT:#x}")
                return MMIO_WINDOW + (gfn << PAGE_SHIFT), _READ_WRITE if writable else api.READ
            writes = True
        maddr = mfn << PAGE_SHIFT
        if writes:
            self._writable_frames[gfn] = maddr
        return maddr, _PERMISSIONS[writable and writes][executable]

    def rests_on(self, gva: int) -> tuple[int, ...] | None:
        """Return what the last translation, of this gva, rests on: four times the place of an entry and what it was."""
        return self.walker.passed

    def table_access(self, gfn: int) -> int:
        """Return the mfn of a guest page table, writable: AMD-V's walker writes (see guest_walk)."""
        maddr = self._writable_frames.get(gfn)
        if maddr is not None:
            return maddr >> PAGE_SHIFT
        mfn, p2m_type = self._p2m.lookup(gfn)
        if p2m_type in WRITABLE or nested_page_fault(self._paging, gfn, p2m_type, write=True) is Resolution.RETRY:
            self._writable_frames[gfn] = mfn << PAGE_SHIFT
            return mfn
        raise GuestCrash(f"page table in device space or read-only RAM, gpa {gfn << PAGE_SHIFT:#x}")
