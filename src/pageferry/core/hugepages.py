"""Huge pages of the host under guest memory: what can be asked for, and whether this kernel gives it.

``thp`` is advice: the kernel gives a 2 MiB page at the first touch where it can, and splits and joins pages as it
likes. What it gives has storage, so ``GuestMemory.populated()`` grows in steps of 2 MiB.

``hugetlb`` is a pool that the administrator has set aside. Guest memory reserves its pages when it is made, so that a
pool too small is an error then and never a SIGBUS later.
"""

from enum import StrEnum

import numpy as np

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.frames import PAGE_SIZE, PAGES_PER_2M, SIZE_2M
from pageferry.core.hostmem import MADV_HUGEPAGE, HostMapping, MemFd

_SHMEM_ENABLED = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
_POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB"
_TRIALS = 8


class HugePages(StrEnum):
    """The kinds of huge pages that a user can ask for."""

    OFF = "off"
    THP = "thp"
    HUGETLB = "hugetlb"


def expect_offered(kind: HugePages) -> None:
    """Try whether the kernel gives huge pages of this kind.

    Raises:
        UnsupportedError: it does not; ``hint`` says what to set.
    """
    if kind is HugePages.THP:
        _try_thp()
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
    try:
        mapping.advise(0, memfd.size_bytes, MADV_HUGEPAGE)
    except VmError as error:
        raise UnsupportedError(
            "thp", "this kernel has no transparent huge pages", hint="use --hugepages off"
        ) from error
    for page in range(_TRIALS):  # one may fail: a host short of memory in one piece
        mapping.view[page * SIZE_2M + PAGE_SIZE] = 1
        if int(np.max(memfd.populated()[1])) >= PAGES_PER_2M:
            return
    raise none_given(_setting(_SHMEM_ENABLED))


def none_given(shmem_enabled: str | None) -> UnsupportedError:
    """Return the error for a kernel that takes the advice and gives no 2 MiB page, by its setting ``shmem_enabled``."""
    if shmem_enabled is None or "[never]" in shmem_enabled or "[deny]" in shmem_enabled:
        hint = f"as root: echo advise > {_SHMEM_ENABLED}"
    else:
        hint = "the host has no 2 MiB of memory in one piece: free some, or echo 1 > /proc/sys/vm/compact_memory"
    return UnsupportedError("thp", "the kernel gives memfds no transparent huge pages", hint=hint)


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
