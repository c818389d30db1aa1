"""Waiting for what others do, and guests that show that they run on."""

import threading

import pytest

from pageferry.guests.abi import read_status

_POLLS = 60_000


def until(condition, what, poll_s=0.001):
    """Return what ``condition()`` returns once that is true; fail for want of ``what`` after a minute or more."""
    patience = threading.Event()
    for _ in range(int(_POLLS * 0.001 / poll_s)):
        if result := condition():
            return result
        patience.wait(poll_s)
    return pytest.fail(f"no {what() if callable(what) else what}")


def slots(vm):
    """What the guest says of itself, vCPU by vCPU."""
    return read_status(vm.memory, vm.config.cpus)


def work(vm):
    """The operations that each vCPU has done."""
    return [slot.work for slot in slots(vm)]


def runs_on(vm):
    """Every vCPU does more work, and none finds anything wrong."""
    before = work(vm)

    def worked():
        assert vm.end is None, (vm.end, slots(vm))
        return all(now > then for now, then in zip(work(vm), before, strict=True))

    return until(worked, lambda: f"work: {slots(vm)}")
