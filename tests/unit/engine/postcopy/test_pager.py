"""DemandPager by itself: who waits for what, what is brought first, and how it ends. No socket, file or vCPU."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from at_work import until

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.memory import GuestMemory
from pageferry.engine.postcopy.pager import DemandPager, can_wait

#: In the order in which they are best brought.
ORDER = np.array([900, 901, 7, 3, 4, 5], np.uint64)


def gfns(*numbers):
    return np.array(numbers, np.uint64)


def content(frames):
    """Each page is full of its own number."""
    return frames.repeat(PAGE_SIZE // 8).view(np.uint8)


class Arrival:
    """What a machine does with absent pages: writes them to memory, and keeps a list."""

    def __init__(self, memory):
        self.memory = memory
        self.installed = []
        self.calls = []
        self.refuses = False

    def install(self, frames, data):
        if self.refuses:
            raise VmError("no memory")
        self.installed += frames.tolist()
        for frame, page in zip(frames.tolist(), data.reshape(-1, PAGE_SIZE), strict=True):
            self.memory.mapping.view[frame * PAGE_SIZE : (frame + 1) * PAGE_SIZE] = page.data

    def finish(self):
        self.calls.append("finish")

    def close(self):
        self.calls.append("close")


class Machine:
    def __init__(self):
        self.memory = GuestMemory.linear(8 << 20)
        self.arrival = Arrival(self.memory)

    def await_memory(self, fetch, absent):
        self.absent = absent
        return self.arrival


class Toucher:
    """Touches pages on a thread of its own."""

    def __init__(self, pager, frames):
        self.error = None
        self._pager, self._frames = pager, frames
        self._thread = threading.Thread(target=self._touch, daemon=True)
        self._thread.start()

    def _touch(self):
        try:
            self._pager.fetch(self._frames)
        except VmError as error:
            self.error = error

    @property
    def waits(self):
        return self._thread.is_alive()

    def done(self):
        self._thread.join(60)
        assert not self.waits


@pytest.fixture
def machine():
    made = Machine()
    yield made
    made.memory.close()


@pytest.fixture
def needs():
    return threading.Semaphore(0)


@pytest.fixture
def pager(machine, needs):
    made = DemandPager(machine, ORDER, needs.release)
    yield made
    made.close()


@pytest.fixture
def touch(pager, needs):
    """A thread touches missing pages, and has said that it needs them."""

    def begin(*numbers):
        toucher = Toucher(pager, gfns(*numbers))
        assert needs.acquire(timeout=60)
        return toucher

    return begin


def bring(pager, frames):
    pager.install(frames, content(frames))


def test_pages_are_brought_in_the_order_given_each_once(machine, pager):
    assert pager.missing_pages == 6
    assert machine.absent.gfns().tolist() == sorted(ORDER.tolist())
    assert pager.ahead(3).tolist() == [7, 900, 901]  # ascending within what is brought at once
    assert pager.coming_pages == 3
    assert pager.ahead(100).tolist() == [3, 4, 5]
    assert pager.ahead(100).size == 0
    bring(pager, gfns(7, 900, 901))
    assert (pager.missing_pages, pager.coming_pages) == (3, 3)
    assert machine.memory.read(900 * PAGE_SIZE, 8) == (900).to_bytes(8, "little")


def test_pages_that_are_waited_for_come_first_and_are_not_brought_again(pager, touch):
    toucher = touch(4, 901)
    assert pager.needed(1).tolist() == [4]
    assert pager.needed(100).tolist() == [901]
    assert pager.needed(100).size == 0
    assert pager.ahead(100).tolist() == [3, 5, 7, 900]
    bring(pager, gfns(4))
    (need,) = pager._needs
    assert not need.met.is_set()
    bring(pager, gfns(901))
    toucher.done()
    assert toucher.error is None
    assert pager._needs == []
    assert pager.waits_ns().size == 1


def test_a_page_that_is_under_way_already_is_waited_for_and_not_asked_for(pager, touch):
    assert pager.ahead(2).tolist() == [900, 901]
    toucher = touch(900)
    assert pager.needed(100).size == 0
    bring(pager, gfns(900, 901))
    toucher.done()


def test_many_who_wait_for_one_page_are_all_let_go(pager, touch):
    touchers = [touch(3), touch(3, 4), touch(4)]
    assert pager.needed(100).tolist() == [3, 4]
    bring(pager, gfns(3, 4))
    for toucher in touchers:
        toucher.done()
    assert pager.waits_ns().tolist() == sorted(pager.waits_ns().tolist())
    assert pager.waits_ns().size == 3


def test_one_who_touches_a_great_deal_waits_step_by_step(machine, needs):
    pager = DemandPager(machine, np.arange(200, dtype=np.uint64), needs.release)
    toucher = Toucher(pager, np.arange(200, dtype=np.uint64))
    steps = []
    while sum(steps) < 200:
        assert needs.acquire(timeout=60)
        wanted = pager.needed(1000)
        steps.append(wanted.size)
        bring(pager, wanted)
    toucher.done()
    assert steps == [64, 64, 64, 8]
    pager.close()


def test_what_is_absent_and_not_missing_is_zero_at_once(machine, pager, needs):
    pager.fetch(gfns(100, 101, 1 << 40))
    pager.fetch(gfns(100))
    assert machine.arrival.installed == [100, 101]
    assert not needs.acquire(blocking=False)
    assert pager.waits_ns().size == 0


def test_what_has_storage_and_is_not_missing_waits_for_nothing(machine, needs):
    machine.memory.write(50 * PAGE_SIZE, b"here")
    pager = DemandPager(machine, ORDER, needs.release)
    pager.fetch(gfns(50))
    assert machine.arrival.installed == []
    pager.close()


def test_after_a_cut_all_that_was_under_way_is_brought_anew_and_what_came_is_not(pager, touch):
    toucher = touch(5)
    assert pager.needed(100).tolist() == [5]
    assert pager.ahead(3).tolist() == [7, 900, 901]
    bring(pager, gfns(900))
    assert pager.are_coming(gfns(5, 901))
    assert not pager.are_coming(gfns(5, 900))
    assert not pager.are_coming(gfns(1 << 40))
    pager.start_over()
    assert pager.coming_pages == 0
    assert not pager.are_coming(gfns(5))
    assert pager.needed(100).tolist() == [5]
    assert pager.ahead(2).tolist() == [7, 901]
    assert pager.ahead(100).tolist() == [3, 4]
    bring(pager, gfns(5))
    toucher.done()


def test_a_page_that_the_host_refuses_stays_missing(machine, pager, touch):
    toucher = touch(3)
    frames = pager.needed(100)
    machine.arrival.refuses = True
    with pytest.raises(VmError, match="no memory"):
        bring(pager, frames)
    assert (pager.missing_pages, toucher.waits) == (6, True)
    machine.arrival.refuses = False
    pager.start_over()
    bring(pager, pager.needed(100))
    toucher.done()


def test_a_page_that_comes_is_marked_after_it_is_there(machine, pager):
    """Law 4."""
    marked = []
    machine.memory.on_write(lambda frames: marked.append((frames.tolist(), list(machine.arrival.installed))))
    bring(pager, pager.ahead(2))
    assert marked == [([900, 901], [900, 901])]


def test_a_guest_that_is_given_up_releases_waiting_threads_and_takes_nothing_more(machine, pager, touch, needs):
    toucher = touch(3)
    frames = pager.needed(100)
    pager.close()
    toucher.done()
    assert "given up before all its pages had come" in str(toucher.error)
    assert pager.over
    bring(pager, frames)
    assert machine.arrival.installed == []
    assert (pager.needed(100).size, pager.ahead(100).size) == (0, 0)
    with pytest.raises(VmError, match="given up"):
        pager.fetch(gfns(900))
    pager.fetch(gfns(100))  # no page of anybody's: memory ends as zeros
    assert machine.arrival.installed == []


def test_the_end_comes_once_however_often_it_is_said(machine, pager):
    closers = [threading.Thread(target=pager.close) for _ in range(4)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join()
    assert machine.arrival.calls == ["finish", "close"]


def test_no_thread_waits_when_all_pages_have_come(pager):
    while (frames := pager.ahead(4)).size:
        bring(pager, frames)
    pager.close()
    pager.fetch(ORDER)
    assert pager.missing_pages == 0


def test_four_touch_everything_at_random_while_one_brings_it(machine, needs):
    frames = np.arange(1, 2000, dtype=np.uint64)
    pager = DemandPager(machine, frames, needs.release)
    touchers = [Toucher(pager, np.random.default_rng(seed).permutation(frames)) for seed in range(4)]
    while pager.missing_pages:
        wanted = pager.needed(10)
        wanted = wanted if wanted.size else pager.ahead(10)
        bring(pager, wanted)
    until(lambda: not any(toucher.waits for toucher in touchers), "end of the waiting")
    assert sorted(machine.arrival.installed) == frames.tolist()
    pager.close()


def test_whether_a_machine_can_wait_is_found_out_by_trying(machine):
    assert can_wait(machine)
    assert machine.arrival.calls == ["finish", "close"]

    def refuse(fetch, absent):
        raise UnsupportedError("userfaultfd", "no", hint="")

    assert not can_wait(SimpleNamespace(memory=machine.memory, await_memory=refuse))
