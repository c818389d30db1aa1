"""The C library, for what Python has no call for, and :class:`Fd`, a descriptor that answers to ``ioctl``.

Every call lets go of the interpreter lock (``CDLL``, not ``PyDLL``) and leaves ``errno`` in ``ctypes.get_errno()``.
"""

import ctypes
import os
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from pageferry.core.errors import VmError

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_longlong]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
libc.syscall.restype = ctypes.c_long


class Fd:
    """One open descriptor; a context manager; closed when collected at the latest.

    Args:
        fd: taken over.
        error: makes what a failed ioctl raises, of the ioctl's name and the errno.
        names: of the ioctls.
    """

    def __init__(self, fd: int, error: Callable[[str, int], VmError], names: Mapping[int, str]) -> None:
        self._fd = fd
        self._error = error
        self._names = names
        self._close = weakref.finalize(self, os.close, fd)

    def fileno(self) -> int:
        """Return the descriptor, -1 when closed."""
        return self._fd

    def ioctl(self, request: int, argument: "ctypes.Structure | ctypes.Array[ctypes.c_uint64] | int" = 0) -> int:
        """Perform one ioctl; return its value (not negative).

        Raises:
            VmError: it failed: what ``error`` has made.
        """
        # SAFETY: a structure passed here is the caller's and is referenced by this frame until the call returns.
        where = argument if isinstance(argument, int) else ctypes.addressof(argument)
        result: int = libc.ioctl(self._fd, request, where)
        if result < 0:
            raise self._error(self._names.get(request, f"ioctl {request:#x}"), ctypes.get_errno())
        return result

    def close(self) -> None:
        """Close the descriptor; later calls fail with EBADF. May be called twice."""
        self._fd = -1
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
