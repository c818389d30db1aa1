from pathlib import Path

import pytest
from virtio_driver import VirtioDriver

from pageferry.core.device_spec import DeviceKind, DeviceSpec
from pageferry.core.memory import GuestMemory
from pageferry.devices.bus import DeviceBus
from pageferry.devices.virtio.devices import VirtioDevices

MEMORY_BYTES = 32 << 20


class Machine:
    """Devices on a bus, over memory that notes its marks, and the level of each interrupt line."""

    def __init__(self, *specs):
        self.memory = GuestMemory.linear(MEMORY_BYTES)
        self.bus = DeviceBus()
        self.lines = {}
        self.bus.lines.connect(self)
        self.held = False
        self.virtio = VirtioDevices(specs, self.memory, self.bus, lambda: self.held)
        self.virtio.plug_in()
        self.marked = []
        self.memory.on_write(lambda gfns: self.marked.extend(gfns.tolist()))

    def set_line(self, irq, level):
        self.lines[irq] = level

    def driver(self, slot=1):
        return VirtioDriver(self.bus, self.memory, slot)

    def function(self, name):
        """Return a device as it hangs on the bus."""
        return next(device for device in self.bus.devices if device.name == name)


@pytest.fixture
def machine():
    """Make machines whose devices are closed at the end."""
    made = []

    def make(*specs):
        made.append(Machine(*specs))
        return made[-1]

    yield make
    for each in made:
        each.virtio.close()


@pytest.fixture
def disk_file(tmp_path):
    """A disk of 1 MiB, each sector filled with its number."""
    path = Path(tmp_path, "disk.img")
    path.write_bytes(b"".join(n.to_bytes(4, "little") * 128 for n in range(2048)))
    return path


@pytest.fixture
def disk(disk_file):
    return DeviceSpec(kind=DeviceKind.DISK, backend=str(disk_file))
