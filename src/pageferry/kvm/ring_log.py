"""KvmRingLog: the RFC's operators over KVM's dirty rings.

KVM write-protects all pages when logging starts, pushes an entry into the vCPU's ring at a write fault and lets the
page be written from then on. We *harvest* the entries into ``_held``, our bitmap, and *reset* them later: KVM protects
their pages again and the ring has room. So each page is in one of four states, and only the first is clean::

    protected, bit clear --fault--> writable, in a ring --harvest--> writable, bit set --reset--> protected, bit set
         ^                                                                                             |
         '------------------------------------- CLEAN takes the bit -----------------------------------'

``_held`` has what was harvested and the bits of writers other than vCPUs (``mark``). (KVM itself writes
guest memory only with a vCPU loaded, in KVM_RUN or a vCPU's ioctl, and pushes into that vCPU's ring. On x86 the
exceptions are the Xen and Hyper-V interfaces, which no machine here turns on; ITS tables, for which there is
KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, are Arm's. KVM_GET_DIRTY_LOG fails on a machine with rings.)

**Who does it, and when.** PEEK and CLEAN harvest. CLEAN resets, if it takes a bit at all. A collector thread harvests
in a period shorter than a ring needs to fill up, and resets when one is half full, so that a vCPU seldom finds its
ring full. One that does (KVM_EXIT_DIRTY_RING_FULL) harvests and resets on its own thread and goes on.

**Law 8.** A reset before its time protects pages that are dirty: they fault once more. A page costs one fault in a
cycle, and one more for each reset that was not a CLEAN of everything: a half full ring (32,768 entries as a rule, 128
MiB written by one vCPU in one cycle), a full one, or the CLEAN of a range. How many faults there were is not known: KVM
also pushes an entry, of a page that may be writable already, each time it writes itself: where it emulates an
instruction, or sets accessed bits in the guest's page tables.

**Locks.** ``_operator`` is held around everything that touches rings. Its holder waits for the kernel, and for the lock
of ``_held``, and for nothing else; above all, never for a vCPU. So a vCPU with a full ring, which waits for it, gets
it, whatever the others do: operators do not pause the guest, and a thread that pauses it holds no lock of ours. The
kernel in turn waits for vCPUs inside KVM_RUN only.

**Why no write is lost** (laws 1, 2 and 4)::

    vCPU                          CLEAN
    writes p: entry               .
    .                             harvest       p's bit is set, then the entry counts as harvested
    writes p again: no fault      .             the bytes land; p's bit is set, its page is read after CLEAN returned
    writes q: entry               .             not harvested, so not reset: q is writable, and in the ring
    .                             reset         p is protected; then every vCPU's TLB is flushed; only then it returns
    writes p: fault, new entry    .             p is in this bitmap and, by that entry, in the next
    .                             take the bits p's bit goes; p is protected or has an entry, as is every page
    writes p: fault, new entry    returned      the next CLEAN has it

A collector's reset protects p with its bit set, and changes no bit. Devices: as in ``bitmap_log.py``.

An entry that names no page of RAM (another address space, a slot or an offset that is not there) stands for a write
that we cannot tell: PEEK and CLEAN are refused from then on, until OFF. A reset that was cut short (:mod:`.dirty_rings`
says by what) leaves pages writable and clean: then logging is turned off and on, which protects all, and all of RAM is
dirty. It happens before the bits are taken, so what is read afterwards is right.

Source: RFC, "Log-dirty operations"; kernel ``api.rst``: KVM_CAP_DIRTY_LOG_RING, KVM_EXIT_DIRTY_RING_FULL.
"""

import logging
import threading
from collections.abc import Callable

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import KvmError, LogDirtyError, VmError
from pageferry.core.held_bits import HeldBits, HeldLog
from pageferry.core.memory import GuestMemory
from pageferry.core.threads import begin
from pageferry.core.vm import LogDirtyStats
from pageferry.kvm import uapi
from pageferry.kvm.dirty_rings import DirtyRings
from pageferry.kvm.fds import VmFd
from pageferry.kvm.slots import MemorySlot

_log = logging.getLogger(__name__)


class _Collector:
    """Calls ``collect`` on a thread of its own once in each period; started when made.

    A failure is logged and ends the thread: the next operator, which harvests by itself, meets it too.

    Args:
        collect: what to do; may be called once more while :meth:`end` returns.
        period_s: the pause between two calls, in seconds.
    """

    def __init__(self, collect: Callable[[], None], period_s: float) -> None:
        self._collect = collect
        self._period_s = period_s
        self._ended = threading.Event()
        self._thread = begin(self._main, "dirty-ring-collector")

    def end(self) -> None:
        """Ask the thread to end; does not wait."""
        self._ended.set()

    def join(self) -> None:
        """Wait until the thread has ended, which was asked for."""
        self._thread.join()

    def _main(self) -> None:
        while not self._ended.wait(self._period_s):
            try:
                self._collect()
            except VmError as error:
                _log.error("the dirty rings are not collected any more: %s", error)
                return


class KvmRingLog(HeldLog):
    """Log-dirty by KVM's dirty rings; implements :class:`pageferry.core.vm.LogDirty`.

    ``full_exits`` counts how often a vCPU found its ring full, since the machine was made.

    Args:
        vm: the machine.
        memory: its RAM.
        slots: the RAM as KVM knows it.
        rings: of its vCPUs; taken over.
    """

    def __init__(self, vm: VmFd, memory: GuestMemory, slots: tuple[MemorySlot, ...], rings: DirtyRings) -> None:
        self.full_exits = 0
        self._vm = vm
        self._memory = memory
        self._slots = slots
        self._rings = rings
        self._operator = threading.Lock()  # around all that touches rings; a mark does not take it
        self._held = HeldBits(memory)
        self._collector: _Collector | None = None
        self._unprotected = False  # a reset was cut short, and logging did not start anew

    @property
    def tracker(self) -> str:
        """The tracker's name."""
        return "kvm-ring"

    def enable(self) -> None:
        """ENABLE: all bits clear, all RAM NOT WRITABLE, the guest runs on.

        Raises:
            LogDirtyError: log-dirty is on already.
            KvmError: the kernel refused; log-dirty is off.
        """
        with self._operator:
            if self.enabled:
                raise LogDirtyError("log-dirty is on already")
            self._harvest()  # what an OFF that failed has left: not of this cycle
            self._reset()
            collector = _Collector(self._collect, self._rings.period_s)
            try:
                self._start_logging()
            except KvmError:
                collector.end()
                self._stop_logging()
                raise
            self._rings.unknown, self._unprotected = "", False
            self._collector = collector
            self._held.begin()

    def _start_logging(self) -> None:
        for slot in self._slots:
            slot.set(self._vm)  # or a slot that is logged already would not be protected again
            slot.set(self._vm, uapi.KVM_MEM_LOG_DIRTY_PAGES)

    def _stop_logging(self) -> None:
        """Make all RAM writable and empty the rings, as far as the kernel lets us; raise what it refused first."""
        failure: KvmError | None = None
        for slot in self._slots:
            try:
                slot.set(self._vm)
            except KvmError as error:
                failure = failure or error
        self._harvest()
        self._reset()
        if failure is not None:
            raise failure

    def off(self) -> None:
        """OFF: all RAM WRITABLE, the bitmap freed, the rings emptied. Does nothing when it is off already.

        Raises:
            VmError: the kernel refused for a slot; log-dirty is off, that slot may go on being slow.
        """
        collector = None
        try:
            with self._operator:
                if self.enabled:
                    collector = self._forget()
                    self._stop_logging()
        finally:
            if collector is not None:
                collector.join()  # without the lock, for which it may be waiting

    def _forget(self) -> _Collector | None:
        self._held.end()
        collector, self._collector = self._collector, None
        if collector is not None:
            collector.end()
        return collector

    def close(self) -> None:
        """End the collector and unmap the rings; log-dirty is off, and no vCPU will run again."""
        with self._operator:
            collector = self._forget()
            self._rings.close()
        if collector is not None:
            collector.join()

    def peek(self) -> DirtyBitmap:
        """PEEK: return a copy of the bitmap; nothing else changes.

        Raises:
            LogDirtyError: log-dirty is off, or a write is not known.
        """
        with self._operator:
            self._held.expect_on()
            self._harvest()
            self._expect_all_known()
            return self._held.copy()

    def clean(self) -> DirtyBitmap:
        """CLEAN: return the bitmap, clear it, make RAM NOT WRITABLE again; the guest runs on.

        Raises:
            LogDirtyError: log-dirty is off, or a write is not known.
            VmError: the kernel refused; no bit is lost, the next CLEAN has them.
        """
        return self.clean_range(range(self._memory.gfn_limit))

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of these frames only. Dirty pages beside them may become NOT WRITABLE too: their bits stay.

        Raises:
            LogDirtyError: log-dirty is off, or a write is not known.
            ValueError: the range does not consist of whole words of the bitmap; no bit was cleared.
            VmError: the kernel refused; no bit is lost, the next CLEAN has them.
        """
        with self._operator:
            where = self._held.expect_on().words_of(gfns)
            self._harvest()
            self._expect_all_known()
            dirty = self._held.expect_on().words[where].any()
            if dirty:  # else no page of the range is writable: a harvested one has its bit set until it is reset
                self._reset()
            return self._held.take(gfns)

    def stats(self) -> LogDirtyStats:
        """Return the counters. ``fault_count`` is not known: see the module.

        Raises:
            LogDirtyError: log-dirty is off.
        """
        with self._operator:
            self._held.expect_on()
            self._harvest()
            return LogDirtyStats(fault_count=None, dirty_count=self._held.copy().count())

    def on_ring_full(self) -> None:
        """Make room; on the thread of the vCPU whose ring is full, which cannot run on if this raises a VmError."""
        with self._operator:
            self.full_exits += 1
            self._harvest()
            self._reset()

    def _collect(self) -> None:
        """Harvest, and make room where a ring is half full; on the collector's thread."""
        with self._operator:
            if not self.enabled:
                return
            self._harvest()
            if self._rings.half_full:
                self._reset()

    def _expect_all_known(self) -> None:
        hint = "turn log-dirty off, and start anew with all of memory"
        if self._rings.unknown:
            raise LogDirtyError(self._rings.unknown, hint=hint)
        if self._unprotected:
            raise LogDirtyError("after a reset that was cut short the kernel refused to log anew", hint=hint)

    def _harvest(self) -> None:
        """Take the new entries into the bitmap; while log-dirty is off, drop them. _operator is held."""
        self._rings.harvest(self._held.set)

    def _reset(self) -> None:
        """Let KVM protect again what is harvested; no bit is cleared. _operator is held."""
        if self._rings.reset() or not self.enabled:
            return
        _log.warning("a reset of the dirty rings was cut short: all of RAM counts as dirty")
        self._unprotected = True
        self._start_logging()
        self._unprotected = False
        self._held.add(self._memory.all_ram())
