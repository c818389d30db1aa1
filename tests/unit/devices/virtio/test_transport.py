"""The PCI transport, register by register, and the handshake of section 3.1.1."""

import os
import socket

import pytest
from virtio_driver import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    EVENT_IDX,
    FEATURES_OK,
    INDIRECT,
    NEEDS_RESET,
    PCI_WINDOW,
    VERSION_1,
)

from pageferry.core.device_spec import DeviceKind, DeviceSpec
from pageferry.core.errors import VmError

MAC = "52:54:00:12:34:56"


@pytest.fixture
def blk(machine, disk):
    made = machine(disk)
    made.virtio.claim()
    driver = made.driver()
    driver.machine = made
    return driver


def read_sector(driver, ring, sector):
    header, data, status = driver.area.take(16), driver.area.take(512), driver.area.take(1)
    driver.memory.write(header, bytes(8) + sector.to_bytes(8, "little"))
    driver.memory.write(status, b"\xff")
    head = ring.add([(header, 16)], [(data, 512), (status, 1)])
    return head, data, status


def test_a_device_shows_what_it_is(blk):
    assert blk.pci.read(0, 4) == 0x1042_1AF4
    assert blk.pci.read(0x2C, 4) == 0x1042_1AF4
    assert blk.pci.read(8, 1) == 1
    assert set(blk.places) == {1, 2, 3, 4, 5}
    assert blk.pci.read(0x3C, 2) == 0x0100 | 11
    assert blk.offered() & (VERSION_1 | EVENT_IDX | INDIRECT) == VERSION_1 | EVENT_IDX | INDIRECT
    blk.set(0, 4, 2)
    assert blk.get(4, 4) == 0
    assert (blk.get(0x10, 2), blk.get(0x12, 2), blk.get(0x1A, 2)) == (0xFFFF, 1, 0xFFFF)
    blk.set(0x16, 2, 1)
    assert [blk.get(at, 2) for at in (0x18, 0x1C, 0x1E, 0x20)] == [0, 0, 0, 0]


def test_a_driver_sets_it_up_and_resets_it(blk):
    assert blk.begin()
    assert blk.status == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    assert (blk.get(0x18, 2), blk.get(0x1C, 2)) == (256, 1)
    assert [blk.get(at, 8) for at in (0x20, 0x28, 0x30)] == [blk.rings[0].desc, blk.rings[0].avail, blk.rings[0].used]
    assert [blk.get(0x20, 4), blk.get(0x24, 4)] == [blk.rings[0].desc, 0]
    blk.status = 0
    assert (blk.status, blk.get(0x18, 2), blk.get(0x1C, 2), blk.get(0x20, 4)) == (0, 256, 0, 0)


def test_status_bits_are_the_drivers_to_set_and_not_to_clear(blk):
    blk.status = ACKNOWLEDGE | DRIVER
    blk.status = ACKNOWLEDGE | NEEDS_RESET
    assert blk.status == ACKNOWLEDGE | DRIVER


@pytest.mark.parametrize("features", [0, 1 << 40 | VERSION_1, 1 << 5 | VERSION_1, EVENT_IDX])
def test_features_that_were_not_offered_or_none_of_version_1_are_not_accepted(blk, features):
    assert not blk.begin(features)
    blk.status = ACKNOWLEDGE | DRIVER | DRIVER_OK
    blk.notify(0)
    assert not blk.broken


def test_features_are_settled_by_features_ok(blk):
    blk.begin()
    blk.set(8, 4, 0)
    blk.set(12, 4, 0xFFFF_FFFF)
    assert blk.get(12, 4) == 0


def test_a_queue_that_is_enabled_stays_as_it_is(blk):
    blk.begin()
    before = blk.get(0x20, 8)
    blk.set(0x20, 4, 0x1234_5000)
    blk.set(0x18, 2, 8)
    blk.set(0x1C, 2, 0)
    assert (blk.get(0x20, 8), blk.get(0x18, 2), blk.get(0x1C, 2)) == (before, 256, 1)


@pytest.mark.parametrize("size", [0, 3, 257, 512, 0xFFFF])
def test_a_queue_of_an_impossible_size_ends_the_device(blk, size):
    blk.begin(sizes={0: size} if size not in (0, 0xFFFF) else {0: 8})
    blk.status = 0
    blk.set(0x18, 2, size)
    assert blk.broken
    blk.status = 0
    assert not blk.broken
    assert blk.begin()


def test_an_interrupt_is_level_and_reading_the_status_takes_it_back(blk):
    blk.begin()
    lines = blk.machine.lines
    read_sector(blk, blk.rings[0], 5)
    blk.notify(0)
    blk.rings[0].wait()
    assert lines == {11: True}
    assert blk.pci.read(6, 2) & 8
    assert blk.isr() == 1
    assert lines == {11: False}
    assert blk.isr() == 0
    assert not blk.pci.read(6, 2) & 8


def test_intx_disable_holds_the_line_down_and_the_cause_stays(blk):
    blk.begin()
    blk.pci.write(4, 2, 0x0406)
    read_sector(blk, blk.rings[0], 5)
    blk.notify(0)
    blk.rings[0].wait()
    assert not any(blk.machine.lines.values())
    blk.pci.write(4, 2, 0x0006)
    assert blk.machine.lines == {11: True}


def test_the_rings_before_driver_ok_are_served_at_driver_ok(blk):
    blk.begin()
    ring = blk.rings[0]
    _, data, status = read_sector(blk, ring, 7)
    assert blk.memory.read(status, 1) == b"\xff"
    blk.status = 0
    assert blk.begin()  # new rings, which nothing waits in
    assert not blk.rings[0].collect()
    _, data, status = read_sector(blk, blk.rings[0], 7)
    blk.notify(0)
    blk.rings[0].wait()
    assert blk.memory.read(data, 4) == (7).to_bytes(4, "little")


def test_nothing_is_touched_without_bus_mastering(blk):
    blk.begin()
    blk.pci.write(4, 2, 2)
    _, _, status = read_sector(blk, blk.rings[0], 1)
    blk.notify(0)
    assert blk.memory.read(status, 1) == b"\xff"


def test_a_moved_bar_answers_at_its_new_place_only(blk):
    old, new = blk.bar, 0xE800_0000
    blk.pci.write(0x10, 4, new)
    assert blk.bus.mmio_read(old + 0x12, 2) == 0xFFFF
    assert blk.bus.mmio_read(new + 0x12, 2) == 1
    blk.pci.write(4, 2, 0)
    assert blk.bus.mmio_read(new + 0x12, 2) == 0xFFFF


def test_the_bar_can_be_reached_by_configuration_accesses(blk):
    at = blk.places[PCI_WINDOW]

    def access(offset, length, value=None):
        blk.pci.write(at + 4, 1, 0)
        blk.pci.write(at + 8, 4, offset)
        blk.pci.write(at + 12, 4, length)
        if value is None:
            return blk.pci.read(at + 16, length if length in (1, 2, 4) else 4)
        return blk.pci.write(at + 16, length if length in (1, 2, 4) else 4, value)

    assert access(0x12, 2) == 1
    access(0x14, 1, ACKNOWLEDGE)
    assert blk.status == ACKNOWLEDGE
    for offset, length in ((0x13, 2), (0x4000, 4), (0, 3), (0, 0), (0xFFFF_FFFC, 4)):
        access(offset, length, 0)
        assert access(offset, length) == 0
    assert blk.status == ACKNOWLEDGE


def test_registers_take_parts_and_refuse_what_crosses_them(blk):
    blk.set(0x20, 2, 0x5000)
    blk.set(0x22, 2, 0x1)
    blk.set(0x27, 1, 0x7F)
    assert blk.get(0x20, 8) == 0x7F00_0000_0001_5000
    blk.set(0x16, 4, 0x0008_0000)
    assert blk.get(0x18, 2) == 256
    assert blk.get(0x3C, 4) == 0


def test_what_it_knows_moves_to_another_machine(blk, machine, disk):
    blk.begin(VERSION_1 | EVENT_IDX, sizes={0: 16})
    ring = blk.rings[0]
    ring.set_used_event(0)
    read_sector(blk, ring, 5)
    blk.notify(0)
    ring.wait()
    state = blk.bus.save()
    there = machine(disk)
    there.memory.write(0, blk.memory.read(0, blk.memory.size_bytes))
    there.bus.load(state)
    assert there.lines == {11: True}
    assert there.bus.save() == state
    driver = there.driver()
    assert driver.status == blk.status
    assert driver.isr() == 1
    assert there.lines == {11: False}


@pytest.mark.parametrize("change", ["cut", "longer", "version", "status", "isr", "queues", "size", "enabled", "config"])
def test_a_state_that_cannot_be_is_refused(blk, change):
    blk.begin()
    function = blk.machine.function("disk0")
    data = bytearray(function.save())
    spots = {"version": (0, 9), "status": (1, 0x30), "isr": (2, 4), "queues": (3, 2), "config": (28, 1)}
    queue_at = len(data) - 9 - 34
    spots |= {"size": (queue_at, 3), "enabled": (queue_at + 8, 2)}
    if change in spots:
        at, value = spots[change]
        data[at] = value
    data = data[:-1] if change == "cut" else data + b"\0" if change == "longer" else data
    before = function.save()
    with pytest.raises(VmError):
        function.load(bytes(data))
    assert function.save() == before


def test_features_that_are_not_here_are_refused_by_name(blk):
    blk.begin()
    function = blk.machine.function("disk0")
    data = bytearray(function.save())
    data[14:22] = (VERSION_1 | 1 << 5).to_bytes(8, "little")
    with pytest.raises(VmError, match="disk0"):
        function.load(bytes(data))


class Bells:
    """Doorbells that note where they are; ``full``: no more can be installed."""

    def __init__(self):
        self.at = {}
        self.full = False

    def install(self, gpa, event):
        if self.full:
            return False
        assert gpa not in self.at
        self.at[gpa] = event
        return True

    def remove(self, gpa, event):
        assert self.at.pop(gpa) == event


@pytest.fixture
def bells(blk):
    bells = Bells()
    blk.machine.virtio.use_doorbells(bells)
    return bells


def test_doorbells_are_where_a_driver_notifies(blk, bells, machine, disk):
    assert not bells.at
    blk.begin()
    assert list(bells.at) == [blk.bar + 0x3000]
    blk.pci.write(4, 2, 4)  # decodes no memory
    assert not bells.at
    blk.bar += 0x10_0000
    blk.pci.write(0x10, 4, blk.bar)
    blk.pci.write(4, 2, 6)
    assert list(bells.at) == [blk.bar + 0x3000]
    saved = blk.machine.function("disk0").save()
    blk.status = 0
    assert not bells.at
    there, its_bells = machine(disk), Bells()
    there.virtio.use_doorbells(its_bells)
    there.function("disk0").load(saved)
    assert list(its_bells.at) == [blk.bar + 0x3000]


def test_each_queue_has_a_doorbell(machine, tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "net.sock"))
        made, bells = machine(DeviceSpec(kind=DeviceKind.NET, backend=f"unix:{tmp_path}/net.sock", mac=MAC)), Bells()
        made.virtio.use_doorbells(bells)
        driver = made.driver()
        driver.begin()
        assert list(bells.at) == [driver.bar + 0x3000, driver.bar + 0x3004]


def test_a_doorbell_has_requests_done_and_is_no_access_to_the_device(blk, bells):
    blk.begin()
    _, data, _ = read_sector(blk, blk.rings[0], 7)
    (event,) = bells.at.values()
    os.eventfd_write(event, 1)
    assert blk.rings[0].wait()
    assert blk.memory.read(data, 4) == (7).to_bytes(4, "little")


def test_where_no_doorbell_can_be_notifications_come_by_the_bus(blk, bells):
    bells.full = True
    blk.begin()
    _, data, _ = read_sector(blk, blk.rings[0], 7)
    blk.rings[0].notify()
    assert blk.rings[0].wait()
    assert blk.memory.read(data, 4) == (7).to_bytes(4, "little")
