"""Two 8259A interrupt controllers, cascaded as in a PC: IRQs 0 to 7, and 8 to 15 by input 2 of the first.

Each input is edge- or level-triggered as the edge/level registers (ports 0x4D0, 0x4D1) say; with these, bit LTIM of
ICW1 does nothing. Simpler than the chip:

- an edge of a device stays requested until it is acknowledged, even if the line falls before that;
- the cascade is fixed: SNGL of ICW1 and the wiring in ICW3 are not looked at; neither are the modes of an 8080 or of a
  buffered bus. Its input follows the second chip, as if it were level-triggered.

Saved is the structure of KVM's PIC, so that a guest may move between ours and the kernel's. The level of the cascade is
not in it.

Source: Intel 8259A data sheet, *Programming the 8259A*; Intel 82371AB data sheet, *Edge/Level Control Registers*;
``arch/x86/include/uapi/asm/kvm.h``, ``struct kvm_pic_state``.
"""

import struct
from collections.abc import Callable

from pageferry.core.errors import VmError
from pageferry.core.run import Effect
from pageferry.devices.bus import expect_size, read_bytes, write_bytes
from pageferry.devices.interrupts import ELCR_AT_START

PIC_PORTS = (0x20, 0xA0)
ELCR_PORT = 0x4D0

_CASCADE = 2
_INPUTS = 8
_SPURIOUS = 7
#: IRQs 0, 1, 2, 8 and 13 are edges always.
_ELCR_MASKS = (0xF8, 0xDE)

_ICW1, _ICW1_NEEDS_ICW4 = 0x10, 0x01
_ICW2_BASE = 0xF8
_ICW4_AUTO_EOI, _ICW4_SPECIAL_FULLY_NESTED = 0x02, 0x10
_OCW3, _OCW3_POLL, _OCW3_READ, _OCW3_READ_ISR, _OCW3_SET_MASK, _OCW3_SPECIAL_MASK = 0x08, 0x04, 0x02, 0x01, 0x40, 0x20
_POLLED = 0x80

# The commands of OCW2: bits R, SL, EOI.
_AUTO_ROTATE_OFF, _EOI, _NOTHING, _SPECIFIC_EOI = 0, 1, 2, 3
_AUTO_ROTATE_ON, _ROTATE_EOI, _SET_PRIORITY, _ROTATE_SPECIFIC_EOI = 4, 5, 6, 7

# What the next write to the second port is: a mask, or one of the initialisation's words.
_READY, _ICW2, _ICW3, _ICW4 = 0, 1, 2, 3

_FIELDS = (
    *("last_irr", "irr", "imr", "isr", "priority_add", "irq_base", "read_isr", "poll"),
    *("special_mask", "init_state", "auto_eoi", "rotate_on_auto_eoi", "special_fully_nested", "init4", "elcr"),
)
#: The fields' highest values, where not all bits are free.
_LIMITS = {"priority_add": 7, "init_state": 3} | dict.fromkeys(
    ("read_isr", "poll", "special_mask", "auto_eoi", "rotate_on_auto_eoi", "special_fully_nested", "init4"), 1
)
#: The fields, and the mask of the edge/level register.
_STATE = struct.Struct(f"<{len(_FIELDS) + 1}B")


class Pic:
    """One of the two chips. Bit n of its registers is its input n.

    Args:
        index: 0 for the first, 1 for the second.
        changed: called when what it requests may have changed.
    """

    mmio = range(0)

    def __init__(self, index: int, changed: Callable[[], None]) -> None:
        self.name = f"pic{index}"
        self.ports = range(PIC_PORTS[index], PIC_PORTS[index] + 2)
        self.elcr_mask = _ELCR_MASKS[index]
        self._cascading = 1 << _CASCADE if index == 0 else 0
        self._changed = changed
        self._lines = 0  # levels of the inputs
        self._irr = self._imr = self._isr = 0
        self._lowest = 7  # the input of the lowest priority
        self._base = 0
        self._read_isr = self._poll = self._special_mask = False
        self._expects = _READY
        self._init4 = self._auto_eoi = self._rotate_on_auto_eoi = self._special_fully_nested = False
        self._elcr = ELCR_AT_START >> _INPUTS * index & 0xFF

    # -- inputs and output -------------------------------------------------------------------------------------------

    def set_input(self, number: int, level: bool) -> None:
        """Drive an input: a rising edge requests and stays so; a level-triggered one requests while it is high."""
        bit = 1 << number
        if level and (self._levels | ~self._lines) & bit:
            self._irr |= bit
        elif not level and self._levels & bit:
            self._irr &= ~bit
        self._lines = self._lines | bit if level else self._lines & ~bit
        self._changed()

    @property
    def _levels(self) -> int:
        return self._elcr | self._cascading

    def level(self, number: int) -> bool:
        """Return the level of an input."""
        return bool(self._lines >> number & 1)

    def requested(self) -> int | None:
        """Return the input that interrupts now, None if none does: the highest, if above all that are in service."""
        wanted = self._first(self._irr & ~self._imr)
        serving = self._first(self._isr & ~self._imr if self._special_mask else self._isr)
        number = self._input_at(wanted)
        if self._special_fully_nested and self._cascading >> number & 1:
            serving += 1  # the second chip knows which of its own are higher than the one in service
        return number if wanted < serving and wanted < _INPUTS else None

    def acknowledge(self) -> int | None:
        """Take the interrupt that is requested; return its input, None if there is none any more."""
        number = self.requested()
        if number is None:
            return None
        bit = 1 << number
        if not self._levels & bit:
            self._irr &= ~bit
        if not self._auto_eoi:
            self._isr |= bit
        elif self._rotate_on_auto_eoi:
            self._lowest = number
        self._changed()
        return number

    def vector(self, number: int) -> int:
        """Return the vector of an input."""
        return self._base | number

    def _first(self, inputs: int) -> int:
        """Return the highest priority among ``inputs``: 0 is the highest, 8 stands for none."""
        by_priority = (inputs << _INPUTS | inputs) >> (self._lowest + 1) & 0xFF
        return (by_priority & -by_priority).bit_length() - 1 if by_priority else _INPUTS

    def _input_at(self, priority: int) -> int:
        return (self._lowest + 1 + priority) % _INPUTS

    # -- what the guest sees -----------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Return IRR, ISR or the mask; after a poll command, what an acknowledge cycle would have taken."""
        return read_bytes(self._read, offset, size)

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Take command words."""
        write_bytes(self._write, offset, size, value)
        return None

    def _read(self, port: int) -> int:
        if port > 1:
            return 0xFF
        if self._poll:
            self._poll = False
            number = self.acknowledge()
            return 0 if number is None else _POLLED | number
        if port == 1:
            return self._imr
        return self._isr if self._read_isr else self._irr

    def _write(self, port: int, byte: int) -> None:
        if port == 1:
            self._mask_or_initialise(byte)
        elif port == 0:
            if byte & _ICW1:
                self._initialise(byte)
            elif byte & _OCW3:
                self._control(byte)
            else:
                self._end_or_rotate(byte >> 5, byte & 7)
        self._changed()

    def _initialise(self, icw1: int) -> None:
        self._irr &= self._levels  # an edge must come anew
        self._imr = self._isr = 0
        self._lowest = 7
        self._special_mask = self._read_isr = self._poll = self._rotate_on_auto_eoi = False
        self._init4 = bool(icw1 & _ICW1_NEEDS_ICW4)
        if not self._init4:
            self._special_fully_nested = self._auto_eoi = False
        self._expects = _ICW2

    def _mask_or_initialise(self, byte: int) -> None:
        if self._expects == _READY:
            self._imr = byte
        elif self._expects == _ICW2:
            self._base = byte & _ICW2_BASE
            self._expects = _ICW3
        elif self._expects == _ICW3:
            self._expects = _ICW4 if self._init4 else _READY
        else:
            self._special_fully_nested = bool(byte & _ICW4_SPECIAL_FULLY_NESTED)
            self._auto_eoi = bool(byte & _ICW4_AUTO_EOI)
            self._expects = _READY

    def _control(self, ocw3: int) -> None:
        self._poll = bool(ocw3 & _OCW3_POLL)
        if ocw3 & _OCW3_READ:
            self._read_isr = bool(ocw3 & _OCW3_READ_ISR)
        if ocw3 & _OCW3_SET_MASK:
            self._special_mask = bool(ocw3 & _OCW3_SPECIAL_MASK)

    def _end_or_rotate(self, command: int, number: int) -> None:
        if command in (_AUTO_ROTATE_OFF, _AUTO_ROTATE_ON):
            self._rotate_on_auto_eoi = command == _AUTO_ROTATE_ON
        elif command == _SET_PRIORITY:
            self._lowest = number
        elif command != _NOTHING:
            if command in (_EOI, _ROTATE_EOI):
                # In special mask mode what is masked does not count: it ends by a specific EOI.
                priority = self._first(self._isr & ~self._imr if self._special_mask else self._isr)
                if priority == _INPUTS:
                    return
                number = self._input_at(priority)
            self._isr &= ~(1 << number)
            if command in (_ROTATE_EOI, _ROTATE_SPECIFIC_EOI):
                self._lowest = number

    @property
    def elcr(self) -> int:
        """Which inputs are level-triggered."""
        return self._elcr

    def set_elcr(self, byte: int) -> None:
        """Choose which inputs are level-triggered; those that turn so request what their lines say."""
        turned = byte & self.elcr_mask & ~self._elcr
        self._elcr = byte & self.elcr_mask
        self._irr = self._irr & ~turned | self._lines & turned
        self._changed()

    # -- state -------------------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """Return KVM's structure of a PIC."""
        return _STATE.pack(
            self._lines & ~self._cascading,
            self._irr,
            self._imr,
            self._isr,
            (self._lowest + 1) % _INPUTS,
            self._base,
            self._read_isr,
            self._poll,
            self._special_mask,
            self._expects,
            self._auto_eoi,
            self._rotate_on_auto_eoi,
            self._special_fully_nested,
            self._init4,
            self._elcr,
            self.elcr_mask,
        )

    def load(self, data: bytes) -> None:
        """Replace the state.

        Raises:
            VmError: it is not one of this chip.
        """
        expect_size(self.name, data, _STATE.size)
        *values, elcr_mask = _STATE.unpack(data)
        state = dict(zip(_FIELDS, values, strict=True))
        impossible = any(state[field] > most for field, most in _LIMITS.items()) or state["irq_base"] & ~_ICW2_BASE
        if impossible or elcr_mask != self.elcr_mask or state["elcr"] & ~elcr_mask:
            raise VmError(f"the state of device {self.name} has registers that it cannot have")
        self._lines = state["last_irr"] & ~self._cascading
        self._irr, self._imr, self._isr = state["irr"], state["imr"], state["isr"]
        self._lowest = (state["priority_add"] - 1) % _INPUTS
        self._base, self._expects, self._elcr = state["irq_base"], state["init_state"], state["elcr"]
        self._read_isr, self._poll = bool(state["read_isr"]), bool(state["poll"])
        self._special_mask, self._init4 = bool(state["special_mask"]), bool(state["init4"])
        self._auto_eoi, self._rotate_on_auto_eoi = bool(state["auto_eoi"]), bool(state["rotate_on_auto_eoi"])
        self._special_fully_nested = bool(state["special_fully_nested"])
        self._changed()


class ElcrPorts:
    """The edge/level registers, one byte for each chip; their content is in the chips' states."""

    ports = range(ELCR_PORT, ELCR_PORT + 2)
    mmio = range(0)

    def __init__(self, chips: tuple[Pic, Pic]) -> None:
        self._chips = chips

    def read(self, offset: int, size: int) -> int:
        """Return which inputs are level-triggered."""
        return read_bytes(lambda at: self._chips[at].elcr if at < 2 else 0xFF, offset, size)

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Choose which inputs are level-triggered."""
        write_bytes(lambda at, byte: self._chips[at].set_elcr(byte) if at < 2 else None, offset, size, value)
        return None


class PicPair:
    """Both chips; the machine's interrupt controller. The bus's lock is held in all that is called here.

    ``on_raise`` is called when ``pending`` becomes true.
    """

    def __init__(self) -> None:
        self.on_raise: Callable[[], None] = lambda: None
        self.pending = False
        self._first = Pic(0, self._first_changed)
        self._second = Pic(1, self._second_changed)

    @property
    def chips(self) -> tuple[Pic, Pic]:
        """The two, as devices of the bus."""
        return self._first, self._second

    @property
    def elcr(self) -> ElcrPorts:
        """The ports of their edge/level registers."""
        return ElcrPorts(self.chips)

    def set_line(self, irq: int, level: bool) -> None:
        """Drive an IRQ's input; IRQ 2 is the cascade, and no device's."""
        self.chips[irq // _INPUTS].set_input(irq % _INPUTS, level)

    def acknowledge(self) -> int:
        """Take the interrupt and return its vector; one that was withdrawn meanwhile is a spurious IRQ 7 or 15."""
        number = self._first.acknowledge()
        if number is None:
            return self._first.vector(_SPURIOUS)
        if number != _CASCADE:
            return self._first.vector(number)
        second = self._second.acknowledge()
        return self._second.vector(_SPURIOUS if second is None else second)

    def _second_changed(self) -> None:
        level = self._second.requested() is not None
        if level != self._first.level(_CASCADE):
            self._first.set_input(_CASCADE, level)

    def _first_changed(self) -> None:
        was_pending, self.pending = self.pending, self._first.requested() is not None
        if self.pending and not was_pending:
            self.on_raise()
