"""Hostile drivers: whatever is in the rings, the registers or a saved state, a device ends or answers, and no more."""

import logging
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_driver import EVENT_IDX, INDIRECT, VERSION_1, VirtioDriver

from pageferry.core.device_spec import DeviceKind, DeviceSpec
from pageferry.core.errors import VmError
from pageferry.core.memory import GuestMemory
from pageferry.devices.bus import DeviceBus
from pageferry.devices.virtio.devices import VirtioDevices

MEMORY_BYTES = 4 << 20
QUEUE_SIZE = 8
KINDS = (DeviceKind.DISK, DeviceKind.RNG, DeviceKind.CONSOLE, DeviceKind.BALLOON)

gpas = st.one_of(
    st.integers(0, MEMORY_BYTES),
    st.sampled_from([0, 0x1000, MEMORY_BYTES - 1, MEMORY_BYTES, 0xE000_0000, 2**32 - 1, 2**63, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
)
lengths = st.one_of(st.integers(0, 4096), st.sampled_from([0, 1, 16, 512, 513, 2**31, 2**32 - 1]))
descriptors = st.tuples(gpas, lengths, st.integers(0, 0xF), st.integers(0, QUEUE_SIZE + 1))
#: Registers of a driver that reads and writes them as it likes: offset in the BAR, size, value.
accesses = st.tuples(
    st.one_of(st.integers(0, 0x3F), st.sampled_from([0x1000, 0x2000, 0x2010, 0x3000, 0x3004, 0x3FFC])),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 2**64 - 1),
)


class Hostile:
    """Every kind of device that needs nothing of the host, and a driver for each."""

    def __init__(self, disk):
        disk.write_bytes(bytes(64 << 10))
        self.memory = GuestMemory.linear(MEMORY_BYTES)
        specs = [DeviceSpec(kind=kind, backend=str(disk) if kind is DeviceKind.DISK else "") for kind in KINDS]
        self.bus = DeviceBus()
        self.virtio = VirtioDevices(specs, self.memory, self.bus, lambda: False)
        self.virtio.plug_in()
        self.virtio.claim()
        self.drivers = [VirtioDriver(self.bus, self.memory, slot) for slot in range(1, len(specs) + 1)]

    def settle(self):
        """Return when all is done that was asked of the devices."""
        self.virtio.release()
        self.virtio.claim()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    made = Hostile(tmp_path_factory.mktemp("virtio") / "disk")
    logging.disable(logging.WARNING)
    yield made
    logging.disable(logging.NOTSET)
    made.virtio.close()


@settings(max_examples=60, deadline=None)
@given(
    table=st.lists(descriptors, min_size=QUEUE_SIZE, max_size=QUEUE_SIZE),
    indirect=st.lists(descriptors, max_size=QUEUE_SIZE + 2),
    heads=st.lists(st.integers(0, QUEUE_SIZE), max_size=QUEUE_SIZE),
    available=st.one_of(st.none(), st.integers(0, 0xFFFF)),
    headers=st.lists(st.binary(max_size=16), max_size=4),
    features=st.sampled_from([VERSION_1, VERSION_1 | EVENT_IDX, VERSION_1 | EVENT_IDX | INDIRECT]),
)
def test_a_ring_of_anything_ends_the_device_or_is_answered(
    hostile, table, indirect, heads, available, headers, features
):
    for at, header in enumerate(headers):
        hostile.memory.write(0x1000 * at, header)
    hostile.memory.write(0x8000, b"".join(struct.pack("<QIHH", *each) for each in indirect))
    for driver in hostile.drivers:
        assert driver.begin(features, sizes=dict.fromkeys(range(8), QUEUE_SIZE))
        for ring in driver.rings:
            for index, each in enumerate(table):
                ring.put_descriptor(index, *each)
            for head in heads:
                ring.offer(head)
            if available is not None:
                hostile.memory.write(ring.avail + 2, struct.pack("<H", available))
            ring.notify()
        hostile.settle()
        assert driver.begin(VERSION_1)  # and a reset helps, whatever it was
        assert not driver.broken


@settings(max_examples=60, deadline=None)
@given(st.lists(accesses, max_size=40))
def test_registers_take_anything(hostile, accesses_):
    for driver in hostile.drivers:
        for offset, size, value in accesses_:
            value &= (1 << 8 * size) - 1
            hostile.bus.mmio_write(driver.bar + offset, size, value)
            assert 0 <= hostile.bus.mmio_read(driver.bar + offset, size) < 1 << 8 * size
        hostile.settle()
        state = hostile.bus.save()
        hostile.bus.load(state)
        assert hostile.bus.save() == state


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 255), st.sampled_from([1, 2, 4]), st.integers(0, 2**32 - 1)), max_size=30),
)
def test_configuration_space_takes_anything(hostile, writes):
    for driver in hostile.drivers:
        before = [driver.pci.read(at, 4) for at in (0, 8, 0x2C, 0x34)]
        for offset, size, value in writes:
            driver.pci.write(offset & -size, size, value & (1 << 8 * size) - 1)
            driver.pci.read(offset & -size, size)
        hostile.settle()
        assert [driver.pci.read(at, 4) for at in (0, 8, 0x2C, 0x34)] == before
        state = hostile.bus.save()
        hostile.bus.load(state)
        assert hostile.bus.save() == state


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_state_of_anything_is_refused_or_holds(hostile, data):
    for driver, function in zip(hostile.drivers, hostile.bus.devices[2:], strict=True):
        driver.begin()
        state = bytearray(function.save())
        for _ in range(data.draw(st.integers(1, 4))):
            state[data.draw(st.integers(0, len(state) - 1))] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            del state[data.draw(st.integers(0, len(state))) :]
        try:
            function.load(bytes(state))
        except VmError:
            continue
        for ring in driver.rings:
            ring.notify()
        hostile.settle()
        assert driver.begin()
