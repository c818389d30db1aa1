"""Invariants over P2M, reverse map, pool and bitmap, checked in one pass.

Xen has ``audit_p2m`` for the first; the bitmap is ours. Everything is read as it is, nothing is corrected. Writers that
are not vCPUs may mark meanwhile: they only set bits, which no check here minds.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pageferry.core.frames import GfnArray
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.machine_memory import INVALID_GFN, FrameOwner
from pageferry.hypervisor.p2m_types import (
    ADDRESS,
    GRANT_TYPES,
    PRESENT,
    PSE,
    READABLE,
    TYPE_MASK,
    TYPE_SHIFT,
    USER,
    WRITABLE,
    WRITE,
    P2MType,
)

_U = np.uint64
_WRITABLE = np.array(sorted(WRITABLE), np.uint64)
_READABLE = np.array(sorted(READABLE), np.uint64)
_GRANTS = np.array(sorted(GRANT_TYPES), np.uint64)


class InvariantError(AssertionError):
    """An invariant of the hypervisor does not hold: our own bug."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaves:
    """PRESENT leaf entries of one table: ``gfns``, ``entries`` and ``types`` (recalculated), uint64[n] each.

    ``pages`` is what each maps: 1, 512 or 262,144.
    """

    gfns: GfnArray
    entries: NDArray[np.uint64]
    types: NDArray[np.uint64]
    pages: int

    @property
    def mfns(self) -> GfnArray:
        """The first machine frame of each."""
        return (self.entries & _U(ADDRESS)) >> _U(12)

    @property
    def grants(self) -> NDArray[np.bool_]:
        """Whether each maps another owner's page."""
        return np.isin(self.types, _GRANTS)


def check(domain: Domain) -> None:
    """Check a domain; any thread but a vCPU's. Its vCPUs are held meanwhile.

    Raises:
        InvariantError: the first invariant that does not hold.
    """
    with domain.locks.domain, domain.run_control.stopped(), domain.locks.p2m:
        tables: set[int] = set()
        leaves = list(_leaves(domain, domain.p2m.root_mfn, 27, 0, False, tables))
        _check_pool(domain, tables)
        _check_shadow(domain)
        for found in leaves:
            _check_permissions(found)
            _check_reverse_map(domain, found)
            _check_grants(domain, found)
            _check_inside_ram(domain, found)
        _check_accounting(domain, leaves)
        _check_law_1(domain, leaves)
        _check_bitmap(domain)


def _leaves(domain: Domain, mfn: int, shift: int, gfn: int, stale: bool, tables: set[int]) -> Iterator[Leaves]:
    """Walk one table; ``stale``: an entry above asks for recalculation. Collects the tables' frames in ``tables``."""
    row = mfn - domain.machine.pool.first_mfn
    _require(0 <= row < len(domain.machine.pool.tables), f"table at gfn {gfn:#x} is mfn {mfn:#x}, not in the pool")
    _require(mfn not in tables, f"mfn {mfn:#x} is the table of two entries")
    tables.add(mfn)
    entries = domain.machine.pool.tables[row]
    at = np.flatnonzero(entries & _U(PRESENT))
    is_leaf = (entries[at] & _U(PSE) != 0) | (shift == 0)
    if at[is_leaf].size:
        _require(shift <= 18, f"a leaf at level {shift // 9 + 1}, gfn {gfn:#x}")
        found = entries[at[is_leaf]]
        types = found >> _U(TYPE_SHIFT) & _U(TYPE_MASK)
        changeable = (types == _U(P2MType.RAM_RW)) | (types == _U(P2MType.RAM_LOGDIRTY))
        recalculate = changeable & (stale | (found & _U(USER) == 0))
        becomes = P2MType.RAM_LOGDIRTY if domain.p2m.global_logdirty else P2MType.RAM_RW
        types = np.where(recalculate, _U(becomes), types)
        gfns = _U(gfn) + (at[is_leaf].astype(np.uint64) << _U(shift))
        yield Leaves(gfns=gfns, entries=found, types=types, pages=1 << shift)
    for index in at[~is_leaf].tolist():
        entry = int(entries[index])
        below = stale or not entry & USER
        yield from _leaves(domain, (entry & ADDRESS) >> 12, shift - 9, gfn + (index << shift), below, tables)


def _check_pool(domain: Domain, tables: set[int]) -> None:
    pool = domain.machine.pool
    used = pool.used - pool.reserved
    shadows = len(domain.shadow.tables.frames)
    _require(
        len(tables) + shadows == used,
        f"the P2M has {len(tables)} tables, the shadows {shadows}, the pool has {used} frames in use",
    )
    _require(pool.used <= pool.allocation, f"{pool.used} frames in use, the allocation is {pool.allocation}")
    bitmap = -(-domain.memory.gfn_limit // (8 << 12)) if domain.paging.enabled else 0
    _require(pool.reserved == bitmap, f"{pool.reserved} frames are accounted to a bitmap of {bitmap}")


def _check_shadow(domain: Domain) -> None:
    """Each shadow entry agrees with the P2M; one that is WRITABLE is so there, is not a guest table, and on record."""
    tables = domain.shadow.tables
    with domain.locks.shadow:
        _require(domain.paging_mode == "shadow" or not tables.frames, "shadow tables in another paging mode")
        for slot, gfn, mfn, rights in tables.leaves():
            found, p2m_type = domain.p2m.lookup(gfn)
            _require(found == mfn, f"gfn {gfn:#x} is mfn {found:#x}, in the shadows mfn {mfn:#x}")
            writable = bool(rights & WRITE)
            _require(not writable or p2m_type in _WRITABLE, f"gfn {gfn:#x}: writable in the shadows only")
            _require(not writable or gfn not in tables.protected, f"gfn {gfn:#x}: a guest table, writable")
            _require(writable == (slot in tables.writable_slots(gfn)), f"gfn {gfn:#x}: CLEAN would not protect it")
        for gfn in tables.protected:
            only, *others = tables.shadows(gfn)
            on_record = domain.shadow.window.only_shadow(gfn)
            _require(on_record == (None if others else only), f"gfn {gfn:#x}: its writes would look at no shadow of it")


def _check_permissions(found: Leaves) -> None:
    stored = found.entries >> _U(TYPE_SHIFT) & _U(TYPE_MASK)
    _require_none(~np.isin(stored, _READABLE), found.gfns, "PRESENT, with a type that has no frame")
    writable = np.isin(stored, _WRITABLE)
    wrong = writable != (found.entries & _U(WRITE) != 0)
    _require_none(wrong, found.gfns, "the WRITE bit contradicts the type")


def _check_reverse_map(domain: Domain, found: Leaves) -> None:
    """RAM is the domain's own and known by its frame. Each 2 MiB is contiguous in both maps: its ends decide."""
    own = ~found.grants
    gfns, mfns = found.gfns[own], found.mfns[own]
    _require_none(mfns % _U(found.pages) != 0, gfns, "a superpage is not aligned")
    for nth in sorted({*range(0, found.pages, 512), *range(511, found.pages, 512)}):
        wrong = domain.machine.m2p.gfns(mfns + _U(nth)) != gfns + _U(nth)
        _require_none(wrong, gfns, "the reverse map disagrees")
        _require_none(domain.machine.owner[mfns + _U(nth)] != FrameOwner.DOMAIN, gfns, "the frame is not the domain's")


def _check_grants(domain: Domain, found: Leaves) -> None:
    gfns, mfns = found.gfns[found.grants], found.mfns[found.grants]
    known = domain.physmap.grants()
    granted = np.array([known.get(gfn, 0) for gfn in gfns.tolist()], np.uint64)
    _require_none(granted != mfns, gfns, "not the page that was granted")
    _require_none(domain.machine.owner[mfns] != FrameOwner.FOREIGN, gfns, "a grant of a page that no other domain owns")
    _require_none(domain.machine.m2p.gfns(mfns) != INVALID_GFN, gfns, "a granted page is in the reverse map")


def _check_inside_ram(domain: Domain, found: Leaves) -> None:
    """What is mapped is RAM to ``memory`` too, from end to end, with nothing removed between."""
    last = found.gfns + _U(found.pages - 1)
    _require_none(~domain.memory.are_ram(found.gfns) | ~domain.memory.are_ram(last), found.gfns, "an entry outside RAM")
    removed = domain.memory.removed()
    inside = np.searchsorted(removed, found.gfns) != np.searchsorted(removed, last)
    _require_none(inside, found.gfns, "a removed frame is mapped")


def _check_accounting(domain: Domain, leaves: list[Leaves]) -> None:
    mapped = sum(int(np.count_nonzero(~found.grants)) * found.pages for found in leaves)
    grants = sum(int(np.count_nonzero(found.grants)) for found in leaves)
    owned = int(np.count_nonzero(domain.machine.owner == FrameOwner.DOMAIN))
    ram = domain.memory.pages - domain.memory.removed().size - grants
    _require(mapped == owned == ram, f"{mapped} pages are mapped, {owned} frames owned, RAM has {ram}")
    known = len(domain.physmap.grants())
    _require(grants == known, f"{grants} grants are mapped, not {known}")


def _check_law_1(domain: Domain, leaves: list[Leaves]) -> None:
    """Under log-dirty each page of RAM is dirty or NOT WRITABLE; otherwise each is WRITABLE."""
    paging = domain.paging
    for found in leaves:
        if not paging.enabled:
            _require_none(found.types == _U(P2MType.RAM_LOGDIRTY), found.gfns, "log-dirty is off, the type remains")
            continue
        granted: GfnArray = found.gfns[np.isin(found.types, _WRITABLE)]
        pages: GfnArray = np.add.outer(granted, np.arange(found.pages, dtype=np.uint64)).reshape(-1)
        _require_none(~paging.are_dirty(pages), pages, "law 1: writable and clean")
        if not paging.stats().failed_allocations:  # else CLEAN refuses anyway
            protected = np.concatenate((paging.journal(), paging.held_writable()))
            _require_none(~np.isin(pages, protected), pages, "writable, but CLEAN would not protect it")


def _check_bitmap(domain: Domain) -> None:
    if domain.paging.enabled:
        held, removed = domain.paging.held_writable(), domain.memory.removed()
        _require_none(~domain.paging.are_dirty(held), held, "law 1: mapped writable by others, and clean")
        _require_none(domain.paging.are_dirty(removed), removed, "dirty, but removed")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise InvariantError(message)


def _require_none(wrong: NDArray[np.bool_], gfns: GfnArray, message: str) -> None:
    if wrong.any():
        raise InvariantError(f"gfn {int(gfns[wrong][0]):#x}: {message} ({int(np.count_nonzero(wrong))} such)")
