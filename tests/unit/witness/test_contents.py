import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.memory import GuestMemory
from pageferry.witness.contents import Contents

GiB = 1 << 30


def changed(contents, memory, *, keep=True):
    return contents.changed(memory.all_ram(), keep=keep).gfns().tolist()


def test_what_changed_since_the_reading_that_was_kept():
    memory = GuestMemory.linear(2 << 20)
    memory.write(0x3000, b"old")
    contents = Contents(memory)
    assert changed(contents, memory) == [3]
    memory.write(0x3FFF, b"ab")
    assert changed(contents, memory, keep=False) == [3, 4]
    assert contents.changed(DirtyBitmap.of(memory.gfn_limit, [4, 5]), keep=True).gfns().tolist() == [4]
    assert changed(contents, memory) == [3]
    memory.write(0x3000, b"old")
    memory.write(0x3FFF, b"\0")
    assert changed(contents, memory) == [3]


def test_pages_without_storage_stay_so_and_the_hole_is_not_read():
    memory = GuestMemory.linear(3 * GiB + 5 * 4096)
    memory.write(4 * GiB + 4096, b"last")
    before = memory.populated()[1].sum()
    assert changed(Contents(memory), memory) == [(4 * GiB >> 12) + 1]
    assert memory.populated()[1].sum() == before


def test_removed_frames_are_not_read():
    memory = GuestMemory.linear(2 << 20)
    memory.write(0x3000, b"gone")
    memory.remove(np.array([3], np.uint64))
    assert not Contents(memory).changed(DirtyBitmap.of(memory.gfn_limit, 3), keep=True).any()


def test_a_page_of_zeros_is_as_one_without_storage():
    memory = GuestMemory.linear(2 << 20)
    memory.write(0x3000, bytes(4096))
    assert changed(Contents(memory), memory) == []


def test_as_many_pages_as_there_are():
    memory = GuestMemory.linear((8 << 20) + 3 * 4096)
    pages = np.frombuffer(memory.mapping.view, np.uint64).reshape(-1, 512)
    contents = Contents(memory)
    pages[:, 7] = np.arange(len(pages), dtype=np.uint64)
    assert changed(contents, memory) == list(range(1, len(pages)))
    pages[1023:1026, 500] = 1
    pages[-1, 500] = 1
    assert changed(contents, memory) == [1023, 1024, 1025, len(pages) - 1]


WORDS = st.dictionaries(st.integers(0, 511), st.integers(1, (1 << 64) - 1), min_size=1, max_size=4)


@given(flips=WORDS)
def test_any_few_flipped_bits_show(flips):
    memory = GuestMemory.linear(2 << 20)
    memory.write(0x3000, bytes(range(256)) * 16)
    contents = Contents(memory)
    changed(contents, memory)
    words = np.frombuffer(memory.mapping.view, np.uint64)
    for word, bits in flips.items():
        words[3 * 512 + word] ^= np.uint64(bits)
    assert changed(contents, memory) == [3]
