"""A virtio driver as a guest has one, over a device bus and guest memory: for tests of devices.

Numbers are the specification's, said here once more, so that a wrong one in the devices is found.
"""

import struct
import time
from dataclasses import dataclass

VERSION_1, EVENT_IDX, INDIRECT = 1 << 32, 1 << 29, 1 << 28
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 0x40
NEXT, WRITE, IN_TABLE = 1, 2, 4
_PATIENCE_S = 60
COMMON, NOTIFY, ISR, DEVICE, PCI_WINDOW = 1, 2, 3, 4, 5


def wait_until(condition):
    """Wait until ``condition()``, for what a device does by itself."""
    give_up_s = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_s, f"not so after {_PATIENCE_S} s"
        time.sleep(0.0005)


class Pci:
    """Configuration accesses to function 0 of a slot, by mechanism 1."""

    def __init__(self, bus, slot):
        self._bus = bus
        self._slot = slot

    def _address(self, offset):
        self._bus.port_write(0xCF8, 4, 1 << 31 | self._slot << 11 | offset & 0xFC)

    def read(self, offset, size):
        self._address(offset)
        return self._bus.port_read(0xCFC + (offset & 3), size)

    def write(self, offset, size, value):
        self._address(offset)
        self._bus.port_write(0xCFC + (offset & 3), size, value)

    def capabilities(self):
        """Return where each virtio capability is, by its type."""
        assert self.read(6, 2) & 0x10
        found, at = {}, self.read(0x34, 1)
        while at:
            if self.read(at, 1) == 9:
                found[self.read(at + 3, 1)] = at
            at = self.read(at + 1, 1)
        return found


@dataclass
class Area:
    """Memory that a test hands out."""

    next_gpa: int = 0x10_0000

    def take(self, size, align=16):
        gpa = -(-self.next_gpa // align) * align
        self.next_gpa = gpa + size
        return gpa


class Ring:
    """The driver's half of one split queue."""

    def __init__(self, driver, index, size):
        self._driver, self.index, self.size = driver, index, size
        memory, area = driver.memory, driver.area
        self.memory = memory
        self.desc = area.take(16 * size, 16)
        self.avail = area.take(6 + 2 * size, 2)
        self.used = area.take(6 + 8 * size, 4)
        for gpa, length in ((self.desc, 16 * size), (self.avail, 6 + 2 * size), (self.used, 6 + 8 * size)):
            memory.write(gpa, bytes(length))
        self._free = list(range(size))
        self._chains = {}
        self.avail_idx = self.seen = 0

    def put_descriptor(self, index, gpa, length, flags, following=0):
        self.memory.write(self.desc + 16 * index, struct.pack("<QIHH", gpa, length, flags, following))

    def add(self, readable=(), writable=(), *, indirect=False):
        """Make a chain of ranges available; return its head."""
        buffers = [(gpa, size, 0) for gpa, size in readable] + [(gpa, size, WRITE) for gpa, size in writable]
        if indirect:
            table = self._driver.area.take(16 * len(buffers))
            for at, (gpa, size, flags) in enumerate(buffers):
                more = NEXT if at + 1 < len(buffers) else 0
                self.memory.write(table + 16 * at, struct.pack("<QIHH", gpa, size, flags | more, at + 1))
            buffers = [(table, 16 * len(buffers), IN_TABLE)]
        places = [self._free.pop(0) for _ in buffers]
        for at, (gpa, size, flags) in enumerate(buffers):
            last = at + 1 == len(buffers)
            self.put_descriptor(places[at], gpa, size, flags | (0 if last else NEXT), 0 if last else places[at + 1])
        self._chains[places[0]] = places
        self.offer(places[0])
        return places[0]

    def offer(self, head):
        self.memory.write(self.avail + 4 + 2 * (self.avail_idx % self.size), struct.pack("<H", head))
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.memory.write(self.avail + 2, struct.pack("<H", self.avail_idx))

    def u16(self, gpa):
        return int.from_bytes(self.memory.read(gpa, 2), "little")

    def set_used_event(self, index):
        self.memory.write(self.avail + 4 + 2 * self.size, struct.pack("<H", index))

    @property
    def avail_event(self):
        return self.u16(self.used + 4 + 8 * self.size)

    def notify(self):
        self._driver.notify(self.index)

    def wait(self):
        """Wait until the device, which works by itself, has given something back; return all that it has."""
        wait_until(lambda: self.seen != self.u16(self.used + 2))
        with self._driver.bus.locked():  # it has interrupted by then
            return self.collect()

    def collect(self):
        """Return what the device has given back: (head, length) each."""
        found = []
        while self.seen != self.u16(self.used + 2):
            head, length = struct.unpack("<II", self.memory.read(self.used + 4 + 8 * (self.seen % self.size), 8))
            self._free += self._chains.pop(head, [])
            found.append((head, length))
            self.seen = (self.seen + 1) & 0xFFFF
        return found


class VirtioDriver:
    """A driver of one device.

    Args:
        bus: the device bus.
        memory: the guest's.
        slot: of the device.
    """

    def __init__(self, bus, memory, slot):
        self.bus, self.memory = bus, memory
        self.pci = Pci(bus, slot)
        self._area_start = 0x10_0000 + slot * 0x4_0000
        self.area = Area(self._area_start)
        self.places = self.pci.capabilities()
        self.bar = self.pci.read(0x10, 4)
        self._enable()
        self.rings = []
        self._notify_multiplier = self.pci.read(self.places[NOTIFY] + 16, 4)

    def _enable(self):
        self.pci.write(0x10, 4, self.bar)
        self.pci.write(4, 2, 6)

    def _at(self, kind):
        return self.bar + self.pci.read(self.places[kind] + 8, 4)

    def get(self, offset, size):
        return self.bus.mmio_read(self._at(COMMON) + offset, size)

    def set(self, offset, size, value):
        self.bus.mmio_write(self._at(COMMON) + offset, size, value)

    def config(self, offset, size):
        return self.bus.mmio_read(self._at(DEVICE) + offset, size)

    @property
    def status(self):
        return self.get(0x14, 1)

    @status.setter
    def status(self, value):
        self.set(0x14, 1, value)

    def isr(self):
        return self.bus.mmio_read(self._at(ISR), 1)

    def offered(self):
        features = 0
        for half in (0, 1):
            self.set(0, 4, half)
            features |= self.get(4, 4) << 32 * half
        return features

    def begin(self, features=VERSION_1, sizes=None):
        """Set the device up (section 3.1.1) with these features and queue sizes; None: as large as can be."""
        self._enable()
        self.area = Area(self._area_start)
        self.status = 0
        self.status = ACKNOWLEDGE
        self.status = ACKNOWLEDGE | DRIVER
        for half in (0, 1):
            self.set(8, 4, half)
            self.set(12, 4, features >> 32 * half & 0xFFFF_FFFF)
        self.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
        if not self.status & FEATURES_OK:
            return False
        self.rings = []
        for index in range(self.get(0x12, 2)):
            self.set(0x16, 2, index)
            size = (sizes or {}).get(index, self.get(0x18, 2))
            self.set(0x18, 2, size)
            ring = Ring(self, index, size)
            for offset, gpa in ((0x20, ring.desc), (0x28, ring.avail), (0x30, ring.used)):
                self.set(offset, 4, gpa & 0xFFFF_FFFF)
                self.set(offset + 4, 4, gpa >> 32)
            self.set(0x1C, 2, 1)
            self.rings.append(ring)
        self.status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        return True

    def notify(self, index):
        self.set(0x16, 2, index)
        self.bus.mmio_write(self._at(NOTIFY) + self.get(0x1E, 2) * self._notify_multiplier, 2, index)

    @property
    def broken(self):
        return bool(self.status & NEEDS_RESET)
