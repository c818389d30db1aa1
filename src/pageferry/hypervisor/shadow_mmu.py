"""One vCPU under shadow paging: its TLB misses, its shadow faults, and the table window.

The *table window* is where a guest page that has a shadow appears when the guest writes it: machine addresses where
no memory is, as for device space (:mod:`.mmio`). Unicorn calls back with the value, which makes it the instruction
emulator that Xen's shadow code has to bring along. An 8-byte store arrives in two halves, the low one first.
Stores that have nothing to drop are done by :mod:`.table_window`.

Source: Xen ``shadow/multi.c`` (``sh_page_fault`` and the emulation of writes to guest tables).
"""

from collections.abc import Callable

from pageferry.core.errors import GuestCrash
from pageferry.core.frames import PAGE_SHIFT
from pageferry.hypervisor import unicorn_api as api
from pageferry.hypervisor.guest_walk import GuestWalker
from pageferry.hypervisor.mmio import MMIO_WINDOW
from pageferry.hypervisor.npf import Resolution, nested_page_fault
from pageferry.hypervisor.p2m import P2M
from pageferry.hypervisor.p2m_types import READABLE, WRITABLE, WRITE, P2MType
from pageferry.hypervisor.paging import Paging
from pageferry.hypervisor.shadow import ShadowPaging
from pageferry.hypervisor.shadow_tables import MAY_WRITE, NX

#: Where guest pages that have a shadow appear among machine addresses when they are written.
TABLE_WINDOW = 1 << 49
_WINDOW_BYTES = 1 << 48

_RAM = (P2MType.RAM_RW.value, P2MType.RAM_LOGDIRTY.value)
_READ_WRITE = api.READ | api.WRITE


class ShadowMmu:
    """One vCPU's way through the shadows.

    Args:
        shadow: the domain's.
        p2m: the domain's.
        walker: the vCPU's walker of the guest's tables; its own accesses go through :meth:`table_read` and
            :meth:`table_write` in this mode.
        paging: the domain's.
        failed: takes an exception that must not travel through the emulator.
    """

    def __init__(
        self,
        shadow: ShadowPaging,
        p2m: P2M,
        walker: GuestWalker,
        paging: Paging,
        failed: Callable[[BaseException], None],
    ) -> None:
        self.shadow = shadow
        self._paging = paging
        self._p2m = p2m
        self._walker = walker
        self._failed = failed
        self._callbacks = (api.MMIO_READ(self._read), api.MMIO_WRITE(self._write))

    def attach(self, engine: api.Engine) -> None:
        """Open the table window in one emulator instance; this object must outlive it."""
        read, write, data = self.shadow.window.attach(*self._callbacks)
        engine.mmio_map(TABLE_WINDOW, _WINDOW_BYTES, read, write, data=data)

    def translate(self, gva: int, write: bool, fetch: bool) -> tuple[int, int]:
        """Return ``(maddr, permissions)`` for the TLB, once the access is allowed.

        Raises:
            GuestPageFault: the guest's tables refuse.
            GuestCrash: the P2M does.
        """
        if not self._walker.paging:
            return self._unpaged(gva, write, fetch)
        found = self.shadow.fill(self._walker, gva)
        if found is not None and not (fetch and found[2] & NX):
            slot, mfn, rights = found
            if not write or rights & WRITE or (rights & MAY_WRITE and self._grant(slot, mfn)):
                return _tlb_entry(mfn, rights | WRITE if write else rights)
        return self._fault(gva, write, fetch)

    def rests_on(self, gva: int) -> tuple[int, ...] | None:
        """Return what the last translation, of this gva, rests on; see :meth:`ShadowPaging.rests_on`."""
        return self.shadow.rests_on(self._walker, gva) if self._walker.paging else None

    def _unpaged(self, gva: int, write: bool, fetch: bool) -> tuple[int, int]:
        """Translate where the guest has no tables to shadow yet."""
        gfn, _, _ = self._walker.translate(gva, write=write, fetch=fetch)
        mfn, p2m_type = self._p2m.lookup(gfn)
        if not self._allows(gfn, p2m_type, write):
            return self._window(gfn, p2m_type, fetch=fetch, writable=True)
        if write and gfn in self.shadow.tables.protected:
            return self._table_window(gfn, mfn)
        return _tlb_entry(mfn, WRITE if write else 0)

    def _table_window(self, gfn: int, mfn: int) -> tuple[int, int]:
        """Return the TLB's entry for a guest table that is written."""
        self.shadow.window.open(gfn, mfn)
        return TABLE_WINDOW + (gfn << PAGE_SHIFT), _READ_WRITE

    def _window(self, gfn: int, p2m_type: int, *, fetch: bool, writable: bool) -> tuple[int, int]:
        """Return the TLB's entry for what the P2M does not let the CPU access by itself."""
        if fetch:
            raise GuestCrash(f"instruction fetch from device space, gpa {gfn << PAGE_SHIFT:#x}")
        if p2m_type in READABLE:  # the write is discarded: no device has this gpa; reads fill again
            return MMIO_WINDOW + (gfn << PAGE_SHIFT), api.WRITE
        return MMIO_WINDOW + (gfn << PAGE_SHIFT), _READ_WRITE if writable else api.READ

    def _grant(self, slot: int, mfn: int) -> bool:
        """Take a write fault on an entry that only log-dirty keeps NOT WRITABLE; False: it is not so simple."""
        tables, lock = self.shadow.tables, self.shadow.lock
        with lock:
            gfn = tables.gfn_to_grant(slot, mfn)
        if gfn is None:
            return False
        p2m_type = self._p2m.lookup(gfn)[1]
        if p2m_type not in _RAM:
            return False
        self.shadow.fault_count += 1
        self._allows(gfn, p2m_type, True)
        with lock:
            return tables.grant(slot, mfn, gfn)

    def _allows(self, gfn: int, p2m_type: int, write: bool) -> bool:
        """Tell whether the P2M allows an access, after the nested fault that it may take."""
        if p2m_type in (WRITABLE if write else READABLE):
            return True
        return nested_page_fault(self._paging, gfn, p2m_type, write=write) is Resolution.RETRY

    def _fault(self, gva: int, write: bool, fetch: bool) -> tuple[int, int]:
        shadow, p2m = self.shadow, self._p2m
        shadow.fault_count += 1
        while True:
            self._walker.flush()  # the path must be whole
            gfn, writable, _ = self._walker.translate(gva, write=write, fetch=fetch)
            mfn, p2m_type = p2m.lookup(gfn)
            if not self._allows(gfn, p2m_type, write):
                return self._window(gfn, p2m_type, fetch=fetch, writable=writable)
            rights = shadow.enter(self._walker.path, gva, gfn)
            if rights is None:
                continue
            if write and gfn in shadow.tables.protected:
                return self._table_window(gfn, mfn)
            return _tlb_entry(mfn, rights | WRITE if write else rights)

    def table_read(self, gfn: int) -> int:
        """Return the mfn of a guest table: here the walker is ours, and its reads write nothing."""
        mfn, p2m_type = self._p2m.lookup(gfn)
        if p2m_type not in READABLE:
            raise GuestCrash(f"page table at gpa {gfn << PAGE_SHIFT:#x}, which is not memory")
        return mfn

    def table_write(self, gfn: int) -> None:
        """Log that an entry of a guest table changes: A or D is about to be set."""
        p2m_type = self._p2m.lookup(gfn)[1]
        if not self._allows(gfn, p2m_type, True):
            raise GuestCrash(f"page table at gpa {gfn << PAGE_SHIFT:#x}, which cannot be written")

    def _read(self, _engine: int, gpa: int, size: int, _data: int) -> int:
        try:
            return self.shadow.read_table(gpa, size)
        except BaseException as error:
            self._failed(error)
            return 0

    def _write(self, _engine: int, gpa: int, size: int, value: int, _data: int) -> None:
        try:
            self.shadow.write_table(gpa, size, value)
        except BaseException as error:
            self._failed(error)


def _tlb_entry(mfn: int, rights: int) -> tuple[int, int]:
    permissions = api.READ
    if rights & WRITE:
        permissions |= api.WRITE
    if not rights & NX:
        permissions |= api.EXECUTE
    return mfn << PAGE_SHIFT, permissions
