import resource
import threading

import numpy as np
import pytest

from pageferry.core.errors import UsageError, VmError
from pageferry.core.hostmem import HostMapping, MemFd, atomic_or_u32


def test_an_atomic_or_sets_bits_and_touches_nothing_else():
    words = np.array([0x8000_0000_0000_0081, 0xFFFF_FFFF_FFFF_FF00, 7], np.uint64)
    atomic_or_u32(words.ctypes.data + 8, 0x60)
    assert words.tolist() == [0x8000_0000_0000_0081, 0xFFFF_FFFF_FFFF_FF60, 7]
    atomic_or_u32(words.ctypes.data, 0x7FF)
    assert words[0] == 0x8000_0000_0000_07FF


def test_threads_that_set_bits_of_one_word_lose_none():
    words = np.zeros(512, np.uint64)

    def set_bits(bit):
        for i in range(words.size):
            atomic_or_u32(words.ctypes.data + 8 * i, 1 << bit)

    threads = [threading.Thread(target=set_bits, args=(bit,)) for bit in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (words == 0xF).all()


def test_an_address_that_is_not_mapped_is_an_error():
    with pytest.raises(VmError, match="futex"):
        atomic_or_u32(0x10, 1)


def test_a_limit_of_files_that_guest_memory_meets_is_named():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(UsageError, match="cannot hold 2097152 bytes of guest memory") as refused:
            MemFd("ram", 2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "raise ulimit -f" in refused.value.hint


def test_a_device_is_mapped_where_it_is_told_and_nowhere_else(tmp_path):
    mapping = HostMapping(3 << 12)
    mapping.map_private(0, 3 << 12)
    (tmp_path / "device").write_bytes(b"x" * 4096)
    with (tmp_path / "device").open("r+b") as device:
        mapping.map_device(device.fileno(), 1 << 12, 1 << 12, writable=True)
        assert bytes(mapping.view) == bytes(4096) + b"x" * 4096 + bytes(4096)
        mapping.view[1 << 12] = ord("y")
        assert (tmp_path / "device").read_bytes()[:2] == b"yx"
        with pytest.raises(IndexError):
            mapping.map_device(device.fileno(), 3 << 12, 1 << 12, writable=False)
    with pytest.raises(VmError, match="mmap"):
        mapping.map_device(-1, 0, 1 << 12, writable=False)
