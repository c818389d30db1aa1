import pytest
from counting_guest import CountingGuest

from pageferry.core.guest_time import WorkSample
from pageferry.core.vm import VmStatus
from pageferry.guests.abi import STATUS_GPA
from pageferry.vmm.work_meter import WorkMeter


@pytest.fixture
def guest():
    return CountingGuest()


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
