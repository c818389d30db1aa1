"""DiskFile: a guest's disk in a raw file or on a block device, written by one process at a time.

The lock is an open file description's (fcntl(2), F_OFD_SETLK) on the whole file: shared by those that only read, held
alone by one that writes. It ends with the descriptor at the latest, so a process that died holds none. A process that
does not hold it does not write: the lock is the last word on where a guest runs, however a migration ended.

Transfers go through the host's page cache, or past it if the disk is named ``PATH,direct``. That is for disks that
several hosts share: a page cache knows nothing of what another host writes.
"""

import ctypes
import errno
import fcntl
import os
import stat
import struct
import weakref
from collections.abc import Sequence
from pathlib import Path

from pageferry.backends.direct import DirectIo, block_bytes_of, transfer_all
from pageferry.core.device_spec import DIRECT
from pageferry.core.errors import RefusedError, UsageError, VmError
from pageferry.core.libc import libc
from pageferry.core.os_hints import file_hint

SECTOR_BYTES = 512
#: l_type, l_whence, l_start, l_len, l_pid, as on 64-bit Linux.
_FLOCK = struct.Struct("hh4xqqi4x")
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE, _FALLOC_FL_ZERO_RANGE = 1, 2, 16
#: A file system that cannot says so by one of these.
_CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_ZEROS = bytes(1 << 20)


class DiskFile:
    """One disk; opened at once, used between :meth:`claim` and :meth:`release`.

    Args:
        path: a regular file of whole sectors, or a block device.
        readonly: whether the guest may only read it.
        direct: whether to go past the page cache.

    Raises:
        UsageError: there is no such file, it may not be opened, it is not a disk, or its file system cannot do without
            the page cache.
    """

    def __init__(self, path: Path, *, readonly: bool, direct: bool = False) -> None:
        self.path = path
        self.readonly = readonly
        self._claimed = False
        self._direct: DirectIo | None = None
        try:
            mode = os.O_RDONLY if readonly else os.O_RDWR
            self._fd = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for a writer
        except OSError as error:
            only_read = not readonly and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            hint = "a disk that is only read: --disk PATH,readonly" if only_read else file_hint(error)
            raise UsageError(f"cannot open disk {path}: {error.strerror}", hint=hint) from error
        self._close = weakref.finalize(self, os.close, self._fd)
        try:
            self.size_bytes = self._size()
            if direct:
                self._direct = self._make_direct()
        except UsageError:
            self.close()
            raise

    @classmethod
    def named(cls, name: str, *, readonly: bool) -> "DiskFile":
        """Return the disk that ``PATH`` or ``PATH,direct`` names.

        Raises:
            UsageError: as for the class.
        """
        return cls(Path(name.removesuffix(DIRECT)), readonly=readonly, direct=name.endswith(DIRECT))

    def _make_direct(self) -> DirectIo:
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) | os.O_DIRECT)
            block_bytes = block_bytes_of(self._fd, self.size_bytes)
        except OSError as error:
            raise UsageError(
                f"disk {self.path} cannot be used past the page cache: {error.strerror}",
                hint=f"its file system has no O_DIRECT: leave out {DIRECT}",
            ) from error
        if self.size_bytes % block_bytes:
            raise UsageError(
                f"disk {self.path} of {self.size_bytes} bytes is not whole blocks of {block_bytes}, as it is used past "
                "the page cache",
                hint=f"leave out {DIRECT}, or make it larger",
            )
        return DirectIo(self._fd, block_bytes)

    def _size(self) -> int:
        mode = os.fstat(self._fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise UsageError(f"{self.path} is not a disk: neither a regular file nor a block device")
        try:
            size_bytes = os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            raise UsageError(f"{self.path} is not a disk: it has no end ({error.strerror})") from error
        if not size_bytes or size_bytes % SECTOR_BYTES:
            raise UsageError(f"{self.path} is not a disk: {size_bytes} bytes are not whole sectors of {SECTOR_BYTES}")
        return size_bytes

    # -- whose it is -----------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Take the lock. Nothing happens when it is held already.

        Raises:
            RefusedError: another process uses the disk.
            VmError: it cannot be locked.
        """
        if self._claimed:
            return
        try:
            self._lock(fcntl.F_RDLCK if self.readonly else fcntl.F_WRLCK)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise VmError(f"disk {self.path} cannot be locked: {error.strerror}") from error
            raise RefusedError(
                f"disk {self.path} is in use by another process", hint="end the guest or program that uses it"
            ) from error
        self._claimed = True

    def release(self) -> None:
        """Have all that was written on the disk, and give the lock back. Nothing happens when it is not held.

        Raises:
            OSError: it could not be written; the lock is held still.
        """
        if not self._claimed:
            return
        self.flush()
        self._claimed = False
        self._lock(fcntl.F_UNLCK)

    def _lock(self, kind: int) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))

    def close(self) -> None:
        """Close the file, and lose the lock. May be called twice."""
        self._fd, self._claimed = -1, False
        self._close()

    # -- what the guest does with it -------------------------------------------------------------------------------

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill ``views``, one after another, from byte ``offset`` on.

        Raises:
            OSError: it cannot be read, or is not claimed.
        """
        self._expect_claimed()
        if self._direct is None:
            transfer_all(os.preadv, self._fd, views, offset)
        else:
            self._direct.read(views, offset)

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write ``views``, one after another, from byte ``offset`` on.

        Raises:
            OSError: it cannot be written, or is not claimed.
        """
        self._expect_claimed()
        if self._direct is None:
            transfer_all(os.pwritev, self._fd, views, offset)
        else:
            self._direct.write(views, offset)

    def flush(self) -> None:
        """Have all that was written survive a crash of this host.

        Raises:
            OSError: it could not be done, or is not claimed.
        """
        self._expect_claimed()
        if not self.readonly:
            os.fdatasync(self._fd)

    def discard(self, offset: int, size_bytes: int) -> None:
        """Give storage back where the file system can; what it holds afterwards is not told.

        Raises:
            OSError: an error other than that it cannot.
        """
        self._expect_claimed()
        self._allocate(_FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, size_bytes)

    def write_zeroes(self, offset: int, size_bytes: int, *, unmap: bool) -> None:
        """Have zeros in a range, without storage if ``unmap``, as far as the file system can.

        Raises:
            OSError: it cannot be written, or is not claimed.
        """
        self._expect_claimed()
        mode = _FALLOC_FL_PUNCH_HOLE if unmap else _FALLOC_FL_ZERO_RANGE
        if self._allocate(mode | _FALLOC_FL_KEEP_SIZE, offset, size_bytes):
            return
        for at in range(offset, offset + size_bytes, len(_ZEROS)):
            self.write([memoryview(_ZEROS)[: offset + size_bytes - at]], at)

    def _allocate(self, mode: int, offset: int, size_bytes: int) -> bool:
        """Call fallocate(2); tell whether it did what was asked."""
        if not libc.fallocate(self._fd, mode, offset, size_bytes):
            return True
        code = ctypes.get_errno()
        if code in _CANNOT:
            return False
        raise OSError(code, os.strerror(code))

    def _expect_claimed(self) -> None:
        if not self._claimed:
            raise OSError(errno.EBADF, "the disk is not this process's to use")
