"""The clock that drives our own devices while the vCPUs are inside the kernel.

On ``soft`` a vCPU looks between its slices whether a device has something to do by itself, as the wall clock with its
alarm has. Here a thread sleeps until then. It is not stopped at a freeze: such a device raises a line, which is part of
the machine's state, and touches no memory.
"""

import threading
import time

from pageferry.core.threads import begin
from pageferry.devices.bus import DeviceBus

_NS_PER_S = 1_000_000_000


class DeviceTimer:
    """Lets the devices of a bus do what is due; its thread begins when something is, for the first time.

    Args:
        bus: the devices.
    """

    def __init__(self, bus: DeviceBus) -> None:
        self._bus = bus
        self._changed = threading.Condition()
        self._wake_ns: int | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def notice(self) -> None:
        """Look when something is due next: after an access, or a load, that may have changed it; from any thread."""
        due_in_ns = self._bus.due_in_ns()
        if due_in_ns is None:
            return
        wake_ns = time.monotonic_ns() + due_in_ns
        with self._changed:
            if self._closed or (self._wake_ns is not None and self._wake_ns <= wake_ns):
                return
            self._wake_ns = wake_ns
            if self._thread is None:
                self._thread = begin(self._main, "device-timer")
            self._changed.notify()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _main(self) -> None:
        while self._sleep():
            self._bus.advance()
            self.notice()

    def _sleep(self) -> bool:
        """Wait until something is due; return False when it never will be again."""
        with self._changed:
            while not self._closed:
                left_ns = None if self._wake_ns is None else self._wake_ns - time.monotonic_ns()
                if left_ns is not None and left_ns <= 0:
                    self._wake_ns = None
                    return True
                self._changed.wait(None if left_ns is None else left_ns / _NS_PER_S)
            return False
