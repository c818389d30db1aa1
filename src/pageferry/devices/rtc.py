"""The wall clock: an MC146818 real-time clock with CMOS memory, at ports 0x70 (which register) and 0x71 (its value).

It shows the host's real time (UTC) plus an offset in whole seconds, which the guest changes by setting the clock. The
offset travels with the guest; the time does not: after a migration the guest reads the right time at once, however long
it stood still. If the destination's clock is behind the source's, so is then the guest's.

Its interrupts (an update ended, the alarm, the periodic one) follow the host's real time too. What became due while
the guest was on its way is due at once where it arrives. Periods that end unseen are one interrupt.

Simpler than the chip: the oscillator and the divider always run, and the day of the week follows from the date.

Source: Motorola MC146818 data sheet, *Address Map*, *Registers*, *Interrupts*; byte 0x32 is the century by the PC's
convention.
"""

import calendar
import struct
import time
from collections.abc import Callable
from datetime import datetime, timedelta

from pageferry.core.errors import VmError
from pageferry.core.run import Effect
from pageferry.devices.bus import expect_size, read_bytes, write_bytes
from pageferry.devices.interrupts import Line

RTC_PORT = 0x70

_SECOND, _MINUTE, _HOUR, _WEEKDAY, _DAY, _MONTH, _YEAR, CENTURY = 0, 2, 4, 6, 7, 8, 9, 0x32
_TIME_REGISTERS = (_SECOND, _MINUTE, _HOUR, _WEEKDAY, _DAY, _MONTH, _YEAR, CENTURY)
_ALARM_SECOND, _ALARM_MINUTE, _ALARM_HOUR = 1, 3, 5
_REGISTER_A, _REGISTER_B, _REGISTER_C, _REGISTER_D = 0x0A, 0x0B, 0x0C, 0x0D
_REGISTERS = 128

_UPDATE_IN_PROGRESS = 0x80
_RUNNING_1024_HZ = 0x26
_RATE = 0x0F
_SET, _BINARY, _24_HOURS = 0x80, 0x04, 0x02
# A flag of register C and the bit of register B that lets it interrupt are the same.
_INTERRUPT, _PERIODIC, _ALARM, _UPDATE_ENDED = 0x80, 0x40, 0x20, 0x10
_FLAGS = _PERIODIC | _ALARM | _UPDATE_ENDED
_POWER_GOOD = 0x80
_PM = 0x80
#: In an alarm's register: at any.
_ANY = 0xC0
_BASE_HZ = 32_768

_NS_PER_S = 10**9
_DAY_S = 86_400
#: UIP goes up 244 µs before an update, which takes 1,984 µs.
_UPDATE_NS = 2_228_000
_EPOCH = datetime(1970, 1, 1)
_FIRST_S = int((datetime(1, 1, 1) - _EPOCH).total_seconds())
_LAST_S = int((datetime(9999, 12, 31, 23, 59, 59) - _EPOCH).total_seconds())

#: index, offset in seconds, the real time up to which flags are set, the bytes.
_STATE = struct.Struct(f"<Bqq{_REGISTERS}s")


class Rtc:
    """The clock; see the module's text.

    Args:
        line: its interrupt.
        real_ns: the host's real time, nanoseconds since 1970 (UTC).
    """

    name = "rtc"
    ports = range(RTC_PORT, RTC_PORT + 2)
    mmio = range(0)

    def __init__(self, line: Line, real_ns: Callable[[], int] = time.time_ns) -> None:
        self._interrupt = line
        self._real_ns = real_ns
        self._index = 0
        self._offset_s = 0
        self._looked_ns = real_ns()
        self._alarm_s: int | None = None  # when it is next, in real time; None: never
        self._due_ns: int | None = None
        self._bytes = bytearray(_REGISTERS)  # those of the time count only while register B says SET
        self._bytes[_REGISTER_A] = _RUNNING_1024_HZ
        self._bytes[_REGISTER_B] = _24_HOURS
        self._plan()

    # -- ports -----------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Return the chosen register at the second port; the first cannot be read."""
        return read_bytes(lambda at: self._read(self._index) if at == 1 else 0xFF, offset, size)

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Choose a register (bit 7 is the PC's NMI mask: nothing here), or set the chosen one."""
        write_bytes(self._write_port, offset, size, value)
        return None

    def _write_port(self, port: int, byte: int) -> None:
        if port == 0:
            self._index = byte & _REGISTERS - 1
        elif port == 1:
            self.advance()
            self._write(self._index, byte)
            self._plan()

    def _read(self, register: int) -> int:
        if register in _TIME_REGISTERS and not self._setting:
            return self._time_bytes()[register]
        if register == _REGISTER_A:
            return self._bytes[_REGISTER_A] | (_UPDATE_IN_PROGRESS if self._update_is_near() else 0)
        if register == _REGISTER_C:
            return self._take_flags()
        return _POWER_GOOD if register == _REGISTER_D else self._bytes[register]

    def _write(self, register: int, byte: int) -> None:
        if register in (_REGISTER_C, _REGISTER_D):
            return
        if register == _REGISTER_A:
            self._bytes[register] = byte & ~_UPDATE_IN_PROGRESS
        elif register == _REGISTER_B:
            self._control(byte)
        elif register in _TIME_REGISTERS and not self._setting:
            fields = self._time_bytes()
            fields[register] = byte
            self._set_time(fields)
        else:
            self._bytes[register] = byte

    @property
    def _setting(self) -> bool:
        return bool(self._bytes[_REGISTER_B] & _SET)

    def _control(self, byte: int) -> None:
        if byte & _SET and not self._setting:
            for register, value in self._time_bytes().items():
                self._bytes[register] = value
        was_setting, self._bytes[_REGISTER_B] = self._setting, byte & ~_UPDATE_ENDED if byte & _SET else byte
        if was_setting and not self._setting:
            self._set_time({register: self._bytes[register] for register in _TIME_REGISTERS})

    def _update_is_near(self) -> bool:
        return not self._setting and self._real_ns() % _NS_PER_S >= _NS_PER_S - _UPDATE_NS

    # -- interrupts --------------------------------------------------------------------------------------------------

    def due_in_ns(self) -> int | None:
        """Return in how much real time it interrupts, as far as is known now; None: it does not."""
        return None if self._due_ns is None else self._due_ns - self._real_ns()

    def advance(self) -> None:
        """Set the flags of what happened since this was called last, and interrupt if that is wanted."""
        before_ns, self._looked_ns = self._looked_ns, self._real_ns()
        now_s = self._looked_ns // _NS_PER_S
        if not self._setting and now_s != before_ns // _NS_PER_S:
            self._bytes[_REGISTER_C] |= _UPDATE_ENDED
        if self._alarm_s is not None and now_s >= self._alarm_s:
            self._bytes[_REGISTER_C] |= _ALARM
        if self._periods(self._looked_ns) != self._periods(before_ns):
            self._bytes[_REGISTER_C] |= _PERIODIC
        self._plan()

    def _take_flags(self) -> int:
        self.advance()
        flags, self._bytes[_REGISTER_C] = self._bytes[_REGISTER_C], 0
        interrupted = _INTERRUPT if flags & self._bytes[_REGISTER_B] else 0
        self._plan()
        return flags | interrupted

    def _plan(self) -> None:
        """Drive the interrupt line, and work out when a flag that interrupts is set next."""
        flags, enabled = self._bytes[_REGISTER_C], self._bytes[_REGISTER_B] & _FLAGS
        self._interrupt(bool(flags & enabled))
        now_s = self._looked_ns // _NS_PER_S
        left_s = None if self._setting else self._seconds_to_alarm((now_s + self._offset_s) % _DAY_S)
        self._alarm_s = None if left_s is None else now_s + left_s
        awaited = enabled & ~flags
        due = []
        if awaited & _UPDATE_ENDED:
            due.append((now_s + 1) * _NS_PER_S)
        if awaited & _ALARM and self._alarm_s is not None:
            due.append(self._alarm_s * _NS_PER_S)
        if awaited & _PERIODIC and self._period_hz:
            due.append(-(-(self._periods(self._looked_ns) + 1) * _NS_PER_S // self._period_hz))
        self._due_ns = min(due, default=None)

    @property
    def _period_hz(self) -> int:
        """How often the periodic interrupt comes; 0: never. The two highest rates are those of the lower two."""
        rate = self._bytes[_REGISTER_A] & _RATE
        return _BASE_HZ >> (rate + 6 if rate < 3 else rate - 1) if rate else 0

    def _periods(self, real_ns: int) -> int:
        return real_ns * self._period_hz // _NS_PER_S

    def _seconds_to_alarm(self, now: int) -> int | None:
        """Return in how many seconds the alarm is, at ``now`` seconds of the day that the guest sees; None: never."""
        hours = self._alarm_at(_ALARM_HOUR, self._decode_hour, 24)
        minutes = self._alarm_at(_ALARM_MINUTE, self._decode, 60)
        seconds = self._alarm_at(_ALARM_SECOND, self._decode, 60)
        at = now + 1
        while at <= now + _DAY_S:
            if at // 3600 % 24 not in hours:
                at += 3600 - at % 3600
            elif at // 60 % 60 not in minutes:
                at += 60 - at % 60
            elif at % 60 not in seconds:
                at += 1
            else:
                return at - now
        return None

    def _alarm_at(self, register: int, decode: Callable[[int], int], limit: int) -> range:
        byte = self._bytes[register]
        return range(limit) if byte & _ANY == _ANY else range(decode(byte), decode(byte) + 1)

    # -- time as bytes -----------------------------------------------------------------------------------------------

    def _time_bytes(self) -> dict[int, int]:
        """Return the time registers now, in the format that register B asks for."""
        seconds = min(max(self._real_ns() // _NS_PER_S + self._offset_s, _FIRST_S), _LAST_S)
        now = _EPOCH + timedelta(seconds=seconds)
        hour, pm = now.hour, 0
        if not self._bytes[_REGISTER_B] & _24_HOURS:
            hour, pm = (now.hour + 11) % 12 + 1, _PM if now.hour >= 12 else 0
        numbers = {_SECOND: now.second, _MINUTE: now.minute, _HOUR: hour, _WEEKDAY: now.isoweekday() % 7 + 1}
        numbers |= {_DAY: now.day, _MONTH: now.month, _YEAR: now.year % 100, CENTURY: now.year // 100}
        fields = {register: self._encode(number) for register, number in numbers.items()}
        fields[_HOUR] |= pm
        return fields

    def _set_time(self, fields: dict[int, int]) -> None:
        """Let the clock show ``fields``; an impossible date is carried over (February 30 is in March)."""
        year = self._decode(fields[CENTURY]) % 100 * 100 + self._decode(fields[_YEAR]) % 100
        month = min(max(self._decode(fields[_MONTH]), 1), 12)
        date = (max(year, 1), month, self._decode(fields[_DAY]), self._decode_hour(fields[_HOUR]))
        wanted_s = calendar.timegm((*date, self._decode(fields[_MINUTE]), self._decode(fields[_SECOND])))
        self._offset_s = wanted_s - self._real_ns() // _NS_PER_S

    def _encode(self, number: int) -> int:
        return number if self._bytes[_REGISTER_B] & _BINARY else number // 10 << 4 | number % 10

    def _decode_hour(self, byte: int) -> int:
        if self._bytes[_REGISTER_B] & _24_HOURS:
            return self._decode(byte)
        return self._decode(byte & ~_PM) % 12 + (12 if byte & _PM else 0)

    def _decode(self, byte: int) -> int:
        return byte if self._bytes[_REGISTER_B] & _BINARY else (byte >> 4) * 10 + (byte & 0x0F)

    # -- state -----------------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """Return the offset, the bytes and up to when their flags are set; the time is the host's."""
        return _STATE.pack(self._index, self._offset_s, self._looked_ns, bytes(self._bytes))

    def load(self, data: bytes) -> None:
        """Replace the state; what became due since it was saved is due.

        Raises:
            VmError: it is not one of this device.
        """
        expect_size(self.name, data, _STATE.size)
        index, offset_s, looked_ns, memory = _STATE.unpack(data)
        fixed = memory[_REGISTER_A] & _UPDATE_IN_PROGRESS | memory[_REGISTER_C] & ~_FLAGS | memory[_REGISTER_D]
        if index >= _REGISTERS or fixed or abs(offset_s) > _LAST_S - _FIRST_S or looked_ns < 0:
            raise VmError(f"the state of device {self.name} has registers that it cannot have")
        self._index, self._offset_s, self._looked_ns = index, offset_s, looked_ns
        self._bytes[:] = memory
        self._plan()
        self.advance()
