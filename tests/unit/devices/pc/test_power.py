"""How a PC is switched off and reset, and the timer of power management."""

import struct

import pytest

from pageferry.core.errors import VmError
from pageferry.core.memory import GuestMemory
from pageferry.core.run import GuestExit, GuestReset
from pageferry.core.vm import MachineModel
from pageferry.devices.pc.power import PowerManagement
from pageferry.devices.platform import Platform

STATUS, ENABLE, CONTROL, TIMER = 0, 2, 4, 8
BUTTON = 1 << 8


@pytest.fixture
def bus():
    return Platform(GuestMemory.linear(4 << 20), MachineModel.PC).bus


@pytest.fixture
def sci():
    """The levels that the interrupt line had, one after another."""
    return []


@pytest.fixture
def pm(sci):
    return PowerManagement(lambda: 0, sci.append)


def test_s5_ends_the_guest(bus):
    assert bus.port_read(0x604, 2) == 1, "it is in ACPI mode"
    assert bus.port_write(0x604, 2, 5 << 10) is None
    assert bus.port_write(0x604, 2, 1 << 13 | 4 << 10) is None, "no other sleep"
    assert bus.port_write(0x604, 2, 1 << 13 | 5 << 10) == GuestExit(0)
    assert bus.port_write(0x605, 1, 0x34) == GuestExit(0)
    assert bus.port_read(0x604, 2) == 5 << 10 | 1


@pytest.mark.parametrize(
    ("port", "value", "resets"),
    [
        *((0x64, command, True) for command in (0xFE, 0xF0)),
        *((0x64, command, False) for command in (0xFF, 0xD1, 0xAA)),
        *((0x92, byte, bool(byte & 1)) for byte in (0, 1, 2, 3)),
        *((0xCF9, byte, bool(byte & 4)) for byte in (0x02, 0x06, 0x0E, 0x00)),
    ],
)
def test_resets(bus, port, value, resets):
    assert bus.port_write(port, 1, value) == (GuestReset() if resets else None)


def test_what_the_reset_ports_show(bus):
    assert [bus.port_read(port, 1) for port in (0x64, 0x92, 0xCF9, 0x60)] == [0, 2, 0, 0xFF]


def test_a_plain_machine_has_none_of_it():
    bus = Platform(GuestMemory.linear(4 << 20), MachineModel.PLAIN).bus
    assert [bus.port_read(port, 1) for port in (0x64, 0x92, 0xCF9, 0x604)] == [0xFF] * 4
    assert bus.port_write(0x64, 1, 0xFE) is None


def test_events_can_be_enabled_and_none_comes_by_itself(pm, sci):
    pm.write(0, 4, 0xFFFF_FFFF)
    assert pm.read(0, 4) == 0x4721_0000
    assert not any(sci)
    pm.write(ENABLE + 1, 1, 0)
    assert pm.read(ENABLE, 2) == 0x0021


def test_the_power_button_interrupts_until_the_guest_has_cleared_its_status(pm, sci):
    assert not pm.press_power_button(), "the guest has not enabled it"
    assert pm.read(STATUS, 2) == 0
    pm.write(ENABLE, 2, BUTTON)
    assert not any(sci)
    assert pm.press_power_button()
    assert (pm.read(STATUS, 2), sci[-1]) == (BUTTON, True)
    pm.write(STATUS, 2, 0)
    assert (pm.read(STATUS, 2), sci[-1]) == (BUTTON, True), "a 0 clears nothing"
    pm.write(ENABLE, 2, 0)
    assert not sci[-1]
    pm.write(ENABLE, 2, BUTTON)
    assert sci[-1]
    pm.write(STATUS + 1, 1, BUTTON >> 8)
    assert (pm.read(STATUS, 2), sci[-1]) == (0, False)


def test_the_timer_is_guest_time():
    now_ns = [0]
    pm = PowerManagement(lambda: now_ns[0], lambda _: None)
    assert pm.read(TIMER, 4) == 0
    now_ns[0] = 10**9
    assert pm.read(TIMER, 4) == 3_579_545
    assert pm.read(TIMER, 1) == 3_579_545 & 0xFF
    now_ns[0] = 1200 * 10**9
    assert pm.read(TIMER, 4) == 1200 * 3_579_545 - (1 << 32)
    pm.write(TIMER, 4, 0)
    assert pm.read(TIMER, 4) == 1200 * 3_579_545 - (1 << 32), "it cannot be written"


def test_the_registers_move(pm):
    pm.write(ENABLE, 2, BUTTON)
    pm.write(CONTROL, 2, 5 << 10 | 2)
    assert pm.press_power_button()
    levels = []
    other = PowerManagement(lambda: 0, levels.append)
    other.load(pm.save())
    assert [other.read(at, 2) for at in (STATUS, ENABLE, CONTROL)] == [BUTTON, BUTTON, 5 << 10 | 3]
    assert levels[-1], "what was pressed before the move interrupts behind it"


@pytest.mark.parametrize("registers", [(1, 0, 0), (0, 2, 0), (0, 0, 1), (0, 0, 0x2000)])
def test_a_state_that_cannot_be_is_refused(pm, registers):
    state = struct.pack("<3H", *registers)
    with pytest.raises(VmError, match="device pm has registers that it cannot have"):
        pm.load(state)
    with pytest.raises(VmError, match="3 bytes, not 6"):
        pm.load(state[:3])
