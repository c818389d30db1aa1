"""The P2M: guest frame -> (machine frame, type). The nested page table of AMD-V, with Xen's types.

The table has four levels of 512 entries. It lives in machine frames of the paging pool, as on hardware::

    L4 [gfn 35..27] -> L3 [26..18] -> L2 [17..9] -> L1 [8..0] -> mfn
                        `- PSE: 1 GiB  `- PSE: 2 MiB   `- 4 KiB

*Type carries permission* (:mod:`.p2m_types`). ``ram_rw`` is writable; ``ram_logdirty`` is RAM that is NOT WRITABLE
until its first write in this cycle has been logged. An all-zero entry reads as ``mmio_dm``: what is not RAM belongs to
the device model. An entry that is not PRESENT, at any level, gives its type to all that it covers.

*Whole-table changes are lazy* (Xen's recalculation). ``change_entry_type_global`` does not touch the RAM entries: it
clears USER in the root's entries, which says "everything below must be recalculated". A lookup that passes such an
entry computes the type it would get; the first change below it pushes the mark one level down at a time. So ENABLE and
OFF cost the same for 256 MiB and for 64 GiB.

*Superpages split at the first logged write*, one level at a time, and :meth:`P2M.join` makes them whole again.

Reading (``lookup``) takes no lock, as a hardware walker takes none: entries are single u64s, a new table is filled
before it is linked, and a table frame is released only while the domain is stopped. Changes need the P2M lock.

Source: RFC design 1 and "p2m_set_l1e_flags"; AMD APM volume 2, nested paging; Xen ``p2m-pt.c`` for the recalculation.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pageferry.core.errors import P2MError
from pageferry.core.frames import PAGES_PER_1G, PAGES_PER_2M, GfnArray
from pageferry.hypervisor.locks import OrderedLock
from pageferry.hypervisor.machine_memory import MachineMemory
from pageferry.hypervisor.p2m_join import join_tables
from pageferry.hypervisor.p2m_types import (
    ADDRESS,
    BITS,
    MAX_GFN,
    PRESENT,
    PSE,
    TABLE,
    TYPE_MASK,
    TYPE_SHIFT,
    USER,
    P2MType,
    leaf_bits,
)

_RW = P2MType.RAM_RW.value
_LOGDIRTY = P2MType.RAM_LOGDIRTY.value
_NOT_USER = ~USER & 0xFFFF_FFFF_FFFF_FFFF
_U = np.uint64
_STEPS = np.arange(512, dtype=np.uint64)


class P2M:
    """One domain's P2M.

    Args:
        machine: where the tables live.
        lock: the P2M lock; every method but ``lookup`` needs it held by the caller.
    """

    def __init__(self, machine: MachineMemory, lock: OrderedLock) -> None:
        self.lock = lock
        self._m2p = machine.m2p
        self._pool = machine.pool
        self._tables = machine.pool.tables
        self._words = machine.words
        root = self._pool.allocate()
        if root is None:
            raise P2MError("the paging pool is empty", gfn=0)
        self.root_mfn = root
        self._root = root << 9  # as an index into words
        self.fetch: Callable[[int], None] | None = None
        """Brings the content of a frame that is looked for and may be absent; None: no frame is."""
        self.global_logdirty = False
        """What recalculation makes of changeable RAM: ram_logdirty, or ram_rw."""

    def lookup(self, gfn: int) -> tuple[int, int]:
        """Return ``(mfn, type)`` of a frame, as plain ints; the mfn means nothing unless the type has one.

        Any thread, no lock. Pending recalculation is seen as done. An absent frame is not present to the walk: its
        content is brought first.
        """
        fetch = self.fetch
        if fetch is not None:
            fetch(gfn)
        words = self._words
        if gfn >= MAX_GFN:
            return 0, 0
        entry = words[self._root + (gfn >> 27)]
        seen = entry
        if not entry & PRESENT:
            return 0, entry >> TYPE_SHIFT & TYPE_MASK
        entry = words[((entry & ADDRESS) >> 3) + (gfn >> 18 & 511)]
        seen &= entry
        if not entry & PRESENT:
            return 0, entry >> TYPE_SHIFT & TYPE_MASK
        if entry & PSE:
            mfn = ((entry & ADDRESS) >> 12) + (gfn & PAGES_PER_1G - 1)
        else:
            entry = words[((entry & ADDRESS) >> 3) + (gfn >> 9 & 511)]
            if not entry & PRESENT:
                return 0, entry >> TYPE_SHIFT & TYPE_MASK
            seen &= entry
            mfn = (entry & ADDRESS) >> 12
            if entry & PSE:
                mfn += gfn & 511
            else:
                entry = words[(mfn << 9) + (gfn & 511)]
                if not entry & PRESENT:
                    return 0, entry >> TYPE_SHIFT & TYPE_MASK
                seen &= entry
                mfn = (entry & ADDRESS) >> 12
        p2m_type = entry >> TYPE_SHIFT & TYPE_MASK
        if not seen & USER and p2m_type in (_RW, _LOGDIRTY):
            p2m_type = _LOGDIRTY if self.global_logdirty else _RW
        return mfn, p2m_type

    # --- entering and leaving ---

    def map_extent(self, gfn: int, mfn: int, pages: int, p2m_type: P2MType) -> None:
        """Enter ``pages`` frames where nothing was, by the largest entries that fit; both addresses 2 MiB-aligned.

        Raises:
            P2MError: the pool has no frame for a table.
        """
        if gfn % PAGES_PER_2M or mfn % PAGES_PER_2M:
            raise P2MError("an extent must be aligned to 2 MiB", gfn=gfn)
        bits = _U(leaf_bits(p2m_type))
        while pages:
            shift = 0 if pages < PAGES_PER_2M else 9
            if pages >= PAGES_PER_1G and not (gfn | mfn) % PAGES_PER_1G:
                shift = 18
            row = self._row(self._descend(gfn, levels=3 - shift // 9))
            index = gfn >> shift & 511
            count = min(pages >> shift, 512 - index)
            mfns = _U(mfn) + (_STEPS[:count] << _U(shift))
            self._tables[row, index : index + count] = mfns << _U(12) | bits | _U(PSE if shift else 0)
            gfn, mfn, pages = gfn + (count << shift), mfn + (count << shift), pages - (count << shift)

    def prepare(self, gfns: GfnArray) -> None:
        """Have an entry of 4 KiB for each of ``gfns``, so that :meth:`set_pages` cannot fail; nothing seems to change.

        Raises:
            P2MError: the pool has no frame for a table.
        """
        assert self.lock.mine
        for block in np.unique(gfns >> _U(9)).tolist():
            self._descend(block << 9, levels=3)

    def set_pages(self, gfns: GfnArray, mfns: GfnArray | int, p2m_type: P2MType) -> None:
        """Let each of ``gfns`` be its frame of ``mfns`` with a type, whatever it was before; one by one (4 KiB).

        Args:
            gfns: uint64[n], distinct, any order.
            mfns: uint64[n], or 0 for a type that has no frame.
            p2m_type: the type of all.

        Raises:
            P2MError: the pool has no frame for a table; nothing changed.

        Source: Xen ``guest_physmap_add_page`` and ``guest_physmap_remove_page``.
        """
        self.prepare(gfns)
        blocks, which = np.unique(gfns >> _U(9), return_inverse=True)
        rows = np.array([self._row(self._descend(block << 9, levels=3)) for block in blocks.tolist()], np.int64)
        self._tables[rows[which], gfns & _U(511)] = _U(BITS[p2m_type]) | (np.asarray(mfns, np.uint64) << _U(12))

    def _row(self, table_mfn: int) -> int:
        return table_mfn - self._pool.first_mfn

    def _descend(self, gfn: int, *, levels: int) -> int:
        """Return the mfn of the table ``levels`` below the root on ``gfn``'s path, recalculated, making missing ones.

        A larger entry in the way is split: a superpage, or a hole with a type.
        """
        table: int = self.root_mfn
        for shift in (27, 18, 9)[:levels]:
            at = (table << 9) + (gfn >> shift & 511)
            entry = self._words[at]
            if entry & PRESENT and not entry & USER:
                entry = self._recalculate(at, entry, below_is_l1=shift == 9)
            if not entry & PRESENT or entry & PSE:
                self._split(gfn, at, shift)
                entry = self._words[at]
            table = (entry & ADDRESS) >> 12
        return table

    # --- changing types ---

    def change_entry_type_global(self, *, logdirty: bool) -> None:
        """Make all RAM ``ram_logdirty`` (True) or ``ram_rw`` (False): the whole table, lazily.

        Cost does not depend on the guest's memory. The caller flushes every TLB before a vCPU runs again.

        Source: RFC, ENABLE and OFF; Xen ``p2m_change_entry_type_global``.
        """
        assert self.lock.mine
        self.global_logdirty = logdirty
        self._tables[self._row(self.root_mfn)] &= _U(_NOT_USER)

    def change_type(self, gfn: int, old: P2MType, new: P2MType) -> bool:
        """Change one 4 KiB page from ``old`` to ``new``; tell whether it was ``old``. A superpage is split first.

        Raises:
            P2MError: a split was needed and the pool is exhausted; no type changed.

        Source: RFC ``p2m_fix_table()``; Xen ``p2m_change_type_one``.
        """
        at, shift = self.find(gfn)
        if self.type_at(at) != old:
            return False
        if BITS[new] & PRESENT & ~BITS[old]:
            raise P2MError("there is no frame to map", gfn=gfn, p2m_type=old.name.lower())
        self.change_found(gfn, at, shift, new)
        return True

    def change_found(self, gfn: int, at: int, shift: int, new: P2MType) -> None:
        """Change one 4 KiB page, whose entry :meth:`find` has found under this lock; as :meth:`change_type`."""
        assert self.lock.mine
        while shift:
            at, shift = self._split(gfn, at, shift)
        self._words[at] = self._words[at] & (ADDRESS if BITS[new] & PRESENT else 0) | BITS[new]

    def change_superpage_type(self, gfn: int, new: P2MType) -> tuple[int, int]:
        """Change the whole superpage that maps ``gfn``, without splitting it (when no frame is left for the split).

        Returns:
            ``(first gfn, pages)`` of what was changed.
        """
        assert self.lock.mine
        at, shift = self.find(gfn)
        assert self._words[at] & PSE
        self._words[at] = self._words[at] & ADDRESS | PSE | BITS[new]
        return gfn & -(1 << shift), 1 << shift

    def change_types(self, gfns: GfnArray, old: P2MType, new: P2MType) -> int:
        """Change every one of ``gfns`` that is a 4 KiB page of type ``old`` to ``new``; return how many there were.

        One vectorised walk: each level is one gather for all frames. Frames under a superpage or with recalculation
        pending are left alone: neither was changed one by one since the last change of the whole table.

        Args:
            gfns: uint64[n], any order.
            old: the type to replace.
            new: the type to set.

        Source: RFC, CLEAN ("mark all physical memory as NOT WRITABLE"), narrowed to what became writable.
        """
        assert self.lock.mine
        tables, first = self._tables, _U(self._pool.first_mfn)
        rows = np.zeros(gfns.size, np.uint64)  # the root is the pool's first frame
        for shift in (27, 18, 9):
            entries = tables[rows, gfns >> _U(shift) & _U(511)]
            usable = entries & _U(PRESENT | USER | PSE) == _U(PRESENT | USER)
            if not usable.all():
                gfns, entries = gfns[usable], entries[usable]
            rows = ((entries & _U(ADDRESS)) >> _U(12)) - first
        columns = gfns & _U(511)
        leaves = tables[rows, columns]
        chosen = (leaves >> _U(TYPE_SHIFT)) & _U(TYPE_MASK) == _U(old)
        tables[rows[chosen], columns[chosen]] = leaves[chosen] & _U(ADDRESS) | _U(BITS[new])
        return int(np.count_nonzero(chosen))

    def join(self) -> int:
        """Make superpages of what can be one (after OFF); return how many table frames went back to the pool.

        The domain is stopped. Cost grows with the number of tables, not with memory.
        """
        assert self.lock.mine
        becomes = P2MType.RAM_LOGDIRTY if self.global_logdirty else P2MType.RAM_RW
        return join_tables(self._pool, self._m2p, self.root_mfn, becomes)

    # --- walking ---

    def type_at(self, at: int) -> int:
        """Return the type in an entry that :meth:`find` has found."""
        return self._words[at] >> TYPE_SHIFT & TYPE_MASK

    def find(self, gfn: int) -> tuple[int, int]:
        """Return where (an index into words) the entry that decides ``gfn`` is, recalculated, and its shift.

        It maps ``1 << shift`` frames: it is in an L1 table, or has PSE, or is not PRESENT at some level.
        """
        assert self.lock.mine
        words = self._words
        at = self._root + (gfn >> 27)
        for shift in (18, 9, 0):
            entry = words[at]
            if not entry & USER and entry & PRESENT:
                entry = self._recalculate(at, entry, below_is_l1=shift == 0)
            if not entry & PRESENT or entry & PSE:
                return at, shift + 9
            at = ((entry & ADDRESS) >> 3) + (gfn >> shift & 511)
        return at, 0

    def _recalculate(self, at: int, entry: int, *, below_is_l1: bool) -> int:
        """Do a pending recalculation of one entry: a leaf takes its type, a table passes the mark to its entries."""
        if entry & PSE:
            if entry >> TYPE_SHIFT & TYPE_MASK in (_RW, _LOGDIRTY):
                entry = entry & ADDRESS | PSE | BITS[_LOGDIRTY if self.global_logdirty else _RW]
            else:
                entry |= USER
        else:
            row = self._tables[self._row((entry & ADDRESS) >> 12)]
            if below_is_l1:  # the last table: its 512 leaves take their types at once
                types = row >> _U(TYPE_SHIFT) & _U(TYPE_MASK)
                bits = _U(BITS[_LOGDIRTY if self.global_logdirty else _RW])
                np.copyto(row, row & _U(ADDRESS) | bits, where=(types == _U(_RW)) | (types == _U(_LOGDIRTY)))
            else:  # an entry that is not PRESENT has no USER to lose
                row &= _U(_NOT_USER)
            entry |= USER
        self._words[at] = entry
        return entry

    def _split(self, gfn: int, at: int, shift: int) -> tuple[int, int]:
        """Replace an entry of ``1 << shift`` pages by a table of 512 alike; return ``gfn``'s and its shift."""
        table = self._pool.allocate()
        if table is None:
            raise P2MError("the paging pool has no frame for a P2M table", gfn=gfn)
        entry, below = self._words[at], shift - 9
        row: NDArray[np.uint64] = self._tables[self._row(table)]
        if not entry & PRESENT:
            row[:] = entry
        else:
            row[:] = (_STEPS << _U(12 + below)) + _U(entry if below else entry & ~PSE)
        self._words[at] = table << 12 | TABLE  # linked only now that it is filled
        return (table << 9) + (gfn >> below & 511), below
