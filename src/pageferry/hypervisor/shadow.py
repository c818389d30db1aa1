"""Log-dirty under shadow paging: faults on the shadow tables, and what the operators do to them.

A TLB miss walks the shadows once (:mod:`.shadow_tables`). What is not there, or not allowed, is a *shadow fault*::

    walk the guest's tables (:mod:`.guest_walk`)   a refusal is the guest's own page fault; A and D are set
    look at the P2M type, resolve as a nested      device space to handle_mmio; log-dirty RAM is marked and becomes
      page fault would be (:mod:`.npf`)              ram_rw, as one step with respect to CLEAN
    the page is a guest table with a shadow?       a write goes through the *table window*: performed by us
    otherwise enter it in the shadows, retry

The P2M type carries the permission here as under HAP, so laws 1 and 8 are the same statements in both modes, and a
shadow entry is writable only while its page's type is. (Xen's shadow code asks the dirty bitmap instead.)

=========  ==========================================  ===========================================================
operator   HAP                                         shadow
=========  ==========================================  ===========================================================
ENABLE     P2M: all RAM log-dirty                      the same, and all shadows are blown
CLEAN      P2M: what was written, log-dirty again      the same, and its shadow entries lose their W
OFF        P2M: all RAM writable                       the same; entries get their W back as they are written
=========  ==========================================  ===========================================================

What differs is what is dirty: under HAP the processor's walker writes at the nested level, so that the guest's tables
are dirty in every cycle. Here we walk, and a table is dirty only when its content changed, by the guest's hand or
because we set A or D.

Source: RFC, "paging_mark_dirty() dispatches to sh_mark_dirty() or hap_mark_dirty()"; Xen ``shadow/multi.c``
(``sh_page_fault``), ``shadow/common.c`` (``sh_enable_log_dirty``, ``sh_clean_dirty_bitmap``).
"""

from collections.abc import Callable, Sequence

import numpy as np

from pageferry.core.errors import GuestCrash
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE, GfnArray
from pageferry.hypervisor import unicorn_api as api
from pageferry.hypervisor.guest_walk import GuestWalker
from pageferry.hypervisor.locks import OrderedLock
from pageferry.hypervisor.machine import MachineMemory
from pageferry.hypervisor.mmio import MMIO_WINDOW
from pageferry.hypervisor.npf import Resolution, nested_page_fault
from pageferry.hypervisor.p2m import ADDRESS, P2M, PRESENT, PSE, READABLE, USER, WRITE, P2MType, leaf_bits
from pageferry.hypervisor.paging import LogDirtyOps, Paging
from pageferry.hypervisor.shadow_tables import ACCESSED, DIRTY, MAY_WRITE, NX, Key, NoFrame, ShadowTables

#: Where guest pages that have a shadow appear among machine addresses when they are written.
TABLE_WINDOW = 1 << 49
_WINDOW_BYTES = 1 << 48

_RAM = (P2MType.RAM_RW.value, P2MType.RAM_LOGDIRTY.value)
_WRITABLE = frozenset(p2m_type.value for p2m_type in P2MType if leaf_bits(p2m_type) & WRITE)
_READ_WRITE = api.READ | api.WRITE
_ALL = PRESENT | WRITE | USER


class ShadowPaging:
    """The shadow mode of one domain: its tables, and the operations for its log-dirty.

    ``fault_count`` and ``emulated_writes`` count shadow faults and writes to guest tables, for ever.

    Args:
        machine: machine memory.
        p2m: the domain's P2M.
        lock: the SHADOW lock.
        budget: frames for shadow tables.
    """

    def __init__(self, machine: MachineMemory, p2m: P2M, lock: OrderedLock, *, budget: int) -> None:
        self.tables = ShadowTables(machine, budget)
        self.lock = lock
        self.fault_count = 0
        self.emulated_writes = 0
        self.mmus: Sequence[ShadowMmu] = ()
        """One per vCPU; set by the domain before anything runs."""
        self._machine = machine
        self._p2m = p2m
        self._pages = np.frombuffer(machine.words, np.uint64).reshape(-1, 512)
        self._bytes = machine.words.cast("B")
        self._out_of_sync: dict[int, list[int]] = {}  # gfn -> each vCPU's count of TLB flushes when it got its shadow

    def log_dirty_ops(self) -> LogDirtyOps:
        """Return the operations for a domain whose vCPUs run on these tables."""

        def enable() -> None:
            self._p2m.change_entry_type_global(logdirty=True)
            self.blow()

        def disable() -> None:
            self._p2m.change_entry_type_global(logdirty=False)

        def clean(written: GfnArray) -> None:
            self._p2m.change_types(written, P2MType.RAM_RW, P2MType.RAM_LOGDIRTY)
            with self.lock:
                for gfn in written.tolist():
                    self.tables.write_protect(gfn)

        return LogDirtyOps(enable=enable, disable=disable, clean=clean, written=self.written)

    def blow(self) -> None:
        """Throw all shadows away; the caller flushes the TLBs if translations must go too."""
        with self.lock:
            self._blow()

    def _blow(self) -> None:
        self.tables.blow()
        self.tables.newly_protected.clear()
        self._out_of_sync.clear()

    def written(self, gfns: GfnArray) -> None:
        """Drop what was made from these frames: somebody other than a vCPU has written them."""
        if not self.tables.protected:
            return
        with self.lock:
            shadowed = np.fromiter(self.tables.protected, np.uint64, len(self.tables.protected))
            for gfn in shadowed[np.isin(shadowed, gfns)].tolist():
                self.tables.drop_page(gfn)

    def resync(self) -> None:
        """Do a flush that the guest asked for, after its vCPU's TLB: drop what disagrees with pages out of sync."""
        with self.lock:
            for gfn, flushes in tuple(self._out_of_sync.items()):
                mfn = self._p2m.lookup(gfn)[0]
                self.tables.resync_page(gfn, self._pages[mfn])
                if all(mmu.flushes > then for mmu, then in zip(self.mmus, flushes, strict=True)):
                    self._out_of_sync.pop(gfn, None)

    def fill(self, walker: GuestWalker, gva: int) -> tuple[int, int, int] | None:
        """Walk the shadows for a TLB; return ``(slot, mfn, rights)`` if there is something for this privilege."""
        with self.lock:
            root = self.tables.frames.get((walker.cr3 >> PAGE_SHIFT, 4, False))  # type: ignore[call-overload]
            found: tuple[int, int, int] | None = None if root is None else self.tables.lookup(root, gva)
        return None if found is None or (walker.user and not found[2] & USER) else found

    def enter(self, path: list[tuple[int, int]], gva: int, gfn: int) -> int | None:
        """Enter a page that the guest's walk has found into the shadows; return the leaf's rights.

        None: the guest's tables have changed since that walk, or the shadows had to be blown to make room: walk again.
        What is entered is read anew, under the lock that a write to a guest table takes. The P2M type of ``gfn`` can
        only have become more permissive since it was looked at.
        """
        with self.lock:
            try:
                return self._enter(path, gva, gfn)
            except NoFrame:
                self._blow()
                return None

    def _enter(self, path: list[tuple[int, int]], gva: int, gfn: int) -> int | None:
        tables, words = self.tables, self._machine.words
        table, rights = tables.root(path[0][0]), _ALL
        for level in (4, 3, 2):
            slot = (table << 9) + (gva >> (3 + 9 * level) & 511)
            depth = 4 - level
            if depth < len(path):
                entry = words[path[depth][1]]
                own = entry & (_ALL | NX)
                if depth == len(path) - 1:  # a large page, splintered from here on: D decides about all of it
                    own &= ~(0 if entry & DIRTY else WRITE)
                    key = Key(gfn >> 9 * (level - 1) << 9 * (level - 1), level - 1, splinter=True)
                    outdated = not entry & PSE or (entry & ADDRESS) >> PAGE_SHIFT & -(1 << 9 * (level - 1)) != key.gfn
                else:
                    key = Key(path[depth + 1][0], level - 1)
                    outdated = bool(entry & PSE) or (entry & ADDRESS) >> PAGE_SHIFT != key.gfn
                if outdated or not _is_walked(entry):
                    return None
            else:
                own, key = _ALL, Key(gfn >> 9 * (level - 1) << 9 * (level - 1), level - 1, splinter=True)
            rights = _combine(rights, own)
            table = tables.child(slot, key, own)
        leaf = self._enter_leaf(path, (table << 9) + (gva >> PAGE_SHIFT & 511), gfn)
        self._note_newly_protected()
        return None if leaf is None else _combine(rights, leaf)

    def _enter_leaf(self, path: list[tuple[int, int]], slot: int, gfn: int) -> int | None:
        own = _ALL
        if len(path) == 4:
            entry = self._machine.words[path[3][1]]
            if (entry & ADDRESS) >> PAGE_SHIFT != gfn or not _is_walked(entry):
                return None
            own = entry & (_ALL | NX)
            own &= ~(0 if entry & DIRTY else WRITE)
        mfn, p2m_type = self._p2m.lookup(gfn)
        may_write = MAY_WRITE if own & WRITE else 0
        if p2m_type not in _WRITABLE or gfn in self.tables.protected:
            own &= ~WRITE
        self.tables.leaf(slot, gfn, mfn, own | may_write)
        return own

    def _note_newly_protected(self) -> None:
        # TLBs may still map them writable.
        if self.tables.newly_protected:
            for gfn in self.tables.newly_protected:
                self._out_of_sync[gfn] = [mmu.flushes for mmu in self.mmus]
            self.tables.newly_protected.clear()
            for mmu in self.mmus:
                mmu.request_flush()

    def read_table(self, gpa: int, size: int) -> int:
        """Return what a load through the table window reads."""
        at = self._maddr(gpa)
        return int.from_bytes(self._bytes[at : at + size], "little")

    def write_table(self, gpa: int, size: int, value: int) -> None:
        """Perform a guest's write to one of its tables, then drop the shadow entries made from it."""
        at = self._maddr(gpa)
        with self.lock:
            self._bytes[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            self.emulated_writes += 1
            offset = gpa & PAGE_SIZE - 1
            self.tables.drop_words(gpa >> PAGE_SHIFT, offset >> 3, offset + size - 1 >> 3)

    def _maddr(self, gpa: int) -> int:
        return (self._p2m.lookup(gpa >> PAGE_SHIFT)[0] << PAGE_SHIFT) + (gpa & PAGE_SIZE - 1)


class ShadowMmu:
    """One vCPU's way through the shadows.

    Args:
        shadow: the domain's.
        p2m: the domain's.
        walker: the vCPU's walker of the guest's tables; its own accesses go through :meth:`table_read` and
            :meth:`table_write` in this mode.
        request_flush: has the vCPU flush its TLB soon; any thread.
        failed: takes an exception that must not travel through the emulator.
    """

    paging: Paging
    """The domain's paging; set by the domain before anything runs."""

    def __init__(
        self,
        shadow: ShadowPaging,
        p2m: P2M,
        walker: GuestWalker,
        *,
        request_flush: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.shadow = shadow
        self.request_flush = request_flush
        self.flushes = 0
        """How often the vCPU has flushed its TLB; counted after the flush."""
        self._p2m = p2m
        self._walker = walker
        self._failed = failed
        self._callbacks = (api.MMIO_READ(self._read), api.MMIO_WRITE(self._write))

    def attach(self, engine: api.Engine) -> None:
        """Open the table window in one emulator instance; this object must outlive it."""
        engine.mmio_map(TABLE_WINDOW, _WINDOW_BYTES, *self._callbacks)

    def translate(self, gva: int, write: bool, fetch: bool) -> tuple[int, int]:
        """Return ``(maddr, permissions)`` for the TLB, once the access is allowed.

        Raises:
            GuestPageFault: the guest's tables refuse.
            GuestCrash: the P2M does.
        """
        found = self.shadow.fill(self._walker, gva)
        if found is not None and not (fetch and found[2] & NX):
            slot, mfn, rights = found
            if not write or rights & WRITE or (rights & MAY_WRITE and self._grant(slot, mfn)):
                return _tlb_entry(mfn, rights | WRITE if write else rights)
        return self._fault(gva, write, fetch)

    def _grant(self, slot: int, mfn: int) -> bool:
        """Take a write fault on an entry that only log-dirty keeps NOT WRITABLE; False: it is not so simple."""
        tables, lock = self.shadow.tables, self.shadow.lock
        with lock:
            gfn = tables.gfn_to_grant(slot, mfn)
        if gfn is None or self._p2m.lookup(gfn)[1] not in _RAM:
            return False
        self.shadow.fault_count += 1
        nested_page_fault(self._p2m, self.paging, gfn, write=True)
        with lock:
            return self._p2m.lookup(gfn)[1] in _WRITABLE and tables.grant(slot, mfn, gfn)

    def _fault(self, gva: int, write: bool, fetch: bool) -> tuple[int, int]:
        shadow, p2m = self.shadow, self._p2m
        shadow.fault_count += 1
        while True:
            self._walker.flush()  # the path must be whole
            gfn, writable, _ = self._walker.translate(gva, write=write, fetch=fetch)
            mfn, p2m_type = p2m.lookup(gfn)
            while p2m_type not in (_WRITABLE if write else READABLE):
                if nested_page_fault(p2m, self.paging, gfn, write=write) is not Resolution.RETRY:
                    if fetch:
                        raise GuestCrash(f"instruction fetch from device space, gpa {gfn << PAGE_SHIFT:#x}")
                    if p2m_type in READABLE:  # the write is discarded: no device has this gpa; reads fill again
                        return MMIO_WINDOW + (gfn << PAGE_SHIFT), api.WRITE
                    return MMIO_WINDOW + (gfn << PAGE_SHIFT), _READ_WRITE if writable else api.READ
                mfn, p2m_type = p2m.lookup(gfn)
            rights = shadow.enter(self._walker.path, gva, gfn)
            if rights is None:
                continue
            if write and gfn in shadow.tables.protected:
                return TABLE_WINDOW + (gfn << PAGE_SHIFT), _READ_WRITE
            return _tlb_entry(mfn, rights | WRITE if write else rights)

    def table_read(self, gfn: int) -> int:
        """Return the mfn of a guest table: here the walker is ours, and reading is no write."""
        mfn, p2m_type = self._p2m.lookup(gfn)
        if p2m_type not in READABLE:
            raise GuestCrash(f"page table at gpa {gfn << PAGE_SHIFT:#x}, which is no memory")
        return mfn

    def table_write(self, gfn: int) -> None:
        """Log that an entry of a guest table changes: A or D is about to be set."""
        while self._p2m.lookup(gfn)[1] not in _WRITABLE:
            if nested_page_fault(self._p2m, self.paging, gfn, write=True) is not Resolution.RETRY:
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


def _is_walked(entry: int) -> bool:
    return entry & (PRESENT | ACCESSED) == PRESENT | ACCESSED


def _combine(above: int, own: int) -> int:
    return above & own & _ALL | (above | own) & NX


def _tlb_entry(mfn: int, rights: int) -> tuple[int, int]:
    permissions = api.READ
    if rights & WRITE:
        permissions |= api.WRITE
    if not rights & NX:
        permissions |= api.EXECUTE
    return mfn << PAGE_SHIFT, permissions
