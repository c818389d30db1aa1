"""The smallest devices of the guest ABI, exit, sync and invalidate ports, and all devices of a guest together."""

import struct
import threading

from pageferry.core.memory import GuestMemory
from pageferry.core.run import Effect, GuestExit, InvalidateTlb, SyncPoint
from pageferry.core.vm import MachineModel
from pageferry.devices.bus import DeviceBus, expect_size
from pageferry.devices.clock import Clock, Timer
from pageferry.devices.dma import DmaDevice
from pageferry.devices.interrupts import IRQ_COM1, IRQ_RTC, IRQ_SCI
from pageferry.devices.pc.power import PowerManagement, reset_ports
from pageferry.devices.rtc import Rtc
from pageferry.devices.uart import Uart

EXIT_PORT = 0xF4
SYNC_PORT = 0xEC
INVALIDATE_PORT = 0xE8


_NO_MMIO = range(0)


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


class SyncPort:
    """Where a guest and a test meet.

    A write of a value pauses the guest *if a test is attached* (``attached`` is set); the host then answers with
    ``reply`` and resumes. A read gives the answer; with no host attached it gives 1, 2, 3, ... so that the same program
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
        model: a PC has more of them. Its interrupt controllers and timer are added by the machine, or in the kernel.
    """

    def __init__(self, memory: GuestMemory, model: MachineModel) -> None:
        self.bus = DeviceBus()
        self.console = Uart(self.bus.lines.line(IRQ_COM1))
        self.clock = Clock()
        self.timer = Timer(self.clock.now_us)
        self.rtc = Rtc(self.bus.lines.line(IRQ_RTC))
        self.sync = SyncPort()
        self.dma = DmaDevice(memory)
        # States are loaded in this order: those of timers after the guest time that they count in.
        self.bus.add(self.console, self.clock, self.timer, self.rtc)
        self.bus.add(ExitPort(), self.sync, InvalidatePort(), self.dma)
        self.bus.timed += (self.rtc,)
        self.power: PowerManagement | None = None
        if model is MachineModel.PC:
            self.power = PowerManagement(self.clock.now_ns, self.bus.lines.line(IRQ_SCI))
            self.bus.add(self.power)
            self.bus.add_regions(*reset_ports())
