"""DeviceBus: dispatches port I/O and MMIO to devices, saves and restores them all.

One lock serialises device accesses of several vCPUs; the software hypervisor gives it a place in its order of locks.
A device may write guest memory under it, and its marks take the log-dirty lock: so no thread that holds that waits for
a vCPU, and no device waits for vCPUs to stop. An access that no device answers reads all ones and ignores writes, as on
a PC.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from pageferry.core.errors import VmError
from pageferry.core.run import Effect
from pageferry.core.state import DeviceState
from pageferry.devices.interrupts import InterruptLines


class Stateful(Protocol):
    """State that is saved and restored with the devices, under a name of its own."""

    @property
    def name(self) -> str:
        """Its key among the devices."""

    def save(self) -> bytes:
        """Return the state; the guest is paused."""

    def load(self, data: bytes) -> None:
        """Replace the state.

        Raises:
            VmError: ``data`` is not a state of this device.
        """


class IoRegion(Protocol):
    """Ports and MMIO that are answered together. An offset counts from the start of the range that it is in.

    ``size`` is 1, 2, 4 or (MMIO only) 8 bytes; values are unsigned and fit it.
    """

    ports: range
    mmio: range

    def read(self, offset: int, size: int) -> int:
        """Return what the guest reads."""

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Take what the guest writes; the effect, if any, happens after the instruction."""


class Device(IoRegion, Stateful, Protocol):
    """One device: it answers accesses, and has a state."""


class Timed(Protocol):
    """A device that also acts by itself, when its time has come."""

    def due_in_ns(self) -> int | None:
        """Return in how much guest time it has something to do, 0 or less: at once; None: never. Needs no lock."""

    def advance(self) -> None:
        """Do what is due by now."""


class DeviceBus:
    """All devices of one guest, with disjoint ranges and distinct names; and their interrupt lines.

    ``devices`` are saved and restored in their order. ``elsewhere`` is what answers no access that comes here, as
    the kernel's own devices do not: saved and restored after the others. ``timed``: those that act by themselves.
    """

    def __init__(self) -> None:
        self.lines = InterruptLines()
        self.devices: tuple[Device, ...] = ()
        self.elsewhere: tuple[Stateful, ...] = ()
        self.timed: tuple[Timed, ...] = ()
        self._regions: tuple[IoRegion, ...] = ()
        self._last: IoRegion | None = None
        self._lock: AbstractContextManager[object] = threading.Lock()

    def add(self, *devices: Device) -> None:
        """Add devices, before anything runs."""
        self.devices += devices
        self._regions += devices

    def add_regions(self, *regions: IoRegion) -> None:
        """Add what answers accesses and has no state of its own, before anything runs."""
        self._regions += regions

    def use_lock(self, lock: AbstractContextManager[object]) -> None:
        """Serialise accesses by another lock, before anything runs."""
        self._lock = lock

    def locked(self) -> AbstractContextManager[object]:
        """Return the lock of the accesses: for a host's own access to a device."""
        return self._lock

    def port_read(self, port: int, size: int) -> int:
        """Return what IN reads."""
        with self._lock:
            for region in self._regions:
                if port in region.ports:
                    return region.read(port - region.ports.start, size)
        return _all_ones(size)

    def port_write(self, port: int, size: int, value: int) -> Effect | None:
        """Perform OUT."""
        with self._lock:
            for region in self._regions:
                if port in region.ports:
                    return region.write(port - region.ports.start, size, value)
        return None

    def mmio_read(self, gpa: int, size: int) -> int:
        """Return what a load from device space reads."""
        with self._lock:
            region = self._at(gpa)
            return _all_ones(size) if region is None else region.read(gpa - region.mmio.start, size)

    def mmio_write(self, gpa: int, size: int, value: int) -> Effect | None:
        """Perform a store to device space."""
        with self._lock:
            region = self._at(gpa)
            return None if region is None else region.write(gpa - region.mmio.start, size, value)

    def _at(self, gpa: int) -> IoRegion | None:
        """Return what answers at an address; that of the last access is looked at first."""
        if self._last is None or gpa not in self._last.mmio:
            self._last = next((region for region in self._regions if gpa in region.mmio), None)
        return self._last

    def due_in_ns(self) -> int | None:
        """Return in how much guest time a device has something to do by itself; None: none ever will as it is."""
        return min((due for device in self.timed if (due := device.due_in_ns()) is not None), default=None)

    def advance(self) -> None:
        """Let the devices do what is due by now; cheap when nothing is."""
        due_in_ns = self.due_in_ns()
        if due_in_ns is not None and due_in_ns <= 0:
            with self._lock:
                self._advance()

    def _advance(self) -> None:
        for device in self.timed:
            device.advance()

    def save(self) -> tuple[DeviceState, ...]:
        """Return every device's state, with all done that is due by now; the guest is paused."""
        with self._lock:
            self._advance()
            return tuple(_save(device) for device in (*self.devices, *self.elsewhere))

    def load(self, states: Sequence[DeviceState]) -> None:
        """Replace every device's state.

        Raises:
            VmError: a device is missing, unknown or named twice, or refuses its data.
        """
        by_name = {state.name: state for state in states}
        devices = (*self.devices, *self.elsewhere)
        ours = {device.name for device in devices}
        if len(by_name) != len(states) or set(by_name) != ours:
            raise VmError(
                f"the saved devices ({', '.join(sorted(s.name for s in states))}) "
                f"are not this machine's ({', '.join(sorted(ours))})"
            )
        with self._lock:
            for device in devices:
                device.load(by_name[device.name].data)
            self.lines.drive_all()


def _save(device: Stateful) -> DeviceState:
    began_ns = time.perf_counter_ns()
    data = device.save()
    return DeviceState(name=device.name, data=data, save_ns=time.perf_counter_ns() - began_ns)


def _all_ones(size: int) -> int:
    return (1 << (8 * size)) - 1


def expect_size(name: str, data: bytes, size: int) -> None:
    """Check the length of a device's saved state.

    Raises:
        VmError: it is not ``size`` bytes.
    """
    if len(data) != size:
        raise VmError(f"the state of device {name} has {len(data)} bytes, not {size}")


def read_bytes(read: Callable[[int], int], offset: int, size: int) -> int:
    """Read registers of a byte each, as on a bus of bytes: ``read`` gives the one at an offset."""
    return int.from_bytes(bytes(read(at) for at in range(offset, offset + size)), "little")


def write_bytes(write: Callable[[int, int], object], offset: int, size: int, value: int) -> None:
    """Write registers of a byte each: ``write`` takes an offset and what to write there."""
    for at, byte in enumerate(value.to_bytes(size, "little"), offset):
        write(at, byte)
