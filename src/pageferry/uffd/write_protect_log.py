"""WriteProtectLog: userfaultfd write protection with our own fault handler.

The RFC's nested page fault handler in user space, on the real CPU. A vCPU that writes a protected page sleeps inside
KVM_RUN until our thread has heard of it, marked the page and made it writable.

``_granted`` has the pages that vCPUs may write: exactly those are dirty by a vCPU, and exactly those are protected
again by CLEAN. ``_step`` makes two things one each: marking and granting, on the handler's side; protecting a span and
taking its bits, on CLEAN's. CLEAN lets go of it after every span, so that a vCPU waits for one span at the most.

**Why no write is lost** (laws 1 and 2)::

    vCPU              handler (holds _step)       CLEAN (holds _step)
    writes q: fault,  marks q
    sleeps            makes q writable, wakes
    goes on           lets go
    writes q          .                           protects q's span: flushes every TLB, KVM drops its mappings
    .                 .                           takes q's bit; q is read after CLEAN has returned, with both writes
    writes q: fault   waits for _step             lets go
    sleeps            marks q, grants             q is in the next CLEAN

Were q granted before it is marked, the vCPU could write it and be paused, and the last CLEAN of a migration come and go
before the mark. Were ``_step`` not held, CLEAN could protect q, see it granted again, and then take its bit: q would be
writable and clean, and the next write to it unseen.

Two vCPUs on one page send two messages: read together they count as one fault. The one that comes while the first is
being resolved is woken by its grant and drops out of the kernel's queue. A vCPU that is kicked (paused) while it waits
may leave a message behind: its page is granted and reported without having been written, which costs one page sent.

What a fault costs is two context switches and our thread's turn with the interpreter lock. A thread that computes in
Python without a pause may keep that from it for ``sys.getswitchinterval()``; the engine's threads let go of it in every
call that sends, reads or digests memory.

**When the handler fails** no vCPU may wait for ever: all RAM becomes writable at once, and PEEK and CLEAN refuse until
OFF. A migration fails then; a write is not lost, and the guest runs on.

Source: RFC, "Nested page fault handling"; kernel ``admin-guide/mm/userfaultfd.rst``, "Write Protect Notifications".
"""

import logging
import threading

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import LogDirtyError, UffdError
from pageferry.core.frames import PAGE_SHIFT
from pageferry.uffd.fds import UffdFd
from pageferry.uffd.handler import FaultHandler
from pageferry.uffd.log import UffdLog
from pageferry.uffd.view import VcpuView, spans_of

_log = logging.getLogger(__name__)


class WriteProtectLog(UffdLog):
    """Log-dirty by write protection with a handler of our own; implements :class:`pageferry.core.vm.LogDirty`.

    Args:
        view: RAM as the vCPUs see it.
    """

    def __init__(self, view: VcpuView) -> None:
        super().__init__(view)
        self._step = threading.Lock()  # nothing is taken under it
        self._granted = DirtyBitmap(view.memory.gfn_limit)
        self._faults = 0
        self._failure: Exception | None = None
        self._handler: FaultHandler | None = None

    @property
    def tracker(self) -> str:
        """The tracker's name."""
        return "uffd-wp"

    def _begin(self, uffd: UffdFd) -> None:
        self._granted = DirtyBitmap(self._view.memory.gfn_limit)
        self._faults = 0
        self._failure = None

        def failed(error: Exception) -> None:
            self._fail(uffd, error)

        self._handler = FaultHandler(uffd, lambda faults: self._resolve(uffd, faults), failed)

    def _end(self) -> None:
        if self._handler is not None:
            self._handler.stop()
            self._handler = None

    def _resolve(self, uffd: UffdFd, faults: NDArray[np.void]) -> None:
        """Mark the pages of some faults and make them writable; on the handler's thread."""
        runs: list[range] = []  # at most one fault per vCPU waits: a loop over them is cheaper than arrays
        with self._step:
            for gfn in sorted(set(self._view.gfns(faults["address"]).tolist())):
                self._faults += not self._granted.test_and_set(gfn)
                if runs and runs[-1].stop == gfn:
                    runs[-1] = range(runs[-1].start, gfn + 1)
                else:
                    runs.append(range(gfn, gfn + 1))
            for run in runs:
                uffd.unprotect(self._view.hva(run.start), len(run) << PAGE_SHIFT)

    def _look(self) -> DirtyBitmap:
        with self._step:
            self._expect_sound()
            return self._granted.copy()

    def _take(self, part: range, taken: DirtyBitmap) -> None:
        assert self._uffd is not None
        with self._step:
            spans = list(spans_of(self._granted, part))
        for span in spans:
            where = taken.words_of(span)
            with self._step:
                self._expect_sound()
                self._uffd.protect(self._view.hva(span.start), len(span) << PAGE_SHIFT)
                taken.words[where] |= self._granted.words[where]
                self._granted.words[where] = 0
        self._expect_sound()

    def _fault_count(self) -> int:
        return self._faults

    def _expect_sound(self) -> None:
        if self._failure is not None:
            raise LogDirtyError("the fault handler failed, and pages were written unseen") from self._failure

    def _fail(self, uffd: UffdFd, error: Exception) -> None:
        """Make all RAM writable; on the handler's thread, which ends."""
        _log.error("the fault handler failed: %r", error)
        with self._step:
            self._failure = error
            for hva, size_bytes in self._view.regions():
                try:
                    uffd.unregister(hva, size_bytes)
                except UffdError as refused:
                    _log.error("a region stays protected: %s", refused)
