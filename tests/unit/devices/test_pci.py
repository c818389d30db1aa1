"""Configuration mechanism 1 and the configuration space, byte by byte."""

from itertools import pairwise

import pytest

from pageferry.core.errors import VmError
from pageferry.devices.bus import DeviceBus
from pageferry.devices.pci import PCI_WINDOW, SLOTS, ConfigAddress, ConfigData, ConfigSpace, bar_of_slot, irq_of_slot

ADDRESS, DATA = 0xCF8, 0xCFC


class Function:
    def __init__(self, config):
        self._config = config
        self.read_config, self.write_config = config.read, config.write


@pytest.fixture
def config():
    return ConfigSpace(
        ids=(0x1234, 0x5678),
        class_code=0x010203,
        revision=4,
        subsystem=(0xAAAA, 0xBBBB),
        bar_bytes=0x4000,
        bar_gpa=0xE000_4000,
        irq=10,
        capabilities=(b"\x09\0\x06\0ab", b"\x09\0\x08\0" + bytes(4)),
        writable=(bytes(6), bytes(4) + b"\xff\x0f\0\0"),
    )


@pytest.fixture
def bus(config):
    made, address = DeviceBus(), ConfigAddress()
    made.add(address)
    made.add_regions(ConfigData(address, [Function(config)]))
    return made


def select(bus, slot, register, *, enable=True, number=0, bus_number=0):
    bus.port_write(ADDRESS, 4, enable << 31 | bus_number << 16 | slot << 11 | number << 8 | register)


def test_the_address_is_kept_and_its_reserved_bits_are_not(bus):
    bus.port_write(ADDRESS, 4, 0xFFFF_FFFF)
    assert bus.port_read(ADDRESS, 4) == 0x80FF_FFFC


def test_bytes_and_words_at_the_address_port_are_not_an_address(bus):
    select(bus, 1, 0)
    bus.port_write(ADDRESS + 3, 1, 1)  # as a kernel does before it looks for mechanism 1
    bus.port_write(ADDRESS, 2, 0)
    assert bus.port_read(ADDRESS, 4) == 0x8000_0800
    assert bus.port_read(ADDRESS + 1, 1) == 0xFF


def test_a_function_answers_in_every_size(bus):
    select(bus, 1, 0)
    assert bus.port_read(DATA, 4) == 0x5678_1234
    assert [bus.port_read(DATA + at, 2) for at in (0, 2)] == [0x1234, 0x5678]
    assert [bus.port_read(DATA + at, 1) for at in range(4)] == [0x34, 0x12, 0x78, 0x56]
    select(bus, 1, 8)
    assert bus.port_read(DATA, 4) == 0x010203_04
    select(bus, 1, 0x2C)
    assert bus.port_read(DATA, 4) == 0xBBBB_AAAA


def test_slot_0_is_a_host_bridge(bus):
    select(bus, 0, 8)
    assert bus.port_read(DATA, 4) >> 8 == 0x060000
    select(bus, 0, 4)
    bus.port_write(DATA, 2, 0xFFFF)
    assert bus.port_read(DATA, 2) == 0


@pytest.mark.parametrize(
    "where", [{"slot": 2}, {"slot": 31}, {"number": 1}, {"bus_number": 1}, {"bus_number": 255}, {"enable": False}]
)
def test_where_no_function_is_reads_are_ones_and_writes_go_nowhere(bus, config, where):
    select(bus, **{"slot": 1, "register": 4, **where})
    bus.port_write(DATA, 2, 0)
    assert bus.port_read(DATA, 4) == 0xFFFF_FFFF
    assert config.get(4, 2) == 2


def test_an_access_that_leaves_the_window_goes_nowhere(bus):
    select(bus, 1, 0)
    assert bus.port_read(DATA + 3, 2) == 0xFFFF
    assert bus.port_read(DATA - 1, 1) == 0xFF


def test_a_bar_tells_its_size_and_moves(config):
    assert config.bar == range(0xE000_4000, 0xE000_8000)
    config.write(0x10, 4, 0xFFFF_FFFF)
    assert config.read(0x10, 4) == 0xFFFF_C000
    config.write(0x10, 4, 0xE123_4567)
    assert config.bar == range(0xE123_4000, 0xE123_8000)
    config.write(4, 2, 0)
    assert not config.bar
    for at in range(0x14, 0x28, 4):
        config.write(at, 4, 0xFFFF_FFFF)
        assert config.read(at, 4) == 0


def test_command_bits_that_exist_are_kept(config):
    config.write(4, 2, 0xFFFF)
    assert config.read(4, 2) == 0x0406
    assert config.bus_master
    assert not config.intx


def test_the_status_tells_of_a_pending_interrupt_whether_or_not_it_is_passed_on(config):
    assert config.read(6, 2) == 0x10
    config.pending = True
    assert config.intx
    assert [config.read(6, 2), config.read(6, 1), config.read(4, 4) >> 16, config.read(7, 1)] == [0x18, 0x18, 0x18, 0]
    config.write(5, 1, 4)
    assert not config.intx
    assert config.read(6, 1) == 0x18
    config.write(6, 2, 0xFFFF)
    assert config.read(6, 2) == 0x18


def test_the_interrupt_line_is_the_kernels_to_write_and_the_pin_is_not(config):
    config.write(0x3C, 2, 0x0505)
    assert (config.read(0x3C, 1), config.read(0x3D, 1)) == (5, 1)


def test_capabilities_are_a_chain_and_writable_where_they_say(config):
    first = config.read(0x34, 1)
    second = config.read(first + 1, 1)
    assert config.capabilities == (first, second)
    assert config.read(second + 1, 1) == 0
    assert config.read(first + 4, 2) == int.from_bytes(b"ab", "little")
    config.write(second + 4, 4, 0xFFFF_FFFF)
    assert config.read(second + 4, 4) == 0x0FFF


def test_what_was_written_is_all_of_the_state(config):
    config.write(4, 2, 4)
    config.write(0x10, 4, 0xE000_0000)
    config.write(0x3C, 1, 7)
    saved = config.save()
    other = ConfigSpace(ids=(1, 2), class_code=0, bar_bytes=0x4000, irq=10)
    other.load(saved[:0x40] + bytes(0xC0))
    assert (other.read(4, 2), other.read(0x10, 4), other.read(0x3C, 1), other.get(0, 2)) == (4, 0xE000_0000, 7, 1)
    with pytest.raises(VmError, match="cannot be written"):
        other.load(b"\1" + saved[1:])


def test_an_address_that_cannot_be_is_refused(bus):
    (state,) = bus.save()
    select(bus, 3, 8)
    bus.load((state,))
    assert bus.port_read(ADDRESS, 4) == 0
    with pytest.raises(VmError, match="pci"):
        ConfigAddress().load(b"\1\0\0\0")


def test_every_slot_has_its_own_place_in_the_window():
    places = [range(bar_of_slot(slot), bar_of_slot(slot) + 0x4000) for slot in range(1, SLOTS)]
    assert all(place[0] in PCI_WINDOW and place[-1] in PCI_WINDOW for place in places)
    assert all(a.stop <= b.start for a, b in pairwise(places))
    assert {irq_of_slot(slot) for slot in range(1, SLOTS)} == {10, 11}
