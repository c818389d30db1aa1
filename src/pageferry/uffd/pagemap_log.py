"""PagemapScanLog: asynchronous write protection, read back with PAGEMAP_SCAN.

A write to a protected page traps into the kernel, which removes the protection by itself (UFFD_FEATURE_WP_ASYNC): the
page tables *are* the bitmap, and faults are neither handled here nor counted. PAGEMAP_SCAN returns the pages that are
not protected; with PM_SCAN_WP_MATCHING it protects each in the step that finds it, under the page table's lock.

CLEAN looks first and then protects, in spans around what it saw: a scan that protects makes KVM drop its mappings of
the *whole* span, dirty or not, and the guest would pay for each of them with a fault.

**Why no write is lost** (laws 1 and 2)::

    vCPU                          CLEAN
    .                             look: the spans S
    writes q, not in S            .              q is not protected from now on: the next CLEAN finds it
    writes p, in S, was clean     .              p is not protected from now on
    .                             protect S: under the page table's lock each page that is writable becomes protected
    .                             and is reported, p too; what is read after CLEAN has the write in it
    writes p, reported already    .              p is protected, but this CPU's TLB may not know yet: the bytes land,
    .                             .              p is in this bitmap, and is read after CLEAN has returned
    .                             the scan flushes the TLBs, and KVM's mappings of S are gone; only then it returns
    writes p                      returned       the kernel removes the protection: the next CLEAN finds p

Source: kernel ``admin-guide/mm/pagemap.rst``, "PAGEMAP_SCAN"; ``admin-guide/mm/userfaultfd.rst``, WP_ASYNC.
"""

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import UffdError
from pageferry.core.frames import PAGE_SHIFT
from pageferry.core.pagemap import PagemapFd
from pageferry.uffd import uapi
from pageferry.uffd.fds import UffdFd
from pageferry.uffd.log import UffdLog
from pageferry.uffd.view import VcpuView, spans_of


class PagemapScanLog(UffdLog):
    """Log-dirty by asynchronous write protection; implements :class:`pageferry.core.vm.LogDirty`.

    Args:
        view: RAM as the vCPUs see it.
    """

    features = uapi.UFFD_FEATURE_WP_ASYNC

    def __init__(self, view: VcpuView) -> None:
        super().__init__(view)
        self._pagemap = PagemapFd()

    @property
    def tracker(self) -> str:
        """The tracker's name."""
        return "pagemap-scan"

    def close(self) -> None:
        """Free everything, with the machine."""
        super().close()
        self._pagemap.close()

    def _begin(self, uffd: UffdFd) -> None:
        pass  # the kernel handles faults

    def _end(self) -> None:
        pass

    def _look(self) -> DirtyBitmap:
        bitmap = DirtyBitmap(self._view.memory.gfn_limit)
        for part in self._view.parts(range(bitmap.nbits)):
            self._scan(part, bitmap, protect=False)
        return bitmap

    def _take(self, part: range, taken: DirtyBitmap) -> None:
        seen = DirtyBitmap(taken.nbits)
        self._scan(part, seen, protect=False)
        for span in spans_of(seen, part):
            try:
                self._scan(span, taken, protect=True)
            except UffdError:
                taken.set_range(span.start, len(span))  # any of them may have been protected, unreported
                raise

    def _fault_count(self) -> None:
        return None  # the kernel takes them and does not count

    def _scan(self, part: range, bitmap: DirtyBitmap, *, protect: bool) -> None:
        """Set the bits of the pages in ``part``, frames of one region, that are not protected."""
        for found in self._pagemap.written(self._view.hva(part.start), len(part) << PAGE_SHIFT, protect=protect):
            starts: NDArray[np.uint64] = self._view.gfns(found["start"])
            bitmap.set_runs(starts, self._view.gfns(found["end"]) - starts)
