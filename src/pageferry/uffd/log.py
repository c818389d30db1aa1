"""UffdLog: the base of log-dirty by the host's page tables; a subclass resolves the faults.

While log-dirty is on, all RAM in the vCPUs' view is registered with a userfaultfd and write-protected, pages without
storage included (the kernel then keeps a marker for each: 2 MiB of page tables per GiB of RAM, touched or not; huge
page mappings are split). A subclass says which pages are writable again, and protects those again on CLEAN. Bits of
writers other than vCPUs (``mark``) are in ``_held``.

**Why no thread deadlocks.** Only vCPUs write through the protected mapping, inside an ioctl that has released the
interpreter lock. So the thread that resolves a fault may take that lock, and no Python code ever waits for a page.

**Why no mark is lost** (laws 2 and 4)::

    device                        CLEAN
    writes p (other mapping)      protects the vCPUs' pages, collects their bits
    .                             takes _held     p is not in this bitmap; whether this round reads the old or the new
    mark(p)                       .               bytes, p is in the next one.

    device                        ENABLE
    writes p                      .
    mark(p): off, ignored         .               what ENABLE promises begins when it returns, and the caller reads
    .                             _held is made   every page after that: the write is in them.

Source: RFC, "Log-dirty operations"; kernel ``admin-guide/mm/userfaultfd.rst``, "Write Protect Notifications".
"""

import threading
from abc import ABC, abstractmethod
from typing import ClassVar

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import LogDirtyError, UffdError
from pageferry.core.held_bits import HeldBits, HeldLog
from pageferry.core.vm import LogDirtyStats
from pageferry.uffd.fds import UffdFd
from pageferry.uffd.view import VcpuView


class UffdLog(HeldLog, ABC):
    """Base of the trackers here; implements :class:`pageferry.core.vm.LogDirty`.

    Args:
        view: RAM as the vCPUs see it; KVM's slots point there, and only vCPUs write through it.
    """

    features: ClassVar[int] = 0
    """What the userfaultfd must offer besides write protection of shared memory."""

    def __init__(self, view: VcpuView) -> None:
        self._view = view
        self._operator = threading.Lock()  # one operator at a time; taken before every other lock here
        self._held = HeldBits(view.memory)
        self._uffd: UffdFd | None = None  # changes with the operator lock held; open while log-dirty is on

    @property
    @abstractmethod
    def tracker(self) -> str:
        """The tracker's name."""

    def enable(self) -> None:
        """ENABLE: all bits clear, all RAM NOT WRITABLE, the guest runs on. What it writes meanwhile is dirty.

        Raises:
            LogDirtyError: log-dirty is on already.
            UnsupportedError: userfaultfd was taken away from this process meanwhile; log-dirty is off.
            UffdError: the kernel refused; log-dirty is off.
        """
        with self._operator:
            if self.enabled:
                raise LogDirtyError("log-dirty is on already")
            self._uffd = UffdFd(self.features)
            try:
                for hva, size_bytes in self._view.regions():
                    self._uffd.register(hva, size_bytes)
                self._begin(self._uffd)
                for hva, size_bytes in self._view.regions():
                    self._uffd.protect(hva, size_bytes)
            except BaseException:
                self._release()
                raise
            self._held.begin()

    def off(self) -> None:
        """OFF: all RAM WRITABLE, a vCPU that waits for a page goes on, the bitmap is freed. May be called twice.

        Raises:
            UffdError: the kernel refused for a region; log-dirty is off, that region may go on being slow.
        """
        with self._operator:
            if not self.enabled:
                return
            self._held.end()
            failure = self._release()
            if failure is not None:
                raise failure

    def close(self) -> None:
        """Free everything, with the machine; no vCPU will run again."""
        with self._operator:
            self._held.end()
            self._release()

    def peek(self) -> DirtyBitmap:
        """PEEK: return a copy of the bitmap; nothing else changes.

        Raises:
            LogDirtyError: log-dirty is off, or the bitmap is incomplete.
            UffdError: the kernel refused; no bit was cleared.
        """
        with self._operator:
            return self._peek()

    def _peek(self) -> DirtyBitmap:
        self._held.expect_on()
        bitmap = self._look()
        bitmap |= self._held.copy()
        return bitmap

    def clean(self) -> DirtyBitmap:
        """CLEAN: return the bitmap, clear it, make RAM NOT WRITABLE again; the guest runs on.

        Raises:
            LogDirtyError: log-dirty is off, or the bitmap is incomplete.
            UffdError: the kernel refused; no bit is lost, the next CLEAN has them.
        """
        return self.clean_range(range(self._view.memory.gfn_limit))

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of these frames only.

        Raises:
            LogDirtyError: as :meth:`clean`.
            ValueError: the range does not consist of whole words of the bitmap; no bit was cleared.
            UffdError: as :meth:`clean`.
        """
        with self._operator:
            where = self._held.expect_on().words_of(gfns)
            taken = DirtyBitmap(self._view.memory.gfn_limit)
            try:
                for part in self._view.parts(gfns):
                    self._take(part, taken)
            finally:  # what is protected again is in `taken` alone
                self._held.add(taken, where)
            return self._held.take(gfns)

    def stats(self) -> LogDirtyStats:
        """Return the counters.

        Raises:
            LogDirtyError: log-dirty is off, or the bitmap is incomplete.
        """
        with self._operator:
            return LogDirtyStats(dirty_count=self._peek().count(), fault_count=self._fault_count())

    @abstractmethod
    def _begin(self, uffd: UffdFd) -> None:
        """Get ready for faults: all is registered, nothing protected. On failure ``_end`` is called."""

    @abstractmethod
    def _end(self) -> None:
        """Undo ``_begin``, or what it came to; all is writable again, or about to be."""

    @abstractmethod
    def _look(self) -> DirtyBitmap:
        """Return a new bitmap of the pages that vCPUs have written, and may write."""

    @abstractmethod
    def _take(self, part: range, taken: DirtyBitmap) -> None:
        """Protect again what vCPUs have written in one region's ``part``, and set its bits in ``taken``.

        On failure ``taken`` has every bit that would be lost otherwise.
        """

    @abstractmethod
    def _fault_count(self) -> int | None:
        """Return the write faults since ENABLE, None when they are not counted."""

    def _release(self) -> UffdError | None:
        """Make all writable, wake the vCPUs that wait, close the userfaultfd; return what the kernel refused first."""
        failure: UffdError | None = None
        if self._uffd is not None:
            self._end()
            for hva, size_bytes in self._view.regions():
                try:
                    self._uffd.unregister(hva, size_bytes)
                except UffdError as error:
                    failure = failure or error
            self._uffd.close()
            self._uffd = None
        return failure
