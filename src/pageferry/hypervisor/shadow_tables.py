"""Shadow page tables: gva -> mfn in one walk, in machine frames of the paging pool.

The hardware of 2005 had one set of page tables. A hypervisor that wanted to hide machine frames gave the processor
tables of its own, the *shadows*, made from the guest's tables (gva -> gfn) and the P2M (gfn -> mfn)::

    guest     CR3 -> PML4 ------> PDPT ------> PD ------> PT ----> gfn
                      :            :           :          :          | P2M
    shadow    root -> L4 --------> L3 -------> L2 ------> L1 ----> mfn

Each guest table has one shadow per level it is used at, entry for entry, filled in as the guest touches what they map
and shared by all who point to it. A large guest page has no tables below it to shadow: it is *splintered* into tables
of 4 KiB entries that belong to no guest page (Xen's FL1 shadows), so log-dirty sees 4 KiB always.

An entry carries what both sides allow::

    P   the guest's P and A: so that the first access comes to us and A can be set
    W   the guest's W and D (so that we set D), the P2M's type, and the page is not a guest table with a shadow
    U, NX   the guest's

**Keeping in step.** A guest page that has a shadow is never mapped writable: its writes are performed by the
hypervisor, which then drops the shadow entries made from the words written. A translation that some TLB has held
since before the page got its shadow may still write it unseen. Until every vCPU has flushed its TLB, such a page is
*out of sync*: each flush that the guest asks for compares its shadow entries with it. That suffices, because only
after a flush may a guest rely on what it wrote; and an entry that was not present is in no shadow.

Everything here needs the SHADOW lock, lookups included: tables are freed when their last reference goes.

Source: Xen ``arch/x86/mm/shadow/`` (``common.c``, ``multi.c``) for the method; AMD APM volume 2,
"Page-Translation-Table Entry Fields".
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pageferry.core.frames import PAGE_SHIFT
from pageferry.hypervisor.machine_memory import INVALID_GFN, MachineMemory
from pageferry.hypervisor.p2m_types import ADDRESS, PRESENT, PSE, USER, WRITE
from pageferry.hypervisor.table_window import TableWindow

ACCESSED, DIRTY, NX = 1 << 5, 1 << 6, 1 << 63
#: Software's own bit of a 4 KiB entry: the guest lets it be written and D is set, so W may come without a walk.
MAY_WRITE = 1 << 9
_U = np.uint64
_RIGHTS = PRESENT | WRITE | USER


class Key(NamedTuple):
    """What a shadow table stands for: a guest table at a level, or (splinter) 512 parts of a large page at ``gfn``."""

    gfn: int
    level: int
    splinter: bool = False


class NoFrame(Exception):
    """The budget is used up: blow the shadows and start again."""


class ShadowTables:
    """The shadow tables of one domain.

    ``protected`` maps each guest page that has a shadow to the levels it is shadowed at.

    Args:
        machine: where the tables live, and the guest's.
        budget: how many frames they may take; at least 16. What the P2M needs is not part of it.
        window: is told which shadows a guest page has.
    """

    def __init__(self, machine: MachineMemory, budget: int, window: TableWindow) -> None:
        self._words = machine.words
        self._pool = machine.pool
        self._budget = budget
        self._window = window
        self.frames: dict[Key, int] = {}
        self.protected: dict[int, list[int]] = {}
        self.newly_protected: list[int] = []
        """Guest pages that got their first shadow since this list was last emptied."""
        self._keys: dict[int, Key] = {}  # mfn of a shadow -> what it stands for
        self._references: dict[int, int] = {}
        self._writable: dict[int, set[int]] = {}  # gfn -> where (index into words) a leaf maps it writable
        self._gfns: dict[int, int] = {}  # what each leaf maps

    def root(self, gfn: int) -> int:
        """Return the shadow of the PML4 at ``gfn``, made if need be.

        Raises:
            NoFrame: no frame for it.
        """
        mfn = self.frames.get(Key(gfn, 4))
        if mfn is None:
            mfn = self._make(Key(gfn, 4))
            self._references[mfn] = 1  # the vCPUs': it stays until the shadows are blown
        return mfn

    def lookup(self, root: int, gva: int) -> tuple[int, int, int] | None:
        """Walk the shadows, as the processor does; None where an entry is not present.

        Return where the last entry is (index into words), its mfn, and the rights: WRITE and USER where all levels
        give them, NX where any sets it; MAY_WRITE where only the last entry's W is in the way, or not even that.
        """
        words, table, rights, no_execute = self._words, root << 9, _RIGHTS, 0
        for shift in (39, 30, 21):
            entry = words[table + (gva >> shift & 511)]
            if not entry & PRESENT:
                return None
            rights &= entry
            no_execute |= entry
            table = (entry & ADDRESS) >> 3
        slot = table + (gva >> PAGE_SHIFT & 511)
        entry = words[slot]
        if not entry & PRESENT:
            return None
        may_write = entry & MAY_WRITE if rights & WRITE else 0
        return slot, (entry & ADDRESS) >> PAGE_SHIFT, rights & entry | (no_execute | entry) & NX | may_write

    def entries(self, root: int, gva: int) -> tuple[int, ...] | None:
        """Return four times where the entry of a level is (index into words), and what it is; None: one is missing."""
        words, table = self._words, root << 9
        found: tuple[int, ...] = ()
        for shift in (39, 30, 21, PAGE_SHIFT):
            slot = table + (gva >> shift & 511)
            entry = words[slot]
            if not entry & PRESENT:
                return None
            found += slot, entry
            table = (entry & ADDRESS) >> 3
        return found

    def child(self, slot: int, key: Key, rights: int) -> int:
        """Make a table's entry point to the shadow of ``key``, made if need be; return that shadow.

        Raises:
            NoFrame: no frame for it.
        """
        entry, mfn = self._words[slot], self.frames.get(key)
        if mfn is None:
            mfn = self._make(key)
        if not entry & PRESENT or (entry & ADDRESS) >> PAGE_SHIFT != mfn:
            self._references[mfn] += 1  # first, or dropping might free it
            self.drop(slot)
        self._words[slot] = mfn << PAGE_SHIFT | rights
        return mfn

    def leaf(self, slot: int, gfn: int, mfn: int, rights: int) -> None:
        """Enter a 4 KiB page."""
        self.drop(slot)
        self._words[slot] = mfn << PAGE_SHIFT | rights
        self._gfns[slot] = gfn
        if rights & WRITE:
            self._writable.setdefault(gfn, set()).add(slot)

    def gfn_to_grant(self, slot: int, mfn: int) -> int | None:
        """Return the page of a 4 KiB entry for ``mfn`` if W may be set in it, as far as the guest is concerned."""
        entry = self._words[slot]
        if not entry & MAY_WRITE or (entry & ADDRESS) >> PAGE_SHIFT != mfn:
            return None
        gfn = self._gfns.get(slot)
        return None if gfn in self.protected else gfn

    def grant(self, slot: int, mfn: int, gfn: int) -> bool:
        """Set W in a 4 KiB entry, if it still maps that page and may have it."""
        if self.gfn_to_grant(slot, mfn) != gfn:
            return False
        self._words[slot] |= WRITE
        self._writable.setdefault(gfn, set()).add(slot)
        return True

    def drop(self, slot: int) -> None:
        """Clear an entry; a table that loses its last reference goes with all below it."""
        entry = self._words[slot]
        if not entry & PRESENT:
            return
        self._words[slot] = 0
        if self._keys[slot >> 9].level == 1:
            self._forget_leaf(slot)
            return
        mfn = (entry & ADDRESS) >> PAGE_SHIFT
        self._references[mfn] -= 1
        if not self._references[mfn]:
            self._free(mfn)

    def drop_words(self, gfn: int, first: int, last: int) -> None:
        """Drop what was made from words ``first`` to ``last`` of a guest page."""
        for level in tuple(self.protected.get(gfn, ())):
            mfn = self.frames.get(Key(gfn, level))  # gone, if a drop before this one freed it
            if mfn is not None:
                for index in range(first, last + 1):
                    self.drop((mfn << 9) + index)

    def drop_page(self, gfn: int) -> None:
        """Drop everything that was made from a guest page."""
        self.drop_words(gfn, 0, 511)

    def unshadow(self, gfn: int) -> None:
        """Drop the shadows of a guest page, and every entry that points to them; a root stays."""
        for level in tuple(self.protected.get(gfn, ())):
            mfn = self.frames.get(Key(gfn, level))
            if mfn is None or level == 4:
                continue
            for key, above in tuple(self.frames.items()):
                if key.level == level + 1 and above in self._keys:
                    pointing = self._row(above) & _U(ADDRESS) == _U(mfn << PAGE_SHIFT)
                    for index in np.flatnonzero(pointing).tolist():
                        self.drop((above << 9) + index)

    def resync_page(self, gfn: int, guest: NDArray[np.uint64]) -> None:
        """Drop what disagrees with the guest page it was made from, whose content is ``guest`` (uint64[512])."""
        for level in tuple(self.protected.get(gfn, ())):
            mfn = self.frames.get(Key(gfn, level))
            if mfn is not None:
                row = self._row(mfn)
                present = np.flatnonzero(row)
                for index in present[~self._agree(level, mfn, present, row[present], guest[present])].tolist():
                    self.drop((mfn << 9) + index)

    def _agree(
        self, level: int, table: int, indices: NDArray[np.int64], shadows: NDArray[np.uint64], guest: NDArray[np.uint64]
    ) -> NDArray[np.bool_]:
        mfns = (shadows & _U(ADDRESS)) >> _U(PAGE_SHIFT)
        frames = (guest & _U(ADDRESS)) >> _U(PAGE_SHIFT)
        is_leaf = np.full(guest.shape, level == 1)
        if level == 1:
            expected = np.array([self._gfns[(table << 9) + index] for index in indices.tolist()], np.uint64)
        else:
            keys = [self._keys[mfn] for mfn in mfns.tolist()]
            expected = np.array([key.gfn for key in keys], np.uint64)
            is_leaf = guest & _U(PSE) != 0
            frames = np.where(is_leaf, frames & ~_U((1 << 9 * (level - 1)) - 1), frames)
            is_leaf_here = np.array([key.splinter for key in keys], np.bool_)
            expected = np.where(is_leaf == is_leaf_here, expected, INVALID_GFN)
        rights = np.where(is_leaf & (guest & _U(DIRTY) == 0), guest & ~_U(WRITE), guest)
        given = np.where(shadows & _U(MAY_WRITE) != 0, shadows | _U(WRITE), shadows)
        allowed = given & _U(WRITE | USER) & ~rights == 0
        walked = guest & _U(PRESENT | ACCESSED) == _U(PRESENT | ACCESSED)
        agree: NDArray[np.bool_] = (frames == expected) & allowed & walked & ((guest ^ shadows) & _U(NX) == 0)
        return agree

    def shadows(self, gfn: int) -> list[int]:
        """Return the mfns of a guest page's shadows."""
        return [self.frames[Key(gfn, level)] for level in self.protected.get(gfn, ())]

    def write_protect(self, gfn: int) -> None:
        """Take the right to write a page from every entry that maps it. TLBs are the caller's business."""
        for slot in self._writable.pop(gfn, ()):
            self._words[slot] &= ~WRITE

    def blow(self) -> None:
        """Throw every shadow away (Xen's ``shadow_blow_tables``)."""
        for gfn in self.protected:
            self._window.shadowed(gfn, [])
        for mfn in self.frames.values():
            self._pool.release(mfn, shadow=True)  # type: ignore[arg-type]  # it is an Mfn
        for book in (self.frames, self.protected, self._keys, self._references, self._writable, self._gfns):
            book.clear()

    def leaves(self) -> list[tuple[int, int, int, int]]:
        """Return every present 4 KiB entry as (slot, gfn, mfn, rights); for the audit."""
        found = []
        for key, mfn in self.frames.items():
            if key.level == 1:
                row = self._row(mfn)
                for index in np.flatnonzero(row).tolist():
                    entry = int(row[index])
                    slot = (mfn << 9) + index
                    found.append((slot, self._gfns[slot], (entry & ADDRESS) >> PAGE_SHIFT, entry & (_RIGHTS | NX)))
        return found

    def writable_slots(self, gfn: int) -> frozenset[int]:
        """Return where a page is mapped writable; for the audit."""
        return frozenset(self._writable.get(gfn, ()))

    def _make(self, key: Key) -> int:
        mfn = self._pool.allocate(shadow=True) if len(self.frames) < self._budget else None
        if mfn is None:
            raise NoFrame
        self._row(mfn)[:] = 0
        self.frames[key] = mfn
        self._keys[mfn] = key
        self._references[mfn] = 0
        if not key.splinter:
            if key.gfn not in self.protected:
                self.newly_protected.append(key.gfn)
            self.protected.setdefault(key.gfn, []).append(key.level)
            self._window.shadowed(key.gfn, self.shadows(key.gfn))
            self.write_protect(key.gfn)
        return mfn

    def _free(self, mfn: int) -> None:
        key = self._keys[mfn]
        for index in np.flatnonzero(self._row(mfn)).tolist():
            self.drop((mfn << 9) + index)
        del self._keys[mfn], self._references[mfn], self.frames[key]
        if not key.splinter:
            self.protected[key.gfn].remove(key.level)
            self._window.shadowed(key.gfn, self.shadows(key.gfn))
            if not self.protected[key.gfn]:
                del self.protected[key.gfn]
        self._pool.release(mfn)  # type: ignore[arg-type]  # it is an Mfn

    def _row(self, mfn: int) -> NDArray[np.uint64]:
        row: NDArray[np.uint64] = self._pool.tables[mfn - self._pool.first_mfn]
        return row

    def _forget_leaf(self, slot: int) -> None:
        gfn = self._gfns.pop(slot)
        slots = self._writable.get(gfn)
        if slots is not None:
            slots.discard(slot)
            if not slots:
                del self._writable[gfn]
