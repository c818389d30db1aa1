"""How a PC is switched off and reset: ACPI's fixed power management registers, and the ports that reset.

The power management block has its event registers (the power button is the only event), the control register, by which
an operating system enters S5, and the timer. It is in ACPI mode always.

Source: ACPI specification 6.5, sections 4.8.2.2 (the power button) and 4.8.3 (fixed hardware registers); Intel 82371AB
data sheet, *Reset Control Register* (port 0xCF9); IBM PS/2 technical reference, *System Control Port A* (port 0x92).
"""

import struct
from collections.abc import Callable

from pageferry.core.errors import VmError
from pageferry.core.run import Effect, GuestExit, GuestReset
from pageferry.devices.bus import expect_size, read_bytes, write_bytes
from pageferry.devices.interrupts import Line

PM_EVENT_PORT, PM_CONTROL_PORT, PM_TIMER_PORT = 0x600, 0x604, 0x608
PM_TIMER_HZ = 3_579_545
#: What goes into the control register's SLP_TYP to switch off.
SLEEP_TYPE_S5 = 5
RESET_PORT, RESET_VALUE = 0xCF9, 0x06

_STATUS, _ENABLE, _CONTROL, _TIMER = (range(at, at + size) for at, size in ((0, 2), (2, 2), (4, 2), (8, 4)))
_POWER_BUTTON = 1 << 8
_ENABLE_BITS = 0x4721
_SCI_ENABLED, _CONTROL_BITS, _SLEEP_TYPE_SHIFT, _SLEEP = 0x0001, 0x1C02, 10, 1 << 13
_NS_PER_S = 10**9

#: Status, enable and control registers.
_STATE = struct.Struct("<HHH")


class PowerManagement:
    """The block of registers; see the module's text.

    Args:
        now_ns: guest time.
        line: the system control interrupt (SCI), high while an event that is enabled has its status bit set.
    """

    name = "pm"
    ports = range(PM_EVENT_PORT, PM_TIMER_PORT + len(_TIMER))
    mmio = range(0)

    def __init__(self, now_ns: Callable[[], int], line: Line) -> None:
        self._now_ns = now_ns
        self._interrupt = line
        self._status = self._enable = self._control = 0

    def press_power_button(self) -> bool:
        """Press the power button, with the bus locked; return False, with nothing done, if the guest ignores it."""
        if not self._enable & _POWER_BUTTON:
            return False
        self._status |= _POWER_BUTTON
        self._drive_interrupt()
        return True

    def _drive_interrupt(self) -> None:
        self._interrupt(bool(self._status & self._enable))

    def read(self, offset: int, size: int) -> int:
        """Return registers, or parts of them."""
        timer = self._now_ns() * PM_TIMER_HZ // _NS_PER_S & 0xFFFF_FFFF
        registers = struct.pack("<HHHxxI", self._status, self._enable, self._control | _SCI_ENABLED, timer)
        return read_bytes(lambda at: registers[at] if at < len(registers) else 0xFF, offset, size)

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Set registers, or parts of them; a 1 clears a status bit; SLP_EN with the type of S5 ends the guest."""
        effects: list[Effect] = []
        write_bytes(lambda at, byte: effects.extend(self._write(at, byte)), offset, size, value)
        self._drive_interrupt()
        return effects[0] if effects else None

    def _write(self, at: int, byte: int) -> tuple[Effect, ...]:
        shift = 8 * (at & 1)
        if at in _STATUS:
            self._status &= ~(byte << shift)
        elif at in _ENABLE:
            self._enable = (self._enable & ~(0xFF << shift) | byte << shift) & _ENABLE_BITS
        elif at in _CONTROL:
            control = self._control & ~(0xFF << shift) | byte << shift
            self._control = control & _CONTROL_BITS
            if control & _SLEEP and control >> _SLEEP_TYPE_SHIFT & 7 == SLEEP_TYPE_S5:
                return (GuestExit(0),)
        return ()

    def save(self) -> bytes:
        """Return the registers; the timer is guest time."""
        return _STATE.pack(self._status, self._enable, self._control)

    def load(self, data: bytes) -> None:
        """Replace the registers.

        Raises:
            VmError: they do not belong to this device.
        """
        expect_size(self.name, data, _STATE.size)
        status, enable, control = _STATE.unpack(data)
        if status & ~_POWER_BUTTON or enable & ~_ENABLE_BITS or control & ~_CONTROL_BITS:
            raise VmError(f"the state of device {self.name} has registers that it cannot have")
        self._status, self._enable, self._control = status, enable, control
        self._drive_interrupt()


class ResetPort:
    """A port by which the guest resets the machine; it has no state.

    Args:
        port: where it is.
        shows: what reads give.
        resets: tells which writes reset.
    """

    mmio = range(0)

    def __init__(self, port: int, shows: int, resets: Callable[[int], bool]) -> None:
        self.ports = range(port, port + 1)
        self._shows = shows
        self._resets = resets

    def read(self, offset: int, size: int) -> int:
        """Return what is fixed."""
        return read_bytes(lambda at: 0xFF if at else self._shows, offset, size)

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Reset, if the value says so."""
        return GuestReset() if self._resets(value & 0xFF) else None


def reset_ports() -> tuple[ResetPort, ...]:
    """Return the ports that reset a PC.

    The keyboard controller at 0x64 has no keyboard and takes one kind of command: pulse the outputs (0xF0 to 0xFF) of
    which bit 0, the reset, is low. Port 0x92: bit 0 resets, bit 1 is the gate of address line 20, open always. Port
    0xCF9: bit 2 resets.
    """
    return (
        ResetPort(0x64, 0x00, lambda command: command >= 0xF0 and not command & 1),
        ResetPort(0x92, 0x02, lambda byte: bool(byte & 1)),
        ResetPort(RESET_PORT, 0x00, lambda byte: bool(byte & 4)),
    )
