"""What pre-copy cost the guest, with a scripted clock and a scripted guest."""

import pytest
from counting_guest import CountingGuest

from pageferry.core.guest_time import WorkSample
from pageferry.core.vm import VmStatus
from pageferry.engine.stall_meter import Stall, StallMeter
from pageferry.guests.abi import STATUS_GPA


@pytest.fixture
def guest():
    return CountingGuest()


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
