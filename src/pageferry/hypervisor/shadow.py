"""Log-dirty under shadow paging: faults on the shadow tables, and what the operators do to them.

A TLB miss walks the shadows once (:mod:`.shadow_tables`). What is not there, or not allowed, is a *shadow fault*::

    walk the guest's tables (:mod:`.guest_walk`)   a refusal is the guest's own page fault; A and D are set
    look at the P2M type, resolve as a nested      device space to handle_mmio; log-dirty RAM is marked and becomes
      page fault would be (:mod:`.npf`)              ram_rw, as one step with respect to CLEAN
    the page is a guest table with a shadow?       a write goes through the *table window*: performed by us
    otherwise enter it in the shadows, retry

The vCPU's side of it is :mod:`.shadow_mmu`. The P2M type carries the permission here as under HAP, so laws 1 and 8
are the same statements in both modes, and a shadow entry is writable only while its page's type is. (Xen's shadow
code asks the dirty bitmap instead.)

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

from collections.abc import Sequence

import numpy as np

from pageferry.core.errors import VmError
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE, GfnArray
from pageferry.hypervisor.guest_walk import GuestWalker
from pageferry.hypervisor.locks import OrderedLock
from pageferry.hypervisor.machine_memory import MachineMemory
from pageferry.hypervisor.p2m import P2M
from pageferry.hypervisor.p2m_types import ADDRESS, PRESENT, PSE, USER, WRITABLE, WRITE, P2MType
from pageferry.hypervisor.paging import LogDirtyOps, Tlb
from pageferry.hypervisor.shadow_tables import ACCESSED, DIRTY, MAY_WRITE, NX, Key, NoFrame, ShadowTables
from pageferry.hypervisor.table_window import TableWindow

_ALL = PRESENT | WRITE | USER


class ShadowPaging:
    """The shadow mode of one domain: its tables, and the operations for its log-dirty.

    ``fault_count`` counts shadow faults, for ever; ``window`` is the short way of writes to guest tables.

    Args:
        machine: machine memory.
        p2m: the domain's P2M.
        lock: the SHADOW lock.
        tlbs: the vCPUs'.
        budget: frames for shadow tables.
        gfns: how many guest frames there are.
    """

    def __init__(
        self, machine: MachineMemory, p2m: P2M, lock: OrderedLock, *, tlbs: Sequence[Tlb], budget: int, gfns: int
    ) -> None:
        self.window = TableWindow(machine, gfns, vcpus=len(tlbs))
        self.tables = ShadowTables(machine, budget, self.window)
        self.lock = lock
        self.fault_count = 0
        self._long_writes = 0
        self._machine = machine
        self._p2m = p2m
        self._tlbs = tuple(tlbs)
        self._pages = np.frombuffer(machine.words, np.uint64).reshape(-1, 512)
        self._bytes = machine.words.cast("B")
        self._out_of_sync: dict[int, list[int]] = {}  # gfn -> each vCPU's count of TLB flushes when it got its shadow

    @property
    def emulated_writes(self) -> int:
        """How many writes to guest tables were performed for the guest, for ever."""
        return self._long_writes + self.window.stores

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
        for tlb in self._tlbs:  # they may remember what rests on roots that are gone
            tlb.request_flush()

    def written(self, gfns: GfnArray) -> None:
        """Drop what was made from these frames: a writer other than a vCPU has written them."""
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
                if all(tlb.flushes > then for tlb, then in zip(self._tlbs, flushes, strict=True)):
                    self._out_of_sync.pop(gfn, None)

    def fill(self, walker: GuestWalker, gva: int) -> tuple[int, int, int] | None:
        """Walk the shadows for a TLB; return ``(slot, mfn, rights)`` if there is something for this privilege."""
        with self.lock:
            root = self.tables.frames.get((walker.cr3 >> PAGE_SHIFT, 4, False))  # type: ignore[call-overload]
            found: tuple[int, int, int] | None = None if root is None else self.tables.lookup(root, gva)
        return None if found is None or (walker.user and not found[2] & USER) else found

    def rests_on(self, walker: GuestWalker, gva: int) -> tuple[int, ...] | None:
        """Return the shadow entries that a translation rests on, as :meth:`ShadowTables.entries`; None: there is none.

        They say all of it: the root is the same until the shadows are blown, and what is dropped reads differently.
        """
        with self.lock:
            root = self.tables.frames.get((walker.cr3 >> PAGE_SHIFT, 4, False))  # type: ignore[call-overload]
            return None if root is None else self.tables.entries(root, gva)

    def enter(self, path: list[tuple[int, int]], gva: int, gfn: int) -> int | None:
        """Enter a page that the guest's walk has found into the shadows; return the leaf's rights.

        None: the guest's tables have changed since that walk, or the shadows had to be blown to make room: walk again.
        What is entered is read anew, under the lock that a write to a guest table takes. The P2M type of ``gfn`` can
        only have become more permissive since it was looked at.
        """
        with self.lock:
            blown = not self.tables.frames
            try:
                return self._enter(path, gva, gfn)
            except NoFrame:
                self._blow()
                if blown:  # not even one walk fits: to walk again would be to walk for ever
                    raise VmError("the paging pool has no room for the shadows of one walk") from None
                return None

    def _enter(self, path: list[tuple[int, int]], gva: int, gfn: int) -> int | None:
        tables, words = self.tables, self._machine.words
        for table_gfn, _ in path:
            self.window.used(table_gfn)
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
        if p2m_type not in WRITABLE or gfn in self.tables.protected:
            own &= ~WRITE
        self.tables.leaf(slot, gfn, mfn, own | may_write)
        return own

    def _note_newly_protected(self) -> None:
        # TLBs may still map them writable.
        if self.tables.newly_protected:
            maddrs = [self._p2m.lookup(gfn)[0] << PAGE_SHIFT for gfn in self.tables.newly_protected]
            for gfn in self.tables.newly_protected:
                self._out_of_sync[gfn] = [tlb.flushes for tlb in self._tlbs]
            self.tables.newly_protected.clear()
            for tlb in self._tlbs:
                tlb.request_protection(maddrs)

    def read_table(self, gpa: int, size: int) -> int:
        """Return what a load through the table window reads."""
        at = self._maddr(gpa)
        return int.from_bytes(self._bytes[at : at + size], "little")

    def write_table(self, gpa: int, size: int, value: int) -> None:
        """Perform a guest's write to one of its tables, then drop the shadow entries made from it."""
        at = self._maddr(gpa)
        with self.lock:
            self._bytes[at : at + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            self._long_writes += 1
            gfn, offset = gpa >> PAGE_SHIFT, gpa & PAGE_SIZE - 1
            self.tables.drop_words(gfn, offset >> 3, offset + size - 1 >> 3)
            if self.window.written(gfn):
                self.tables.unshadow(gfn)

    def _maddr(self, gpa: int) -> int:
        return (self._p2m.lookup(gpa >> PAGE_SHIFT)[0] << PAGE_SHIFT) + (gpa & PAGE_SIZE - 1)


def _is_walked(entry: int) -> bool:
    return entry & (PRESENT | ACCESSED) == PRESENT | ACCESSED


def _combine(above: int, own: int) -> int:
    return above & own & _ALL | (above | own) & NX
