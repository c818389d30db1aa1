import threading

import pytest

from pageferry.core.errors import VmError
from pageferry.core.run import RunControl
from pageferry.engine.host import Host
from pageferry.engine.throttle import Throttle

_CYCLES = 5


class Frozen:
    """A guest that can only be frozen; counts how often it was, and tells the end of freeze number ``_CYCLES``."""

    def __init__(self):
        self.frozen = self.freezes = 0
        self.went_on = threading.Event()
        self.freezing = threading.Event()

    def freeze(self):
        self.freezes += 1
        self.frozen += 1
        self.freezing.set()

    def thaw(self):
        self.frozen -= 1
        if self.freezes == _CYCLES:
            self.went_on.set()


class LateHost(Host):
    """Where time passes in waits only; each takes ``late`` times as long as it should.

    Notes how long the guest ran and was frozen. After ``_CYCLES`` freezes time stands still.
    """

    def __init__(self, vm, late):
        self._vm, self._late = vm, late
        self._now_s = 0.0
        self.ran_s, self.frozen_s = [], []

    def now_s(self):
        return self._now_s

    def condition(self):
        return LateCondition(self)

    def passes(self, timeout_s):
        """Let time pass; return False once it stands still."""
        if self._vm.went_on.is_set():
            return False
        self._now_s += timeout_s * self._late
        (self.frozen_s if self._vm.frozen else self.ran_s).append(timeout_s * self._late)
        return True


class LateCondition(threading.Condition):
    """A condition of a late host."""

    def __init__(self, host):
        super().__init__()
        self._host = host

    def wait_for(self, predicate, timeout=None):
        if timeout is not None and self._host.passes(timeout):
            return predicate()
        return super().wait_for(predicate)


@pytest.fixture
def vm():
    return Frozen()


@pytest.fixture
def throttle(vm):
    throttle = Throttle(vm)
    yield throttle
    throttle.close()


def test_nothing_is_held_at_first_nor_by_a_share_of_nothing(vm, throttle):
    throttle.set(0.0)
    throttle.close()
    assert (vm.freezes, throttle.throttled_s) == (0, 0.0)


@pytest.mark.parametrize("late", [1, 40])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_share_is_kept_however_late_a_thread_wakes_up(vm, share, late):
    host = LateHost(vm, late)
    throttle = Throttle(vm, host)
    throttle.set(share)
    assert vm.went_on.wait(60)
    throttle.close()
    assert len(host.frozen_s) == len(host.ran_s) == _CYCLES
    for ran_s, frozen_s in zip(host.ran_s, host.frozen_s, strict=True):
        assert frozen_s == pytest.approx(late * ran_s * share / (1 - share))  # what it should be, and late once more
    assert throttle.throttled_s == pytest.approx(sum(host.frozen_s))


def test_a_guest_that_is_held_for_long_is_let_go_at_once(vm, throttle):
    throttle.set(0.9999999)  # a freeze of hours
    assert vm.freezing.wait(60)
    throttle.close()
    assert vm.frozen == 0
    assert throttle.share == 0.0


def test_a_smaller_share_takes_effect_while_the_guest_is_held(vm, throttle):
    throttle.set(0.9999999)
    assert vm.freezing.wait(60)
    throttle.set(0.5)
    assert vm.went_on.wait(60)


def test_once_closed_nothing_is_held_any_more(vm, throttle):
    throttle.close()
    throttle.set(0.5)
    assert throttle.share == 0.0
    assert vm.freezes == 0


def test_a_guest_that_cannot_be_held_is_told(vm, throttle):
    tried = threading.Event()

    def refuse():
        tried.set()
        raise VmError("no")

    vm.freeze = refuse
    throttle.set(0.5)
    assert tried.wait(60)
    throttle.close()
    with pytest.raises(VmError, match="no"):
        throttle.set(0.5)


def test_a_throttled_guest_works_on(accel, guests):
    vm = guests("sweep")
    throttle = Throttle(vm)
    assert isinstance(vm.run_control, RunControl)
    vm.resume()
    throttle.set(0.5)
    try:
        vm.freeze()  # another's: a throttle neither ends it nor is ended by it
        throttle.set(0.9)
        vm.thaw()
    finally:
        throttle.close()
    vm.freeze()
    vm.thaw()
    with pytest.raises(VmError, match="not frozen"):
        vm.thaw()
