"""Changing what the guest's physical memory is made of: ballooning, moved pages, foreign and grant mappings.

The names are those of Xen's memory operations. Each change is made with the domain stopped and in one order: P2M,
reverse map and ownership, the guest's face of memory, the dirty bitmap, TLBs. What log-dirty makes of it (Xen once
forgot pages that were added during a migration):

* a page that is *added* or *moved* in is dirty at once, and NOT WRITABLE until its first write is logged, as all RAM;
* a page that is *removed* is not RAM any more: it is never dirty again, and ``memory.removed()`` tells of it;
* a frame that another program can write without a nested fault (a writable foreign mapping; a grant, which its owner
  may write at any time) is dirty in every cycle, from its beginning, as long as that lasts.

Source: Xen ``common/memory.c`` and ``p2m.c``; FACTS on ballooning and Xen's LOGDIRTY_FINAL; the RFC's change to
``grant_table.h``.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from pageferry.core.bitmap import runs_of
from pageferry.core.errors import VmError
from pageferry.core.frames import PAGE_SHIFT, GfnArray, Mfn
from pageferry.core.memory import GuestMemory
from pageferry.hypervisor.locks import DomainLocks
from pageferry.hypervisor.machine_memory import INVALID_GFN, FrameOwner, MachineMemory
from pageferry.hypervisor.p2m import P2M
from pageferry.hypervisor.p2m_types import GRANT_TYPES, P2MType
from pageferry.hypervisor.paging import Paging
from pageferry.hypervisor.shadow import ShadowPaging


class ForeignMapping:
    """Guest frames mapped by another program (a device model, a toolstack); use as a context, or :meth:`unmap` it.

    ``view`` is a view of the frames, read-only if the mapping is; it is dead after ``unmap``. While a writable mapping
    exists its frames are dirty in every cycle.
    """

    def __init__(self, physmap: "PhysMap", gfns: GfnArray, view: memoryview, *, writable: bool) -> None:
        self.gfns = gfns
        self.writable = writable
        self.view = view if writable else view.toreadonly()
        self._physmap = physmap

    def unmap(self) -> None:
        """End the mapping; of a writable one the frames are dirty in this cycle. Nothing happens the second time."""
        self.view.release()
        self._physmap.unmap_foreign(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.unmap()


class PhysMap:
    """The operations on one domain's physical memory; any thread but a vCPU's.

    Args:
        machine: machine memory.
        p2m: the domain's P2M.
        shadow: the domain's shadow paging.
        paging: the domain's log-dirty.
        memory: the guest's face of memory.
        locks: the domain's.
        hold: a context in which every vCPU is outside the guest.
    """

    def __init__(
        self,
        *,
        machine: MachineMemory,
        p2m: P2M,
        shadow: ShadowPaging,
        paging: Paging,
        memory: GuestMemory,
        locks: DomainLocks,
        hold: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._machine = machine
        self._p2m = p2m
        self._shadow = shadow
        self._paging = paging
        self._memory = memory
        self._locks = locks
        self._hold = hold
        self._foreign: list[ForeignMapping] = []
        self._grants: dict[int, Mfn] = {}

    # --- ballooning ---

    def decrease_reservation(self, gfns: ArrayLike) -> None:
        """Take RAM away from the guest, which has given it up: an access is its end, the content is gone.

        Args:
            gfns: frames of RAM, distinct, any order; no grants, and without foreign mappings.

        Raises:
            VmError: a frame is not such; nothing changed.
            P2MError: the paging pool has no frame to split a superpage; nothing changed.

        Source: Xen ``XENMEM_decrease_reservation``.
        """
        with self._changing():
            self._take_away(self._own_ram(gfns))

    def populate_physmap(self, gfns: ArrayLike) -> None:
        """Give the guest zeroed RAM where there was some before: frames of ``memory.removed()``; they are dirty.

        Raises:
            VmError: a frame was not removed, or machine memory has too few; nothing changed.
            P2MError: as for :meth:`decrease_reservation`.

        Source: Xen ``XENMEM_populate_physmap``.
        """
        with self._changing():
            wanted = self._holes(gfns)
            self._p2m.prepare(wanted)
            self._put(wanted, self._machine.allocate_frames(wanted.size), self._ram_type())

    def add_to_physmap(self, source_gfn: int, target_gfn: int) -> None:
        """Move a page of RAM to another frame, where it is dirty; its old frame is removed, as is RAM at the target.

        Raises:
            VmError: the source is not RAM of the domain's own, or the target neither that nor removed; nothing changed.
            P2MError: as for :meth:`decrease_reservation`.

        Source: Xen ``XENMEM_add_to_physmap`` with a gmfn.
        """
        with self._changing():
            source = self._own_ram(source_gfn)
            if source_gfn == target_gfn:
                return
            occupied = bool(self._memory.are_ram(np.array([target_gfn], np.uint64))[0])
            target = self._own_ram(target_gfn) if occupied else self._holes(target_gfn)
            self._p2m.prepare(np.concatenate((source, target)))
            if occupied:
                self._take_away(target)
            read_only = self._p2m.lookup(source_gfn)[1] == P2MType.RAM_RO
            self._put(target, self._unmap(source), P2MType.RAM_RO if read_only else self._ram_type())

    # --- foreign mappings ---

    def map_foreign(self, gfn: int, count: int, *, writable: bool) -> ForeignMapping:
        """Map guest frames for a program other than the guest; they cannot be ballooned out meanwhile.

        Raises:
            VmError: a frame is not RAM.

        Source: Xen ``map_domain_gfn`` and foreign mappings of a toolstack.
        """
        gfns = np.arange(gfn, gfn + count, dtype=np.uint64)
        with self._locks.domain:
            view = self._memory.views(gfns[:1], np.array([count], np.uint64))[0]
            mapping = ForeignMapping(self, gfns, view, writable=writable)
            self._foreign.append(mapping)
            if writable:
                self._paging.hold_writable(gfns)
        return mapping

    def unmap_foreign(self, mapping: ForeignMapping) -> None:
        """End a mapping; see :meth:`ForeignMapping.unmap`."""
        with self._locks.domain:
            if mapping in self._foreign:
                self._foreign.remove(mapping)
                if mapping.writable:
                    self._paging.mark(mapping.gfns)
                    self._paging.let_go(mapping.gfns)

    # --- grants ---

    def map_grant(self, gfn: int, mfn: Mfn, *, writable: bool) -> None:
        """Let a removed frame of the guest be another owner's page, which that owner has granted.

        Raises:
            VmError: the frame was not removed, or the page has no other owner; nothing changed.
            P2MError: as for :meth:`decrease_reservation`.

        Source: Xen ``GNTTABOP_map_grant_ref`` under HAP; ``p2m_grant_map_rw`` and ``p2m_grant_map_ro``.
        """
        with self._changing():
            where = self._holes(gfn)
            if self._machine.owner[mfn] != FrameOwner.FOREIGN:
                raise VmError(f"mfn {mfn:#x} is not another domain's page")
            self._put(where, np.array([mfn], np.uint64), P2MType.GRANT_MAP_RW if writable else P2MType.GRANT_MAP_RO)
            self._grants[gfn] = mfn
            self._paging.hold_writable(where)

    def unmap_grant(self, gfn: int) -> None:
        """Give a granted page back; the frame is removed again.

        Raises:
            VmError: no grant is mapped there, or it has a foreign mapping; nothing changed.
        """
        with self._changing():
            if gfn not in self._grants:
                raise VmError(f"gfn {gfn:#x} is not a grant mapping")
            where = np.array([gfn], np.uint64)
            self._refuse_mapped(where)
            self._paging.let_go(where)
            self._unmap(where)
            del self._grants[gfn]

    def grants(self) -> dict[int, Mfn]:
        """Return gfn -> mfn of every grant mapping."""
        return dict(self._grants)

    def populated(self) -> tuple[GfnArray, GfnArray]:
        """Return the runs of gfns with storage, grants among them; see ``GuestMemory.populated``."""
        starts, lengths = self._machine.populated()
        if not self._grants:
            return starts, lengths
        grants = np.array(sorted(self._grants), np.uint64)
        starts, lengths = np.concatenate((starts, grants)), np.concatenate((lengths, np.ones_like(grants)))
        order = np.argsort(starts)
        return starts[order], lengths[order]

    # --- what they are made of ---

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._locks.domain, self._hold(), self._locks.p2m:
            yield
            self._shadow.blow()
            self._paging.flush_tlbs()

    def _own_ram(self, gfns: ArrayLike) -> GfnArray:
        """Return ``gfns`` ascending, all of them RAM of the domain's own, without foreign mappings."""
        wanted = self._distinct(gfns)
        wrong = ~self._memory.are_ram(wanted)
        wrong |= np.isin(wanted, np.array(list(self._grants), np.uint64))
        if wrong.any():
            raise VmError(f"gfn {int(wanted[wrong][0]):#x} is not RAM of the domain's own")
        self._refuse_mapped(wanted)
        return wanted

    def _refuse_mapped(self, gfns: GfnArray) -> None:
        for mapping in self._foreign:
            if (both := np.intersect1d(gfns, mapping.gfns)).size:
                raise VmError(f"gfn {int(both[0]):#x} has a foreign mapping", hint="unmap it first")

    def _holes(self, gfns: ArrayLike) -> GfnArray:
        """Return ``gfns`` ascending, all of them removed."""
        wanted = self._distinct(gfns)
        wrong = ~np.isin(wanted, self._memory.removed())
        if wrong.any():
            raise VmError(f"gfn {int(wanted[wrong][0]):#x} was not removed")
        return wanted

    def _distinct(self, gfns: ArrayLike) -> GfnArray:
        given = np.atleast_1d(np.asarray(gfns, np.uint64))
        wanted = np.unique(given)
        if wanted.size != given.size:
            raise VmError("a frame is named twice")
        return wanted

    def _ram_type(self) -> P2MType:
        return P2MType.RAM_LOGDIRTY if self._p2m.global_logdirty else P2MType.RAM_RW

    def _take_away(self, gfns: GfnArray) -> None:
        self._machine.free_frames(self._unmap(gfns))

    def _unmap(self, gfns: GfnArray) -> GfnArray:
        """Leave holes at ``gfns``; return the frames that were there, which are still owned."""
        mfns = np.array([self._p2m.lookup(gfn)[0] for gfn in gfns.tolist()], np.uint64)
        self._p2m.set_pages(gfns, 0, P2MType.INVALID)
        self._machine.m2p.set_pages(mfns, np.full_like(mfns, INVALID_GFN))
        self._paging.frames_removed(gfns)
        for start, count in zip(*(part.tolist() for part in runs_of(gfns)), strict=True):
            self._memory.mapping.map_private(start << PAGE_SHIFT, count << PAGE_SHIFT)
        return mfns

    def _put(self, gfns: GfnArray, mfns: GfnArray, p2m_type: P2MType) -> None:
        """Let the holes at ``gfns`` be ``mfns``, and dirty."""
        self._p2m.set_pages(gfns, mfns, p2m_type)
        if p2m_type not in GRANT_TYPES:
            self._machine.m2p.set_pages(mfns, gfns)
        at = 0
        while at < gfns.size:
            same = np.flatnonzero(np.diff(gfns[at:] - mfns[at:]))
            count = int(same[0]) + 1 if same.size else gfns.size - at
            count = int(runs_of(gfns[at : at + count])[1][0])
            gpa, maddr = int(gfns[at]) << PAGE_SHIFT, int(mfns[at]) << PAGE_SHIFT
            self._memory.mapping.map_fd(self._machine.memfd, maddr, gpa, count << PAGE_SHIFT)
            at += count
        self._memory.restore(gfns)
        self._paging.mark(gfns)
