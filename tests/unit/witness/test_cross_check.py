"""The tracker oracle's rule, with scripted trackers over real memory: every loss is found, and nothing else is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import LogDirtyError, OracleError, VmError
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import LogDirtyStats
from pageferry.witness.cross_check import CrossCheck
from pageferry.witness.ledger import OracleCounts

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

    def give_back(self, bitmap):
        bits = self._on()
        bits |= bitmap

    def stats(self):
        return LogDirtyStats(fault_count=7, dirty_count=self._on().count())

    def close(self):
        self.closed += 1


class World:
    """A guest of one page per write, two trackers, and the oracle over them, log-dirty on."""

    def __init__(self, *, digests=False):
        self.memory = GuestMemory.linear(MEMORY_BYTES)
        self.first, self.second = Scripted("first"), Scripted("second")
        self.still = False
        witness = None if digests else self.second
        self.oracle = CrossCheck(self.first, witness, self.memory, still=lambda: self.still)
        self.trackers = (self.first,) if digests else (self.first, self.second)
        self.oracle.enable()
        self.number = 0

    def store(self, gfn):
        """A vCPU's store that nobody has noticed yet."""
        self.number += 1
        self.memory.mapping.view[gfn << 12 : (gfn << 12) + 8] = self.number.to_bytes(8, "little")

    def write(self, gfn, *, unseen_by=None):
        self.store(gfn)
        for tracker in self.trackers:
            if tracker is not unseen_by:
                tracker.mark(np.array([gfn], np.uint64))

    def counts(self):
        return self.oracle.counts()


@pytest.fixture(params=[False, True], ids=["two-trackers", "digests"])
def world(request):
    return World(digests=request.param)


def test_trackers_that_agree_are_the_first_one(world):
    world.write(3)
    assert world.oracle.peek().gfns().tolist() == [3]
    world.write(PAGES - 1)
    assert world.oracle.stats() == LogDirtyStats(fault_count=7, dirty_count=2)
    assert world.oracle.clean().gfns().tolist() == [3, PAGES - 1]
    assert not world.oracle.clean().any()
    assert world.counts() == OracleCounts(rounds=2, pages=2)


def test_a_page_that_the_first_lost_is_named_with_round_and_direction():
    world = World()
    world.oracle.clean()
    world.write(5)
    world.write(0x41, unseen_by=world.first)
    world.write(0x43, unseen_by=world.first)
    assert world.oracle.clean().gfns().tolist() == [5]
    world.write(6)
    with pytest.raises(OracleError, match=r"gfn 0x41 \(and 1 more\) changed in round 1; first lost it, second") as lost:
        world.oracle.clean()
    assert (lost.value.gfns, lost.value.round_index) == ((0x41, 0x43), 1)
    assert (lost.value.lost_by, lost.value.seen_by) == ("first", "second")
    assert [tracker.peek().gfns().tolist() for tracker in world.trackers] == [[6], [6]]  # no bit was cleared


def test_a_page_that_the_witness_lost_is_its_loss():
    world = World()
    world.write(9, unseen_by=world.second)
    world.oracle.clean()
    with pytest.raises(OracleError) as lost:
        world.oracle.clean()
    assert (lost.value.gfn, lost.value.lost_by, lost.value.seen_by) == (9, "second", "first")


def test_digests_find_what_no_tracker_reports():
    world = World(digests=True)
    world.write(9, unseen_by=world.first)
    world.oracle.clean()
    with pytest.raises(OracleError) as lost:
        world.oracle.clean()
    assert (lost.value.gfn, lost.value.lost_by, lost.value.seen_by) == (9, "first", "digests")


def test_a_report_one_clean_late_is_no_loss(world):
    world.store(9)  # seen by the reading, marked only after the CLEAN
    world.oracle.clean()
    for tracker in world.trackers:
        tracker.mark(np.array([9], np.uint64))
    world.oracle.clean()
    world.oracle.clean()


def test_reports_without_a_change_are_counted_and_no_error():
    world = World()
    world.memory.write(7 << 12, b"x")
    world.first.mark(np.array([7], np.uint64))
    world.second.mark(np.array([8], np.uint64))
    world.oracle.clean()  # page 7 was written without the oracle's mark: changed, so owed by the second
    world.second.mark(np.array([7], np.uint64))
    world.first.mark(np.array([20], np.uint64))
    world.oracle.clean()
    world.oracle.clean()
    counts = world.counts()
    assert (counts.spurious_primary, counts.spurious_witness) == (1, 2)


def test_what_each_reports_alone_is_counted_range_by_range():
    world = World()
    world.second.mark(np.array([3], np.uint64))
    low, high = range(256), range(256, PAGES)
    world.oracle.clean_range(low)
    world.oracle.clean_range(high)
    assert world.counts().spurious_witness == 0  # the first may still report it
    world.first.mark(np.array([3], np.uint64))
    world.oracle.clean_range(low)
    assert (world.counts().spurious_primary, world.counts().spurious_witness) == (0, 0)


def test_nobody_is_blamed_while_a_mark_is_still_under_way(world):
    def two_rounds_before_the_mark(gfns):
        world.oracle.clean()
        world.oracle.clean()
        world.still = True
        world.oracle.peek()
        world.oracle.mark(gfns)

    world.memory.on_write(two_rounds_before_the_mark)
    world.memory.write(9 << 12, b"slow")
    assert world.memory.unmarked_writes == 0
    assert world.oracle.clean().gfns().tolist() == [9]
    world.oracle.clean()


def test_a_guest_that_stands_still_settles_everything_in_one_peek(world):
    world.write(9, unseen_by=world.first)
    world.oracle.peek()  # it runs: nothing is decided
    world.still = True
    with pytest.raises(OracleError) as lost:
        world.oracle.peek()
    assert (lost.value.gfn, lost.value.round_index, lost.value.lost_by) == (9, 0, "first")


def test_a_good_peek_settles_nothing_for_the_clean_after_it():
    world = World(digests=True)
    world.write(9)
    world.still = True
    world.oracle.peek()
    world.first.bits.clear(9)
    world.oracle.clean()
    with pytest.raises(OracleError):
        world.oracle.clean()


def test_bits_given_back_must_come_again_though_nothing_changes(world):
    world.write(9)
    taken = world.oracle.clean()
    world.oracle.give_back(taken)
    assert world.oracle.clean() == taken
    world.oracle.give_back(taken)
    world.first.bits.clear(9)
    with pytest.raises(OracleError, match="gfn 0x9 "):
        world.oracle.clean()


def test_ranges_are_judged_by_themselves_and_make_one_round(world):
    low, high = range(256), range(256, PAGES)
    world.write(3, unseen_by=world.first)
    world.write(300)
    world.oracle.clean_range(low)
    assert world.oracle.clean_range(high).gfns().tolist() == [300]
    assert world.counts().rounds == 1
    world.oracle.clean_range(high)
    with pytest.raises(OracleError) as lost:
        world.oracle.clean_range(low)
    assert lost.value.gfn == 3
    with pytest.raises(ValueError, match="whole words"):
        world.oracle.clean_range(range(3, 70))


def test_frames_that_are_taken_away_are_owed_no_more(world):
    world.store(9)
    world.oracle.clean()
    world.memory.remove(np.array([9], np.uint64))
    world.oracle.clean()


def test_a_witness_that_cannot_leaves_both_off():
    memory, first = GuestMemory.linear(MEMORY_BYTES), Scripted("first")
    oracle = CrossCheck(first, Scripted("second", refuse=True), memory, still=lambda: False)
    with pytest.raises(VmError, match="no"):
        oracle.enable()
    assert not first.enabled
    with pytest.raises(LogDirtyError):
        oracle.clean()


def test_off_forgets_debts_but_not_the_counts(world):
    world.write(9, unseen_by=world.first)
    world.oracle.clean()
    world.oracle.off()
    world.oracle.off()
    assert not any(tracker.enabled for tracker in world.trackers)
    assert world.counts().rounds == 1
    world.oracle.enable()
    assert world.counts() == OracleCounts()
    world.oracle.clean()
    with pytest.raises(LogDirtyError, match="on already"):
        world.oracle.enable()
    assert world.oracle.enabled


def test_closing_closes_both(world):
    world.oracle.close()
    assert [tracker.closed for tracker in world.trackers] == [1] * len(world.trackers)


GFNS = st.integers(0, PAGES - 1)
RANGES = st.sampled_from([range(PAGES), range(64), range(64, 512), range(512, PAGES)])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), GFNS),
        st.tuples(st.just("touch"), GFNS, st.integers(0, 1)),
        st.tuples(st.just("clean"), RANGES, st.lists(GFNS, max_size=2), st.lists(GFNS, max_size=2)),
        st.tuples(st.just("peek"), st.booleans()),
        st.tuples(st.just("return"), st.lists(GFNS, max_size=3)),
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
            world.oracle.clean_range(rest[0])
            between.clear()
            for gfn in rest[2]:
                world.write(gfn)
        elif kind == "peek":
            world.still = rest[0]
            world.oracle.peek()
        else:
            world.oracle.give_back(DirtyBitmap.of(PAGES, np.array(rest[0], np.uint64)))


@given(steps=STEPS, digests=st.booleans())
def test_sound_trackers_are_never_blamed(steps, digests):
    world = World(digests=digests)
    play(world, steps)
    world.oracle.clean()
    world.still = True
    world.oracle.peek()


@given(steps=STEPS, digests=st.booleans(), gfn=GFNS, by=st.integers(0, 1), final=st.booleans())
def test_every_loss_is_found_by_the_next_but_one_clean_or_the_last_peek(steps, digests, gfn, by, final):
    world = World(digests=digests)
    play(world, steps)
    world.oracle.clean()
    loser = world.trackers[by % len(world.trackers)]
    world.write(gfn, unseen_by=loser)
    world.still = True
    if not final:
        world.oracle.clean()
    with pytest.raises(OracleError) as lost:
        (world.oracle.peek if final else world.oracle.clean)()
    assert (lost.value.gfns, lost.value.lost_by) == ((gfn,), loser.tracker)
