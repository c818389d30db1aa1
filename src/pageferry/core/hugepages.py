"""What lies under guest memory: a memfd or private memory, in huge pages of the host where it gives them.

``thp`` and ``anonymous`` are advice: the kernel gives a 2 MiB page at the first touch where it can, and splits and
joins pages as it likes. What it gives has storage, so ``GuestMemory.populated()`` grows in steps of 2 MiB.

A memfd can be mapped a second time and handed to another process. Private memory cannot; most kernels give huge pages
to it alone, and then it is four to six times cheaper to touch for the first time.

``hugetlb`` is a pool that the administrator has set aside. Guest memory reserves its pages when it is made, so that a
pool too small is an error then and never a SIGBUS later.
"""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.frames import PAGE_SIZE, PAGES_PER_2M, SIZE_2M, GfnArray
from pageferry.core.hostmem import MADV_HUGEPAGE, MADV_NOHUGEPAGE, HostMapping, MemFd
from pageferry.core.pagemap import can_tell

_ENABLED = "/sys/kernel/mm/transparent_hugepage/enabled"
_SHMEM_ENABLED = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
_POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB"
_TRIALS = 8
#: So many parts of a guest's memory may be advised each by itself: a process has 65,530 mappings, and each may be one.
_MAX_PIECES = 8192


class HugePages(StrEnum):
    """What a user can ask for.

    ``auto``: the best of what follows that this kernel gives and this guest can have. ``off``: a memfd of small pages.
    ``thp``: a memfd, with advice. ``anonymous``: private memory, with advice. ``hugetlb``: the pool.
    """

    AUTO = "auto"
    OFF = "off"
    THP = "thp"
    ANONYMOUS = "anonymous"
    HUGETLB = "hugetlb"


class HugeAdvice:
    """What the host is told of one guest's memory. Does nothing where it is not to be told anything.

    A guest runs with huge pages wherever the host gives them. One that arrives, from a source or a file, gets them only
    where whole 2 MiB of it come: one that comes thin stays thin.

    Args:
        mapping: of its RAM at offset gpa.
        regions: of it, in bytes.
        kind: of memory.
    """

    def __init__(self, mapping: HostMapping, regions: Sequence[range], kind: HugePages) -> None:
        self._mapping = mapping
        self._regions = tuple(regions) if kind in (HugePages.THP, HugePages.ANONYMOUS) else ()
        self._small: NDArray[np.bool_] | None = None  # which 2 MiB get no huge page, while a guest arrives
        self._pieces = 0

    def everywhere(self) -> None:
        """Let the host use huge pages wherever it can."""
        self._small = None
        self._advise(MADV_HUGEPAGE)

    def begin_arrival(self) -> None:
        """Give none from now on but where :meth:`make_huge` says so."""
        if self._regions:
            self._small = np.ones(-(-self._regions[-1].stop // SIZE_2M), np.bool_)
            self._advise(MADV_NOHUGEPAGE)

    def make_huge(self, starts: GfnArray, lengths: GfnArray) -> None:
        """Let the host use them for each whole 2 MiB of these runs of RAM; nothing to do unless a guest arrives."""
        if self._small is None:
            return
        long = lengths >= PAGES_PER_2M  # most runs are not
        if long.any():
            for start, length in zip(starts[long].tolist(), lengths[long].tolist(), strict=True):
                self.make_run_huge(range(start, start + length))

    def make_run_huge(self, run: range) -> None:
        """As :meth:`make_huge`, of one run."""
        small, first, end = self._small, -(-run.start // PAGES_PER_2M), run.stop // PAGES_PER_2M
        if small is None or first >= end or self._pieces >= _MAX_PIECES or not small[first:end].any():
            return
        small[first:end] = False
        self._pieces += 1
        self._mapping.advise(first * SIZE_2M, (end - first) * SIZE_2M, MADV_HUGEPAGE)

    def end_arrival(self) -> None:
        """Let the host use them wherever it can again: the guest has come, and is about to run."""
        if self._small is not None:
            self.everywhere()

    def _advise(self, advice: int) -> None:
        for region in self._regions:
            self._mapping.advise(region.start, len(region), advice)


def chosen(
    asked: HugePages, *, needs_file: bool, enabled: str | None = None, shmem_enabled: str | None = None
) -> HugePages:
    """Return what to use for a guest; never ``auto``.

    Args:
        asked: what was asked for.
        needs_file: whether its memory is to be mapped a second time, or another process's.
        enabled: the kernel's setting for private memory; None: as it is now.
        shmem_enabled: its setting for memfds; None: as it is now.

    Raises:
        UnsupportedError: what was asked for cannot be a file, and must be.

    Source: kernel ``admin-guide/mm/transhuge.rst``.
    """
    if asked is HugePages.ANONYMOUS and needs_file:
        raise UnsupportedError(
            "anonymous", "private memory cannot be mapped a second time", hint="use --hugepages auto, thp or off"
        )
    if asked is not HugePages.AUTO:
        return asked
    if _gives(_setting(_SHMEM_ENABLED) if shmem_enabled is None else shmem_enabled):
        return HugePages.THP
    if not needs_file and can_tell() and _gives(_setting(_ENABLED) if enabled is None else enabled):
        return HugePages.ANONYMOUS
    return HugePages.OFF


def expect_offered(kind: HugePages) -> None:
    """Try whether the kernel gives huge pages of this kind.

    Raises:
        UnsupportedError: it does not; ``hint`` says what to set.
    """
    if kind is HugePages.THP:
        _try_thp()
    if kind is HugePages.ANONYMOUS:
        _try_anonymous()
    if kind is HugePages.HUGETLB:
        try:
            HostMapping(SIZE_2M).map_fd(MemFd("pageferry-trial", SIZE_2M, hugetlb=True), 0, 0, SIZE_2M)
        except UnsupportedError:
            raise
        except VmError as error:
            raise pool_too_small(1) from error


def _try_thp() -> None:
    memfd = MemFd("pageferry-trial", _TRIALS * SIZE_2M)
    mapping = HostMapping(memfd.size_bytes)
    mapping.map_fd(memfd, 0, 0, memfd.size_bytes)
    if not _is_given(mapping):
        raise none_given(_setting(_SHMEM_ENABLED))


def _try_anonymous() -> None:
    mapping = HostMapping(_TRIALS * SIZE_2M)
    mapping.map_private(0, mapping.size_bytes)
    if not _is_given(mapping):
        raise none_given(_setting(_ENABLED), setting=_ENABLED, what="private memory", advice="madvise")


def _is_given(mapping: HostMapping) -> bool:
    try:
        mapping.advise(0, mapping.size_bytes, MADV_HUGEPAGE)
    except VmError as error:
        raise UnsupportedError(
            "thp", "this kernel has no transparent huge pages", hint="use --hugepages off"
        ) from error
    for page in range(_TRIALS):  # one may fail: a host short of memory in one piece
        mapping.view[page * SIZE_2M + PAGE_SIZE] = 1
        if int(np.max(mapping.resident(0, mapping.size_bytes)[1])) >= PAGES_PER_2M:
            return True
    return False


def none_given(
    value: str | None, *, setting: str = _SHMEM_ENABLED, what: str = "memfds", advice: str = "advise"
) -> UnsupportedError:
    """Return the error for a kernel that takes the advice and gives no 2 MiB page.

    Args:
        value: of the setting; None: there is none.
        setting: the file in sysfs.
        what: is given none.
        advice: the value to set.
    """
    if value is None or not _gives(value):
        hint = f"as root: echo {advice} > {setting}"
    else:
        hint = "the host has no 2 MiB of memory in one piece: free some, or echo 1 > /proc/sys/vm/compact_memory"
    return UnsupportedError("thp", f"the kernel gives {what} no transparent huge pages", hint=hint)


def _gives(setting: str | None) -> bool:
    return setting is not None and "[never]" not in setting and "[deny]" not in setting


def pool_too_small(pages: int, pool: str = _POOL) -> UnsupportedError:
    """Return the error for a pool, which ``pool`` in sysfs tells of, that cannot give so many 2 MiB pages."""
    values = [_setting(f"{pool}/{name}_hugepages") for name in ("nr", "free", "resv")]
    have = wanted = ""
    if None not in values:
        total, free, reserved = (int(value or 0) for value in values)
        have, wanted = f", it has {free - reserved} left", str(total - (free - reserved) + pages)
    return UnsupportedError(
        "hugetlb",
        f"the host's pool of 2 MiB pages cannot give {pages}{have}",
        hint=f"as root: sysctl vm.nr_hugepages={wanted or pages}",
    )


def _setting(path: str) -> str | None:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return None
