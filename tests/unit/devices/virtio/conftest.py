from pathlib import Path

import pytest
from virtio_driver import VirtioDriver

from pageferry.core.memory import GuestMemory
from pageferry.core.vm import DeviceKind, DeviceSpec
from pageferry.devices.bus import DeviceBus
from pageferry.devices.virtio.devices import VirtioDevices

MEMORY_BYTES = 32 << 20


class Machine:
    """Devices on a bus, over memory that notes its marks, and the level of each interrupt line."""

    def __init__(self, *specs):
        self.memory = GuestMemory.linear(MEMORY_BYTES)
        self.lines = {}
        self.virtio = VirtioDevices(specs, self.memory, self.lines.__setitem__)
        self.bus = DeviceBus(self.virtio.devices)
        self.marked = []
        self.memory.on_write(lambda gfns: self.marked.extend(gfns.tolist()))

    def driver(self, slot=1):
        return VirtioDriver(self.bus, self.memory, slot)


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
