"""Guest time: the clock that a guest reads and waits on, and a periodic timer over it.

**Guest time**, of every device here, starts at 0 and counts microseconds. It goes on while the guest is paused, as a
wall clock does, unless that is a PC (see :mod:`.machine`). It stands still from the moment in which the state is saved
until it is loaded, and goes on from there: so it never runs backwards and never jumps, whatever the clocks of the two
hosts say. Wall time is :mod:`.rtc`'s.
"""

import struct
import time
from collections.abc import Callable

from pageferry.core.errors import VmError
from pageferry.core.run import Effect, Wait
from pageferry.devices.bus import expect_size

CLOCK_PORT = 0xF0
TIMER_PORT = 0xE0

_NO_MMIO = range(0)
_MAX_WAIT_S = 10.0
_NS_PER_US = 1000
_MAX_US = (1 << 63) - 1

_PERIOD_OR_LEFT, _PERIODS = 0, 4
_ENDED = 1 << 31
_TIMER_STATE = struct.Struct("<IQQ")


class Clock:
    """Guest time in microseconds, and a way to wait.

    Reading gives the low 32 bits; writing n waits n microseconds (the guest may be woken early, and waits again if it
    must).

    Args:
        now_ns: a monotonic clock in nanoseconds.
    """

    name = "clock"
    ports = range(CLOCK_PORT, CLOCK_PORT + 4)
    mmio = _NO_MMIO

    def __init__(self, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._now_ns = now_ns
        self._zero_ns = now_ns()

    def now_ns(self) -> int:
        """Return the guest time in nanoseconds."""
        return self._now_ns() - self._zero_ns

    def now_us(self) -> int:
        """Return the guest time in microseconds."""
        return self.now_ns() // _NS_PER_US

    def set_back(self, ns: int) -> None:
        """Let so much time not have passed."""
        self._zero_ns += ns

    def read(self, offset: int, size: int) -> int:
        """Return the low bits of the guest time."""
        return _part(self.now_us(), offset, size)

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Wait so many microseconds."""
        return Wait(min(value / 1e6, _MAX_WAIT_S))

    def save(self) -> bytes:
        """Return the guest time."""
        return struct.pack("<Q", self.now_us())

    def load(self, data: bytes) -> None:
        """Go on from a saved guest time.

        Raises:
            VmError: it is none that a guest can have lived to see, and would soon not fit its 64 bits.
        """
        expect_size(self.name, data, 8)
        saved_us: int = struct.unpack("<Q", data)[0]
        if saved_us > _MAX_US:
            raise VmError(f"the state of device {self.name} shows a time that it cannot have")
        self._zero_ns = self._now_ns() - saved_us * _NS_PER_US


class Timer:
    """One periodic timer, polled.

    ======  =======================================  ======================================================
    offset  read                                     write
    ======  =======================================  ======================================================
    0       µs left of this period; 0: stopped       the period in µs: start anew with it; 0: stop
    4       bits 30..0: periods ended since the      any value: clear bit 31
            start; bit 31: one ended since the last
            write here
    ======  =======================================  ======================================================

    Both are u32; a write of another size or place does nothing.

    Args:
        now_us: guest time.
    """

    name = "timer"
    ports = range(TIMER_PORT, TIMER_PORT + 8)
    mmio = _NO_MMIO

    def __init__(self, now_us: Callable[[], int]) -> None:
        self._now_us = now_us
        self._period_us = 0
        self._started_us = 0
        self._seen = 0

    def _ended(self) -> int:
        return (self._now_us() - self._started_us) // self._period_us if self._period_us else 0

    def read(self, offset: int, size: int) -> int:
        """Return a register or a part of one."""
        if offset >= _PERIODS:
            ended = self._ended()
            return _part(ended & _ENDED - 1 | (_ENDED if ended > self._seen else 0), offset - _PERIODS, size)
        if not self._period_us:
            return 0
        return _part(self._period_us - (self._now_us() - self._started_us) % self._period_us, offset, size)

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Start, stop or acknowledge."""
        if size == 4 and offset == _PERIOD_OR_LEFT:
            self._period_us, self._started_us, self._seen = value, self._now_us(), 0
        elif size == 4 and offset == _PERIODS:
            self._seen = self._ended()
        return None

    def save(self) -> bytes:
        """Return the period, the guest time of the start, and the periods acknowledged."""
        return _TIMER_STATE.pack(self._period_us, self._started_us, self._seen)

    def load(self, data: bytes) -> None:
        """Replace the state; the guest time that it speaks of is loaded already.

        Raises:
            VmError: it is not one of this device.
        """
        expect_size(self.name, data, _TIMER_STATE.size)
        period_us, started_us, seen = _TIMER_STATE.unpack(data)
        if started_us > self._now_us():
            raise VmError(f"the state of device {self.name} begins after the guest time")
        self._period_us, self._started_us, self._seen = period_us, started_us, seen


def _part(value: int, offset: int, size: int) -> int:
    return value >> 8 * offset & (1 << 8 * size) - 1
