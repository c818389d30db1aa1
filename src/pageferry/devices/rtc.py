"""The wall clock: an MC146818 real-time clock with CMOS memory, at ports 0x70 (which register) and 0x71 (its value).

It shows the host's real time (UTC) plus an offset in whole seconds, which the guest changes by setting the clock. The
offset travels with the guest; the time does not: after a migration the guest reads the right time at once, however long
it stood still. If the destination's clock is behind the source's, so is then the guest's.

Simpler than the chip: the oscillator and the divider always run, the day of the week follows from the date, there are
no interrupts, and of register C only the update-ended flag is ever set (alarm bytes are kept and not compared).

Source: Motorola MC146818 data sheet, *Address Map*, *Registers*; byte 0x32 is the century by the PC's convention.
"""

import calendar
import struct
import time
from collections.abc import Callable
from datetime import datetime, timedelta

from pageferry.core.errors import VmError
from pageferry.core.run import Effect
from pageferry.devices.bus import expect_size

RTC_PORT = 0x70

_SECOND, _MINUTE, _HOUR, _WEEKDAY, _DAY, _MONTH, _YEAR, _CENTURY = 0, 2, 4, 6, 7, 8, 9, 0x32
_TIME_REGISTERS = (_SECOND, _MINUTE, _HOUR, _WEEKDAY, _DAY, _MONTH, _YEAR, _CENTURY)
_REGISTER_A, _REGISTER_B, _REGISTER_C, _REGISTER_D = 0x0A, 0x0B, 0x0C, 0x0D
_REGISTERS = 128

_UPDATE_IN_PROGRESS = 0x80
_RUNNING_1024_HZ = 0x26
_SET, _UPDATE_INTERRUPT, _BINARY, _24_HOURS = 0x80, 0x10, 0x04, 0x02
_INTERRUPT, _UPDATE_ENDED = 0x80, 0x10
_POWER_GOOD = 0x80
_PM = 0x80

_NS_PER_S = 10**9
#: UIP goes up 244 µs before an update, which takes 1,984 µs.
_UPDATE_NS = 2_228_000
_EPOCH = datetime(1970, 1, 1)
_FIRST_S = int((datetime(1, 1, 1) - _EPOCH).total_seconds())
_LAST_S = int((datetime(9999, 12, 31, 23, 59, 59) - _EPOCH).total_seconds())

#: index, an update not yet seen in register C, offset in seconds, the bytes.
_STATE = struct.Struct(f"<BBq{_REGISTERS}s")


class Rtc:
    """The clock; see the module's text.

    Args:
        real_ns: the host's real time, nanoseconds since 1970 (UTC).
    """

    name = "rtc"
    ports = range(RTC_PORT, RTC_PORT + 2)
    mmio = range(0)

    def __init__(self, real_ns: Callable[[], int] = time.time_ns) -> None:
        self._real_ns = real_ns
        self._index = 0
        self._offset_s = 0
        self._seen_s = real_ns() // _NS_PER_S
        self._updated = False
        self._bytes = bytearray(_REGISTERS)  # those of the time count only while register B says SET
        self._bytes[_REGISTER_A] = _RUNNING_1024_HZ
        self._bytes[_REGISTER_B] = _24_HOURS

    # -- ports -----------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Return the chosen register at the second port; the first cannot be read."""
        ports = (self._read(self._index) if at == 1 else 0xFF for at in range(offset, offset + size))
        return int.from_bytes(bytes(ports), "little")

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Choose a register (bit 7 is the PC's NMI mask: nothing here), or set the chosen one."""
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            if at == 0:
                self._index = byte & _REGISTERS - 1
            elif at == 1:
                self._write(self._index, byte)
        return None

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
        self._note_updates()
        if byte & _SET and not self._setting:
            for register, value in self._time_bytes().items():
                self._bytes[register] = value
        was_setting, self._bytes[_REGISTER_B] = self._setting, byte & ~_UPDATE_INTERRUPT if byte & _SET else byte
        if was_setting and not self._setting:
            self._set_time({register: self._bytes[register] for register in _TIME_REGISTERS})

    # -- updates, once a second --------------------------------------------------------------------------------------

    def _update_is_near(self) -> bool:
        return not self._setting and self._real_ns() % _NS_PER_S >= _NS_PER_S - _UPDATE_NS

    def _note_updates(self) -> None:
        now_s = self._real_ns() // _NS_PER_S
        if not self._setting and now_s != self._seen_s:
            self._updated = True
        self._seen_s = now_s

    def _take_flags(self) -> int:
        self._note_updates()
        flags = _UPDATE_ENDED if self._updated else 0
        if flags & self._bytes[_REGISTER_B]:
            flags |= _INTERRUPT
        self._updated = False
        return flags

    # -- time as bytes -----------------------------------------------------------------------------------------------

    def _time_bytes(self) -> dict[int, int]:
        """Return the time registers now, in the format that register B asks for."""
        seconds = min(max(self._real_ns() // _NS_PER_S + self._offset_s, _FIRST_S), _LAST_S)
        now = _EPOCH + timedelta(seconds=seconds)
        hour, pm = now.hour, 0
        if not self._bytes[_REGISTER_B] & _24_HOURS:
            hour, pm = (now.hour + 11) % 12 + 1, _PM if now.hour >= 12 else 0
        numbers = {_SECOND: now.second, _MINUTE: now.minute, _HOUR: hour, _WEEKDAY: now.isoweekday() % 7 + 1}
        numbers |= {_DAY: now.day, _MONTH: now.month, _YEAR: now.year % 100, _CENTURY: now.year // 100}
        fields = {register: self._encode(number) for register, number in numbers.items()}
        fields[_HOUR] |= pm
        return fields

    def _set_time(self, fields: dict[int, int]) -> None:
        """Let the clock show ``fields``; what is no date counts on as a calendar does (February 30 is in March)."""
        hour = self._decode(fields[_HOUR])
        if not self._bytes[_REGISTER_B] & _24_HOURS:
            hour = self._decode(fields[_HOUR] & ~_PM) % 12 + (12 if fields[_HOUR] & _PM else 0)
        year = self._decode(fields[_CENTURY]) % 100 * 100 + self._decode(fields[_YEAR]) % 100
        month = min(max(self._decode(fields[_MONTH]), 1), 12)
        date = (max(year, 1), month, self._decode(fields[_DAY]), hour)
        wanted_s = calendar.timegm((*date, self._decode(fields[_MINUTE]), self._decode(fields[_SECOND])))
        self._offset_s = wanted_s - self._real_ns() // _NS_PER_S

    def _encode(self, number: int) -> int:
        return number if self._bytes[_REGISTER_B] & _BINARY else number // 10 << 4 | number % 10

    def _decode(self, byte: int) -> int:
        return byte if self._bytes[_REGISTER_B] & _BINARY else (byte >> 4) * 10 + (byte & 0x0F)

    # -- state -----------------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """Return the offset and the bytes, not the time."""
        self._note_updates()
        return _STATE.pack(self._index, self._updated, self._offset_s, bytes(self._bytes))

    def load(self, data: bytes) -> None:
        """Replace the state.

        Raises:
            VmError: it is not one of this device.
        """
        expect_size(self.name, data, _STATE.size)
        index, updated, offset_s, memory = _STATE.unpack(data)
        fixed = memory[_REGISTER_A] & _UPDATE_IN_PROGRESS | memory[_REGISTER_C] | memory[_REGISTER_D]
        if index >= _REGISTERS or updated > 1 or fixed or abs(offset_s) > _LAST_S - _FIRST_S:
            raise VmError(f"the state of device {self.name} has registers that it cannot have")
        self._index, self._updated, self._offset_s = index, bool(updated), offset_s
        self._bytes[:] = memory
        self._seen_s = self._real_ns() // _NS_PER_S
