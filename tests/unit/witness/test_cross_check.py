"""The witness's rule, with scripted trackers over real memory: every loss is found, and nothing else is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import LogDirtyError, LostPageError, VmError
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import LogDirtyStats
from pageferry.witness.cross_check import CrossCheck
from pageferry.witness.ledger import WitnessCounts

MEMORY_BYTES = (2 << 20) + 3 * 4096
PAGES = MEMORY_BYTES >> 12


class Scripted:
    """A sound tracker of bits that the test sets; ``refuse`` makes ENABLE fail."""

    def __init__(self, name, *, refuse=False):
        self.tracker = name
        self.refuse = refuse
        self.bits = None
        self.closed = 0

    @property
    def enabled(self):
        return self.bits is not None

    def enable(self):
        if self.refuse:
            raise VmError("no")
        if self.enabled:
            raise LogDirtyError("on")
        self.bits = DirtyBitmap(PAGES)

    def _on(self):
        if self.bits is None:
            raise LogDirtyError("off")
        return self.bits

    def peek(self):
        return self._on().copy()

    def clean(self):
        return self.clean_range(range(PAGES))

    def clean_range(self, gfns):
        return self._on().take(gfns)

    def off(self):
        self.bits = None

    def mark(self, gfns):
        if self.bits is not None:
            self.bits.set(gfns)

    def stats(self):
        return LogDirtyStats(fault_count=7, dirty_count=self._on().count())

    def close(self):
        self.closed += 1


class World:
    """A guest of one page per write, two trackers, and a CrossCheck of them, log-dirty on."""

    def __init__(self, *, digests=False):
        self.memory = GuestMemory.linear(MEMORY_BYTES)
        self.first, self.second = Scripted("first"), Scripted("second")
        self.still = False
        witness = None if digests else self.second
        self.log = CrossCheck(self.first, witness, self.memory, still=lambda: self.still)
        self.trackers = (self.first,) if digests else (self.first, self.second)
        self.log.enable()
        self.number = 0

    def store(self, gfn):
        """A vCPU's store that was not noticed yet."""
        self.number += 1
        self.memory.mapping.view[gfn << 12 : (gfn << 12) + 8] = self.number.to_bytes(8, "little")

    def write(self, gfn, *, unseen_by=None):
        self.store(gfn)
        for tracker in self.trackers:
            if tracker is not unseen_by:
                tracker.mark(np.array([gfn], np.uint64))

    def counts(self):
        return self.log.counts()


@pytest.fixture(params=[False, True], ids=["two-trackers", "digests"])
def world(request):
    return World(digests=request.param)


def test_trackers_that_agree_are_the_first_one(world):
    world.write(3)
    assert world.log.peek().gfns().tolist() == [3]
    world.write(PAGES - 1)
    assert world.log.stats() == LogDirtyStats(fault_count=7, dirty_count=2)
    assert world.log.clean().gfns().tolist() == [3, PAGES - 1]
    assert not world.log.clean().any()
    assert world.counts() == WitnessCounts(rounds=2, pages=2)


def test_a_page_that_the_first_lost_is_named_with_round_and_direction():
    world = World()
    world.log.clean()
    world.write(5)
    world.write(0x41, unseen_by=world.first)
    world.write(0x43, unseen_by=world.first)
    assert world.log.clean().gfns().tolist() == [5]
    world.write(6)
    with pytest.raises(LostPageError, match=r"gfn 0x41 \(and 1 more\) changed in round 1; first lost it") as lost:
        world.log.clean()
    assert (lost.value.gfns, lost.value.round_index) == ((0x41, 0x43), 1)
    assert (lost.value.lost_by, lost.value.seen_by) == ("first", "second")
    assert [tracker.peek().gfns().tolist() for tracker in world.trackers] == [[6], [6]]  # no bit was cleared


def test_a_page_that_the_witness_lost_is_its_loss():
    world = World()
    world.write(9, unseen_by=world.second)
    world.log.clean()
    with pytest.raises(LostPageError) as lost:
        world.log.clean()
    assert (lost.value.gfn, lost.value.lost_by, lost.value.seen_by) == (9, "second", "first")


def test_digests_find_what_no_tracker_reports():
    world = World(digests=True)
    world.write(9, unseen_by=world.first)
    world.log.clean()
    with pytest.raises(LostPageError) as lost:
        world.log.clean()
    assert (lost.value.gfn, lost.value.lost_by, lost.value.seen_by) == (9, "first", "digests")


def test_a_report_one_clean_late_is_not_a_loss(world):
    world.store(9)  # seen by the reading, marked only after the CLEAN
    world.log.clean()
    for tracker in world.trackers:
        tracker.mark(np.array([9], np.uint64))
    world.log.clean()
    world.log.clean()


def test_reports_without_a_change_are_counted_and_no_error():
    world = World()
    world.memory.write(7 << 12, b"x")
    world.first.mark(np.array([7], np.uint64))
    world.second.mark(np.array([8], np.uint64))
    world.log.clean()  # page 7 was written without a mark: changed, so owed by the second
    world.second.mark(np.array([7], np.uint64))
    world.first.mark(np.array([20], np.uint64))
    world.log.clean()
    world.log.clean()
    counts = world.counts()
    assert (counts.spurious_primary, counts.spurious_witness) == (1, 2)


def test_what_each_reports_alone_is_counted_range_by_range():
    world = World()
    world.second.mark(np.array([3], np.uint64))
    low, high = range(256), range(256, PAGES)
    world.log.clean_range(low)
    world.log.clean_range(high)
    assert world.counts().spurious_witness == 0  # the first may still report it
    world.first.mark(np.array([3], np.uint64))
    world.log.clean_range(low)
    assert (world.counts().spurious_primary, world.counts().spurious_witness) == (0, 0)


def test_no_tracker_is_blamed_while_a_mark_is_still_under_way(world):
    def two_rounds_before_the_mark(gfns):
        world.log.clean()
        world.log.clean()
        world.still = True
        world.log.peek()
        world.log.mark(gfns)

    world.memory.on_write(two_rounds_before_the_mark)
    world.memory.write(9 << 12, b"slow")
    assert world.memory.unmarked_writes == 0
    assert world.log.clean().gfns().tolist() == [9]
    world.log.clean()


def test_a_guest_that_stands_still_settles_everything_in_one_peek(world):
    world.write(9, unseen_by=world.first)
    world.log.peek()  # it runs: nothing is decided
    world.still = True
    with pytest.raises(LostPageError) as lost:
        world.log.peek()
    assert (lost.value.gfn, lost.value.round_index, lost.value.lost_by) == (9, 0, "first")


def test_a_good_peek_settles_nothing_for_the_clean_after_it():
    world = World(digests=True)
    world.write(9)
    world.still = True
    world.log.peek()
    world.first.bits.clear(9)
    world.log.clean()
    with pytest.raises(LostPageError):
        world.log.clean()


def test_ranges_are_judged_by_themselves_and_make_one_round(world):
    low, high = range(256), range(256, PAGES)
    world.write(3, unseen_by=world.first)
    world.write(300)
    world.log.clean_range(low)
    assert world.log.clean_range(high).gfns().tolist() == [300]
    assert world.counts().rounds == 1
    world.log.clean_range(high)
    with pytest.raises(LostPageError) as lost:
        world.log.clean_range(low)
    assert lost.value.gfn == 3
    with pytest.raises(ValueError, match="whole words"):
        world.log.clean_range(range(3, 70))


def test_frames_that_are_taken_away_are_owed_no_more(world):
    world.store(9)
    world.log.clean()
    world.memory.remove(np.array([9], np.uint64))
    world.log.clean()


def test_a_witness_that_cannot_leaves_both_off():
    memory, first = GuestMemory.linear(MEMORY_BYTES), Scripted("first")
    log = CrossCheck(first, Scripted("second", refuse=True), memory, still=lambda: False)
    with pytest.raises(VmError, match="no"):
        log.enable()
    assert not first.enabled
    with pytest.raises(LogDirtyError):
        log.clean()


def test_off_forgets_debts_but_not_the_counts(world):
    world.write(9, unseen_by=world.first)
    world.log.clean()
    world.log.off()
    world.log.off()
    assert not any(tracker.enabled for tracker in world.trackers)
    assert world.counts().rounds == 1
    world.log.enable()
    assert world.counts() == WitnessCounts()
    world.log.clean()
    with pytest.raises(LogDirtyError, match="on already"):
        world.log.enable()
    assert world.log.enabled


def test_closing_closes_both(world):
    world.log.close()
    assert [tracker.closed for tracker in world.trackers] == [1] * len(world.trackers)


GFNS = st.integers(0, PAGES - 1)
RANGES = st.sampled_from([range(PAGES), range(64), range(64, 512), range(512, PAGES)])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), GFNS),
        st.tuples(st.just("touch"), GFNS, st.integers(0, 1)),
        st.tuples(st.just("clean"), RANGES, st.lists(GFNS, max_size=2), st.lists(GFNS, max_size=2)),
        st.tuples(st.just("peek"), st.booleans()),
        st.tuples(st.just("mark"), st.lists(GFNS, max_size=3)),
    ),
    max_size=30,
)


def play(world, steps):
    """Play steps: writes and reports without one, CLEANs of ranges with writes between and after the trackers' own."""
    between = []
    original = world.trackers[-1].clean_range

    def clean_and_write(gfns):
        for gfn in between:
            world.write(gfn)  # after the first tracker's CLEAN, before the second's
        return original(gfns)

    if len(world.trackers) == 2:
        world.second.clean_range = clean_and_write
    for kind, *rest in steps:
        if kind == "write":
            world.write(rest[0])
        elif kind == "touch":
            world.trackers[rest[1] % len(world.trackers)].mark(np.array([rest[0]], np.uint64))
        elif kind == "clean":
            between[:] = rest[1]
            world.log.clean_range(rest[0])
            between.clear()
            for gfn in rest[2]:
                world.write(gfn)
        elif kind == "peek":
            world.still = rest[0]
            world.log.peek()
        else:
            world.log.mark(np.array(rest[0], np.uint64))


@given(steps=STEPS, digests=st.booleans())
def test_sound_trackers_are_never_blamed(steps, digests):
    world = World(digests=digests)
    play(world, steps)
    world.log.clean()
    world.still = True
    world.log.peek()


@given(steps=STEPS, digests=st.booleans(), gfn=GFNS, by=st.integers(0, 1), final=st.booleans())
def test_every_loss_is_found_by_the_next_but_one_clean_or_the_last_peek(steps, digests, gfn, by, final):
    world = World(digests=digests)
    play(world, steps)
    world.log.clean()
    loser = world.trackers[by % len(world.trackers)]
    world.write(gfn, unseen_by=loser)
    world.still = True
    if not final:
        world.log.clean()
    with pytest.raises(LostPageError) as lost:
        (world.log.peek if final else world.log.clean)()
    assert (lost.value.gfns, lost.value.lost_by) == ((gfn,), loser.tracker)
