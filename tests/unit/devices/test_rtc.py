"""The wall clock: the chip's registers, and a time that is right wherever the guest is."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.core.errors import VmError
from pageferry.devices.rtc import Rtc

A, B, C, D = 0x0A, 0x0B, 0x0C, 0x0D
SET, UIE, BINARY, H24 = 0x80, 0x10, 0x04, 0x02
S = 10**9
TIME = (0x32, 9, 8, 7, 6, 4, 2, 0)


def ns(*when):
    return int(datetime(*when, tzinfo=UTC).timestamp()) * S


def unheard(level):
    """Lead an interrupt line nowhere."""


@pytest.fixture
def real():
    """The host's real time, ns: Thursday, 29 February 2024, 13:05:09 and a half."""
    return [ns(2024, 2, 29, 13, 5, 9) + S // 2]


@pytest.fixture
def rtc(real):
    """A clock that was told to have no periodic rate."""
    rtc = Rtc(unheard, lambda: real[0])
    put(rtc, A, 0x20)
    return rtc


def get(rtc, register):
    rtc.write(0, 1, register)
    return rtc.read(1, 1)


def put(rtc, register, value):
    rtc.write(0, 1, register)
    rtc.write(1, 1, value)


def shown(rtc):
    return [get(rtc, register) for register in TIME]


def test_the_time_in_each_format(rtc):
    assert (get(rtc, A), get(rtc, B), get(rtc, C), get(rtc, D)) == (0x20, H24, 0, 0x80)
    assert shown(rtc) == [0x20, 0x24, 0x02, 0x29, 5, 0x13, 0x05, 0x09]
    put(rtc, B, H24 | BINARY)
    assert shown(rtc) == [20, 24, 2, 29, 5, 13, 5, 9]
    put(rtc, B, BINARY)
    assert get(rtc, 4) == 0x81
    put(rtc, B, 0)
    assert get(rtc, 4) == 0x81


@pytest.mark.parametrize(
    ("hour", "bcd"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (22, 0x90), (23, 0x91)]
)
def test_twelve_hours_begin_with_twelve(hour, bcd):
    rtc = Rtc(unheard, lambda: ns(2024, 1, 1, hour))
    put(rtc, B, 0)
    assert get(rtc, 4) == bcd
    put(rtc, 4, bcd)
    put(rtc, B, H24 | BINARY)
    assert get(rtc, 4) == hour


@pytest.mark.parametrize(
    ("date", "weekday"),
    [((2024, 3, 2), 7), ((2024, 3, 3), 1), ((2024, 3, 4), 2), ((2000, 1, 1), 7), ((1999, 12, 31), 6)],
)
def test_the_week_begins_on_sunday(date, weekday):
    assert get(Rtc(unheard, lambda: ns(*date)), 6) == weekday


def test_an_update_is_announced_and_makes_a_flag(rtc, real):
    put(rtc, B, H24 | UIE)
    assert get(rtc, C) == 0
    second = real[0] - S // 2
    for fraction, near in ((0, 0), (S - 2_228_001, 0), (S - 2_228_000, 0x80), (S - 1, 0x80)):
        real[0] = second + fraction
        assert get(rtc, A) == 0x20 | near
        assert get(rtc, 0) == 0x09
        assert get(rtc, C) == 0
    real[0] = second + S
    assert get(rtc, A) == 0x20
    assert get(rtc, 0) == 0x10
    assert (get(rtc, C), get(rtc, C)) == (0x90, 0)
    put(rtc, B, H24)
    real[0] += S
    assert (get(rtc, C), get(rtc, C)) == (0x10, 0)


def set_time(rtc, values):
    mode = get(rtc, B)
    put(rtc, B, mode | SET)
    for register, value in zip(TIME, values, strict=True):
        put(rtc, register, value)
    put(rtc, B, mode)


def test_while_it_is_set_it_stands_and_then_counts_on(rtc, real):
    put(rtc, B, H24 | UIE)
    put(rtc, B, H24 | UIE | SET)
    assert get(rtc, B) == H24 | SET  # SET takes UIE back
    before = shown(rtc)
    real[0] += 100 * S + S // 2 - 1
    assert shown(rtc) == before
    assert get(rtc, A) == 0x20
    for register, value in zip(TIME, (0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x58), strict=True):
        put(rtc, register, value)
    assert shown(rtc)[0] == 0x19
    put(rtc, B, H24)
    assert get(rtc, C) == 0
    assert shown(rtc) == [0x19, 0x99, 0x12, 0x31, 6, 0x23, 0x59, 0x58]
    real[0] += 2 * S
    assert shown(rtc) == [0x20, 0x00, 0x01, 0x01, 7, 0, 0, 0]


def test_one_register_may_be_set_by_itself(rtc, real):
    put(rtc, 4, 0x20)
    assert shown(rtc) == [0x20, 0x24, 0x02, 0x29, 5, 0x20, 0x05, 0x09]
    real[0] += 60 * S
    assert shown(rtc) == [0x20, 0x24, 0x02, 0x29, 5, 0x20, 0x06, 0x09]


@given(st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31)), st.booleans(), st.booleans())
def test_any_time_can_be_set(when, binary, h24):
    rtc = Rtc(unheard, lambda: ns(2024, 2, 29) + 5)
    put(rtc, B, BINARY * binary | H24 * h24)
    hour = when.hour if h24 else when.hour % 12 or 12
    numbers = [when.year // 100, when.year % 100, when.month, when.day]
    numbers += [when.isoweekday() % 7 + 1, hour, when.minute, when.second]
    values = numbers if binary else [int(str(number), 16) for number in numbers]
    values[5] |= 0x80 * (not h24 and when.hour >= 12)
    set_time(rtc, values)
    assert shown(rtc) == values


@given(st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255)), max_size=40), st.integers(0, 1 << 40))
def test_nothing_that_a_guest_writes_breaks_it(writes, later):
    real = [ns(2024, 2, 29)]
    rtc = Rtc(unheard, lambda: real[0])
    for register, value in writes:
        put(rtc, register, value)
    real[0] += later * S
    other = Rtc(unheard, lambda: real[0])
    other.load(rtc.save())
    assert [get(other, register) for register in range(128)] == [get(rtc, register) for register in range(128)]


def test_cmos_bytes_are_kept(rtc):
    kept = [register for register in range(128) if register not in {*TIME, A, B, C, D}]
    for register in kept:
        put(rtc, register, register ^ 0xA5)
    put(rtc, C, 0xFF)
    put(rtc, D, 0)
    assert [get(rtc, register) for register in kept] == [register ^ 0xA5 for register in kept]
    assert (get(rtc, C), get(rtc, D)) == (0, 0x80)
    put(rtc, A, 0xFF)
    assert get(rtc, A) == 0x7F


def test_ports(rtc):
    rtc.write(0, 1, 0x80 | 9)  # with the NMI mask
    assert rtc.read(1, 1) == 0x24
    assert (rtc.read(0, 1), rtc.read(0, 2), rtc.read(1, 2)) == (0xFF, 0x24FF, 0xFF24)
    rtc.write(0, 2, 0x5520)
    assert get(rtc, 0x20) == 0x55


def test_a_guest_reads_the_right_time_however_long_its_migration_took(rtc, real):
    set_time(rtc, [0x20, 0x24, 0x02, 0x29, 5, 0x15, 0x05, 0x09])  # two hours east of here
    saved = rtc.save()
    real[0] += 3600 * S
    arrived = Rtc(unheard, lambda: real[0])
    arrived.load(saved)
    assert get(arrived, 4) == 0x16
    arrived.load(arrived.save())
    assert get(arrived, C) == 0x10  # an update that the guest did not see yet is not lost
    arrived.load(arrived.save())
    assert get(arrived, C) == 0


def test_a_clock_that_is_being_set_moves_with_what_was_set(rtc, real):
    put(rtc, B, SET | H24)
    put(rtc, 4, 0x03)
    arrived = Rtc(unheard, lambda: real[0] + 1000 * S)
    arrived.load(rtc.save())
    put(arrived, B, H24)
    assert shown(arrived)[5:] == [0x03, 0x05, 0x09]


@pytest.mark.parametrize(
    ("at", "value"), [(0, 0x80), (8, 0x40), (16, 0x80), (17 + A, 0x80), (17 + C, 0x80), (17 + D, 1)]
)
def test_a_state_that_no_clock_has_is_refused(rtc, at, value):
    good = rtc.save()
    for bad in (good[:at] + bytes([value]) + good[at + 1 :], good[:-1], good + b"x", b""):
        with pytest.raises(VmError, match="device rtc"):
            rtc.load(bad)
    assert rtc.save() == good


# -- interrupts ------------------------------------------------------------------------------------------------------

PIE, AIE, PF, AF, UF, IRQF = 0x40, 0x20, 0x40, 0x20, 0x10, 0x80
ANY = 0xFF


class Alarm:
    """A clock that is slept on, as a halted CPU does it, and when it raised its line."""

    def __init__(self, real_ns):
        self.real_ns = real_ns
        self.level = False
        self.raised = []
        self.rtc = Rtc(self.line, lambda: self.real_ns)

    def line(self, level):
        if level and not self.level:
            self.raised.append(self.real_ns)
        self.level = level

    def set_alarm(self, hour, minute, second):
        for register, value in ((5, hour), (3, minute), (1, second)):
            put(self.rtc, register, value)

    def sleep(self, most=1):
        """Sleep until it interrupts; return what register C says each time."""
        seen = []
        for _ in range(most):
            due_in_ns = self.rtc.due_in_ns()
            assert due_in_ns > 0
            self.real_ns += due_in_ns - 1
            self.rtc.advance()
            assert not self.level
            self.real_ns += 1
            self.rtc.advance()
            assert self.level
            assert self.rtc.due_in_ns() is None, "nothing more until register C is read"
            seen.append(get(self.rtc, C))
            assert not self.level
        return seen


@pytest.fixture
def alarm():
    return Alarm(ns(2024, 2, 29, 13, 5, 9) + S // 2)


def test_without_leave_it_does_not_interrupt(alarm):
    alarm.set_alarm(ANY, ANY, ANY)
    assert alarm.rtc.due_in_ns() is None
    alarm.real_ns += 2 * S
    alarm.rtc.advance()
    assert alarm.raised == []
    assert get(alarm.rtc, C) == PF | AF | UF
    put(alarm.rtc, B, H24 | UIE)
    alarm.sleep()
    alarm.real_ns += S
    alarm.rtc.advance()
    put(alarm.rtc, B, H24)
    assert not alarm.level
    put(alarm.rtc, B, H24 | UIE)
    assert alarm.level, "a flag that waits interrupts once it may"


def test_an_update_each_second(alarm):
    put(alarm.rtc, B, H24 | UIE)
    alarm.sleep(3)
    assert alarm.raised == [ns(2024, 2, 29, 13, 5, 10 + second) for second in range(3)]
    put(alarm.rtc, B, H24 | UIE | SET)
    assert alarm.rtc.due_in_ns() is None


@pytest.mark.parametrize(
    ("hour", "minute", "second", "first", "second_time"),
    [
        (0x13, 0x06, 0x00, (2024, 2, 29, 13, 6, 0), (2024, 3, 1, 13, 6, 0)),
        (0x13, 0x05, 0x09, (2024, 3, 1, 13, 5, 9), (2024, 3, 2, 13, 5, 9)),
        (0x00, 0x00, 0x00, (2024, 3, 1, 0, 0, 0), (2024, 3, 2, 0, 0, 0)),
        (ANY, 0x05, 0x10, (2024, 2, 29, 13, 5, 10), (2024, 2, 29, 14, 5, 10)),
        (ANY, ANY, 0x05, (2024, 2, 29, 13, 6, 5), (2024, 2, 29, 13, 7, 5)),
        (0x14, ANY, ANY, (2024, 2, 29, 14, 0, 0), (2024, 2, 29, 14, 0, 1)),
        (0xC0, 0xC0, 0xC0, (2024, 2, 29, 13, 5, 10), (2024, 2, 29, 13, 5, 11)),
    ],
)
def test_the_alarm(alarm, hour, minute, second, first, second_time):
    alarm.set_alarm(hour, minute, second)
    put(alarm.rtc, B, H24 | AIE)
    assert [flags & (IRQF | AF) for flags in alarm.sleep(2)] == [IRQF | AF] * 2
    assert alarm.raised == [ns(*first), ns(*second_time)]


def test_the_alarm_is_in_the_guests_time_and_format(alarm):
    set_time(alarm.rtc, [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x00, 0x00])
    put(alarm.rtc, B, BINARY | AIE)
    alarm.set_alarm(0x80 | 11, 1, 0)
    alarm.sleep()
    assert alarm.raised == [ns(2024, 2, 29, 13, 6, 9)]


@pytest.mark.parametrize("register", [1, 3, 5])
def test_an_alarm_at_no_time_never_comes(alarm, register):
    alarm.set_alarm(ANY, ANY, ANY)
    put(alarm.rtc, B, H24 | AIE)
    put(alarm.rtc, register, 0x61)
    assert alarm.rtc.due_in_ns() is None


@pytest.mark.parametrize(("rate", "hz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (8, 256), (9, 128), (15, 2)])
def test_the_periodic_interrupt(alarm, rate, hz):
    put(alarm.rtc, A, 0x20 | rate)
    put(alarm.rtc, B, H24 | PIE)
    alarm.sleep(5)
    began_ns = alarm.real_ns - S * 5 // hz
    assert alarm.raised == pytest.approx([began_ns + S * k // hz for k in range(1, 6)], abs=S // hz)
    steps = [later - sooner for sooner, later in zip(alarm.raised, alarm.raised[1:], strict=False)]
    assert steps == pytest.approx([S / hz] * 4, abs=1)


def test_without_a_rate_no_periodic_interrupt_comes(alarm):
    put(alarm.rtc, A, 0x20)
    put(alarm.rtc, B, H24 | PIE)
    assert alarm.rtc.due_in_ns() is None


def test_an_alarm_that_was_due_on_the_way_is_due_on_arrival(alarm):
    alarm.set_alarm(0x13, 0x06, 0x00)
    put(alarm.rtc, B, H24 | AIE)
    saved = alarm.rtc.save()
    there = Alarm(alarm.real_ns + 600 * S)
    there.rtc.load(saved)
    assert there.level
    assert get(there.rtc, C) == IRQF | AF | UF | PF
    assert there.rtc.due_in_ns() == ns(2024, 3, 1, 13, 6, 0) - there.real_ns


def test_an_alarm_waits_for_a_host_whose_clock_is_behind(alarm):
    alarm.set_alarm(0x13, 0x06, 0x00)
    put(alarm.rtc, B, H24 | AIE)
    there = Alarm(alarm.real_ns - 3600 * S)
    there.rtc.load(alarm.rtc.save())
    there.sleep()
    assert there.raised == [ns(2024, 2, 29, 13, 6, 0)]
