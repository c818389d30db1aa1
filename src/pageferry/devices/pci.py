"""PCI as a small PC has it: configuration mechanism 1, one bus, a host bridge, functions with one memory BAR.

A function is on the device bus by itself, with the range of its BAR while it decodes memory; here are the ports by
which it is found and set up. No firmware runs here, so BARs and interrupt lines are assigned from the beginning, as
firmware would leave them. The function of slot n pulls INTA#, which is wired to ISA IRQ 10 or 11 (:func:`irq_of_slot`),
level-triggered and shared with others.

Simpler than hardware: bus 0 only, function 0 only, no I/O space, no expansion ROM, no MSI.

Source: PCI Local Bus Specification 3.0, sections 3.2.2.3.2 (configuration mechanism 1), 6.1, 6.2, 6.7.
"""

from collections.abc import Sequence
from struct import Struct
from typing import Protocol

from pageferry.core.errors import VmError
from pageferry.core.run import Effect
from pageferry.devices.bus import expect_size
from pageferry.devices.interrupts import PCI_IRQS

CONFIG_ADDRESS_PORT = 0xCF8
CONFIG_DATA_PORT = 0xCFC
#: Where BARs are assigned, and may be moved to: in the hole below 4 GiB, away from every other device.
PCI_WINDOW = range(0xE000_0000, 0xF000_0000)
#: What a BAR is assigned by slot: room for any function here.
_BAR_STRIDE = 0x1_0000
SLOTS = 32

CONFIG_BYTES = 256
_VENDOR, _COMMAND, _STATUS, _REVISION = 0x00, 0x04, 0x06, 0x08
_BAR0, _SUBSYSTEM, _CAPABILITIES, _INTERRUPT_LINE, _INTERRUPT_PIN = 0x10, 0x2C, 0x34, 0x3C, 0x3D
_COMMAND_MEMORY, _COMMAND_MASTER, _COMMAND_NO_INTX = 1 << 1, 1 << 2, 1 << 10
_STATUS_INTERRUPT, _STATUS_CAPABILITIES = 1 << 3, 1 << 4
_FIRST_CAPABILITY = 0x40
_ENABLE, _BUS, _FUNCTION = 1 << 31, 0xFF_0000, 0x700
_ADDRESS_BITS = _ENABLE | 0xFF_FFFC
_ADDRESS = Struct("<I")


def irq_of_slot(slot: int) -> int:
    """Return the ISA IRQ that INTA# of a slot is wired to."""
    return PCI_IRQS[slot % len(PCI_IRQS)]


def bar_of_slot(slot: int) -> int:
    """Return where the BAR of a slot's function is at first."""
    return PCI_WINDOW.start + slot * _BAR_STRIDE


class ConfigSpace:
    """The 256 bytes of a function: a header of type 0, and a list of capabilities.

    Args:
        ids: vendor and device.
        class_code: base class, subclass and interface, 24 bits.
        revision: of the device.
        subsystem: vendor and device of the subsystem.
        bar_bytes: size of the memory BAR, a power of two; 0: there is none.
        bar_gpa: where it is at first; it decodes memory from the beginning.
        irq: the ISA IRQ of its pin; None: it has no pin.
        capabilities: each from its identifier on; byte 1, the pointer to the next, is filled in here.
        writable: of each capability, for each byte the bits that a guest may write.
    """

    def __init__(
        self,
        *,
        ids: tuple[int, int],
        class_code: int,
        revision: int = 0,
        subsystem: tuple[int, int] = (0, 0),
        bar_bytes: int = 0,
        bar_gpa: int = 0,
        irq: int | None = None,
        capabilities: Sequence[bytes] = (),
        writable: Sequence[bytes] = (),
    ) -> None:
        self._data = bytearray(CONFIG_BYTES)
        self._mask = bytearray(CONFIG_BYTES)
        self._bar_bytes = bar_bytes
        self.pending = False
        """Whether the function asks for an interrupt: a bit of the status register."""
        self._put(_VENDOR, 2, ids[0])
        self._put(_VENDOR + 2, 2, ids[1])
        self._put(_REVISION, 4, class_code << 8 | revision)
        self._put(_SUBSYSTEM, 2, subsystem[0])
        self._put(_SUBSYSTEM + 2, 2, subsystem[1])
        if bar_bytes:
            self._put(_BAR0, 4, bar_gpa)
            self._mask[_BAR0 : _BAR0 + 4] = (-bar_bytes & 0xFFFF_FFFF).to_bytes(4, "little")
            self._put(_COMMAND, 2, _COMMAND_MEMORY)
            self._mask[_COMMAND : _COMMAND + 2] = (_COMMAND_MEMORY | _COMMAND_MASTER | _COMMAND_NO_INTX).to_bytes(
                2, "little"
            )
        if irq is not None:
            self._data[_INTERRUPT_LINE], self._data[_INTERRUPT_PIN] = irq, 1
            self._mask[_INTERRUPT_LINE] = 0xFF
        self.capabilities = self._chain(capabilities, writable)
        """Where each capability is."""

    def _chain(self, capabilities: Sequence[bytes], writable: Sequence[bytes]) -> tuple[int, ...]:
        if capabilities:
            self._put(_STATUS, 2, _STATUS_CAPABILITIES)
        places, at, link = [], _FIRST_CAPABILITY, _CAPABILITIES
        for capability, mask in zip(capabilities, writable, strict=True):
            self._data[link] = at
            self._data[at : at + len(capability)] = capability
            self._mask[at : at + len(mask)] = mask
            places.append(at)
            link, at = at + 1, at + (len(capability) + 3 & ~3)
        if capabilities:
            self._data[link] = 0
        return tuple(places)

    def _put(self, at: int, size: int, value: int) -> None:
        self._data[at : at + size] = value.to_bytes(size, "little")

    def get(self, at: int, size: int) -> int:
        """Return a register, the interrupt bit of the status register aside."""
        return int.from_bytes(self._data[at : at + size], "little")

    def read(self, offset: int, size: int) -> int:
        """Return what the guest reads."""
        value = self.get(offset, size)
        if self.pending and offset <= _STATUS < offset + size:
            value |= _STATUS_INTERRUPT << 8 * (_STATUS - offset)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Take what the guest writes, as far as it may."""
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            mask = self._mask[at]
            self._data[at] = self._data[at] & ~mask & 0xFF | byte & mask

    @property
    def bar(self) -> range:
        """Where the function decodes memory now; an empty range: nowhere."""
        if not self.get(_COMMAND, 2) & _COMMAND_MEMORY:
            return range(0)
        gpa = self.get(_BAR0, 4)
        return range(gpa, gpa + self._bar_bytes)

    @property
    def bus_master(self) -> bool:
        """Whether the function may read and write memory."""
        return bool(self._data[_COMMAND] & _COMMAND_MASTER)

    @property
    def intx(self) -> bool:
        """Whether the function pulls its pin now."""
        return self.pending and not self._data[_COMMAND + 1] & _COMMAND_NO_INTX >> 8

    def save(self) -> bytes:
        """Return what the guest may have written, CONFIG_BYTES bytes; all else is 0."""
        return bytes(byte & mask for byte, mask in zip(self._data, self._mask, strict=True))

    def load(self, data: bytes) -> None:
        """Replace what the guest may have written.

        Raises:
            VmError: there is something else in it.
        """
        if any(byte & ~mask for byte, mask in zip(data, self._mask, strict=True)):
            raise VmError("the saved configuration space of a PCI function has bits that cannot be written")
        self._data[:] = bytes(
            old & ~mask & 0xFF | new for old, new, mask in zip(self._data, data, self._mask, strict=True)
        )


class PciFunction(Protocol):
    """Function 0 of a slot, as configuration accesses see it."""

    def read_config(self, offset: int, size: int) -> int:
        """Return what the guest reads; the access does not leave its aligned four bytes."""

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Take what the guest writes; the access does not leave its aligned four bytes."""


class HostBridge:
    """The function of slot 0, by which operating systems find that there is a PCI bus."""

    def __init__(self) -> None:
        self._config = ConfigSpace(ids=(0x1B36, 0x0008), class_code=0x06_00_00)

    def read_config(self, offset: int, size: int) -> int:
        """Return a register."""
        return self._config.read(offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Do nothing: no register can be written."""
        self._config.write(offset, size, value)


class ConfigAddress:
    """The address port, 0xCF8: takes and gives four bytes; the reset control port, 0xCF9, is another device's."""

    name = "pci"
    ports = range(CONFIG_ADDRESS_PORT, CONFIG_ADDRESS_PORT + 1)
    mmio = range(0)

    def __init__(self) -> None:
        self._address = 0

    @property
    def slot(self) -> int | None:
        """The slot on bus 0 whose function 0 is addressed; None: something else is, or nothing."""
        if not self._address & _ENABLE or self._address & (_BUS | _FUNCTION):
            return None
        return (self._address & ~_ENABLE) >> 11

    @property
    def register(self) -> int:
        """Which register is addressed, by its first byte."""
        return self._address & 0xFC

    def read(self, offset: int, size: int) -> int:
        """Return the address."""
        return self._address if size == 4 else (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Set the address."""
        if size == 4:
            self._address = value & _ADDRESS_BITS
        return None

    def save(self) -> bytes:
        """Return the address."""
        return _ADDRESS.pack(self._address)

    def load(self, data: bytes) -> None:
        """Replace the address.

        Raises:
            VmError: it is not an address.
        """
        expect_size(self.name, data, _ADDRESS.size)
        (address,) = _ADDRESS.unpack(data)
        if address & ~_ADDRESS_BITS:
            raise VmError(f"the state of device {self.name} has an address that it cannot have")
        self._address = address


class ConfigData:
    """The data ports, 0xCFC to 0xCFF: a window onto the register that is addressed; ones where no function is.

    Args:
        address: the other port.
        functions: by slot, from 1 on.
    """

    ports = range(CONFIG_DATA_PORT, CONFIG_DATA_PORT + 4)
    mmio = range(0)

    def __init__(self, address: ConfigAddress, functions: Sequence[PciFunction]) -> None:
        self._address = address
        self._functions: tuple[PciFunction, ...] = (HostBridge(), *functions)

    def read(self, offset: int, size: int) -> int:
        """Return a register, or a part of one."""
        function = self._function(offset, size)
        if function is None:
            return (1 << 8 * size) - 1
        return function.read_config(self._address.register + offset, size)

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Set a register, or a part of one."""
        function = self._function(offset, size)
        if function is not None:
            function.write_config(self._address.register + offset, size, value)
        return None

    def _function(self, offset: int, size: int) -> PciFunction | None:
        slot = self._address.slot
        if slot is None or slot >= len(self._functions) or offset + size > len(self.ports):
            return None
        return self._functions[slot]
