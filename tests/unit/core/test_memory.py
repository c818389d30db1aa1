import gc
import os

import numpy as np
import pytest

from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.frames import PAGE_SIZE, gfns_touched
from pageferry.core.hostmem import HostMapping, available_bytes
from pageferry.core.memory import GuestMemory

MiB = 1 << 20
GiB = 1 << 30


def u64(*values):
    return np.array(values, np.uint64)


def test_memory_of_a_larger_guest_has_the_pci_hole_in_it():
    memory = GuestMemory.linear(5 * GiB)
    assert memory.gfn_limit == (6 * GiB) >> 12
    assert memory.all_ram().count() == memory.pages == (5 * GiB) >> 12
    memory.write(4 * GiB, b"above")
    assert memory.read(4 * GiB, 5) == b"above"
    for gpa in (3 * GiB, 4 * GiB - 1, 3 * GiB - 2, 6 * GiB - 4):
        with pytest.raises(VmError, match="not RAM"):
            memory.write(gpa, b"outside")
    with pytest.raises(VmError):
        memory.views(u64((3 * GiB >> 12) - 1), u64(2))
    assert memory.are_ram(u64(0, 3 * GiB >> 12, 4 * GiB >> 12, 6 * GiB >> 12)).tolist() == [True, False, True, False]


def test_untouched_memory_is_not_populated_and_reads_as_zero():
    memory = GuestMemory.linear(64 * MiB)
    memory.write(10 * PAGE_SIZE + 5, b"x" * PAGE_SIZE)
    memory.write(63 * MiB, b"y")
    assert expand_runs(*memory.populated()).tolist() == [10, 11, 63 * 256]
    memory.populate(u64(100), u64(3))
    assert expand_runs(*memory.populated()).tolist() == [10, 11, 100, 101, 102, 63 * 256]
    assert memory.read(100 * PAGE_SIZE, 8) == bytes(8)


def test_law_4_every_write_marks_after_writing():
    memory = GuestMemory.linear(4 * MiB)
    seen = []

    def mark(gfns):
        seen.append((gfns.tolist(), memory.read(0x3FFE, 4)))

    memory.on_write(mark)
    memory.write(0x3FFE, b"abcd")
    assert seen == [([3, 4], b"abcd")]
    memory.copy_within(0x3FFE, 0x3FFD, 4)
    assert seen[1] == ([3, 4], b"bcdd")
    assert memory.read(0x3FFD, 4) == b"abcd"
    memory.write(0x100, b"")
    assert len(seen) == 2
    with pytest.raises(VmError):
        memory.write(4 * MiB - 1, b"12")
    assert len(seen) == 2


def test_views_are_the_memory_and_outlive_it():
    memory = GuestMemory.linear(4 * MiB)
    first, second = memory.views(u64(3, 9), u64(2, 1))
    assert (len(first), len(second)) == (2 * PAGE_SIZE, PAGE_SIZE)
    first[0:3] = b"abc"
    assert memory.read(3 * PAGE_SIZE, 3) == b"abc"
    del memory
    gc.collect()
    second[0:1] = b"z"
    assert bytes(first[0:3]) == b"abc"


def test_a_run_is_ram_if_one_region_has_all_of_it():
    memory = GuestMemory.linear(4 * GiB)
    hole = (3 * GiB) >> 12
    assert memory.holds(range(hole - 2, hole))
    assert not memory.holds(range(hole - 2, hole + 1))
    assert not memory.holds(range(hole - 2, (4 * GiB >> 12) + 1))
    assert memory.holds(range(4 * GiB >> 12, 5 * GiB >> 12))
    assert not memory.holds(range(4 * GiB >> 12, (5 * GiB >> 12) + 1))
    memory.remove(u64(5))
    assert memory.holds(range(3, 5))
    assert not memory.holds(range(3, 6))


def test_the_view_of_a_run_is_the_memory():
    memory = GuestMemory.linear(4 * MiB)
    memory.view(range(3, 5))[4095:4098] = b"abc"
    assert memory.read(3 * PAGE_SIZE + 4095, 3) == b"abc"
    with pytest.raises(VmError):
        memory.view(range(1023, 1025))


def test_frames_touched():
    assert gfns_touched(0, 0).size == 0
    assert gfns_touched(0xFFF, 1).tolist() == [0]
    assert gfns_touched(0xFFF, 2).tolist() == [0, 1]


def test_the_host_tells_what_it_can_give():
    assert 0 < available_bytes() < 1 << 50


def test_what_is_released_has_no_storage_reads_as_zeros_and_is_marked():
    memory = GuestMemory.linear(3 * GiB + 2 * PAGE_SIZE)
    end = 4 * GiB + 2 * PAGE_SIZE
    for gpa in (0, 3 * PAGE_SIZE, end - 2 * PAGE_SIZE):
        memory.write(gpa, b"\xff" * (2 * PAGE_SIZE))
    marked = []
    memory.on_write(lambda gfns: marked.extend(gfns.tolist()))
    assert memory.release(((0, PAGE_SIZE), (end - PAGE_SIZE, PAGE_SIZE)))
    assert marked == [0, (end >> 12) - 1]
    assert expand_runs(*memory.populated()).tolist() == [1, 3, 4, (end >> 12) - 2]
    assert memory.read(0, PAGE_SIZE) == memory.read(end - PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
    with pytest.raises(VmError):
        memory.release(((3 * PAGE_SIZE, PAGE_SIZE), (3 * GiB, PAGE_SIZE)))
    assert memory.read(3 * PAGE_SIZE, 1) == b"\xff"


def test_pages_that_are_absent_are_not_fetched_to_be_released():
    memory = GuestMemory.linear(16 * MiB)
    memory.write(PAGE_SIZE, b"\xff")
    fetched, marked = [], []
    memory.on_touch(lambda gfns: fetched.extend(gfns.tolist()))
    memory.on_write(lambda gfns: marked.extend(gfns.tolist()))
    assert not memory.release(((PAGE_SIZE, PAGE_SIZE),))
    with pytest.raises(VmError):
        memory.release(((PAGE_SIZE, PAGE_SIZE), (16 * MiB, PAGE_SIZE)))
    assert (fetched, marked) == ([], [])
    assert memory.read(PAGE_SIZE, 1) == b"\xff"


def test_a_second_mapping_shows_the_same_bytes_at_the_same_places_and_outlives_the_first():
    memory = GuestMemory.linear(3 * GiB + 2 * PAGE_SIZE)
    again = memory.map_again()
    assert again.hva != memory.mapping.hva
    for gpa in (0, 3 * GiB - 8, 4 * GiB + 2 * PAGE_SIZE - 8):
        memory.write(gpa, b"by host ")
        assert again.view[gpa : gpa + 8] == b"by host "
        again.view[gpa : gpa + 8] = b"by guest"
        assert memory.read(gpa, 8) == b"by guest"
    assert expand_runs(*memory.populated()).tolist() == [0, (3 * GiB >> 12) - 1, (4 * GiB >> 12) + 1]
    del memory
    gc.collect()
    assert again.view[4 * GiB + 2 * PAGE_SIZE - 8 : 4 * GiB + 2 * PAGE_SIZE] == b"by guest"


def test_a_second_mapping_outside_the_first_is_refused():
    memory = GuestMemory.linear(2 * MiB)
    with pytest.raises(IndexError):
        HostMapping(4 * MiB).map_same(memory.mapping, 2 * MiB, PAGE_SIZE)


def test_what_is_not_a_shared_memory_cannot_be_mapped_twice():
    with pytest.raises(UnsupportedError, match="mapped a second time"):
        HostMapping(2 * MiB).map_same(HostMapping(2 * MiB), 0, PAGE_SIZE)


def test_memory_that_was_closed_holds_no_file_though_it_is_still_held_itself():
    memory = GuestMemory.linear(8 * MiB)
    memory.write(0, b"content")
    fd = memory.storage.fd
    memory.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    memory.close()
    assert memory.read(0, 7) == bytes(7)
