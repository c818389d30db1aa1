"""FileOutlet: a file that comes into being whole or not at all, written as a connection is: gathered, in order.

What is written goes to ``NAME.part`` beside it, which nobody else can read, since it holds a guest's memory. A rename
makes it NAME when it is on the disk. What a killed process left under that name is taken over by the next one.
"""

import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

from pageferry.core.errors import UsageError
from pageferry.engine.wire.pacer import Pacer
from pageferry.stream.format import IMAGE_HEADER, IMAGE_ID, MARKER

_MAX_BUFFERS = 1024  # IOV_MAX
_MODE = 0o600


def _may_replace(path: Path) -> bool:
    """Whether what is there is empty or a libxc stream, as far as its first bytes tell."""
    with path.open("rb") as file:
        begin = file.read(IMAGE_HEADER.size)
    if not begin:
        return True
    return len(begin) == IMAGE_HEADER.size and IMAGE_HEADER.unpack(begin)[:2] == (MARKER, IMAGE_ID)


class FileOutlet:
    """One file on its way; an :class:`~pageferry.engine.pages.send.Outlet`.

    Args:
        path: what it will be called; what is there now stays until :meth:`commit`.

    Raises:
        UsageError: something else than an earlier one is there, or another process is writing it.
        OSError: the folder does not exist or refuses.
    """

    def __init__(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise UsageError(f"{path} is no regular file", hint="a guest is saved to a file of its own")
            if not _may_replace(path):
                raise UsageError(
                    f"{path} is there and is no saved guest", hint="choose another name, or remove it first"
                )
        self.path = path
        self.part = path.with_name(f"{path.name}.part")
        self.pacer: Pacer | None = None
        self._aborted = threading.Event()
        self.sent_bytes = 0
        self._fd = _open_alone(self.part)

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
            written = os.writev(self._fd, queue[at : at + _MAX_BUFFERS])
            self.sent_bytes += written
            while at < len(queue) and written >= len(queue[at]):
                written -= len(queue[at])
                at += 1
            if written:
                queue[at] = queue[at][written:]

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
            OSError: it could not be done; the name is not (or no more) ours, and what it stood for before is as it was
                unless the folder itself failed.
        """
        os.rename(self.part, self.path)
        try:
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            raise

    def close(self) -> None:
        """Close the file; one that was not committed is removed. May be called twice."""
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._fd), os.stat(self.part)):
                os.unlink(self.part)
        os.close(self._fd)
        self._fd = -1


def _open_alone(path: Path) -> int:
    """Open a file for writing, empty, and lock it; what nobody holds is taken over.

    Raises:
        UsageError: another process holds it.
        OSError: it cannot be made.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, _MODE)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(fd), os.stat(path)):  # or its owner has just renamed or removed it
                os.fchmod(fd, _MODE)
                os.ftruncate(fd, 0)
                return fd
        except FileNotFoundError:
            pass
        except BlockingIOError as error:
            os.close(fd)
            raise UsageError(f"{path} is being written already", hint="wait, or choose another name") from error
        except OSError as error:
            os.close(fd)
            if error.errno == errno.EINVAL:
                raise UsageError(f"{path} is no regular file") from error
            raise
        os.close(fd)
