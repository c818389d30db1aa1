"""The 8254 as its data sheet has it: modes, latches, BCD, gate; and that a move loses no tick."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.core.errors import VmError
from pageferry.devices.pc.pit import PIT_HZ, Pit, SpeakerPort

S = 10**9
LATCH, LOW, HIGH, BOTH = 0x00, 0x10, 0x20, 0x30


def ns(ticks):
    """The first nanosecond at which so many ticks have passed."""
    return -(-ticks * S // PIT_HZ)


class Timer:
    """A PIT, its clock, and what it did to IRQ 0."""

    def __init__(self, now_ns=0):
        self.now_ns = now_ns
        self.edges = []
        self.level = False
        self.pit = Pit(lambda: self.now_ns, self.line)
        self.port_61 = SpeakerPort(self.pit)

    def line(self, level):
        if level and not self.level:
            self.edges.append(self.now_ns)
        self.level = level

    def program(self, number, mode, count, *, access=BOTH, bcd=0):
        self.pit.write(3, 1, number << 6 | access | mode << 1 | bcd)
        if access in (LOW, BOTH):
            self.pit.write(number, 1, count & 0xFF)
        if access in (HIGH, BOTH):
            self.pit.write(number, 1, count >> 8)

    def at(self, ticks, since_ns=0):
        self.now_ns = since_ns + ns(ticks)
        self.pit.advance()

    def count(self, number):
        self.pit.write(3, 1, number << 6)
        return self.pit.read(number, 1) | self.pit.read(number, 1) << 8

    def status(self, number):
        self.pit.write(3, 1, 0xE0 | 2 << number)
        return self.pit.read(number, 1)

    def out(self, number):
        return self.status(number) >> 7

    def run_to_edges(self, most):
        """Sleep as a halted CPU does, from one time that is due to the next."""
        while len(self.edges) < most and (due_in_ns := self.pit.due_in_ns()) is not None:
            assert due_in_ns > 0
            self.now_ns += due_in_ns - 1
            self.pit.advance()
            before = len(self.edges)
            self.now_ns += 1
            self.pit.advance()
            assert len(self.edges) == before + 1
        return self.edges


@pytest.fixture
def timer():
    return Timer()


def test_one_that_was_never_programmed_does_nothing(timer):
    timer.at(10**7)
    assert (timer.pit.due_in_ns(), timer.edges) == (None, [])
    assert timer.pit.read(3, 1) == 0xFF
    timer.pit.write(0, 1, 5)
    assert timer.pit.due_in_ns() is None


def test_mode_0_interrupts_once_at_the_end_of_the_count(timer):
    timer.program(0, 0, 1000)
    assert (timer.out(0), timer.count(0)) == (0, 1000)
    timer.at(999)
    assert (timer.out(0), timer.count(0), timer.edges) == (0, 1, [])
    assert timer.run_to_edges(2) == [ns(1000)]
    assert timer.out(0) == 1
    timer.at(1003)
    assert timer.count(0) == 0xFFFD, "it counts on"
    timer.pit.write(0, 1, 0x10)
    assert (timer.out(0), timer.pit.due_in_ns()) == (0, None), "half a count stops it"
    timer.pit.write(0, 1, 0x00)
    assert timer.pit.due_in_ns() == ns(0x10)


@pytest.mark.parametrize("mode", [2, 3, 6, 7])
@pytest.mark.parametrize(("written", "count"), [(4773, 4773), (0, 65536), (2, 2)])
def test_modes_2_and_3_interrupt_periodically(timer, mode, written, count):
    timer.now_ns = 12345
    timer.program(0, mode, written)
    assert timer.status(0) == 0x80 | BOTH | mode % 4 << 1
    assert timer.run_to_edges(5) == [12345 + ns(count * k) for k in range(1, 6)]


def test_mode_2_is_low_for_the_last_tick(timer):
    timer.program(2, 2, 5)
    timer.port_61.write(0, 1, 1)
    seen = []
    for ticks in range(10):
        timer.at(ticks)
        seen.append((timer.count(2), timer.out(2)))
    assert seen == [(5, 1), (4, 1), (3, 1), (2, 1), (1, 0)] * 2


@pytest.mark.parametrize(
    ("count", "seen"),
    [
        (6, [(6, 1), (4, 1), (2, 1), (6, 0), (4, 0), (2, 0)]),
        (5, [(4, 1), (2, 1), (0, 1), (4, 0), (2, 0)]),
    ],
)
def test_mode_3_counts_by_two(timer, count, seen):
    timer.program(1, 3, count)
    for ticks, expected in enumerate(seen * 2):
        timer.at(ticks)
        assert (timer.count(1), timer.out(1)) == expected


def test_mode_4_strobes_for_a_tick(timer):
    timer.program(0, 4, 3)
    seen = []
    for ticks in range(6):
        timer.at(ticks)
        seen.append((timer.count(0), timer.out(0), len(timer.edges)))
    assert seen == [(3, 1, 0), (2, 1, 0), (1, 1, 0), (0, 0, 0), (0xFFFF, 1, 1), (0xFFFE, 1, 1)]
    assert timer.pit.due_in_ns() is None
    timer.pit.write(0, 1, 9)
    timer.pit.write(0, 1, 0)
    assert timer.pit.due_in_ns() == ns(10), "a count alone begins it anew"


@pytest.mark.parametrize(("mode", "levels"), [(1, [0, 0, 0, 1, 1]), (5, [1, 1, 1, 0, 1])])
def test_modes_1_and_5_wait_for_the_gate(timer, mode, levels):
    timer.program(2, mode, 3)
    timer.program(0, mode, 3)
    timer.at(100)
    assert (timer.status(2), timer.pit.due_in_ns()) == (0xC0 | BOTH | mode << 1, None)
    for _ in range(2):
        timer.port_61.write(0, 1, 0)
        timer.port_61.write(0, 1, 1)
        began_ns, seen = timer.now_ns, []
        for ticks in range(5):
            timer.at(ticks, began_ns)
            seen.append(timer.out(2))
        assert seen == levels
    timer.port_61.write(0, 1, 0)
    timer.port_61.write(0, 1, 1)
    timer.port_61.write(0, 1, 0)
    began_ns = timer.now_ns
    timer.at(2, began_ns)
    assert timer.count(2) == 1, "the gate's level does not matter"


@pytest.mark.parametrize("mode", [0, 4])
def test_a_low_gate_holds_the_count(timer, mode):
    timer.program(2, mode, 1000)
    timer.at(500)
    assert timer.count(2) == 1000
    timer.port_61.write(0, 1, 1)
    timer.at(800)
    timer.port_61.write(0, 1, 0)
    timer.at(5000)
    assert timer.count(2) == 700
    timer.port_61.write(0, 1, 1)
    timer.at(5100)
    assert timer.count(2) == 600


@pytest.mark.parametrize("mode", [2, 3])
def test_a_low_gate_ends_the_period(timer, mode):
    timer.port_61.write(0, 1, 1)
    timer.program(2, mode, 1000)
    timer.at(998 if mode == 2 else 700)
    timer.at(999)
    assert timer.out(2) == 0
    timer.port_61.write(0, 1, 0)
    assert timer.out(2) == 1
    timer.at(2000)
    timer.port_61.write(0, 1, 1)
    assert timer.count(2) == 1000


def test_port_61(timer):
    timer.program(2, 0, 11932)  # 10 ms, as kernels measure their clock by it
    timer.port_61.write(0, 1, 0x03)
    assert timer.port_61.read(0, 1) & 0x23 == 0x03
    timer.at(11932)
    assert timer.port_61.read(0, 1) & 0x23 == 0x23
    timer.port_61.write(0, 1, 0)
    assert timer.port_61.read(0, 1) & 0x03 == 0
    toggles = set()
    for timer.now_ns in range(0, 40_000, 5_000):
        toggles.add(timer.port_61.read(0, 1) & 0x10)
    assert toggles == {0, 0x10}
    assert timer.port_61.read(0, 2) >> 8 == 0xFF


def test_bcd(timer):
    timer.program(0, 2, 0x1000, bcd=1)
    timer.at(1)
    assert timer.count(0) == 0x0999
    timer.program(0, 0, 0x0000, bcd=1)
    assert timer.pit.due_in_ns() == ns(10_000)
    timer.program(1, 0, 0x0002, bcd=1)
    timer.now_ns += ns(5)
    assert timer.count(1) == 0x9997


@pytest.mark.parametrize(("access", "count", "high"), [(LOW, 0xAB, 0), (HIGH, 0xAB00, 1)])
def test_one_byte_alone(timer, access, count, high):
    timer.program(0, 2, count, access=access)
    assert timer.pit.due_in_ns() == ns(count)
    timer.at(1)
    shown = (count - 1) >> 8 * high & 0xFF
    assert [timer.pit.read(0, 1) for _ in range(2)] == [shown, shown]
    timer.pit.write(3, 1, 0)
    timer.at(50)
    assert timer.pit.read(0, 1) == shown, "latched"


def test_a_latched_count_waits_to_be_read(timer):
    timer.program(0, 2, 0x1234)
    timer.pit.write(3, 1, 0)
    timer.at(0x100)
    timer.pit.write(3, 1, 0)
    assert timer.pit.read(0, 1) == 0x34
    assert timer.pit.read(0, 1) == 0x12
    assert [timer.pit.read(0, 1), timer.pit.read(0, 1)] == [0x34, 0x11], "unlatched, low and high in turn"
    timer.pit.write(3, 1, 0)
    timer.program(0, 2, 0x4321)
    assert timer.pit.read(0, 1) == 0x21, "a control word forgets what was latched"


def test_read_back(timer):
    for number in range(3):
        timer.program(number, 2, 0x1111 * (number + 1))
    timer.pit.write(3, 1, 0xC0 | 0x0A)  # count and status of 0 and 2
    timer.at(10)
    assert [timer.pit.read(0, 1) for _ in range(3)] == [0xB4, 0x11, 0x11]
    assert [timer.pit.read(2, 1) for _ in range(3)] == [0xB4, 0x33, 0x33]
    assert timer.pit.read(1, 1) == (0x2222 - 10) & 0xFF, "not asked for"
    timer.pit.write(3, 1, 0xD0 | 0x02)  # count of 0
    timer.at(20)
    assert [timer.pit.read(0, 1) for _ in range(2)] == [0x07, 0x11]
    timer.pit.write(3, 1, 0xE0 | 0x02)
    timer.pit.write(3, 1, 0x34)
    assert timer.status(0) == 0xF4, "it waits for its count; the older status is forgotten"


def test_wide_accesses_are_bytes(timer):
    timer.program(0, 2, 0x1234)
    timer.program(1, 2, 0x5678)
    assert timer.pit.read(0, 4) == 0xFF00_7834
    timer.pit.write(2, 2, 0x34 << 8 | 0x99)
    assert timer.pit.due_in_ns() is None


def test_an_interrupt_that_was_due_comes_before_what_is_written(timer):
    timer.program(0, 0, 100)
    timer.now_ns = ns(100)
    timer.pit.write(3, 1, 0x30)
    assert timer.edges == [ns(100)]


def test_ticks_that_pass_unseen_are_one(timer):
    timer.program(0, 2, 100)
    timer.at(1050)
    assert len(timer.edges) == 1
    assert timer.pit.due_in_ns() == ns(1100) - ns(1050)


PROGRAMS = st.lists(
    st.tuples(st.sampled_from(["control", "count", "read", "wait", "port 61"]), st.integers(0, 3), st.integers(0, 255)),
    max_size=25,
)


def do(timer, step):
    kind, number, value = step
    match kind:
        case "control":
            timer.pit.write(3, 1, value)
        case "count":
            timer.pit.write(number % 3, 1, value)
        case "wait":
            timer.now_ns += (value + 1) << 4 * number
        case "port 61":
            timer.port_61.write(0, 1, value)
    timer.pit.advance()
    read = timer.pit.read(number, 1) if kind == "read" else None
    return read, timer.pit.due_in_ns(), [counter.out for counter in timer.pit.counters], len(timer.edges)


@given(before=PROGRAMS, after=PROGRAMS, elsewhere_ns=st.integers(0, 10**12))
def test_one_that_moves_goes_on_as_if_it_had_not(before, after, elsewhere_ns):
    here, there = Timer(), Timer(elsewhere_ns)
    for step in before:
        do(here, step)
    there.pit.load(here.pit.save())
    here.edges.clear()
    assert there.pit.due_in_ns() == here.pit.due_in_ns()
    assert [do(there, step) for step in after] == [do(here, step) for step in after]


def test_what_becomes_due_behind_the_last_look_comes_at_the_destination(timer):
    timer.program(0, 0, 100)
    timer.at(99)
    timer.now_ns += ns(5)
    there = Timer(10**6)
    there.pit.load(timer.pit.save())
    assert there.run_to_edges(2) == [10**6 + ns(100) - ns(99)]


def test_the_state_of_a_kernels_timer_begins_anew(timer):
    timer.program(0, 2, 1000)
    timer.at(300)
    state = timer.pit.save()
    there = Timer()
    there.pit.load(state[:16] + bytes(8) + state[24:])
    assert there.pit.due_in_ns() == ns(1000)


@pytest.mark.parametrize(
    "change",
    [{0: 0, 1: 0}, {6: 5}, {7: 2}, {9: 5}, {10: 5}, {12: 4}, {13: 6}, {14: 2}, {15: 2}, {23: 0x80}, {72: 1}, {76: 1}],
)
def test_a_state_that_cannot_be_is_refused(timer, change):
    timer.program(0, 2, 1000)
    state = bytearray(timer.pit.save())
    for at, value in change.items():
        state[at] = value
    with pytest.raises(VmError, match="device pit has registers that it cannot have"):
        timer.pit.load(bytes(state))
    with pytest.raises(VmError, match="111 bytes, not 112"):
        timer.pit.load(bytes(111))
