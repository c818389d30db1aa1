"""Audit: the invariants over P2M, reverse map, pool and bitmap, checked in one pass.

Xen has ``audit_p2m`` for the first; the bitmap is ours. Everything is read as it is, nothing is corrected. Writers that
are not vCPUs may mark meanwhile: they only set bits, which no check here minds.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pageferry.core.frames import PAGES_PER_2M, GfnArray
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.machine import FrameOwner
from pageferry.hypervisor.p2m import ADDRESS, PRESENT, PSE, TYPE_MASK, TYPE_SHIFT, USER, WRITE, P2MType

_U = np.uint64
_WRITABLE = (P2MType.RAM_RW, P2MType.MMIO_DIRECT, P2MType.GRANT_MAP_RW)


class AuditError(AssertionError):
    """An invariant of the hypervisor does not hold: our own bug."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaves:
    """PRESENT leaf entries of one table: ``gfns``, ``entries`` and ``types`` (recalculated), uint64[n] each.

    ``pages`` is what each maps: 1 or 512.
    """

    gfns: GfnArray
    entries: NDArray[np.uint64]
    types: NDArray[np.uint64]
    pages: int

    @property
    def mfns(self) -> GfnArray:
        """The first machine frame of each."""
        return (self.entries & _U(ADDRESS)) >> _U(12)


def check(domain: Domain) -> None:
    """Check a domain; any thread but a vCPU's. Its vCPUs are held meanwhile.

    Raises:
        AuditError: the first invariant that does not hold.
    """
    with domain.locks.domain, domain.run_control.stopped(), domain.locks.p2m:
        tables: set[int] = set()
        leaves = list(_leaves(domain, domain.p2m.root_mfn, 27, 0, False, tables))
        _check_pool(domain, tables)
        _check_shadow(domain)
        for found in leaves:
            _check_permissions(found)
            _check_reverse_map(domain, found)
        _check_accounting(domain, leaves)
        _check_law_1(domain, leaves)


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
        _require(shift in (0, 9), f"a leaf at level {shift // 9 + 1}, gfn {gfn:#x}")
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
    used = domain.machine.pool.used
    shadows = len(domain.shadow.tables.frames)
    _require(
        len(tables) + shadows == used,
        f"the P2M has {len(tables)} tables, the shadows {shadows}, the pool has {used} frames in use",
    )


def _check_shadow(domain: Domain) -> None:
    """Each shadow entry agrees with the P2M; one that is WRITABLE is so there, is no guest table, and on record."""
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


def _check_permissions(found: Leaves) -> None:
    stored = found.entries >> _U(TYPE_SHIFT) & _U(TYPE_MASK)
    writable = np.isin(stored, np.array(_WRITABLE, np.uint64))
    wrong = writable != (found.entries & _U(WRITE) != 0)
    _require_none(wrong, found.gfns, "the WRITE bit contradicts the type")


def _check_reverse_map(domain: Domain, found: Leaves) -> None:
    mfns = found.mfns
    _require_none(mfns % _U(found.pages) != 0, found.gfns, "a superpage is not aligned")
    for nth in (0, found.pages - 1):  # a superpage is contiguous in both maps, so its ends decide
        wrong = domain.machine.m2p.gfns(mfns + _U(nth)) != found.gfns + _U(nth)
        _require_none(wrong, found.gfns, "the reverse map disagrees")
        owner = domain.machine.owner[mfns + _U(nth)]
        _require_none(owner != FrameOwner.DOMAIN, found.gfns, "the frame is not the domain's")
    outside = ~domain.memory.are_ram(found.gfns) | ~domain.memory.are_ram(found.gfns + _U(found.pages - 1))
    _require_none(outside, found.gfns, "a RAM entry outside RAM")


def _check_accounting(domain: Domain, leaves: list[Leaves]) -> None:
    mapped = sum(found.gfns.size * found.pages for found in leaves)
    owned = int(np.count_nonzero(domain.machine.owner == FrameOwner.DOMAIN))
    ram = domain.memory.pages
    _require(mapped == owned == ram, f"{mapped} pages are mapped, {owned} frames owned, RAM has {ram}")


def _check_law_1(domain: Domain, leaves: list[Leaves]) -> None:
    """Under log-dirty each page of RAM is dirty or NOT WRITABLE; otherwise each is WRITABLE."""
    paging = domain.paging
    for found in leaves:
        if not paging.enabled:
            _require_none(found.types == _U(P2MType.RAM_LOGDIRTY), found.gfns, "log-dirty is off, the type remains")
            continue
        granted = found.gfns[found.types == _U(P2MType.RAM_RW)]
        pages = (granted[:, None] + np.arange(found.pages, dtype=np.uint64)).reshape(-1)
        _require_none(~paging.are_dirty(pages), pages, "law 1: writable and clean")
        if found.pages < PAGES_PER_2M:
            _require_none(~np.isin(pages, paging.journal()), pages, "writable, but CLEAN would not protect it")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AuditError(message)


def _require_none(wrong: NDArray[np.bool_], gfns: GfnArray, message: str) -> None:
    if wrong.any():
        raise AuditError(f"gfn {int(gfns[wrong][0]):#x}: {message} ({int(np.count_nonzero(wrong))} such)")
