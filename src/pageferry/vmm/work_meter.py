"""WorkMeter: remembers what the guest did lately, so that a migration knows what it slowed down."""

import threading
import time
from collections import deque
from collections.abc import Callable

from pageferry.core.errors import VmError
from pageferry.core.guest_time import WorkSample
from pageferry.core.vm import Vm, VmStatus
from pageferry.guests.abi import read_work

#: How long ago the oldest sample may be.
_SPAN_S = 2.0


class WorkMeter:
    """Samples of one guest's work that lie in one stretch of undisturbed running; for any thread.

    Args:
        now_s: a monotonic clock in seconds.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._lock = threading.Lock()
        self._samples: deque[WorkSample] = deque()

    def sample(self, vm: Vm) -> None:
        """Take a sample; forget all of them when the guest does not run."""
        try:
            work = read_work(vm.memory, vm.config.cpus) if vm.status is VmStatus.RUNNING else None
        except VmError:  # its counter's page was removed
            work = None
        if work is None:
            self.forget()
            return
        now_s = self._now_s()
        with self._lock:
            self._samples.append(WorkSample(at_s=now_s, work=work))
            while self._samples[0].at_s < now_s - _SPAN_S:
                self._samples.popleft()

    def forget(self) -> None:
        """Begin anew: the guest was disturbed."""
        with self._lock:
            self._samples.clear()

    def oldest(self) -> WorkSample | None:
        """Return the oldest sample, at most 2 s old at the last one; None without any."""
        with self._lock:
            return self._samples[0] if self._samples else None
