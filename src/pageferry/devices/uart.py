"""A 16550 UART at COM1: the guest's console, both ways.

The registers are those of the data sheet. What stands behind them is simpler than a wire:

- a byte written is sent at once, so the transmitter is always empty; divisor and word length change nothing;
- the line has flow control: what comes while the receiver is full waits on the line, up to ``LINE_BYTES``, and is
  part of the state. So the receiver overruns in loopback only, where the guest itself is the sender;
- the other side is always there (DCD, DSR and CTS on), and never sends a break or a damaged byte;
- a byte that is below the trigger level has timed out at once, as character times are zero.

The interrupt line is high while the interrupt identification register says that one is pending and OUT2 is set, which
connects it on a PC. On a machine without interrupt controllers it leads nowhere, and guests poll.

Source: National Semiconductor, PC16550D data sheet, section 8.0, *Registers*.
"""

import struct
from collections import deque
from collections.abc import Callable
from enum import IntEnum

from pageferry.core.errors import VmError
from pageferry.core.run import Effect
from pageferry.devices.bus import read_bytes, write_bytes
from pageferry.devices.interrupts import Line

CONSOLE_PORT = 0x3F8
FIFO_BYTES = 16
#: How many bytes may wait on the line.
LINE_BYTES = 4096


class _Register(IntEnum):
    DATA = 0  # RBR when read, THR when written; the divisor's low byte with DLAB
    IER = 1  # the divisor's high byte with DLAB
    IIR_FCR = 2
    LCR = 3
    MCR = 4
    LSR = 5
    MSR = 6
    SCR = 7


_IER_DATA, _IER_THR_EMPTY, _IER_LINE, _IER_MODEM = 1, 2, 4, 8
_IIR_NONE, _IIR_LINE, _IIR_DATA, _IIR_TIMEOUT, _IIR_THR_EMPTY, _IIR_MODEM = 0x01, 0x06, 0x04, 0x0C, 0x02, 0x00
_IIR_FIFOS = 0xC0
_FCR_ENABLE, _FCR_CLEAR_RECEIVER, _FCR_KEPT = 0x01, 0x02, 0xC9
_LCR_DLAB = 0x80
_MCR_DTR, _MCR_RTS, _MCR_OUT1, _MCR_OUT2, _MCR_LOOPBACK, _MCR_KEPT = 0x01, 0x02, 0x04, 0x08, 0x10, 0x1F
_LSR_DATA_READY, _LSR_OVERRUN, _LSR_TRANSMITTER_EMPTY = 0x01, 0x02, 0x60
_MSR_CTS, _MSR_DSR, _MSR_RI, _MSR_DCD = 0x10, 0x20, 0x40, 0x80
_MSR_RI_ENDED = 0x04
_TRIGGER_LEVELS = (1, 4, 8, 14)
_DIVISOR_9600 = 12
_REGISTERS = range(8)

#: ier, fcr, lcr, mcr, scr, overrun, modem deltas, transmitter interrupt; divisor; bytes received, bytes on the line.
_STATE = struct.Struct("<8B3H")
#: Which bits of the first nine may be set.
_STATE_BITS = (0x0F, _FCR_KEPT, 0xFF, _MCR_KEPT, 0xFF, 1, 0x0F, 1, 0xFFFF)


class Uart:
    """The UART; see the module's text. ``sink`` sees every byte that the guest sends, as it is sent.

    Args:
        line: its interrupt.
    """

    name = "console"
    ports = range(CONSOLE_PORT, CONSOLE_PORT + 8)
    mmio = range(0)

    def __init__(self, line: Line) -> None:
        self._interrupt = line
        self.sink: Callable[[bytes], None] | None = None
        self._ier = self._fcr = self._lcr = self._mcr = self._scr = 0
        self._divisor = _DIVISOR_9600
        self._overrun = False
        self._modem_deltas = 0
        self._thr_interrupt = False
        self._received: deque[int] = deque()
        self._line: deque[int] = deque()

    # -- the line --------------------------------------------------------------------------------------------------

    def type(self, data: bytes) -> int:
        """Put input on the line; return how many of its bytes found room there, the first ones."""
        taken = data[: LINE_BYTES - len(self._line)]
        self._line.extend(taken)
        self._receive_from_line()
        self._drive_interrupt()
        return len(taken)

    def _capacity(self) -> int:
        return FIFO_BYTES if self._fcr & _FCR_ENABLE else 1

    def _receive_from_line(self) -> None:
        if self._mcr & _MCR_LOOPBACK:  # the receiver is not connected to the line
            return
        while self._line and len(self._received) < self._capacity():
            self._received.append(self._line.popleft())

    def _send(self, byte: int) -> None:
        if not self._mcr & _MCR_LOOPBACK:
            if self.sink is not None:
                self.sink(bytes((byte,)))
        elif len(self._received) < self._capacity():
            self._received.append(byte)
        else:
            self._overrun = True
            if not self._fcr & _FCR_ENABLE:  # a full FIFO keeps what it has, the single register does not
                self._received[0] = byte

    # -- what the guest sees ---------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Return registers, one per byte of the access, as on a bus of bytes; there is nothing behind the last."""
        value = read_bytes(lambda at: self._read(at) if at in _REGISTERS else 0xFF, offset, size)
        self._drive_interrupt()
        return value

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Set registers, one per byte of the access."""
        write_bytes(lambda at, byte: self._write(at, byte) if at in _REGISTERS else None, offset, size, value)
        self._drive_interrupt()
        return None

    def _read(self, register: int) -> int:
        if self._lcr & _LCR_DLAB and register <= _Register.IER:
            return self._divisor >> 8 * register & 0xFF
        match register:
            case _Register.DATA:
                return self._take_received()
            case _Register.IER:
                return self._ier
            case _Register.IIR_FCR:
                return self._identify()
            case _Register.LCR:
                return self._lcr
            case _Register.MCR:
                return self._mcr
            case _Register.LSR:
                return self._take_line_status()
            case _Register.MSR:
                return self._take_modem_status()
        return self._scr

    def _write(self, register: int, byte: int) -> None:
        if self._lcr & _LCR_DLAB and register <= _Register.IER:
            shift = 8 * register
            self._divisor = self._divisor & ~(0xFF << shift) | byte << shift
            return
        match register:
            case _Register.DATA:
                self._thr_interrupt = False
                self._drive_interrupt()
                self._send(byte)
                self._thr_interrupt = True  # again, as the byte is gone at once
            case _Register.IER:
                if byte & ~self._ier & _IER_THR_EMPTY:
                    self._thr_interrupt = True
                self._ier = byte & 0x0F
            case _Register.IIR_FCR:
                self._control_fifos(byte)
            case _Register.LCR:
                self._lcr = byte
            case _Register.MCR:
                self._control_modem(byte)
            case _Register.SCR:
                self._scr = byte

    def _take_received(self) -> int:
        byte = self._received.popleft() if self._received else 0
        self._drive_interrupt()  # what comes from the line interrupts anew
        self._receive_from_line()
        return byte

    def _identify(self) -> int:
        """Return the pending interrupt of the highest priority; reading it takes the transmitter's back."""
        pending = self._pending()
        if pending == _IIR_THR_EMPTY:
            self._thr_interrupt = False
        return pending | (_IIR_FIFOS if self._fcr & _FCR_ENABLE else 0)

    def _pending(self) -> int:
        if self._ier & _IER_LINE and self._overrun:
            return _IIR_LINE
        if self._ier & _IER_DATA and self._received:
            trigger = _TRIGGER_LEVELS[self._fcr >> 6] if self._fcr & _FCR_ENABLE else 1
            return _IIR_DATA if len(self._received) >= trigger else _IIR_TIMEOUT
        if self._ier & _IER_THR_EMPTY and self._thr_interrupt:
            return _IIR_THR_EMPTY
        if self._ier & _IER_MODEM and self._modem_deltas:
            return _IIR_MODEM
        return _IIR_NONE

    def _drive_interrupt(self) -> None:
        connected = self._mcr & (_MCR_OUT2 | _MCR_LOOPBACK) == _MCR_OUT2
        self._interrupt(connected and self._pending() != _IIR_NONE)

    def _control_fifos(self, byte: int) -> None:
        enabled = bool(byte & _FCR_ENABLE)
        if enabled != bool(self._fcr & _FCR_ENABLE) or (enabled and byte & _FCR_CLEAR_RECEIVER):
            self._received.clear()
        self._fcr = byte & _FCR_KEPT if enabled else 0  # the other bits are programmed with this one only
        self._receive_from_line()

    def _modem_inputs(self) -> int:
        if not self._mcr & _MCR_LOOPBACK:
            return _MSR_DCD | _MSR_DSR | _MSR_CTS
        wires = ((_MCR_RTS, _MSR_CTS), (_MCR_DTR, _MSR_DSR), (_MCR_OUT1, _MSR_RI), (_MCR_OUT2, _MSR_DCD))
        return sum(level for output, level in wires if self._mcr & output)

    def _control_modem(self, byte: int) -> None:
        before = self._modem_inputs()
        self._mcr = byte & _MCR_KEPT
        after = self._modem_inputs()
        changed = (before ^ after) >> 4
        if after & _MSR_RI:  # of the ring indicator only the end counts
            changed &= ~_MSR_RI_ENDED
        self._modem_deltas |= changed
        self._receive_from_line()

    def _take_line_status(self) -> int:
        status = _LSR_TRANSMITTER_EMPTY
        if self._received:
            status |= _LSR_DATA_READY
        if self._overrun:
            status |= _LSR_OVERRUN
        self._overrun = False
        return status

    def _take_modem_status(self) -> int:
        status = self._modem_inputs() | self._modem_deltas
        self._modem_deltas = 0
        return status

    # -- state -----------------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """Return every register, what was received and what waits on the line."""
        registers = (self._ier, self._fcr, self._lcr, self._mcr, self._scr, self._overrun, self._modem_deltas)
        head = _STATE.pack(*registers, self._thr_interrupt, self._divisor, len(self._received), len(self._line))
        return head + bytes(self._received) + bytes(self._line)

    def load(self, data: bytes) -> None:
        """Replace the state.

        Raises:
            VmError: it is not one of this device.
        """
        if len(data) < _STATE.size:
            raise VmError(f"the state of device {self.name} has {len(data)} bytes, not {_STATE.size} or more")
        *values, received, waiting = _STATE.unpack_from(data)
        if len(data) != _STATE.size + received + waiting:
            raise VmError(f"the state of device {self.name} has {len(data)} bytes for {received} and {waiting}")
        fcr = values[1]
        fits = all(value | bits == bits for value, bits in zip(values, _STATE_BITS, strict=True))
        most = FIFO_BYTES if fcr & _FCR_ENABLE else 1
        if not fits or (fcr and not fcr & _FCR_ENABLE) or received > most or waiting > LINE_BYTES:
            raise VmError(f"the state of device {self.name} has registers that it cannot have")
        self._ier, self._fcr, self._lcr, self._mcr, self._scr = values[:5]
        self._overrun, self._modem_deltas, self._thr_interrupt = bool(values[5]), values[6], bool(values[7])
        self._divisor = values[8]
        body = data[_STATE.size :]
        self._received, self._line = deque(body[:received]), deque(body[received:])
        self._drive_interrupt()
