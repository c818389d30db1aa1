"""Transfers past the page cache: in whole blocks, whatever the guest asks for."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from pageferry.backends.direct import DirectIo, block_bytes_of
from pageferry.backends.disk import DiskFile
from pageferry.core.errors import UsageError

BLOCK_BYTES = 4096
FILE_BYTES = 8 * BLOCK_BYTES


class Strict:
    """Transfers of an ordinary file that take whole blocks only, as those past the page cache do; counts them."""

    def __init__(self):
        self.calls = 0

    def _expect_blocks(self, views, offset):
        self.calls += 1
        places = [
            offset,
            *(len(view) for view in views),
            *(np.frombuffer(view, np.uint8).ctypes.data for view in views),
        ]
        assert [place % BLOCK_BYTES for place in places] == [0] * len(places)

    def preadv(self, fd, views, offset):
        self._expect_blocks(views, offset)
        return os.preadv(fd, views, offset)

    def pwritev(self, fd, views, offset):
        self._expect_blocks(views, offset)
        return os.pwritev(fd, views, offset)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(np.random.default_rng(1).bytes(FILE_BYTES))
    return path


@pytest.fixture
def strict():
    return Strict()


@pytest.fixture
def direct(path, strict):
    fd = os.open(path, os.O_RDWR)
    yield DirectIo(fd, BLOCK_BYTES, preadv=strict.preadv, pwritev=strict.pwritev)
    os.close(fd)


@pytest.fixture
def memory():
    return memoryview(mmap.mmap(-1, FILE_BYTES))


#: Where in memory and in the file a transfer is, and the sizes of its pieces: from aligned to not at all.
TRANSFERS = [
    (0, 0, (FILE_BYTES,)),
    (BLOCK_BYTES, BLOCK_BYTES, (BLOCK_BYTES, 2 * BLOCK_BYTES)),
    (512, 0, (BLOCK_BYTES,)),
    (0, 512, (512,)),
    (0, 3584, (1024,)),
    (0, 512, (BLOCK_BYTES, 3 * BLOCK_BYTES)),
    (7, FILE_BYTES - 512, (100, 412)),
]


def pieces(memory, at, sizes):
    views = []
    for size in sizes:
        views.append(memory[at : at + size])
        at += size
    return views


@pytest.mark.parametrize(("at", "offset", "sizes"), TRANSFERS)
def test_what_is_read_is_what_the_file_has(direct, path, memory, at, offset, sizes):
    views = pieces(memory, at, sizes)
    direct.read(views, offset)
    assert b"".join(views) == path.read_bytes()[offset : offset + sum(sizes)]


@pytest.mark.parametrize(("at", "offset", "sizes"), TRANSFERS)
def test_what_is_written_is_there_and_what_is_beside_it_stays(direct, path, memory, at, offset, sizes):
    expected = bytearray(path.read_bytes())
    memory[:] = bytes(255 - byte for byte in path.read_bytes())
    views = pieces(memory, at, sizes)
    expected[offset : offset + sum(sizes)] = b"".join(views)
    direct.write([view.toreadonly() for view in views], offset)
    assert path.read_bytes() == expected


def test_what_is_aligned_goes_straight(direct, strict, memory):
    direct.read([memory[:BLOCK_BYTES]], 0)
    direct.write([memory[:BLOCK_BYTES]], 0)
    assert strict.calls == 2
    direct.write([memory[512 : 512 + BLOCK_BYTES]], 0)
    assert strict.calls == 3, "whole blocks are not read first"


@pytest.fixture
def disk(path):
    try:
        disk = DiskFile.named(f"{path},direct", readonly=False)
    except UsageError as error:
        pytest.skip(f"{error} ({error.hint})")
    disk.claim()
    yield disk
    disk.close()


def test_a_disk_past_the_page_cache_is_read_and_written_as_any_other(disk, path, memory):
    assert disk.path == path
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    assert block_bytes_of(fd, FILE_BYTES) in (512, 1024, 2048, 4096)
    os.close(fd)
    disk.write([memoryview(b"x" * 700), memoryview(b"y" * 324)], 1536)
    disk.write_zeroes(512, 1024, unmap=False)
    disk.flush()
    disk.read([memory[3:2563]], 0)
    assert memory[515:2563] == bytes(1024) + b"x" * 700 + b"y" * 324
    assert memory[3:515] == path.read_bytes()[:512]


def test_a_file_system_that_cannot_is_refused_with_a_hint():
    number = Path("/sys/kernel/uevent_seqnum")  # of sysfs, where each file seems to have a page
    DiskFile.named(str(number), readonly=True).close()
    with pytest.raises(
        UsageError, match="uevent_seqnum cannot be used past the page cache: Invalid argument"
    ) as refused:
        DiskFile.named(f"{number},direct", readonly=True)
    assert refused.value.hint == "its file system has no O_DIRECT: leave out ,direct"
