"""What pre-copy cost the guest, with a scripted clock and a scripted guest."""

import struct
from types import SimpleNamespace

import pytest

from pageferry.core.guest_time import WorkSample, lost_s, rate_before, work_per_s
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import VmStatus
from pageferry.engine.guest_time import Stall, StallMeter
from pageferry.guests.abi import STATUS_GPA, STATUS_SLOT_BYTES
from pageferry.vmm.work_meter import WorkMeter


class Guest:
    """A guest of two vCPUs that works at the rate it is told while the clock goes on."""

    def __init__(self):
        self.memory = GuestMemory.linear(2 << 20)
        self.config = SimpleNamespace(cpus=2)
        self.status = VmStatus.RUNNING
        self.at_s = 100.0
        self.work = 0

    def now_s(self):
        return self.at_s

    def pass_s(self, duration_s, *, per_s):
        self.at_s += duration_s
        self.work += round(duration_s * per_s)
        for index, share in enumerate((self.work // 3, self.work - self.work // 3)):
            self.memory.write(STATUS_GPA + index * STATUS_SLOT_BYTES, struct.pack("<Q", share))


@pytest.fixture
def guest():
    return Guest()


@pytest.mark.parametrize(
    ("first", "last", "rate"),
    [((0, 0), (2, 500), 250), ((1, 400), (2, 500), 100), (None, (2, 500), None), ((2, 5), None, None)],
)
def test_a_rate_lies_between_two_samples(first, last, rate):
    first, last = (each and WorkSample(at_s=each[0], work=each[1]) for each in (first, last))
    assert work_per_s(first, last) == rate
    assert rate_before(first, last) == rate


def test_no_time_and_too_little_work_give_no_rate():
    then, now = WorkSample(at_s=1, work=100), WorkSample(at_s=2, work=199)
    assert work_per_s(now, now) is None
    assert work_per_s(then, now) == 99
    assert rate_before(then, now) is None


@pytest.mark.parametrize(
    ("before", "during", "lost"),
    [
        (100.0, 100.0, 0.0),
        (100.0, 25.0, 3.0),
        (100.0, 0.0, 4.0),
        (100.0, 125.0, -1.0),
        (None, 5.0, None),
        (100.0, None, None),
        (0.0, 0.0, None),
    ],
)
def test_lost_time_is_that_of_the_work_not_done(before, during, lost):
    assert lost_s(4.0, before, during) == lost


def test_the_stall_is_measured_by_the_guests_own_work(guest):
    before = WorkSample(at_s=guest.at_s, work=0)
    guest.pass_s(2, per_s=1000)
    meter = StallMeter(guest, guest.now_s, before)
    meter.begin()
    with meter.spent_on(Stall.REHEARSAL):
        guest.pass_s(0.5, per_s=0)
    with meter.spent_on(Stall.ENABLE):
        guest.pass_s(0.25, per_s=0)
    for _ in range(2):
        guest.pass_s(1.5, per_s=500)
        with meter.spent_on(Stall.CLEAN):
            guest.pass_s(0.125, per_s=0)
    meter.end()
    guest.pass_s(100, per_s=7)  # what comes afterwards counts no more
    meter.end()
    time = meter.result()
    assert (time.precopy_s, time.rehearsal_s, time.enable_s, time.clean_s) == (4.0, 0.5, 0.25, 0.25)
    assert (time.work_before_per_s, time.work_during_per_s, time.work_after_per_s) == (1000.0, 375.0, None)
    assert time.lost_s == 2.5


def test_without_an_earlier_sample_the_handshake_is_what_is_compared_with(guest):
    meter = StallMeter(guest, guest.now_s)
    guest.pass_s(1, per_s=1000)
    meter.begin()
    guest.pass_s(1, per_s=900)
    meter.end()
    assert meter.result().work_before_per_s == 1000
    assert meter.result().lost_s == pytest.approx(0.1)


def test_a_part_that_fails_counts_all_the_same(guest):
    meter = StallMeter(guest, guest.now_s)
    meter.begin()

    def clean():
        guest.pass_s(1, per_s=0)
        raise OSError("no")

    with pytest.raises(OSError, match="no"), meter.spent_on(Stall.CLEAN):
        clean()
    meter.end()
    assert meter.result().clean_s == 1


def test_no_pre_copy_has_no_times(guest):
    meter = StallMeter(guest, guest.now_s)
    meter.end()
    assert meter.result() is None


@pytest.mark.parametrize("when", ["before", "during", "at the end"])
def test_a_paused_guest_is_not_said_to_have_lost_time(guest, when):
    guest.status = VmStatus.PAUSED if when == "before" else VmStatus.RUNNING
    meter = StallMeter(guest, guest.now_s)
    guest.pass_s(1, per_s=1000)
    guest.status = VmStatus.PAUSED if when == "during" else VmStatus.RUNNING
    meter.begin()
    guest.status = VmStatus.PAUSED if when == "at the end" else VmStatus.RUNNING
    guest.pass_s(1, per_s=1000)
    meter.end()
    time = meter.result()
    assert time.precopy_s == 1
    assert (time.work_during_per_s, time.lost_s) == (None, None)


def test_a_guest_that_does_not_count_has_no_rates(guest):
    meter = StallMeter(guest, guest.now_s)
    guest.pass_s(1, per_s=0)
    meter.begin()
    guest.pass_s(1, per_s=0)
    meter.end()
    time = meter.result()
    assert (time.precopy_s, time.work_before_per_s, time.work_during_per_s, time.lost_s) == (1.0, None, None, None)


def test_a_guest_whose_counter_is_not_ram_any_more_has_no_rates(guest):
    meter = StallMeter(guest, guest.now_s)
    guest.pass_s(1, per_s=1000)
    guest.memory.remove([STATUS_GPA >> 12])
    meter.begin()
    guest.at_s += 1
    meter.end()
    assert meter.result().work_before_per_s is None


def test_the_meter_remembers_two_seconds(guest):
    meter = WorkMeter(guest.now_s)
    assert meter.oldest() is None
    for _ in range(10):
        guest.pass_s(0.5, per_s=1000)
        meter.sample(guest)
    assert meter.oldest() == WorkSample(at_s=guest.at_s - 2.0, work=guest.work - 2000)
    meter.forget()
    assert meter.oldest() is None


def test_the_meter_forgets_a_guest_that_was_paused(guest):
    meter = WorkMeter(guest.now_s)
    guest.pass_s(0.5, per_s=1000)
    meter.sample(guest)
    guest.status = VmStatus.PAUSED
    meter.sample(guest)
    assert meter.oldest() is None
    guest.status = VmStatus.RUNNING
    guest.pass_s(0.5, per_s=1000)
    meter.sample(guest)
    assert meter.oldest() == WorkSample(at_s=guest.at_s, work=1000)
    guest.memory.remove([STATUS_GPA >> 12])
    meter.sample(guest)
    assert meter.oldest() is None
