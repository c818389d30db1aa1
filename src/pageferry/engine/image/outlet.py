"""FileOutlet: writes a file that appears whole or not at all; like a connection, it gathers buffers in order.

While it is written it has no name (``O_TMPFILE``): a process that is killed leaves nothing, and no other user finds
what holds a guest's memory. Where the file system has no such files it has a name that cannot be guessed. It gets its
own name in one step when all of it is on the disk. A file that this process did not make is never opened for writing.

Source: Linux ``open(2)``, ``linkat(2)``, ``rename(2)``.
"""

import contextlib
import ctypes
import errno
import os
import secrets
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

from pageferry.core.errors import UsageError
from pageferry.core.gather import MAX_BUFFERS, first_left
from pageferry.core.libc import libc
from pageferry.engine.wire.pacer import Pacer
from pageferry.stream.foreign import XL_MAGIC
from pageferry.stream.format import IMAGE_HEADER, IMAGE_ID, MARKER

_MODE = 0o600
_RENAME_NOREPLACE = 1
#: What a file system answers that has no unnamed files, or no second names.
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)


class FileOutlet:
    """One file on its way; an :class:`~pageferry.engine.pages.send.Outlet`.

    Args:
        path: what it will be called; what is there now stays until :meth:`commit`.

    Raises:
        UsageError: something else than an earlier save is there.
        OSError: the folder does not exist or refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pacer: Pacer | None = None
        self._aborted = threading.Event()
        self.sent_bytes = 0
        self._folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._expect_replaceable()
            self._fd, self._name = _open_new(self._folder)
        except BaseException:
            os.close(self._folder)
            raise

    def _expect_replaceable(self) -> None:
        """Check that what is there, if anything, is empty or a saved guest, as far as its first bytes tell.

        Raises:
            UsageError: it is something else.
        """
        name = self.path.name or "."
        try:
            if not stat.S_ISREG(os.stat(name, dir_fd=self._folder, follow_symlinks=False).st_mode):
                raise UsageError(f"{self.path} is not a regular file", hint="a guest is saved to a file of its own")
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._folder)
        except FileNotFoundError:
            return
        with open(fd, "rb") as file:
            begin = file.read(len(XL_MAGIC))
        image = begin[: IMAGE_HEADER.size]
        is_save = len(image) == IMAGE_HEADER.size and IMAGE_HEADER.unpack(image)[:2] == (MARKER, IMAGE_ID)
        is_save = is_save or begin == XL_MAGIC
        if begin and not is_save:
            raise UsageError(
                f"{self.path} is there and is not a saved guest", hint="choose another name, or remove it first"
            )

    def fileno(self) -> int:
        """Return the descriptor, for reading what was written too."""
        return self._fd

    def free_bytes(self) -> int:
        """Return how much more the file system takes."""
        room = os.fstatvfs(self._fd)
        return room.f_bavail * room.f_frsize

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Append all of ``buffers`` in order, gathered, when the pacer allows it.

        Raises:
            OSError: the disk is full, or broken, or the file may not be so long.
        """
        queue = [memoryview(buffer) for buffer in buffers if len(buffer)]
        if self.pacer is not None:
            self._aborted.wait(self.pacer.reserve(sum(map(len, queue))))
        at = 0
        while at < len(queue):
            written = os.writev(self._fd, queue[at : at + MAX_BUFFERS])
            self.sent_bytes += written
            at = first_left(queue, at, written)

    def abort(self) -> None:
        """Let a thread that waits for the pacer go on at once."""
        self._aborted.set()

    def settle(self) -> None:
        """Have all of it on the disk, and out of the host's cache: what is read afterwards was really written.

        Raises:
            OSError: the disk failed.
        """
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def commit(self) -> None:
        """Give the file its name, for good; :meth:`settle` was called.

        Raises:
            UsageError: something else than an earlier save has come to be there; it stays.
            OSError: it could not be done; the name is not (or no more) ours, and what it stood for before is as it was
                unless the folder itself failed.
        """
        name = self.path.name
        try:
            self._take_name(name)
        except FileExistsError:
            self._expect_replaceable()
            if not self._name:
                unused = _unused_name()
                self._take_name(unused)
                self._name = unused
            os.rename(self._name, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._name = ""
        try:
            os.fsync(self._folder)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._folder)
            raise

    def _take_name(self, name: str) -> None:
        """Give the file a name that is free.

        Raises:
            FileExistsError: it is not.
        """
        if not self._name:
            # Only with a directory's descriptor does Python ask for AT_SYMLINK_FOLLOW.
            os.link(f"/proc/self/fd/{self._fd}", name, dst_dir_fd=self._folder, follow_symlinks=True)
            return
        try:
            os.link(self._name, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            _rename_to_free(self._folder, self._name, name)
        else:
            os.unlink(self._name, dir_fd=self._folder)

    def close(self) -> None:
        """Close the file; one that was not committed is gone. May be called twice."""
        if self._fd < 0:
            return
        if self._name:
            with contextlib.suppress(OSError):
                os.unlink(self._name, dir_fd=self._folder)
        os.close(self._fd)
        os.close(self._folder)
        self._fd = self._folder = -1


def _open_new(folder: int) -> tuple[int, str]:
    """Make an empty file in a folder, readable by its owner only; return its descriptor, and its name if it has one.

    Raises:
        OSError: the folder refuses.
    """
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(".", flags | os.O_TMPFILE, _MODE, dir_fd=folder), ""
    except OSError as error:
        if error.errno not in _NO_TMPFILE:
            raise
    name = _unused_name()
    return os.open(name, flags | os.O_CREAT | os.O_EXCL, _MODE, dir_fd=folder), name


def _unused_name() -> str:
    return f".pageferry-{secrets.token_hex(16)}.part"


def _rename_to_free(folder: int, name: str, free: str) -> None:
    # SAFETY: both strings are this frame's until the call returns.
    if libc.renameat2(folder, os.fsencode(name), folder, os.fsencode(free), _RENAME_NOREPLACE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), free)  # FileExistsError, for that code
