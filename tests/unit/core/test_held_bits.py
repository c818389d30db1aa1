"""HeldBits: on and off, marks and whole bitmaps, ranges that are taken, and marks that race with OFF and CLEAN."""

import threading

import numpy as np
import pytest
from altered import alter

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import LogDirtyError
from pageferry.core.held_bits import HeldBits
from pageferry.core.memory import GuestMemory

PAGES = 514


def gfns(*numbers):
    return np.array(numbers, np.uint64)


@pytest.fixture
def memory():
    return GuestMemory.linear(PAGES * 4096)


@pytest.fixture
def held(memory):
    bits = HeldBits(memory)
    bits.begin()
    return bits


def test_off_at_first_marks_do_nothing_and_the_rest_is_refused(memory):
    bits = HeldBits(memory)
    assert not bits.on
    bits.mark(gfns(1))
    bits.set(gfns(1))
    for refused in (bits.expect_on, bits.copy, lambda: bits.take(range(64)), lambda: bits.add(DirtyBitmap(PAGES))):
        with pytest.raises(LogDirtyError, match="log-dirty is off"):
            refused()
    bits.begin()
    assert bits.on
    assert not bits.copy().any()


def test_every_beginning_is_clear(held):
    held.mark(gfns(1))
    held.end()
    held.end()
    assert not held.on
    held.mark(gfns(2))
    for _ in range(2):
        held.begin()
        assert not held.copy().any()
        held.mark(gfns(3))


def test_marks_of_what_is_not_ram_are_ignored(held):
    held.mark(gfns(PAGES - 1, PAGES, 1 << 51, 3))
    assert held.copy().gfns().tolist() == [3, PAGES - 1]


def test_bits_that_are_added_and_set_come_to_those_there(held):
    added = DirtyBitmap.of(PAGES, [5, 70])
    held.set(gfns(1))
    held.add(added)
    added.set(9)
    held.set(gfns(2))
    assert held.copy().gfns().tolist() == [1, 2, 5, 70]
    held.add(DirtyBitmap.of(PAGES, [64, 130]), slice(1, 2))
    assert held.copy().gfns().tolist() == [1, 2, 5, 64, 70]


def test_a_copy_is_the_callers(held):
    held.copy().set(7)
    assert not held.copy().any()


def test_a_range_is_taken_and_the_others_stay(held):
    held.set(gfns(0, 63, 64, 127, 128, PAGES - 1))
    taken = held.take(range(64, 128))
    assert (taken.nbits, taken.gfns().tolist()) == (PAGES, [64, 127])
    assert held.copy().gfns().tolist() == [0, 63, 128, PAGES - 1]
    with pytest.raises(ValueError, match="whole words"):
        held.take(range(1, 64))
    assert held.take(range(PAGES)).count() == 4


def test_a_mark_that_off_overtakes_is_not_an_error(held, memory):
    alter(memory, "are_ram", lambda are_ram: lambda asked: (held.end(), are_ram(asked))[1])
    held.mark(gfns(3))
    assert not held.on


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held.mark(gfns(3)),
        lambda held: held.set(gfns(3)),
        lambda held: held.add(DirtyBitmap.of(PAGES, 3)),
        lambda held: held.take(range(PAGES)),
    ],
    ids=["mark", "set", "add", "take"],
)
def test_each_change_waits_for_the_lock(held, change):
    held.set(gfns(5))
    with held._lock:
        other = threading.Thread(target=change, args=(held,))
        other.start()
        assert held._bits.gfns().tolist() == [5]
    other.join()
    assert held.copy().gfns().tolist() != [5]
