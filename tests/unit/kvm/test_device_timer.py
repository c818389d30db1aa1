"""The thread that lets devices do what is due, while the vCPUs are elsewhere."""

import threading
import time

import pytest

from pageferry.devices.bus import DeviceBus
from pageferry.kvm.device_timer import DeviceTimer

_PATIENCE_S = 30.0
_HOUR_NS = 3_600_000_000_000


class Alarm:
    """Due at an instant, which it forgets when it has come."""

    def __init__(self):
        self.at_ns = None
        self.rang = threading.Semaphore(0)

    def due_in_ns(self):
        at_ns = self.at_ns
        return None if at_ns is None else at_ns - time.monotonic_ns()

    def advance(self):
        if self.at_ns is not None and self.at_ns <= time.monotonic_ns():
            self.at_ns = None
            self.rang.release()


@pytest.fixture
def alarms():
    return Alarm(), Alarm()


@pytest.fixture
def timer(alarms):
    bus = DeviceBus()
    bus.timed += alarms
    made = DeviceTimer(bus)
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "device-timer"]


def test_nothing_due_needs_no_thread(timer):
    timer.notice()
    assert timer._thread is None


def test_what_is_due_is_done(timer, alarms):
    for alarm in (*alarms, alarms[0]):
        alarm.at_ns = time.monotonic_ns() + 1_000_000
        timer.notice()
        assert alarm.rang.acquire(timeout=_PATIENCE_S)


def test_what_is_due_sooner_is_done_first(timer, alarms):
    late, soon = alarms
    late.at_ns = time.monotonic_ns() + _HOUR_NS
    timer.notice()
    soon.at_ns = time.monotonic_ns()
    timer.notice()
    assert soon.rang.acquire(timeout=_PATIENCE_S)
    late.at_ns = time.monotonic_ns()
    timer.notice()
    assert late.rang.acquire(timeout=_PATIENCE_S)


def test_each_of_several_is_done(timer, alarms):
    first, second = alarms
    first.at_ns, second.at_ns = time.monotonic_ns(), time.monotonic_ns() + 5_000_000
    timer.notice()
    assert first.rang.acquire(timeout=_PATIENCE_S)
    assert second.rang.acquire(timeout=_PATIENCE_S)


def test_a_closed_one_does_nothing_more(timer, alarms):
    alarms[0].at_ns = time.monotonic_ns() + _HOUR_NS
    timer.notice()
    timer.close()
    alarms[0].at_ns = 0
    timer.notice()
    assert not alarms[0].rang.acquire(blocking=False)
