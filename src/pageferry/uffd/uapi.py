"""The kernel's interface as it is: ioctl numbers, constants and structures. Transcription only; names are the kernel's.

Source: ``include/uapi/linux/userfaultfd.h``.
"""

import ctypes
import platform
from ctypes import c_uint64 as u64

import numpy as np

NR_USERFAULTFD = 323 if platform.machine() == "x86_64" else 282  # asm-generic

UFFD_API = 0xAA

# features
UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
UFFD_FEATURE_MISSING_SHMEM = 1 << 5
UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
UFFD_FEATURE_WP_ASYNC = 1 << 15

UFFDIO_REGISTER_MODE_MISSING = 1 << 0
UFFDIO_REGISTER_MODE_WP = 1 << 1
UFFDIO_WRITEPROTECT_MODE_WP = 1 << 0


class UffdioApi(ctypes.Structure):
    """``struct uffdio_api``."""

    _fields_ = (("api", u64), ("features", u64), ("ioctls", u64))


class UffdioRange(ctypes.Structure):
    """``struct uffdio_range``."""

    _fields_ = (("start", u64), ("len", u64))


class UffdioRegister(ctypes.Structure):
    """``struct uffdio_register``."""

    _fields_ = (("range", UffdioRange), ("mode", u64), ("ioctls", u64))


class UffdioWriteprotect(ctypes.Structure):
    """``struct uffdio_writeprotect``."""

    _fields_ = (("range", UffdioRange), ("mode", u64))


class UffdioCopy(ctypes.Structure):
    """``struct uffdio_copy``; ``copy`` is how many bytes were copied, or an error."""

    _fields_ = (("dst", u64), ("src", u64), ("len", u64), ("mode", u64), ("copy", ctypes.c_int64))


#: ``struct uffd_msg`` of a page fault, for arrays.
UFFD_MSG = np.dtype(
    {
        "names": ["event", "flags", "address", "ptid"],
        "formats": ["u1", "u8", "u8", "u4"],
        "offsets": [0, 8, 16, 24],
        "itemsize": 32,
    }
)


def _ioc(direction: int, kind: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | kind << 8 | number


_WRITE, _READ = 1, 2
UFFDIO_API = _ioc(_READ | _WRITE, UFFD_API, 0x3F, ctypes.sizeof(UffdioApi))
UFFDIO_REGISTER = _ioc(_READ | _WRITE, UFFD_API, 0x00, ctypes.sizeof(UffdioRegister))
UFFDIO_UNREGISTER = _ioc(_READ, UFFD_API, 0x01, ctypes.sizeof(UffdioRange))
UFFDIO_WAKE = _ioc(_READ, UFFD_API, 0x02, ctypes.sizeof(UffdioRange))
UFFDIO_COPY = _ioc(_READ | _WRITE, UFFD_API, 0x03, ctypes.sizeof(UffdioCopy))
UFFDIO_WRITEPROTECT = _ioc(_READ | _WRITE, UFFD_API, 0x06, ctypes.sizeof(UffdioWriteprotect))
USERFAULTFD_IOC_NEW = _ioc(0, UFFD_API, 0x00, 0)

IOCTL_NAMES = {
    value: name
    for name, value in list(globals().items())
    if name.startswith(("UFFDIO_", "USERFAULTFD_IOC")) and "_MODE_" not in name
}
FEATURE_NAMES = {value: name for name, value in list(globals().items()) if name.startswith("UFFD_FEATURE_")}
