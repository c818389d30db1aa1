"""StallMeter: measures where the guest's time goes during pre-copy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum

from pageferry.core.errors import VmError
from pageferry.core.guest_time import GuestTime, WorkSample, lost_s, rate_before, work_per_s
from pageferry.core.vm import Vm, VmStatus
from pageferry.guests.abi import read_work


class Stall(StrEnum):
    """The causes for which the guest may have to wait while it runs."""

    REHEARSAL = "rehearsal"
    ENABLE = "enable"
    CLEAN = "clean"


class StallMeter:
    """Measures one pre-copy; the methods are called in the order in which they are here.

    Args:
        vm: the guest.
        now_s: a monotonic clock in seconds.
        before: an earlier sample of the guest's work, on the same clock; the guest was not paused since. None: what
            it did since this object was made is taken instead.
    """

    def __init__(self, vm: Vm, now_s: Callable[[], float], before: WorkSample | None = None) -> None:
        self._vm = vm
        self._now_s = now_s
        self._stalls_s = dict.fromkeys(Stall, 0.0)
        self._before = before or self.work()
        self._first: WorkSample | None = None
        self._last: WorkSample | None = None
        self._began_s: float | None = None
        self._ended_s: float | None = None

    def begin(self) -> None:
        """Pre-copy begins."""
        self._began_s = self._now_s()
        self._first = self.work()

    @contextmanager
    def spent_on(self, stall: Stall) -> Iterator[None]:
        """Count the length of a ``with`` block as time that the guest may have waited."""
        began_s = self._now_s()
        try:
            yield
        finally:
            self._stalls_s[stall] += self._now_s() - began_s

    def work(self) -> WorkSample | None:
        """Return what the guest has done by now; None unless it runs and counts."""
        if self._vm.status is not VmStatus.RUNNING:
            return None
        try:
            work = read_work(self._vm.memory, self._vm.config.cpus)
        except VmError:  # the page of its counter is not RAM any more
            return None
        return WorkSample(at_s=self._now_s(), work=work)

    def end(self) -> None:
        """Pre-copy ends: the guest has just been frozen, or the migration failed. Only the first call counts."""
        if self._began_s is not None and self._ended_s is None:
            self._last = self.work()
            self._ended_s = self._now_s()

    def result(self) -> GuestTime | None:
        """Return what was measured; None if there was no pre-copy."""
        if self._began_s is None or self._ended_s is None:
            return None
        before = rate_before(self._before, self._first)
        during = None if before is None else work_per_s(self._first, self._last)
        precopy_s = self._ended_s - self._began_s
        return GuestTime(
            precopy_s=precopy_s,
            rehearsal_s=self._stalls_s[Stall.REHEARSAL],
            enable_s=self._stalls_s[Stall.ENABLE],
            clean_s=self._stalls_s[Stall.CLEAN],
            work_before_per_s=before,
            work_during_per_s=during,
            work_after_per_s=None,
            lost_s=lost_s(precopy_s, before, during),
        )
