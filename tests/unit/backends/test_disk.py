"""Disk files: which files are taken, and which process owns one."""

import fcntl
import os
import struct
from pathlib import Path

import pytest

from pageferry.backends.disk import DiskFile
from pageferry.core.errors import UsageError, VmError


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "disk"
    path.write_bytes(bytes(range(256)) * 16)
    return path


def test_what_is_not_a_disk_is_refused_by_name(tmp_path, path):
    odd, empty, fifo = tmp_path / "odd", tmp_path / "empty", tmp_path / "fifo"
    odd.write_bytes(bytes(513))
    empty.touch()
    os.mkfifo(fifo)
    for wrong in (tmp_path / "missing", odd, empty, tmp_path, Path("/proc/version")):
        with pytest.raises(UsageError, match=wrong.name):
            DiskFile(wrong, readonly=True)
    for readonly in (True, False):
        with pytest.raises(UsageError, match="fifo"):
            DiskFile(fifo, readonly=readonly)


def test_one_process_writes_or_several_read(path):
    one, two = DiskFile(path, readonly=False), DiskFile(path, readonly=False)
    one.claim()
    one.claim()
    with pytest.raises(VmError, match="in use"):
        two.claim()
    with pytest.raises(VmError, match="in use"):
        DiskFile(path, readonly=True).claim()
    one.release()
    one.release()
    two.claim()
    with pytest.raises(VmError, match="in use"):
        one.claim()
    two.close()
    readers = [DiskFile(path, readonly=True) for _ in range(2)]
    for reader in readers:
        reader.claim()
    with pytest.raises(VmError, match="in use"):
        one.claim()
    for reader in readers:
        reader.close()
        reader.close()
    one.claim()
    one.close()


def test_a_lock_of_another_program_counts(path):
    other = os.open(path, os.O_RDWR)
    fcntl.fcntl(other, fcntl.F_OFD_SETLK, struct.pack("hh4xqqi4x", fcntl.F_RDLCK, 0, 100, 1, 0))
    disk = DiskFile(path, readonly=False)
    with pytest.raises(VmError, match="in use"):
        disk.claim()
    os.close(other)
    disk.claim()
    disk.close()


def test_nothing_is_done_with_a_disk_that_is_not_claimed(path):
    disk = DiskFile(path, readonly=False)
    before = path.read_bytes()
    for act in (
        lambda: disk.read([memoryview(bytearray(8))], 0),
        lambda: disk.write([memoryview(b"8 bytes.")], 0),
        disk.flush,
        lambda: disk.discard(0, 4096),
        lambda: disk.write_zeroes(0, 4096, unmap=True),
    ):
        with pytest.raises(OSError, match="not this process's"):
            act()
    assert path.read_bytes() == before
    disk.close()


def test_bytes_go_where_they_belong(path):
    disk = DiskFile(path, readonly=False)
    disk.claim()
    parts = [bytearray(n) for n in (1, 300, 0, 211)]
    disk.read([memoryview(part) for part in parts], 512)
    assert b"".join(parts) == path.read_bytes()[512:1024]
    disk.write([memoryview(b"x" * 500), memoryview(b"y" * 12)], 1024)
    assert path.read_bytes()[1024:1536] == b"x" * 500 + b"y" * 12
    with pytest.raises(OSError, match="shorter"):
        disk.read([memoryview(bytearray(1024))], 3584)
    disk.close()
