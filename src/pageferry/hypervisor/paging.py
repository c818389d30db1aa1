"""The four operators and ``paging_mark_dirty``: log-dirty as seen by everyone else.

Common to all paging modes: the bitmap, its lock, the state of the mode bit, the stopping of the domain. What differs
by mode is in a :class:`LogDirtyOps`, one per *domain*. That is the RFC's first "special attention": it wanted a
function pointer where Xen had one only per vCPU.

A cycle, from one ``clean()`` to the next::

    vCPU thread                                   anyone
    -----------                                   ------
    write -> nested page fault (type LOGDIRTY)
      P2M lock { LOG_DIRTY lock { set bit }       clean():
                 journal gfn; type := RW }          DOMAIN lock, every vCPU stopped {
    retry, write                                      P2M lock { LOG_DIRTY lock { swap the bitmap }
    ... further writes: no fault                                 journal's gfns := LOGDIRTY }
                                                      every TLB to be flushed before its vCPU enters }

Marking and granting are one step with respect to ``clean()`` (law 1), because both hold the P2M lock. The *journal*
lists the frames that became writable in this cycle: exactly those CLEAN must take the right from again, so CLEAN
costs what is dirty, never what is configured. (The RFC goes through the whole table each time.)

Frames that another program has mapped writable (:meth:`Paging.hold_writable`) cannot fault: their bits are set in every
cycle from its beginning, so a CLEAN always reports them, the last one too.

The bitmap is accounted to the domain's paging pool, whole, at ENABLE. Table frames are taken as pages are told apart;
when there is none, the whole superpage becomes dirty and writable, the failure is counted, and PEEK and CLEAN refuse:
pages can no longer be told apart, but no write is lost silently.

Source: RFC design 1 and "paging_mark_dirty()"; Xen ``paging.c``, ``struct log_dirty_ops``.
"""

from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import LogDirtyError, LogDirtyMemoryError, P2MError
from pageferry.core.frames import PAGE_SIZE, GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import LogDirtyStats
from pageferry.hypervisor.locks import DomainLocks
from pageferry.hypervisor.machine_memory import PagingPool
from pageferry.hypervisor.p2m import P2M
from pageferry.hypervisor.p2m_types import P2MType

#: What a domain can run under; also the names of its trackers. The first is the default.
PAGING_MODES = ("hap", "shadow")
_LOGDIRTY = P2MType.RAM_LOGDIRTY.value


class Tlb:
    """One vCPU's TLB, as other threads see it.

    ``flushes`` counts the flushes that are done; ``flush_wanted`` is cleared by the vCPU when it begins one. The same
    for ``protected``, pages by machine address: a flush is wanted because they may not be written any more, and all
    else that the vCPU remembers is as true as before.

    ``holds_code``: the vCPU may hold code translated from guest memory. Then ``written`` collects the frames (uint64[n]
    each) that a writer other than a vCPU has written, and ``hurry`` has the vCPU look at them soon.
    """

    __slots__ = ("flush_wanted", "flushes", "holds_code", "hurry", "protected", "written")

    def __init__(self) -> None:
        self.flush_wanted = False
        self.flushes = 0
        self.protected: deque[int] = deque()
        self.holds_code = False
        self.written: deque[GfnArray] = deque()
        self.hurry: Callable[[], None] = lambda: None

    def request_flush(self) -> None:
        """Have the vCPU flush it, on its own thread, before it enters the guest again or begins its next slice."""
        self.flush_wanted = True

    def request_protection(self, maddrs: Iterable[int]) -> None:
        """As :meth:`request_flush`, only that these pages may not be written through it any more; any thread."""
        self.protected.extend(maddrs)

    def note_written(self, gfns: GfnArray) -> None:
        """Tell the vCPU that frames were written behind its back; any thread, after the write."""
        if self.holds_code:
            self.written.append(gfns)
            self.hurry()


@dataclass(frozen=True, slots=True, kw_only=True)
class LogDirtyOps:
    """What a paging mode does for log-dirty; called with the domain stopped and the P2M lock held.

    ``enable``: make all RAM NOT WRITABLE. ``disable``: make all RAM WRITABLE. ``clean``: make NOT WRITABLE again the
    frames (uint64[n]) that became writable in the cycle that ends. The caller flushes the TLBs afterwards.

    ``written`` is for a mode that keeps copies of guest memory: a writer other than a vCPU has written these frames.
    Called whether log-dirty is on or not, by any thread that may take the SHADOW lock.
    """

    enable: Callable[[], None]
    disable: Callable[[], None]
    clean: Callable[[GfnArray], None]
    written: Callable[[GfnArray], None] = lambda _gfns: None


def hap_log_dirty_ops(p2m: P2M) -> LogDirtyOps:
    """Return the operations under hardware-assisted paging: the P2M is all that is between a write and memory.

    Source: RFC design 1, the last step of each operator; Xen's ``hap_enable_log_dirty``, ``hap_disable_log_dirty`` and
    ``hap_clean_dirty_bitmap``.
    """

    def enable() -> None:
        p2m.change_entry_type_global(logdirty=True)

    def disable() -> None:
        p2m.change_entry_type_global(logdirty=False)

    def clean(written: GfnArray) -> None:
        p2m.change_types(written, P2MType.RAM_RW, P2MType.RAM_LOGDIRTY)

    return LogDirtyOps(enable=enable, disable=disable, clean=clean)


class Paging:
    """Log-dirty of one domain; implements :class:`pageferry.core.vm.LogDirty`.

    Args:
        tracker: the name of the paging mode.
        ops: that mode's operations.
        p2m: the domain's P2M.
        pool: the domain's paging pool.
        memory: tells which frames are RAM.
        locks: the domain's.
        hold: a context in which every vCPU is outside the guest.
        tlbs: the vCPUs'; a flush is requested while they are held.
    """

    def __init__(
        self,
        *,
        tracker: str,
        ops: LogDirtyOps,
        p2m: P2M,
        pool: PagingPool,
        memory: GuestMemory,
        locks: DomainLocks,
        hold: Callable[[], AbstractContextManager[None]],
        tlbs: Sequence[Tlb],
    ) -> None:
        self._tracker = tracker
        self._ops = ops
        self._p2m = p2m
        self._pool = pool
        self._memory = memory
        self._locks = locks
        self._hold = hold
        self._tlbs = tuple(tlbs)
        self._bitmap: DirtyBitmap | None = None
        self._words: memoryview = memoryview(b"")
        self._journal = array("Q")
        self._fault_count = 0
        self._failed_allocations = 0
        self._held_writable: Counter[int] = Counter()
        self._bitmap_frames = -(-memory.gfn_limit // (8 * PAGE_SIZE))

    @property
    def tracker(self) -> str:
        """The name of the paging mode: ``hap`` or ``shadow``."""
        return self._tracker

    def set_mode(self, tracker: str, ops: LogDirtyOps) -> None:
        """Dispatch to another mode's operations; the domain is stopped and the P2M lock held.

        Raises:
            LogDirtyError: log-dirty is on; nothing changed.
        """
        assert self._locks.p2m.mine
        if self._bitmap is not None:
            raise LogDirtyError("the paging mode cannot change while log-dirty is on", hint="turn it off first")
        self._tracker, self._ops = tracker, ops

    @property
    def enabled(self) -> bool:
        """Whether the log-dirty bit of the paging mode is set."""
        return self._bitmap is not None

    def enable(self) -> None:
        """ENABLE: allocate the bitmap, set the mode bit, make all RAM NOT WRITABLE; the guest runs on.

        Raises:
            LogDirtyError: log-dirty is on already; nothing changed.
            LogDirtyMemoryError: the paging pool has no room for the bitmap; nothing changed.
        """
        with self._locks.domain, self._hold(), self._locks.p2m:
            if self._bitmap is not None:
                raise LogDirtyError("log-dirty is on already", hint="turn it off first")
            if not self._pool.reserve(self._bitmap_frames):
                raise LogDirtyMemoryError(
                    f"the paging pool has no {self._bitmap_frames} frames for the dirty bitmap",
                    hint="give the domain a larger paging pool",
                )
            with self._locks.log_dirty:
                self._fault_count = 0
                self._failed_allocations = 0
                self._bitmap = DirtyBitmap(self._memory.gfn_limit)
                self._bitmap.set(list(self._held_writable))
                self._words = memoryview(self._bitmap.words)  # type: ignore[arg-type]  # a numpy array is a buffer
            self._ops.enable()
            self.flush_tlbs()

    def peek(self) -> DirtyBitmap:
        """PEEK: return a copy of the bitmap; nothing else changes.

        Raises:
            LogDirtyError: log-dirty is off.
            LogDirtyMemoryError: pages could not be told apart for want of table memory; until OFF.
        """
        with self._locks.domain, self._hold(), self._locks.log_dirty:
            return self._complete().copy()

    def clean(self) -> DirtyBitmap:
        """CLEAN: return the bitmap, clear it, make RAM NOT WRITABLE again; the guest runs on.

        Raises:
            LogDirtyError: as :meth:`peek`; then no bit was cleared.
        """
        return self.clean_range(range(self._memory.gfn_limit))

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of these frames only: the cycle of all others goes on.

        Raises:
            LogDirtyError: as :meth:`peek`; then no bit was cleared.
            ValueError: the range does not consist of whole words of the bitmap; no bit was cleared.
        """
        with self._locks.domain, self._hold(), self._locks.p2m:
            with self._locks.log_dirty:
                dirty, written = self._end_cycle(gfns)
            self._ops.clean(written)
            self.flush_tlbs()
            return dirty

    def off(self) -> None:
        """OFF: make all RAM WRITABLE, clear the mode bit, free the bitmap. Does nothing when it is off already."""
        with self._locks.domain, self._hold(), self._locks.p2m:
            if self._bitmap is None:
                return
            self._ops.disable()
            self._p2m.join()
            self._pool.unreserve(self._bitmap_frames)
            with self._locks.log_dirty:
                self._bitmap = None
                self._words = memoryview(b"")
                self._journal = array("Q")
            self.flush_tlbs()

    def mark(self, gfns: GfnArray) -> None:
        """Mark frames dirty, *after* writing them by other means than a vCPU (``paging_mark_dirty``).

        Frames that are not RAM are ignored; nothing happens while log-dirty is off. The frames stay NOT WRITABLE for
        vCPUs: their first write faults as usual.
        """
        self._ops.written(gfns)
        for tlb in self._tlbs:
            tlb.note_written(gfns)
        if self._bitmap is None:  # a mark that races with ENABLE came before it: everything is sent first then
            return
        with self._locks.log_dirty:
            if self._bitmap is not None:
                self._bitmap.set(gfns[self._memory.are_ram(gfns)])

    def frames_removed(self, gfns: GfnArray) -> None:
        """Take note that frames are not RAM any more: they are never dirty; ``memory.removed()`` tells of them.

        Called with the domain stopped and the P2M lock held, after the P2M was changed.
        """
        with self._locks.log_dirty:
            self._memory.remove(gfns)
            if self._bitmap is not None:
                self._bitmap.clear(gfns)

    def hold_writable(self, gfns: GfnArray) -> None:
        """Have frames reported by every CLEAN and PEEK from now on: another program can write them without a fault.

        May be said several times of a frame; each is undone by one :meth:`let_go`.

        Source: Xen ``XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL``, which reports them in the last round only.
        """
        with self._locks.log_dirty:
            self._held_writable.update(gfns.tolist())
            if self._bitmap is not None:
                self._bitmap.set(gfns)

    def let_go(self, gfns: GfnArray) -> None:
        """Undo one :meth:`hold_writable`; the frames stay dirty in this cycle."""
        with self._locks.log_dirty:
            self._held_writable -= Counter(gfns.tolist())

    def held_writable(self) -> GfnArray:
        """Return the frames that others can write without a fault, ascending."""
        with self._locks.log_dirty:
            return np.array(sorted(self._held_writable), np.uint64)

    def fix_and_mark(self, gfn: int) -> None:
        """Handle a write fault on a log-dirty page: set its bit and make it WRITABLE, as one step.

        Does nothing when the page is not log-dirty any more (another vCPU was first, and its fault counted): between
        two CLEANs a page is counted once, however many vCPUs write it at a time (law 8).

        Source: RFC, ``p2m_fix_table()`` and ``paging_mark_dirty()``.
        """
        p2m = self._p2m
        with self._locks.p2m:
            at, shift = p2m.find(gfn)
            if p2m.type_at(at) != _LOGDIRTY:
                return
            with self._locks.log_dirty:
                self._fault_count += 1
                self._words[gfn >> 6] |= 1 << (gfn & 63)
            try:
                p2m.change_found(gfn, at, shift, P2MType.RAM_RW)
            except P2MError:
                self._fix_whole_superpage(gfn)
            else:
                self._journal.append(gfn)

    def _fix_whole_superpage(self, gfn: int) -> None:
        # No frame to split with: all 512 pages become dirty and writable, so nothing is lost; but they can no longer
        # be told apart, and PEEK and CLEAN refuse until OFF. Between the two steps no CLEAN can come: P2M lock.
        first, pages = self._p2m.change_superpage_type(gfn, P2MType.RAM_RW)
        with self._locks.log_dirty:
            self._failed_allocations += 1
            if self._bitmap is not None:
                self._bitmap.set_range(first, pages)

    def stats(self) -> LogDirtyStats:
        """Return the counters since ``enable()``.

        Raises:
            LogDirtyError: log-dirty is off.
        """
        with self._locks.log_dirty:
            return LogDirtyStats(
                fault_count=self._fault_count,
                dirty_count=self._on().count(),
                failed_allocations=self._failed_allocations,
            )

    def are_dirty(self, gfns: GfnArray) -> NDArray[np.bool_]:
        """Tell for each of ``gfns`` whether its bit is set, as bool[n]; disturbs nothing, not even vCPUs.

        Raises:
            LogDirtyError: log-dirty is off.
        """
        with self._locks.log_dirty:
            return self._on().test_many(gfns)

    def journal(self) -> GfnArray:
        """Return a copy of the frames made writable in this cycle (for the audit)."""
        return np.array(self._journal, np.uint64)

    def flush_tlbs(self) -> None:
        """Request a flush of every TLB; no vCPU is inside the guest, so none enters with a stale translation."""
        for tlb in self._tlbs:
            tlb.request_flush()

    def _on(self) -> DirtyBitmap:
        if self._bitmap is None:
            raise LogDirtyError("log-dirty is off", hint="enable it first")
        return self._bitmap

    def _complete(self) -> DirtyBitmap:
        bitmap = self._on()
        if self._failed_allocations:
            raise LogDirtyMemoryError(
                f"the dirty bitmap is incomplete: {self._failed_allocations} allocations failed",
                hint="give the domain a larger paging pool",
            )
        return bitmap

    def _end_cycle(self, gfns: range) -> tuple[DirtyBitmap, GfnArray]:
        """Take the bits of a range, and the frames there that became writable; a new cycle begins for it."""
        bitmap = self._complete()
        dirty = bitmap.take(gfns)
        journal = np.frombuffer(self._journal, np.uint64) if self._journal else np.empty(0, np.uint64)
        ended = (journal >= gfns.start) & (journal < gfns.stop)
        self._journal = array("Q", journal[~ended].tobytes())
        bitmap.set([gfn for gfn in self._held_writable if gfn in gfns])
        return dirty, journal[ended]
