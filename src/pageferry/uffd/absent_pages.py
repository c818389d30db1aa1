"""UffdAbsentPages: frames that are absent until they are touched, for guests whose vCPUs are KVM's.

A vCPU that touches a page without storage waits in the kernel until our handler has brought the page. Python code must
not wait so: it would hold the interpreter lock that the handler needs. It goes through
:class:`~pageferry.core.memory.GuestMemory`, which asks for the page before it touches it.

Source: kernel ``admin-guide/mm/userfaultfd.rst``, UFFDIO_REGISTER_MODE_MISSING and UFFDIO_COPY.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap, runs_of
from pageferry.core.errors import UnsupportedError
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE, GfnArray
from pageferry.core.hostmem import HostMapping
from pageferry.core.memory import GuestMemory
from pageferry.uffd import uapi
from pageferry.uffd.fds import UffdFd
from pageferry.uffd.handler import FaultHandler

_log = logging.getLogger(__name__)
_HINT = "let all memory come before the guest runs: no --lazy, no --policy postcopy"


class UffdAbsentPages:
    """The absent frames of a guest; implements :class:`pageferry.core.vm.AbsentPages`.

    Args:
        memory: the guest's; no other thread touches it during the call.
        mappings: every mapping of it that is touched, ``memory.mapping`` first.
        fetch: brings frames by :meth:`install`, on the handler's thread; a failure is for it to keep.
        absent: frames that lose their storage; all without storage wait to be installed.

    Raises:
        UnsupportedError: this process may not have a userfaultfd that can, or memory of this kind cannot be missing.
        UffdError: the kernel refused for another reason.
    """

    def __init__(
        self,
        memory: GuestMemory,
        mappings: Sequence[HostMapping],
        fetch: Callable[[GfnArray], None],
        absent: DirtyBitmap,
    ) -> None:
        if memory.reserved:
            raise UnsupportedError("lazy-hugetlb", "pages of a hugetlb pool cannot come one by one", hint=_HINT)
        self._memory = memory
        self._mappings = tuple(dict.fromkeys(mappings))
        self._fetch = fetch
        self._finished = False
        try:
            self._uffd = UffdFd(uapi.UFFD_FEATURE_MISSING_SHMEM)
        except UnsupportedError as error:
            raise UnsupportedError(error.capability, str(error), hint=_HINT) from error
        try:
            for hva, size_bytes in self._ranges():  # first: then the kernel fills no hole to make a huge page
                self._uffd.register(hva, size_bytes, uapi.UFFDIO_REGISTER_MODE_MISSING)
            self._empty(absent)
            self._handler = FaultHandler(self._uffd, self._resolve, self._failed)
        except BaseException:
            self._uffd.close()
            raise
        memory.on_touch(fetch)

    def install(self, gfns: GfnArray, content: NDArray[np.uint8]) -> None:
        """Give frames their content, and wake the threads that wait for them.

        Args:
            gfns: uint64[n], ascending; one that was installed before, by a call that failed, keeps what it holds.
            content: uint8[4096 n], one after another.

        Raises:
            UffdError: the kernel refused.
        """
        at = 0
        for start, length in zip(*(part.tolist() for part in runs_of(gfns)), strict=True):
            size_bytes = length << PAGE_SHIFT
            self._uffd.copy(self._memory.mapping.hva + (start << PAGE_SHIFT), content[at : at + size_bytes])
            at += size_bytes

    def finish(self) -> None:
        """Let what was not installed be zeros, and wake every thread that waits."""
        self._finished = True
        for hva, size_bytes in self._ranges():
            self._uffd.unregister(hva, size_bytes)
        self._memory.on_touch(None)

    def close(self) -> None:
        """End the handler's thread."""
        self._handler.stop()
        self._uffd.close()

    def _ranges(self) -> list[tuple[int, int]]:
        return [(m.hva + region.gpa, region.size_bytes) for m in self._mappings for region in self._memory.regions]

    def _empty(self, absent: DirtyBitmap) -> None:
        """Take their storage from frames: no mapping of the memory has them any more."""
        self._memory.drop(*absent.runs())
        kept = DirtyBitmap(absent.nbits)
        kept.set_runs(*self._memory.populated())
        kept &= absent
        if kept.any():  # a huge page that was not split: part of it is zeroed then, and not absent
            raise UnsupportedError("lazy-thp", "huge pages under this guest cannot be taken apart", hint=_HINT)

    def _resolve(self, faults: NDArray[np.void]) -> None:
        hvas = np.unique(faults["address"]) & ~np.uint64(PAGE_SIZE - 1)
        for mapping in self._mappings:
            base = np.uint64(mapping.hva)
            inside = hvas[(hvas >= base) & (hvas < base + np.uint64(mapping.size_bytes))]
            if inside.size:
                self._fetch(np.unique((inside - base) >> np.uint64(PAGE_SHIFT)))
        for hva in hvas.tolist():  # one per vCPU at the most; it may wait in another mapping, or have come too late
            self._uffd.wake(hva, PAGE_SIZE)

    def _failed(self, error: Exception) -> None:
        if not self._finished:
            _log.error("the handler of missing pages failed, and the guest waits: %r", error)
