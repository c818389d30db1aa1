"""Host address space for guest memory: one reservation into which pieces of a memfd, or memory of its own, are mapped.

Reservations begin at a multiple of 2 MiB, so that wherever gpa and file offset agree modulo 2 MiB the host may use huge
pages, if it is asked to (:mod:`.hugepages`).

This is the only module that calls ``mmap``/``madvise`` by address. Views are ordinary buffers that keep the mapping
alive: memory is unmapped when the last of them is gone, never under a reader's feet.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import platform
import weakref
from typing import Any, Self

import numpy as np

from pageferry.core.bitmap import runs_of
from pageferry.core.errors import UnsupportedError, UsageError, VmError
from pageferry.core.frames import PAGE_SHIFT, SIZE_2M, GfnArray, Hva
from pageferry.core.libc import libc
from pageferry.core.os_hints import resource_hint

_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_PROT_NONE = 0
_MREMAP_MAYMOVE_FIXED = 1 | 2
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_MFD_HUGE_2MB = 21 << 26
MADV_DONTNEED = 4
MADV_REMOVE = 9
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_POPULATE_WRITE = 23
_HUGE_FIELDS = ("AnonHugePages", "ShmemPmdMapped", "Shared_Hugetlb", "Private_Hugetlb")

_SYS_FUTEX = 202 if platform.machine() == "x86_64" else 98  # asm-generic
_FUTEX_WAKE_OP_PRIVATE = 5 | 128
_FUTEX_OP_OR = 2 << 28


def _raise(call: str) -> None:
    code = ctypes.get_errno()
    hint = "less memory for the guest, or more for the host" if code == errno.ENOMEM else ""
    raise VmError(f"{call}: {os.strerror(code)}", hint=hint or resource_hint(OSError(code, "")))


def available_bytes() -> int | None:
    """Return how much memory the host could give without swapping, or None where it does not tell.

    Source: Linux ``/proc/meminfo``, ``MemAvailable``.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None


def total_bytes() -> int | None:
    """Return how much memory the host has, or None where it does not tell.

    Source: Linux ``sysconf(3)``, ``_SC_PHYS_PAGES``.
    """
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def atomic_or_u32(hva: int, bits: int) -> None:
    """Set ``bits`` (below 0x800) in the u32 at ``hva``, as one step for every thread, emulated vCPUs included.

    Python has no such operation on memory, but the kernel does one for us: FUTEX_WAKE_OP is "``*uaddr2 |= oparg``, then
    wake waiters", and there are none here. About a microsecond.

    Raises:
        VmError: the kernel refuses.

    Source: futex(2), FUTEX_WAKE_OP.
    """
    assert 0 <= bits < 0x800  # 12 bits, sign-extended
    # SAFETY: the caller keeps the four bytes at hva mapped during the call; the first word is never dereferenced.
    word = ctypes.c_void_p(hva)
    zero, operation = ctypes.c_long(0), ctypes.c_long(_FUTEX_OP_OR | bits << 12)
    if libc.syscall(
        ctypes.c_long(_SYS_FUTEX), word, ctypes.c_long(_FUTEX_WAKE_OP_PRIVATE), zero, zero, word, operation
    ):
        _raise("futex")


#: No process can make a file with these smaller or larger.
_FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def _size_hint(error: OSError) -> str:
    if error.errno == errno.EFBIG:
        return (
            "the kernel counts this memory as a file, and it is longer than this process may make one: raise ulimit -f"
        )
    return resource_hint(error)


class MemFd:
    """An anonymous, sparse, page-granular file: the storage of guest RAM.

    Args:
        name: shown in ``/proc/PID/maps``.
        size_bytes: a multiple of the page size; costs nothing until touched.
        hugetlb: whether its pages come from the host's pool of 2 MiB pages. It ends with a whole one, and every mapping
            of it reserves what it needs.

    Raises:
        UsageError: the host refuses the size.
        UnsupportedError: the kernel has no pool of 2 MiB pages.
    """

    def __init__(self, name: str, size_bytes: int, *, hugetlb: bool = False) -> None:
        self.size_bytes = size_bytes
        flags = os.MFD_HUGETLB | _MFD_HUGE_2MB if hugetlb else os.MFD_ALLOW_SEALING
        try:
            self.fd = os.memfd_create(name, os.MFD_CLOEXEC | flags)
        except OSError as error:
            if not hugetlb:
                raise
            raise UnsupportedError(
                "hugetlb", "this kernel has no pool of 2 MiB pages", hint="use --hugepages thp, or off"
            ) from error
        self._close = weakref.finalize(self, os.close, self.fd)
        try:
            os.ftruncate(self.fd, -(-size_bytes // SIZE_2M) * SIZE_2M if hugetlb else size_bytes)
            if not hugetlb:
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _FIXED_SIZE)
        except (OSError, OverflowError) as error:
            self._close()
            hint = _size_hint(error) if isinstance(error, OSError) else ""
            raise UsageError(f"the host cannot hold {size_bytes} bytes of guest memory", hint=hint) from error

    @classmethod
    def adopt(cls, fd: int, size_bytes: int) -> Self:
        """Return the file that another process made with this size, and handed over; the descriptor is ours then.

        Raises:
            VmError: it is not such a file, or another process could make it smaller: touching it would then kill this
                process.
        """
        memfd = cls.__new__(cls)
        memfd.fd, memfd.size_bytes = fd, size_bytes
        memfd._close = weakref.finalize(memfd, os.close, fd)
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _FIXED_SIZE == _FIXED_SIZE
            fits = sealed and os.fstat(fd).st_size == size_bytes
        except OSError:  # no file that can have seals
            fits = False
        if not fits:
            memfd.close()
            raise VmError("the memory that was handed over is not a file of the guest's size that stays so")
        return memfd

    def populated(self) -> tuple[GfnArray, GfnArray]:
        """Return the page runs that have storage, ``(starts, lengths)`` in pages of the file, ascending.

        Everything else reads as zero and was never touched. Cost grows with the number of extents. Not for hugetlb: the
        kernel says that such a file is full from the beginning.
        """
        starts: list[int] = []
        ends: list[int] = []
        at = 0
        while at < self.size_bytes:
            try:
                begin = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break
                raise
            at = os.lseek(self.fd, begin, os.SEEK_HOLE)
            starts.append(begin >> PAGE_SHIFT)
            ends.append(at >> PAGE_SHIFT)
        first = np.array(starts, np.uint64)
        return first, np.array(ends, np.uint64) - first

    def punch(self, offset: int, size_bytes: int) -> None:
        """Give the storage of a range back to the host; it reads as zero afterwards."""
        if libc.fallocate(self.fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, offset, size_bytes):
            _raise("fallocate")

    def close(self) -> None:
        """Close the descriptor; mappings stay valid."""
        self._close()


class _Reservation:
    """Owns a range of host addresses that begins and ends at a multiple of 2 MiB; unmapped when collected."""

    def __init__(self, size_bytes: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        size_bytes = -(-size_bytes // SIZE_2M) * SIZE_2M
        found = libc.mmap(None, size_bytes + SIZE_2M, _PROT_NONE, flags, -1, 0)
        if found == _MAP_FAILED:
            _raise("mmap")
        self.hva = Hva(-(-found // SIZE_2M) * SIZE_2M)
        end, found_end = self.hva + size_bytes, found + size_bytes + SIZE_2M
        # SAFETY: both are the unused ends of what was just mapped.
        for begin, stop in ((found, self.hva), (end, found_end)):
            if begin < stop:
                libc.munmap(begin, stop - begin)
        # At the end of the process all else may still use it, vCPUs too: it goes with the process.
        weakref.finalize(self, libc.munmap, self.hva, size_bytes).atexit = False


class HostMapping:
    """A contiguous range of host addresses, at first inaccessible, into which memory is mapped.

    ``view`` is a writable ``memoryview`` of bytes over the whole range. Touching a part of it where nothing is mapped
    kills the process, as any wild pointer does: callers check addresses first.

    Args:
        size_bytes: how much to reserve; a multiple of the page size.
    """

    def __init__(self, size_bytes: int) -> None:
        reservation = _Reservation(size_bytes)
        self.hva = reservation.hva
        self.size_bytes = size_bytes
        array: Any = (ctypes.c_ubyte * size_bytes).from_address(reservation.hva)
        # SAFETY: the array borrows the reservation's addresses; this attribute keeps it mapped as long as any view
        # (every memoryview and numpy array over it holds the ctypes array).
        array.owner = reservation
        self.view = memoryview(array).cast("B")

    def _check(self, at: int, size_bytes: int) -> None:
        if at < 0 or size_bytes < 0 or at + size_bytes > self.size_bytes:
            raise IndexError(f"{at:#x}+{size_bytes:#x} is outside a mapping of {self.size_bytes:#x}")

    def map_fd(self, memfd: MemFd, offset: int, at: int, size_bytes: int) -> None:
        """Map ``size_bytes`` of ``memfd`` from ``offset`` at byte ``at``, shared and writable.

        All three are multiples of the page size. With a hugetlb file ``offset`` and ``at`` are multiples of 2 MiB, and
        the last 2 MiB page is mapped whole.

        Raises:
            VmError: the host refused: out of memory, or too few pages left to reserve.
        """
        self._check(at, size_bytes)
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        # SAFETY: MAP_FIXED lands inside our own reservation (checked above), which ends with a whole 2 MiB.
        if libc.mmap(self.hva + at, size_bytes, prot, mmap.MAP_SHARED | _MAP_FIXED, memfd.fd, offset) == _MAP_FAILED:
            _raise("mmap")

    def map_device(self, fd: int, at: int, size_bytes: int, *, writable: bool) -> None:
        """Map a device from its beginning at byte ``at``, shared; both are multiples of the page size.

        Raises:
            VmError: the device or the host refused.
        """
        self._check(at, size_bytes)
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        # SAFETY: MAP_FIXED lands inside our own reservation (checked above).
        if libc.mmap(self.hva + at, size_bytes, prot, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) == _MAP_FAILED:
            _raise("mmap")

    def map_same(self, other: "HostMapping", at: int, size_bytes: int) -> None:
        """Map at byte ``at`` the very memory that ``other`` has there, shared and writable.

        Both are multiples of the page size, and ``other`` has one piece of one memfd there.

        Raises:
            UnsupportedError: memory of that kind cannot be mapped twice (hugetlb cannot).
            VmError: the host refused for another reason.

        Source: mremap(2): an old size of 0 on a shared mapping makes a second mapping of the same pages.
        """
        self._check(at, size_bytes)
        other._check(at, size_bytes)
        # SAFETY: the target lies inside our own reservation (checked above), which MREMAP_FIXED replaces; the source
        # is only looked at.
        if libc.mremap(other.hva + at, 0, size_bytes, _MREMAP_MAYMOVE_FIXED, self.hva + at) == _MAP_FAILED:
            if ctypes.get_errno() == errno.EINVAL:
                raise UnsupportedError(
                    "mremap",
                    "this guest's memory cannot be mapped a second time for its vCPUs",
                    hint="no hugetlb pages under it, or another tracker",
                )
            _raise("mremap")

    def map_private(self, at: int, size_bytes: int) -> None:
        """Put memory of its own into a range: zeros, which no file has and no other process can map."""
        self._check(at, size_bytes)
        self._map_private(at, size_bytes)

    def clear(self) -> None:
        """Give back all that is mapped. Views may live on: they read as zeros, and a late write harms nothing."""
        self._map_private(0, -(-self.size_bytes // SIZE_2M) * SIZE_2M)  # a huge page goes only as a whole

    def _map_private(self, at: int, size_bytes: int) -> None:
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        # SAFETY: MAP_FIXED lands inside our own reservation, which ends with a whole 2 MiB.
        if libc.mmap(self.hva + at, size_bytes, prot, flags, -1, 0) == _MAP_FAILED:
            _raise("mmap")

    def advise(self, at: int, size_bytes: int, advice: int) -> None:
        """Call ``madvise`` on a range without holding the interpreter lock."""
        self._check(at, size_bytes)
        if libc.madvise(self.hva + at, size_bytes, advice):
            _raise("madvise")

    def resident(self, at: int, size_bytes: int) -> tuple[GfnArray, GfnArray]:
        """Return the runs of pages of a range that were ever touched through it: ``(starts, lengths)``, ascending.

        Args:
            at: of the range, a multiple of the page size.
            size_bytes: a multiple of the page size, at least one page.

        Returns:
            uint64[n] each, in pages from the beginning of the mapping. Only hugetlb pages, which the host cannot take
            away, are surely still there.

        Source: mincore(2).
        """
        self._check(at, size_bytes)
        present = np.zeros(size_bytes >> PAGE_SHIFT, np.uint8)
        # SAFETY: the kernel writes one byte per page, exactly the array, during the call; this frame holds it.
        if libc.mincore(self.hva + at, size_bytes, present.ctypes.data):
            _raise("mincore")
        pages = np.flatnonzero(present & np.uint8(1)).astype(np.uint64)
        return runs_of(pages + np.uint64(at >> PAGE_SHIFT))

    def huge_bytes(self) -> int:
        """Return how many bytes are mapped by huge pages of the host now. Cost grows with all that is mapped.

        Source: proc_pid_smaps(5).
        """
        total_kib, ours = 0, False
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, rest = line.partition(":")
                if key in _HUGE_FIELDS:
                    total_kib += ours * int(rest.split()[0])
                elif "-" in key:
                    ours = self.hva <= int(key.partition("-")[0], 16) < self.hva + self.size_bytes
        return total_kib << 10
