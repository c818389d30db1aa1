"""This process's page tables, as the kernel tells of them: which pages are there, and which were written.

PAGEMAP_SCAN answers for ranges, and costs as much as there are runs to tell of. Kernels without it have the pagemap,
eight bytes a page, which cannot tell the kernel's page of zeros from a page of one's own.

The first part is transcription only; names are the kernel's.

Source: kernel ``admin-guide/mm/pagemap.rst``; ``include/uapi/linux/fs.h``; PAGEMAP_SCAN(2const).
"""

import ctypes
import errno
import os
from collections.abc import Iterator
from ctypes import c_uint64 as u64
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import runs_of
from pageferry.core.errors import UffdError, UnsupportedError
from pageferry.core.frames import PAGE_SHIFT, GfnArray
from pageferry.core.libc import Fd

PAGEMAP = Path("/proc/self/pagemap")

PAGE_IS_WRITTEN = 1 << 1
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_PFNZERO = 1 << 5
PM_SCAN_WP_MATCHING = 1 << 0
PM_SCAN_CHECK_WPASYNC = 1 << 1
_PM_PRESENT_OR_SWAPPED = 3 << 62


class PmScanArg(ctypes.Structure):
    """``struct pm_scan_arg``; ``start``, ``end``, ``walk_end`` and ``vec`` are user addresses."""

    _fields_ = (
        ("size", u64),
        ("flags", u64),
        ("start", u64),
        ("end", u64),
        ("walk_end", u64),
        ("vec", u64),
        ("vec_len", u64),
        ("max_pages", u64),
        ("category_inverted", u64),
        ("category_mask", u64),
        ("category_anyof_mask", u64),
        ("return_mask", u64),
    )


#: ``struct page_region``, for arrays.
PAGE_REGION = np.dtype([("start", "u8"), ("end", "u8"), ("categories", "u8")])
PAGEMAP_SCAN = 3 << 30 | ctypes.sizeof(PmScanArg) << 16 | ord("f") << 8 | 16
IOCTL_NAMES = {PAGEMAP_SCAN: "PAGEMAP_SCAN"}

#: Regions returned by one PAGEMAP_SCAN (384 KiB); a scan that finds more goes on where it stopped.
_REGIONS = 1 << 14
#: How much of the pagemap is read at once: 8 MiB, of 4 GiB of memory.
_ENTRIES = 1 << 20


class PagemapFd(Fd):
    """This process's pagemap, for PAGEMAP_SCAN.

    Raises:
        UnsupportedError: the kernel has no PAGEMAP_SCAN, or ``/proc`` does not show the pagemap.
    """

    def __init__(self) -> None:
        super().__init__(_open(), UffdError, IOCTL_NAMES)
        self._regions = np.zeros(_REGIONS, PAGE_REGION)
        try:
            self._scan(0, 0, 0)
        except UffdError as error:
            self.close()
            raise UnsupportedError(
                "PAGEMAP_SCAN", "this kernel has no PAGEMAP_SCAN", hint="Linux 6.7 has it; or use --tracker kvm-bitmap"
            ) from error

    def written(self, hva: int, size_bytes: int, *, protect: bool) -> Iterator[NDArray[np.void]]:
        """Yield the parts of a range that were written since they were protected: ``PAGE_REGION[n]``, ascending.

        Each array is valid until the next is asked for.

        Args:
            hva: first byte, registered with a ``userfaultfd`` that has WP_ASYNC.
            size_bytes: multiple of the page size.
            protect: protect each page again in the moment in which it is found written, and flush as
                :meth:`~pageferry.uffd.fds.UffdFd.protect` does.

        Raises:
            UffdError: the kernel refused. With ``protect``, pages may be protected that were not yielded.
        """
        flags = PM_SCAN_CHECK_WPASYNC | (PM_SCAN_WP_MATCHING if protect else 0)
        # Asking for nothing but PAGE_IS_WRITTEN is a promise of its own: with another category in the masks, a page
        # that was written and whose entry was then reclaimed counts as not written in some kernels.
        yield from self._all(hva, size_bytes, flags, category_mask=PAGE_IS_WRITTEN, return_mask=PAGE_IS_WRITTEN)

    def filled(self, hva: int, size_bytes: int) -> Iterator[NDArray[np.void]]:
        """Yield the parts of a range of private memory that have storage, in memory or in swap; arguments as above.

        A page that was only read is not one of them.
        """
        yield from self._all(
            hva,
            size_bytes,
            0,
            category_inverted=PAGE_IS_PFNZERO,
            category_mask=PAGE_IS_PFNZERO,
            category_anyof_mask=PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        )

    def _all(self, hva: int, size_bytes: int, flags: int, **masks: int) -> Iterator[NDArray[np.void]]:
        at, end = hva, hva + size_bytes
        while at < end:
            found, at = self._scan(at, end, flags, **masks)
            if found:
                yield self._regions[:found]

    def _scan(self, start: int, end: int, flags: int, **masks: int) -> tuple[int, int]:
        request = PmScanArg(
            size=ctypes.sizeof(PmScanArg),
            flags=flags,
            start=start,
            end=end,
            vec=self._regions.ctypes.data,
            vec_len=self._regions.size,
            **masks,
        )
        # SAFETY: the kernel writes at most vec_len regions into our array during the call.
        return self.ioctl(PAGEMAP_SCAN, request), request.walk_end


def can_tell() -> bool:
    """Tell whether this process may see its own page tables, without which private memory is of no use to a guest."""
    try:
        os.close(_open())
    except UnsupportedError:
        return False
    return True


def filled_runs(hva: int, size_bytes: int) -> tuple[GfnArray, GfnArray]:
    """Return the runs of pages of a range of private memory that have storage, swapped out or not.

    Args:
        hva: of its first page.
        size_bytes: a multiple of the page size.

    Returns:
        ``(starts, lengths)``, uint64[n] each, in pages from ``hva``; ascending. Before Linux 6.7 pages that were only
        read are among them.

    Raises:
        UnsupportedError: ``/proc`` does not show the pagemap.
        UffdError: the kernel refused.
    """
    try:
        pagemap = PagemapFd()
    except UnsupportedError as error:
        if error.capability != "PAGEMAP_SCAN":
            raise
        return _read_runs(hva, size_bytes)
    with pagemap:
        found = [part.copy() for part in pagemap.filled(hva, size_bytes)]
    regions = np.concatenate(found) if found else np.empty(0, PAGE_REGION)
    joins = regions["start"][1:] == regions["end"][:-1]
    starts = regions["start"][np.concatenate((np.ones(min(regions.size, 1), np.bool_), ~joins))]
    ends = regions["end"][np.concatenate((~joins, np.ones(min(regions.size, 1), np.bool_)))]
    shift = np.uint64(PAGE_SHIFT)
    return (starts - np.uint64(hva)) >> shift, (ends - starts) >> shift


def _read_runs(hva: int, size_bytes: int) -> tuple[GfnArray, GfnArray]:
    """Return the same by the pagemap itself."""
    pages = size_bytes >> PAGE_SHIFT
    filled = np.zeros(pages, np.bool_)
    with Fd(_open(), UffdError, IOCTL_NAMES) as pagemap:
        for at in range(0, pages, _ENTRIES):
            count = min(_ENTRIES, pages - at)
            try:
                data = os.pread(pagemap.fileno(), count * 8, ((hva >> PAGE_SHIFT) + at) * 8)
            except OSError as error:
                raise UffdError("read of the pagemap", error.errno or errno.EIO) from error
            if len(data) != count * 8:
                raise UffdError("read of the pagemap", errno.EIO)
            filled[at : at + count] = np.frombuffer(data, np.uint64) & np.uint64(_PM_PRESENT_OR_SWAPPED) != 0
    return runs_of(np.flatnonzero(filled).astype(np.uint64))


def _open() -> int:
    try:
        return os.open(PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UnsupportedError(
            "pagemap",
            f"{PAGEMAP} cannot be opened: {os.strerror(error.errno or errno.EIO)}",
            hint="mount /proc; or use --hugepages off, and another tracker than pagemap-scan",
        ) from error
