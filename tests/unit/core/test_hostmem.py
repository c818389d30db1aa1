import resource
import threading

import numpy as np
import pytest

from pageferry.core.errors import UsageError, VmError
from pageferry.core.hostmem import MemFd, atomic_or_u32


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
