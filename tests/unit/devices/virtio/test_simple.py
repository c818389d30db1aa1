"""The entropy device, the console and the balloon, each by a driver of its own."""

import numpy as np
import pytest
from virtio_driver import DEVICE, VERSION_1

from pageferry.core.device_spec import DeviceKind, DeviceSpec
from pageferry.core.errors import VmError

PAGE = 4096


@pytest.fixture
def device(machine):
    """Make a machine with one device of a kind, and a driver that has begun."""

    def make(kind, features=VERSION_1):
        made = machine(DeviceSpec(kind=kind))
        driver = made.driver()
        driver.machine = made
        assert driver.begin(features)
        return driver

    return make


# -- entropy ----------------------------------------------------------------------------------------------------------


def test_entropy_fills_every_buffer(device):
    driver = device(DeviceKind.RNG)
    target = driver.area.take(300)
    head = driver.rings[0].add(writable=[(target, 100), (target + 100, 200)])
    driver.rings[0].notify()
    assert driver.rings[0].collect() == [(head, 300)]
    assert len(set(driver.memory.read(target, 300))) > 100


def test_entropy_gives_no_more_than_it_will_at_once(device):
    driver = device(DeviceKind.RNG)
    driver.rings[0].add(writable=[(0x20_0000, 1 << 20)])
    driver.rings[0].notify()
    assert driver.rings[0].collect() == [(0, 64 << 10)]


def test_a_device_without_a_configuration_has_no_capability_for_one(device):
    assert DEVICE not in device(DeviceKind.RNG).places
    assert DEVICE in device(DeviceKind.BALLOON).places


# -- console ----------------------------------------------------------------------------------------------------------


def test_a_console_takes_output(device):
    driver = device(DeviceKind.CONSOLE)
    seen = []
    driver.machine.virtio.on_console(seen.append)
    source = driver.area.take(16)
    driver.memory.write(source, b"hello, world")
    driver.rings[1].add([(source, 5), (source + 5, 7)])
    driver.rings[1].notify()
    driver.machine.virtio.on_console(None)
    driver.rings[1].add([(source, 5)])
    driver.rings[1].notify()
    assert seen == [b"hello, world"]
    assert [length for _, length in driver.rings[1].collect()] == [0, 0]


def test_input_waits_for_buffers_and_the_rest_for_more(device):
    driver = device(DeviceKind.CONSOLE)
    virtio, ring = driver.machine.virtio, driver.rings[0]
    assert virtio.type(b"abcdefgh") == 8
    assert not ring.collect()
    place = driver.area.take(8)
    ring.add(writable=[(place, 3)])
    ring.notify()
    assert ring.collect() == [(0, 3)]
    assert driver.memory.read(place, 3) == b"abc"
    for _ in range(2):
        ring.add(writable=[(place, 8)])
        ring.notify()
    assert [length for _, length in ring.collect()] == [5]
    assert virtio.type(b"xy") == 2
    assert [length for _, length in ring.collect()] == [2]
    assert driver.memory.read(place, 2) == b"xy"
    assert virtio.type(bytes(5000)) == 4096


def test_what_is_typed_while_the_guest_is_held_waits_until_it_goes_on(device):
    driver = device(DeviceKind.CONSOLE)
    driver.rings[0].add(writable=[(0x20_0000, 8)])
    driver.machine.held = True
    assert driver.machine.virtio.type(b"later") == 5
    driver.machine.virtio.wake()
    assert not driver.rings[0].collect()
    driver.machine.held = False
    driver.machine.virtio.wake()
    assert driver.rings[0].collect() == [(0, 5)]


def test_a_console_that_no_driver_runs_takes_no_input(machine):
    made = machine(DeviceSpec(kind=DeviceKind.CONSOLE))
    assert made.virtio.type(b"x") is None


def test_what_waits_on_the_line_moves(device, machine):
    driver = device(DeviceKind.CONSOLE)
    driver.machine.virtio.type(b"waits")
    there = machine(DeviceSpec(kind=DeviceKind.CONSOLE))
    there.bus.load(driver.bus.save())
    assert there.function("console0").model.save() == b"waits"
    with pytest.raises(VmError, match="console0"):
        there.function("console0").model.load(bytes(4097))


def test_output_without_end_ends_the_device(device):
    driver = device(DeviceKind.CONSOLE)
    driver.rings[1].add([(0x20_0000, 1 << 20), (0x20_0000, 1)])
    driver.rings[1].notify()
    assert driver.broken


# -- balloon ----------------------------------------------------------------------------------------------------------

REPORTS = range(2, 5)


def stored(memory):
    """Return the frames that have storage."""
    return {gfn for start, length in zip(*(part.tolist() for part in memory.populated()), strict=True)
            for gfn in range(start, start + length)}  # fmt: skip


@pytest.mark.parametrize("index", REPORTS)
def test_reported_pages_are_given_back_read_as_zeros_and_are_dirty(device, index):
    driver = device(DeviceKind.BALLOON, VERSION_1 | 1 << 5)
    memory, first = driver.memory, 0x40_0000
    memory.write(first - PAGE, b"\xff" * (10 * PAGE))
    driver.machine.marked.clear()
    ring = driver.rings[index]
    head = ring.add(writable=[(first, 4 * PAGE), (first + 6 * PAGE, PAGE)])
    ring.notify()
    assert ring.collect() == [(head, 0)]
    gone = {(first >> 12) + n for n in (0, 1, 2, 3, 6)}
    assert not gone & stored(memory)
    assert {(first >> 12) + n for n in (-1, 4, 5, 7)} <= stored(memory)
    assert gone <= set(driver.machine.marked)
    assert memory.read(first, 4 * PAGE) == bytes(4 * PAGE)
    assert memory.read(first + 4 * PAGE, 2 * PAGE) == b"\xff" * (2 * PAGE)
    memory.write(first, b"again")
    assert memory.read(first, 5) == b"again"


def test_a_report_of_parts_of_pages_is_of_the_whole_ones_among_them(device):
    driver = device(DeviceKind.BALLOON, VERSION_1 | 1 << 5)
    driver.memory.write(0x40_0000, b"\xff" * (4 * PAGE))
    driver.rings[2].add(writable=[(0x40_0010, 2 * PAGE), (0x40_3000, PAGE - 1)])
    driver.rings[2].notify()
    assert driver.memory.read(0x40_0000, 4 * PAGE) == b"\xff" * PAGE + bytes(PAGE) + b"\xff" * (2 * PAGE)


def test_pages_in_the_balloon_are_given_back(device):
    driver = device(DeviceKind.BALLOON)
    driver.memory.write(0x40_0000, b"\xff" * (4 * PAGE))
    names = driver.area.take(64)
    driver.memory.write(names, np.array([0x402, 0x400, 0x402], "<u4").tobytes())
    for ring in driver.rings[:2]:
        ring.add([(names, 12)])
        ring.notify()
        assert ring.collect() == [(0, 0)]
    pages = [driver.memory.read(0x40_0000 + n * PAGE, PAGE) for n in range(4)]
    assert [page == bytes(PAGE) for page in pages] == [True, False, True, False]


@pytest.mark.parametrize("names", [b"abc", b"\xff\xff\xff\xff", bytes(4 * 4097)])
def test_a_balloon_of_no_pages_ends_the_device(device, names):
    driver = device(DeviceKind.BALLOON)
    driver.memory.write(0x40_0000, names)
    driver.rings[0].add([(0x40_0000, len(names))])
    driver.rings[0].notify()
    assert driver.broken


def test_nothing_is_given_back_while_pages_are_absent(device):
    driver = device(DeviceKind.BALLOON, VERSION_1 | 1 << 5)
    driver.memory.write(0x40_0000, b"\xff" * PAGE)
    driver.memory.on_touch(lambda gfns: None)
    driver.rings[2].add(writable=[(0x40_0000, PAGE)])
    driver.rings[2].notify()
    driver.memory.on_touch(None)
    assert driver.memory.read(0x40_0000, PAGE) == b"\xff" * PAGE
    assert driver.rings[2].collect()
