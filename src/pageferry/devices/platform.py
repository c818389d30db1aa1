"""The small devices of the guest ABI: console, exit, clock, sync and invalidate ports; and all of them."""

import struct
import threading
import time
from collections.abc import Callable

from pageferry.core.memory import GuestMemory
from pageferry.core.run import Effect, GuestExit, InvalidateTlb, SyncPoint, Wait
from pageferry.devices.bus import DeviceBus, expect_size
from pageferry.devices.dma import DmaDevice

CONSOLE_PORT = 0x3F8
EXIT_PORT = 0xF4
CLOCK_PORT = 0xF0
SYNC_PORT = 0xEC
INVALIDATE_PORT = 0xE8

_NO_MMIO = range(0)
_CONSOLE_LINE_STATUS = 5
_TRANSMITTER_EMPTY = 0x60
_CONSOLE_KEPT_BYTES = 64 << 10
_MAX_WAIT_S = 10.0


class Console:
    """The transmit half of a 16550 at COM1: bytes out, always ready.

    ``output`` keeps the last 64 KiB for whoever asks later; ``sink`` sees every byte as it comes.
    """

    name = "console"
    ports = range(CONSOLE_PORT, CONSOLE_PORT + 8)
    mmio = _NO_MMIO

    def __init__(self) -> None:
        self.output = bytearray()
        self.sink: Callable[[bytes], None] | None = None

    def read(self, offset: int, size: int) -> int:
        """Only the line status register has something to say."""
        return _TRANSMITTER_EMPTY if offset == _CONSOLE_LINE_STATUS else 0

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Send a byte."""
        if offset == 0:
            byte = bytes([value & 0xFF])
            self.output += byte
            if len(self.output) > 2 * _CONSOLE_KEPT_BYTES:
                del self.output[:-_CONSOLE_KEPT_BYTES]
            if self.sink is not None:
                self.sink(byte)
        return None

    def save(self) -> bytes:
        """The transmitter holds nothing."""
        return b""

    def load(self, data: bytes) -> None:
        """Accept the empty state."""
        expect_size(self.name, data, 0)


class ExitPort:
    """A write ends the guest with the value as exit code (the port of QEMU's isa-debug-exit)."""

    name = "exit"
    ports = range(EXIT_PORT, EXIT_PORT + 4)
    mmio = _NO_MMIO

    def read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """End the guest."""
        return GuestExit(value)

    def save(self) -> bytes:
        """No state."""
        return b""

    def load(self, data: bytes) -> None:
        """Accept the empty state."""
        expect_size(self.name, data, 0)


class Clock:
    """Guest time in microseconds, and a way to wait.

    Guest time starts at 0, goes on where it was after a migration, and never runs backwards; it does not stop while
    the guest is paused, as a wall clock does not. Reading gives the low 32 bits; writing n waits n microseconds (the
    guest may be woken early, and waits again if it must).

    Args:
        now_s: a monotonic clock in seconds.
    """

    name = "clock"
    ports = range(CLOCK_PORT, CLOCK_PORT + 4)
    mmio = _NO_MMIO

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._zero_s = now_s()

    def now_us(self) -> int:
        """Return the guest time."""
        return int((self._now_s() - self._zero_s) * 1e6)

    def read(self, offset: int, size: int) -> int:
        """Return the low bits of the guest time."""
        return (self.now_us() >> (8 * offset)) & ((1 << (8 * size)) - 1)

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Wait so many microseconds."""
        return Wait(min(value / 1e6, _MAX_WAIT_S))

    def save(self) -> bytes:
        """Return the guest time."""
        return struct.pack("<Q", self.now_us())

    def load(self, data: bytes) -> None:
        """Go on from a saved guest time."""
        expect_size(self.name, data, 8)
        self._zero_s = self._now_s() - struct.unpack("<Q", data)[0] / 1e6


class SyncPort:
    """Where a guest and a test meet.

    A write of a value pauses the guest *if somebody is attached* (``attached`` is set); the host then answers with
    ``reply`` and resumes. A read gives the answer; with nobody attached it gives 1, 2, 3, ... so that the same program
    runs free. The answer and the count migrate, the attachment does not.
    """

    name = "sync"
    ports = range(SYNC_PORT, SYNC_PORT + 4)
    mmio = _NO_MMIO

    def __init__(self) -> None:
        self.attached = threading.Event()
        self._reply = 0

    def reply(self, value: int) -> None:
        """Set what the guest reads next."""
        self._reply = value & 0xFFFF_FFFF

    def read(self, offset: int, size: int) -> int:
        """Return the answer."""
        if not self.attached.is_set():
            self._reply = (self._reply + 1) & 0xFFFF_FFFF
        return self._reply & ((1 << (8 * size)) - 1)

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Meet."""
        return SyncPoint(value) if self.attached.is_set() else None

    def save(self) -> bytes:
        """Return the answer."""
        return struct.pack("<I", self._reply)

    def load(self, data: bytes) -> None:
        """Replace the answer."""
        expect_size(self.name, data, 4)
        (self._reply,) = struct.unpack("<I", data)


class InvalidatePort:
    """A write has the vCPU forget its translations, as a load of CR3 would: ring 3 has no INVLPG."""

    name = "invalidate"
    ports = range(INVALIDATE_PORT, INVALIDATE_PORT + 4)
    mmio = _NO_MMIO

    def read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Flush, whatever the value."""
        return InvalidateTlb()

    def save(self) -> bytes:
        """No state."""
        return b""

    def load(self, data: bytes) -> None:
        """Accept the empty state."""
        expect_size(self.name, data, 0)


class Platform:
    """The standard devices of a guest, by name, and the bus they hang on.

    Args:
        memory: for the device that writes guest memory.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.console = Console()
        self.clock = Clock()
        self.sync = SyncPort()
        self.dma = DmaDevice(memory)
        self.bus = DeviceBus((self.console, ExitPort(), self.clock, self.sync, InvalidatePort(), self.dma))
