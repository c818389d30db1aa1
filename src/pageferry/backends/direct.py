"""DirectIo: transfers between memory and a file that was opened with O_DIRECT, past the host's page cache.

Such a file takes whole blocks only, at block boundaries of the file and of memory. What a guest asks for otherwise goes
through a buffer of this process: a write that begins or ends inside a block reads that block first.

Source: open(2), *O_DIRECT*.
"""

import errno
import mmap
import os
from collections.abc import Callable, Sequence

import numpy as np

Transfer = Callable[[int, Sequence[memoryview], int], int]
_BLOCK_BYTES = (512, 1024, 2048, 4096)


def block_bytes_of(fd: int, size_bytes: int) -> int:
    """Return the smallest blocks that a file opened with O_DIRECT takes, found by reading some.

    Args:
        fd: the file.
        size_bytes: its size, at least 512 bytes.

    Raises:
        OSError: it takes none, or cannot be read.
    """
    memory = _memory(2 * _BLOCK_BYTES[-1])
    for block_bytes in _BLOCK_BYTES:
        at = block_bytes if size_bytes >= 2 * block_bytes else 0
        try:
            os.preadv(fd, [memory[block_bytes : 2 * block_bytes]], at)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            return block_bytes
    raise OSError(errno.EINVAL, f"it takes no blocks of up to {_BLOCK_BYTES[-1]} bytes")


class DirectIo:
    """Reads and writes of one file; one at a time.

    Args:
        fd: the file, of whole blocks; not closed here.
        block_bytes: what it is read and written in.
        preadv, pwritev: as those of :mod:`os`.
    """

    def __init__(
        self, fd: int, block_bytes: int, *, preadv: Transfer = os.preadv, pwritev: Transfer = os.pwritev
    ) -> None:
        self._fd = fd
        self._block_bytes = block_bytes
        self._preadv = preadv
        self._pwritev = pwritev

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill ``views``, one after another, from byte ``offset`` on.

        Raises:
            OSError: it cannot be read.
        """
        if self._aligned(views, offset):
            transfer_all(self._preadv, self._fd, views, offset)
            return
        begin, end = self._blocks(views, offset)
        blocks, at = _memory(end - begin), offset - begin
        transfer_all(self._preadv, self._fd, [blocks], begin)
        for view in views:
            view[:] = blocks[at : at + len(view)]
            at += len(view)

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write ``views``, one after another, from byte ``offset`` on.

        Raises:
            OSError: it cannot be written.
        """
        if self._aligned(views, offset):
            transfer_all(self._pwritev, self._fd, views, offset)
            return
        begin, end = self._blocks(views, offset)
        blocks, at = _memory(end - begin), offset - begin
        if at or sum(map(len, views)) < end - begin:
            transfer_all(self._preadv, self._fd, [blocks], begin)
        for view in views:
            blocks[at : at + len(view)] = view
            at += len(view)
        transfer_all(self._pwritev, self._fd, [blocks], begin)

    def _aligned(self, views: Sequence[memoryview], offset: int) -> bool:
        places = offset
        for view in views:
            places |= len(view) | np.frombuffer(view, np.uint8).ctypes.data
        return places % self._block_bytes == 0

    def _blocks(self, views: Sequence[memoryview], offset: int) -> tuple[int, int]:
        """Return where the blocks begin and end that a transfer touches."""
        end = offset + sum(map(len, views))
        return offset // self._block_bytes * self._block_bytes, -(-end // self._block_bytes) * self._block_bytes


def _memory(size_bytes: int) -> memoryview:
    """Return new memory, which begins at a page."""
    return memoryview(mmap.mmap(-1, size_bytes))


def transfer_all(transfer: Transfer, fd: int, views: Sequence[memoryview], offset: int) -> None:
    """Transfer all of ``views`` from byte ``offset`` of a file on, by as many calls as it takes.

    Raises:
        OSError: it cannot be done, or the file ends before.
    """
    left = list(views)
    wanted_bytes = sum(map(len, left))
    while left:
        moved = transfer(fd, left, offset)
        if moved == wanted_bytes:  # nearly always, at once
            return
        if not moved:
            raise OSError(errno.EIO, "the disk has become shorter")
        offset += moved
        wanted_bytes -= moved
        while left and moved >= len(left[0]):
            moved -= len(left.pop(0))
        if moved:
            left[0] = left[0][moved:]
