"""The owner of a ``userfaultfd``, which does not survive ``exec``, and what this kernel must have for each tracker.

Source: userfaultfd(2), ioctl_userfaultfd(2); kernel ``admin-guide/mm/userfaultfd.rst``.
"""

import ctypes
import errno
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pageferry.core.errors import UffdError, UnsupportedError
from pageferry.core.frames import PAGE_SIZE, SIZE_2M
from pageferry.core.libc import Fd, libc
from pageferry.core.pagemap import PagemapFd
from pageferry.uffd import uapi

DEV_USERFAULTFD = Path("/dev/userfaultfd")

#: Messages taken by one read: every vCPU waits for one fault at the most.
_BATCH = 256
_WP_FEATURES = uapi.UFFD_FEATURE_PAGEFAULT_FLAG_WP | uapi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM


class UffdFd(Fd):
    """A ``userfaultfd`` that sees faults of the kernel too (KVM's are), non-blocking.

    Args:
        features: what it must offer (``UFFD_FEATURE_*``); write protection of shared memory is always asked for.

    Raises:
        UnsupportedError: the kernel has none, forbids it, or lacks a feature; says which.
        UffdError: the kernel refused for another reason.
    """

    def __init__(self, features: int = 0) -> None:
        super().__init__(_open_userfaultfd(), UffdError, uapi.IOCTL_NAMES)
        wanted = _WP_FEATURES | features
        try:
            self.ioctl(uapi.UFFDIO_API, uapi.UffdioApi(api=uapi.UFFD_API, features=wanted))
        except UffdError as error:
            self.close()
            missing = wanted & ~_offered_features()
            names = [name for bit, name in uapi.FEATURE_NAMES.items() if bit & missing]
            if not names:
                raise
            raise UnsupportedError(
                names[0],
                f"this kernel's userfaultfd lacks {', '.join(names)}",
                hint="Linux 6.7 has all of them; or use --tracker kvm-bitmap",
            ) from error
        self._messages = bytearray(_BATCH * uapi.UFFD_MSG.itemsize)

    def register(self, hva: int, size_bytes: int, mode: int = uapi.UFFDIO_REGISTER_MODE_WP) -> None:
        """Let faults of a range be ours: by write protection (nothing is protected yet), or on missing pages.

        Raises:
            UffdError: the kernel refused.
        """
        where = uapi.UffdioRange(start=hva, len=size_bytes)
        self.ioctl(uapi.UFFDIO_REGISTER, uapi.UffdioRegister(range=where, mode=mode))

    def copy(self, hva: int, content: NDArray[np.uint8]) -> None:
        """Give missing pages their content, each as one step, and wake the threads that wait for one of them here.

        Args:
            hva: of the first page; the range was registered for missing pages. One that is there keeps what it holds.
            content: uint8[n], whole pages.

        Raises:
            UffdError: the kernel refused; some of them may be there, and the same call may be made again.
        """
        at = 0
        while at < content.size:
            # Advice on huge pages divides memory into mappings at multiples of 2 MiB, and no call may go across two.
            size_bytes = min(content.size - at, SIZE_2M - (hva + at) % SIZE_2M)
            # SAFETY: the kernel reads this part of the array during the call; this frame holds it.
            request = uapi.UffdioCopy(dst=hva + at, src=content.ctypes.data + at, len=size_bytes)
            try:
                self.ioctl(uapi.UFFDIO_COPY, request)
            except UffdError as error:
                if error.errno == errno.EEXIST:
                    at += PAGE_SIZE
                elif error.errno != errno.EAGAIN:  # another thread is changing the address space: soon over
                    raise
            at += max(request.copy, 0)

    def wake(self, hva: int, size_bytes: int) -> None:
        """Have the threads that wait for a page of a range try again.

        Raises:
            UffdError: the kernel refused.
        """
        self.ioctl(uapi.UFFDIO_WAKE, uapi.UffdioRange(start=hva, len=size_bytes))

    def unregister(self, hva: int, size_bytes: int) -> None:
        """Make a range writable again and wake the threads that wait for a page of it; ours or not.

        To close the descriptor is not enough: a child that was forked may hold it as well.

        Raises:
            UffdError: the kernel refused.
        """
        where = uapi.UffdioRange(start=hva, len=size_bytes)
        self.ioctl(uapi.UFFDIO_UNREGISTER, where)
        self.ioctl(uapi.UFFDIO_WAKE, where)  # UNREGISTER itself wakes only those that wait for a missing page

    def protect(self, hva: int, size_bytes: int) -> None:
        """Write-protect a range, pages without storage included; what is protected stays so.

        When it returns no CPU holds a stale writable translation, and KVM none either: the kernel has flushed the
        host's TLBs and told KVM (its MMU notifier) to drop what it derived from them.

        Raises:
            UffdError: the kernel refused; some of it may be protected.
        """
        self._write_protect(hva, size_bytes, uapi.UFFDIO_WRITEPROTECT_MODE_WP)

    def unprotect(self, hva: int, size_bytes: int) -> None:
        """Make a range writable and wake the threads that wait for a page of it.

        Raises:
            UffdError: the kernel refused.
        """
        self._write_protect(hva, size_bytes, 0)

    def _write_protect(self, hva: int, size_bytes: int, mode: int) -> None:
        where = uapi.UffdioRange(start=hva, len=size_bytes)
        while True:
            try:
                self.ioctl(uapi.UFFDIO_WRITEPROTECT, uapi.UffdioWriteprotect(range=where, mode=mode))
            except UffdError as error:
                if error.errno != errno.EAGAIN:  # another thread changes the address space (fork, mremap): soon over
                    raise
            else:
                return

    def read_faults(self) -> NDArray[np.void]:
        """Return the faults that wait, at once: ``UFFD_MSG[n]``, n possibly 0; the caller's own.

        Raises:
            UffdError: the kernel refused.
        """
        try:
            # SAFETY: the kernel writes whole messages into a buffer of ours during the call.
            size_bytes = os.readv(self._fd, [self._messages])
        except BlockingIOError:
            size_bytes = 0
        except OSError as error:
            raise UffdError("read of userfaultfd", error.errno or errno.EIO) from error
        return np.frombuffer(self._messages, uapi.UFFD_MSG, size_bytes // uapi.UFFD_MSG.itemsize).copy()


def check_userfaultfd(features: int = 0) -> None:
    """Check that this process may have a userfaultfd with these features.

    Raises:
        UnsupportedError: as :class:`UffdFd`.
    """
    UffdFd(features).close()


def check_pagemap_scan() -> None:
    """Check that this kernel has PAGEMAP_SCAN and the write protection that it needs.

    Raises:
        UnsupportedError: as :class:`UffdFd` and :class:`PagemapFd`.
    """
    check_userfaultfd(uapi.UFFD_FEATURE_WP_ASYNC)
    PagemapFd().close()


def _offered_features() -> int:
    """Return the features of this kernel's userfaultfd: told only by one that asks for none."""
    answer = uapi.UffdioApi(api=uapi.UFFD_API)
    with Fd(_open_userfaultfd(), UffdError, uapi.IOCTL_NAMES) as asked:
        asked.ioctl(uapi.UFFDIO_API, answer)
    return int(answer.features)


def _open_userfaultfd() -> int:
    """Return a new descriptor: from the system call, or else from the device, which has permissions of its own."""
    fd: int = libc.syscall(ctypes.c_long(uapi.NR_USERFAULTFD), ctypes.c_int(os.O_CLOEXEC | os.O_NONBLOCK))
    if fd >= 0:
        return fd
    code = ctypes.get_errno()
    if code == errno.ENOSYS:
        raise UnsupportedError(
            "userfaultfd", "this kernel has no userfaultfd", hint="CONFIG_USERFAULTFD; or use --tracker kvm-bitmap"
        )
    if code != errno.EPERM:
        raise UffdError("userfaultfd", code)
    try:
        device = os.open(DEV_USERFAULTFD, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UnsupportedError(
            "userfaultfd-permission",
            "userfaultfd for the kernel's own faults is refused to this user",
            hint=f"sysctl vm.unprivileged_userfaultfd=1, access to {DEV_USERFAULTFD}, or CAP_SYS_PTRACE; "
            "a container may block the call",
        ) from error
    try:
        fd = libc.ioctl(device, uapi.USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        if fd < 0:
            raise UffdError("USERFAULTFD_IOC_NEW", ctypes.get_errno())
    finally:
        os.close(device)
    return fd
