"""The P2M: guest frame -> (machine frame, type). The nested page table of AMD-V, with Xen's types.

The table has four levels of 512 entries. It lives in machine frames of the paging pool, as on hardware::

    L4 [gfn 35..27] -> L3 [26..18] -> L2 [17..9] -> L1 [8..0] -> mfn
                                       `- PSE: 2 MiB        `- 4 KiB

An entry is a nested-page-table entry of the AMD manual; the type is in bits the hardware leaves to software::

    63..58 0 | 57..52 type | 51..12 mfn | 7 PSE | 2 USER | 1 WRITE | 0 PRESENT

*Type carries permission.* ``ram_rw`` is writable; ``ram_logdirty`` is RAM that is NOT WRITABLE until its first write
in this cycle has been logged. An all-zero entry reads as ``mmio_dm``: what is not RAM belongs to the device model.

*Whole-table changes are lazy* (Xen's recalculation). ``change_entry_type_global`` does not touch the RAM entries: it
clears USER in the root's entries, which says "everything below must be recalculated". A lookup that passes such an
entry computes the type it would get; the first change below it pushes the mark one level down at a time. So ENABLE and
OFF cost the same for 256 MiB and for 64 GiB.

*Superpages split at the first logged write* into 512 entries of 4 KiB.

Reading (``lookup``) takes no lock, as a hardware walker takes none: entries are single u64s, a new table is filled
before it is linked, and a table frame is released only while the domain is stopped. Changes need the P2M lock.

Source: RFC design 1 and "p2m_set_l1e_flags"; AMD APM volume 2, nested paging; Xen ``p2m-pt.c`` for the recalculation.
"""

from enum import IntEnum

import numpy as np

from pageferry.core.errors import P2MError
from pageferry.core.frames import PAGES_PER_2M, GfnArray
from pageferry.hypervisor.locks import OrderedLock
from pageferry.hypervisor.machine import MachineMemory

PRESENT = 1 << 0
WRITE = 1 << 1
USER = 1 << 2  # clear in a present entry: recalculate what is below
PSE = 1 << 7
ADDRESS = 0x000F_FFFF_FFFF_F000
TYPE_SHIFT = 52
TYPE_MASK = 0x3F

#: gfns are 36 bits: four levels of nine.
MAX_GFN = 1 << 36


class P2MType(IntEnum):
    """What a guest frame is (Xen's ``p2m_type_t``); the values are ours."""

    MMIO_DM = 0
    """Not RAM: the device model (ours: the bus) emulates accesses."""
    RAM_RW = 1
    RAM_LOGDIRTY = 2
    """RAM under log-dirty that was not written in this cycle: NOT WRITABLE."""
    RAM_RO = 3
    MMIO_DIRECT = 4
    GRANT_MAP_RW = 5
    GRANT_MAP_RO = 6
    INVALID = 7
    """Nothing at all: an access is the guest's end."""


_FLAGS_OF = {
    P2MType.MMIO_DM: 0,
    P2MType.RAM_RW: PRESENT | WRITE | USER,
    P2MType.RAM_LOGDIRTY: PRESENT | USER,
    P2MType.RAM_RO: PRESENT | USER,
    P2MType.MMIO_DIRECT: PRESENT | WRITE | USER,
    P2MType.GRANT_MAP_RW: PRESENT | WRITE | USER,
    P2MType.GRANT_MAP_RO: PRESENT | USER,
    P2MType.INVALID: 0,
}
_RW = P2MType.RAM_RW.value
_LOGDIRTY = P2MType.RAM_LOGDIRTY.value
_TABLE = PRESENT | WRITE | USER

#: Types whose frames may be read.
READABLE = frozenset(t.value for t, flags in _FLAGS_OF.items() if flags & PRESENT)


def leaf_bits(p2m_type: P2MType) -> int:
    """Return an entry's bits for a type: everything but the mfn and PSE."""
    return p2m_type << TYPE_SHIFT | _FLAGS_OF[p2m_type]


_BITS = tuple(leaf_bits(t) for t in P2MType)
_U = np.uint64


class P2M:
    """One domain's P2M.

    Args:
        machine: where the tables live.
        lock: the P2M lock; every method but ``lookup`` needs it held by the caller.
    """

    def __init__(self, machine: MachineMemory, lock: OrderedLock) -> None:
        self.lock = lock
        self._pool = machine.pool
        self._tables = machine.pool.tables
        self._words = machine.words
        root = self._pool.allocate()
        if root is None:
            raise P2MError("the paging pool is empty", gfn=0)
        self.root_mfn = root
        self._root = root << 9  # as an index into words
        self.global_logdirty = False
        """What recalculation makes of changeable RAM: ram_logdirty, or ram_rw."""

    def lookup(self, gfn: int) -> tuple[int, int]:
        """Return ``(mfn, type)`` of a frame, as plain ints; the mfn means nothing unless the type has one.

        Any thread, no lock. Pending recalculation is seen as done.
        """
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

    def map_extent(self, gfn: int, mfn: int, pages: int, p2m_type: P2MType) -> None:
        """Enter ``pages`` frames, with 2 MiB entries where whole ones fit; both addresses 2 MiB-aligned.

        Raises:
            P2MError: the pool has no frame for a table.
        """
        if gfn % PAGES_PER_2M or mfn % PAGES_PER_2M:
            raise P2MError("an extent must be aligned to 2 MiB", gfn=gfn)
        end, bits = gfn + pages, _U(leaf_bits(p2m_type))
        while gfn < end:
            l2 = self._row(self._descend(gfn, levels=2))
            index = gfn >> 9 & 511
            count = min((end - gfn) >> 9, 512 - index)
            if count:
                mfns = mfn + PAGES_PER_2M * np.arange(count, dtype=np.uint64)
                self._tables[l2, index : index + count] = mfns << _U(12) | bits | _U(PSE)
            else:
                count, tail = 1, end - gfn
                l1 = self._row(self._descend(gfn, levels=3))
                self._tables[l1, :tail] = (mfn + np.arange(tail, dtype=np.uint64)) << _U(12) | bits
            gfn += count * PAGES_PER_2M
            mfn += count * PAGES_PER_2M

    def _row(self, table_mfn: int) -> int:
        return table_mfn - self._pool.first_mfn

    def _descend(self, gfn: int, *, levels: int) -> int:
        """Return the mfn of the table ``levels`` below the root on ``gfn``'s path, making missing ones."""
        table: int = self.root_mfn
        for shift in (27, 18, 9)[:levels]:
            at = (table << 9) + (gfn >> shift & 511)
            entry = self._words[at]
            if not entry & PRESENT:
                new = self._pool.allocate()
                if new is None:
                    raise P2MError("the paging pool has no frame for a P2M table", gfn=gfn)
                entry = self._words[at] = new << 12 | _TABLE
            table = (entry & ADDRESS) >> 12
        return table

    def change_entry_type_global(self, *, logdirty: bool) -> None:
        """Make all RAM ``ram_logdirty`` (True) or ``ram_rw`` (False): the whole table, lazily.

        Cost does not depend on the guest's memory. The caller flushes every TLB before a vCPU runs again.

        Source: RFC, ENABLE and OFF; Xen ``p2m_change_entry_type_global``.
        """
        assert self.lock.mine
        self.global_logdirty = logdirty
        self._tables[self._row(self.root_mfn)] &= _U(~USER & 0xFFFF_FFFF_FFFF_FFFF)

    def change_type(self, gfn: int, old: P2MType, new: P2MType) -> bool:
        """Change one 4 KiB page from ``old`` to ``new``; tell whether it was ``old``. A superpage is split first.

        Raises:
            P2MError: a split was needed and the pool is exhausted; nothing changed.

        Source: RFC ``p2m_fix_table()``; Xen ``p2m_change_type_one``.
        """
        assert self.lock.mine
        at = self._leaf(gfn)
        entry = self._words[at]
        if entry >> TYPE_SHIFT & TYPE_MASK != old:
            return False
        if entry & PSE:
            at = self._split(gfn, at)
            entry = self._words[at]
        self._words[at] = entry & ADDRESS | _BITS[new]
        return True

    def change_superpage_type(self, gfn: int, new: P2MType) -> None:
        """Change the whole 2 MiB entry that maps ``gfn``, without splitting it (when there is no frame to split)."""
        assert self.lock.mine
        at = self._leaf(gfn)
        assert self._words[at] & PSE
        self._words[at] = self._words[at] & ADDRESS | PSE | _BITS[new]

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
        tables[rows[chosen], columns[chosen]] = leaves[chosen] & _U(ADDRESS) | _U(_BITS[new])
        return int(np.count_nonzero(chosen))

    def _leaf(self, gfn: int) -> int:
        """Return where (an index into words) the entry that decides ``gfn`` is, recalculated.

        It is in an L1 table, or has PSE, or is not PRESENT at some level.
        """
        words = self._words
        at = self._root + (gfn >> 27)
        for shift in (18, 9, 0):
            entry = words[at]
            if not entry & USER and entry & PRESENT:
                entry = self._recalculate(at, entry, below_is_l1=shift == 0)
            if not entry & PRESENT or entry & PSE:
                return at
            at = ((entry & ADDRESS) >> 3) + (gfn >> shift & 511)
        return at

    def _recalculate(self, at: int, entry: int, *, below_is_l1: bool) -> int:
        """Do a pending recalculation of one entry: a leaf takes its type, a table passes the mark to its entries."""
        if entry & PSE:
            if entry >> TYPE_SHIFT & TYPE_MASK in (_RW, _LOGDIRTY):
                entry = entry & ADDRESS | PSE | _BITS[_LOGDIRTY if self.global_logdirty else _RW]
            else:
                entry |= USER
        else:
            row = self._tables[self._row((entry & ADDRESS) >> 12)]
            if below_is_l1:  # the last table: its 512 leaves take their types at once
                types = row >> _U(TYPE_SHIFT) & _U(TYPE_MASK)
                bits = _U(_BITS[_LOGDIRTY if self.global_logdirty else _RW])
                np.copyto(row, row & _U(ADDRESS) | bits, where=(types == _U(_RW)) | (types == _U(_LOGDIRTY)))
            else:  # an entry that is not PRESENT has no USER to lose
                row &= _U(~USER & 0xFFFF_FFFF_FFFF_FFFF)
            entry |= USER
        self._words[at] = entry
        return entry

    def _split(self, gfn: int, at: int) -> int:
        """Replace a 2 MiB entry by a table of 512 entries that say the same; return where ``gfn``'s is."""
        table = self._pool.allocate()
        if table is None:
            raise P2MError("the paging pool has no frame to split a superpage", gfn=gfn)
        entry = self._words[at]
        frames = np.arange(PAGES_PER_2M, dtype=np.uint64) << _U(12)
        self._tables[self._row(table)] = frames + _U(entry & ~PSE)
        self._words[at] = table << 12 | _TABLE  # linked only now that it is filled
        return (table << 9) + (gfn & 511)
