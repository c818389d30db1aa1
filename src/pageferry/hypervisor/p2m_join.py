"""Re-joining: tables whose entries say what one larger entry could say become that entry again.

Log-dirty splits superpages to tell pages apart. When it is over nothing needs to be told apart any more, and a guest
that stays split walks one level more for ever (KVM once left guests so after a failed migration). Joining costs what
was split: whole tables are compared at once, superpages that never were split are not looked at.

Source: FACTS of KVM's history (huge pages left split); the condition is Xen's for a superpage: same type, contiguous
and aligned frames.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pageferry.core.frames import Mfn
from pageferry.hypervisor.machine_memory import PagingPool, ReverseMap
from pageferry.hypervisor.p2m_types import ADDRESS, BITS, PRESENT, PSE, RAM_TYPES, TYPE_MASK, TYPE_SHIFT, USER, P2MType

_U = np.uint64
_STEPS = np.arange(512, dtype=np.uint64)
_JOINABLE = np.array(sorted(RAM_TYPES), np.uint64)
_CHANGEABLE = np.array([P2MType.RAM_RW, P2MType.RAM_LOGDIRTY], np.uint64)


def join_tables(pool: PagingPool, m2p: ReverseMap, root_mfn: Mfn, becomes: P2MType) -> int:
    """Join what can be joined under a root; return how many table frames went back to the pool.

    4 KiB entries become 2 MiB ones and these 1 GiB ones; a table that holds nothing but one kind of hole becomes that
    hole. The domain is stopped: no vCPU walks the table meanwhile.

    Args:
        pool: has the tables.
        m2p: is told of every 2 MiB frame that is whole again.
        root_mfn: the table.
        becomes: what pending recalculation makes of changeable RAM.
    """
    before = pool.used
    root = pool.tables[root_mfn - pool.first_mfn]
    for index, l3, stale in _tables_of(pool, root, False):
        gfn = index << 27
        for nth, l2, below in _tables_of(pool, l3, stale):
            _join_entries(pool, m2p, l2, 9, below, gfn + (nth << 18), becomes)
        _join_entries(pool, m2p, l3, 18, stale, gfn, becomes)
    return before - pool.used


def _tables_of(
    pool: PagingPool, table: NDArray[np.uint64], stale: bool
) -> Iterator[tuple[int, NDArray[np.uint64], bool]]:
    """Yield ``(index, the table it points to, recalculation pending above)`` for the entries that point to tables."""
    for index in np.flatnonzero(table & _U(PRESENT | PSE) == _U(PRESENT)).tolist():
        entry = int(table[index])
        yield index, pool.tables[((entry & ADDRESS) >> 12) - pool.first_mfn], stale or not entry & USER


def _join_entries(
    pool: PagingPool,
    m2p: ReverseMap,
    table: NDArray[np.uint64],
    shift: int,
    stale: bool,
    gfn: int,
    becomes: P2MType,
) -> None:
    """Join the entries of one table, each of ``1 << shift`` pages; ``gfn`` is the table's first."""
    at = np.flatnonzero(table & _U(PRESENT | PSE) == _U(PRESENT))
    if not at.size:
        return
    mfns = (table[at] & _U(ADDRESS)) >> _U(12)
    below = pool.tables[mfns - _U(pool.first_mfn)]
    _recalculated(below, (table[at] & _U(USER) == 0) | stale, becomes)
    first = below[:, 0]
    present = first & _U(PRESENT) != 0
    frame = (first & _U(ADDRESS)) >> _U(12)
    whole = present & (frame & _U((1 << shift) - 1) == 0) & ((shift == 9) | (first & _U(PSE) != 0))
    whole &= np.isin(first >> _U(TYPE_SHIFT) & _U(TYPE_MASK), _JOINABLE)
    whole &= (below == first[:, None] + (_STEPS << _U(shift - 9 + 12))).all(axis=1)
    hole = ~present & (below == first[:, None]).all(axis=1)
    table[at[whole]] = first[whole] | _U(PSE)
    table[at[hole]] = first[hole]
    for mfn in mfns[whole | hole].tolist():
        pool.release(mfn)
    if shift == 9:
        for index, start in zip(at[whole].tolist(), frame[whole].tolist(), strict=True):
            m2p.set_extent(start, gfn + (index << 9), 512)


def _recalculated(entries: NDArray[np.uint64], stale: NDArray[np.bool_], becomes: P2MType) -> None:
    """Give the leaves among copied ``entries`` (uint64[n, 512]) the types that pending recalculation gives them."""
    pending = (entries & _U(PRESENT) != 0) & (stale[:, None] | (entries & _U(USER) == 0))
    changeable = pending & np.isin(entries >> _U(TYPE_SHIFT) & _U(TYPE_MASK), _CHANGEABLE)
    np.copyto(entries, entries & _U(ADDRESS | PSE) | _U(BITS[becomes]), where=changeable)
    np.copyto(entries, entries | _U(USER), where=pending)
