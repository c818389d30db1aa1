"""Throttle: freezes a guest for a share of its time, so that it writes less.

One cycle lets the guest run for a while, measures how long that really was, and freezes it for as long as its share
demands: so the share is kept however late a thread wakes up. Freezing nests: others who pause the guest notice nothing.
"""

import threading

from pageferry.core.vm import Vm
from pageferry.engine.host import THIS_HOST, Host

#: One cycle: short, so that a peer of the guest does not wait long; long against the cost of a kick (0.3 ms).
_CYCLE_S = 0.02
_MIN_RUN_S = 0.001


class Throttle:
    """Throttles ``vm``; not at all until :meth:`set` says so.

    Args:
        vm: the guest.
        host: by whose clock it waits.
    """

    def __init__(self, vm: Vm, host: Host = THIS_HOST) -> None:
        self._vm = vm
        self._host = host
        self._changed = host.condition()
        self._share = 0.0
        self._throttled_s = 0.0
        self._closed = False
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def share(self) -> float:
        """The share of its time for which the guest is throttled now."""
        return self._share

    @property
    def throttled_s(self) -> float:
        """For how long the guest was frozen in all."""
        return self._throttled_s

    def set(self, share: float) -> None:
        """Throttle the guest for ``share`` of its time from now on, 0 to less than 1.

        Raises:
            VmError: the guest could not be frozen or thawed since the last call.
        """
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if self._closed:
                return
            self._share = share
            if share and self._thread is None:
                self._thread = self._host.begin(self._run, "throttle")
            self._changed.notify()

    def close(self) -> None:
        """Stop throttling, for good: when this returns, the throttle freezes nothing. May be repeated."""
        with self._changed:
            self._closed = True
            self._share = 0.0
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closed:
                self._cycle()
        except Exception as error:  # told at the next set(); a guest that cannot be frozen runs
            self._failure = error

    def _cycle(self) -> None:
        with self._changed:
            if self._changed.wait_for(lambda: self._closed or self._share > 0.0) and self._closed:
                return
            share = self._share
            began_s = self._host.now_s()
            run_s = max(_MIN_RUN_S, _CYCLE_S * (1.0 - share))
            self._changed.wait_for(lambda: self._share != share, run_s)
            share = self._share
        ran_s = self._host.now_s() - began_s
        if share:
            self._freeze(ran_s * share / (1.0 - share))

    def _freeze(self, freeze_s: float) -> None:
        self._vm.freeze()
        try:
            share, began_s = self._share, self._host.now_s()
            with self._changed:
                self._changed.wait_for(lambda: self._share < share, freeze_s)
        finally:
            self._vm.thaw()
            self._throttled_s += self._host.now_s() - began_s
