"""An 8254 interval timer: three counters of 1,193,182 Hz at ports 0x40 to 0x43, and the PC's port 0x61 beside it.

Counter 0 drives IRQ 0. Counter 2 has the gate and the speaker that port 0x61 controls; the gates of the others are
always high. The clock is guest time: it stands still while the guest's state is moved.

Simpler than the chip:

- a count counts from its write on, not from the clock pulse after it;
- in modes 1, 2, 3 and 5 a new count ends the old one, which on the chip comes to its own end;
- IRQ 0 is a pulse at each rising edge of the output. Edges that pass unseen are one interrupt.

Saved is the structure of KVM's PIT, so that a guest may move between ours and the kernel's. Where KVM has the time of
its host at which a counter was loaded, there is for how many nanoseconds it has counted: 0, it begins anew; -1, it
waits for its count or its trigger.

Source: Intel 8254 data sheet, *Programming the 8254*, *Mode Definitions*; Intel 82371AB data sheet, *NMI Status and
Control Register* (port 0x61); ``arch/x86/include/uapi/asm/kvm.h``, ``struct kvm_pit_state2``.
"""

import struct
from collections.abc import Callable

from pageferry.core.errors import VmError
from pageferry.core.run import Effect
from pageferry.devices.bus import expect_size, read_bytes, write_bytes
from pageferry.devices.interrupts import Line

PIT_PORT = 0x40
SPEAKER_PORT = 0x61
PIT_HZ = 1_193_182

_CONTROL_PORT = 3
_READ_BACK, _NOT_COUNT, _NOT_STATUS = 3, 0x20, 0x10
_GATED = 2

# How a counter is read and written, and which half comes next; KVM's numbers.
_LATCH, _LOW, _HIGH, _LOW_THEN_HIGH, _HIGH_OF_BOTH = 0, 1, 2, 3, 4
_NOT_PROGRAMMED = 0xFF
_TRIGGERED, _PERIODIC, _STROBES = (1, 5), (2, 3), (4, 5)
_MODES = (0, 1, 2, 3, 4, 5, _NOT_PROGRAMMED)
_OUT, _NULL_COUNT = 0x80, 0x40
_HIGHEST_COUNT = 1 << 16

_WAITS = -1
_NS_PER_S = 10**9

_GATE, _SPEAKER, _REFRESH, _SPEAKER_OUT = 0x01, 0x02, 0x10, 0x20
#: Memory refresh toggles its bit so often.
_REFRESH_NS = 15_085
_STATE_SPEAKER = 2

#: count, latched count; count latched, status latched, status, read state, write state, write latch, rw, mode, BCD,
#: gate; for how long it has counted.
_COUNTER_STATE = struct.Struct("<IH10Bq")
#: The highest values of the first twelve.
_COUNTER_LIMITS = (_HIGHEST_COUNT, 0xFFFF, 4, 1, 0xFF, 4, 4, 0xFF, 3, 0xFF, 1, 1)
#: Flags, after the counters.
_FLAGS_STATE = struct.Struct("<I36x")
_STATE_BYTES = 3 * _COUNTER_STATE.size + _FLAGS_STATE.size


class Counter:
    """One of the three: its registers, and how it counts.

    Args:
        now_ns: guest time.
        gate: the level of its gate at first.
    """

    def __init__(self, now_ns: Callable[[], int], *, gate: bool) -> None:
        self._now_ns = now_ns
        self.gate = gate
        self._mode = _NOT_PROGRAMMED
        self._bcd = False
        self._count = _HIGHEST_COUNT  # as written, 0 as what it stands for
        self._rw = self._read_state = self._write_state = self._write_latch = 0
        self._latched = self._latched_state = 0  # the second: how it is still to be read, 0 when it was
        self._status: int | None = None
        self._waits = True  # for its count or its trigger
        self._counted_ns = 0
        self._since_ns: int | None = None  # it counts since then; None: its gate holds it
        self._edges_seen = 0
        #: The guest time of the next rising edge of the output; None: there will be none.
        self.due_ns: int | None = None

    # -- registers ---------------------------------------------------------------------------------------------------

    def program(self, control: int) -> None:
        """Take a control word: a mode, or the command to latch the count."""
        rw = control >> 4 & 3
        if rw == _LATCH:
            self.latch_count()
            return
        mode = control >> 1 & 7
        self._rw = self._read_state = self._write_state = rw
        self._mode = mode if mode <= 5 else mode - 4
        self._bcd = bool(control & 1)
        self._latched_state, self._status = 0, None
        self._wait()

    def latch_count(self) -> None:
        """Keep the count as it is now until it is read."""
        if not self._latched_state:
            self._latched, self._latched_state = self._value(), self._rw

    def latch_status(self) -> None:
        """Keep the status as it is now until it is read."""
        if self._status is None:
            mode = self._mode & 7
            null_count = _NULL_COUNT if self._waits else 0
            self._status = self.out * _OUT | null_count | self._rw << 4 | mode << 1 | self._bcd

    def read(self) -> int:
        """Return the status or a half of the count, what was latched first."""
        if self._status is not None:
            status, self._status = self._status, None
            return status
        if self._latched_state:
            value, state = self._latched, self._latched_state
            self._latched_state = _HIGH if state == _LOW_THEN_HIGH else 0
        else:
            value, state = self._value(), self._read_state
            self._read_state = _other_half(state)
        return value >> 8 if state in (_HIGH, _HIGH_OF_BOTH) else value & 0xFF

    def write(self, byte: int) -> None:
        """Take a count or a half of one; a whole one is counted from now on, or from the next trigger."""
        state, self._write_state = self._write_state, _other_half(self._write_state)
        if state == _LOW_THEN_HIGH:
            self._write_latch = byte
            if self._mode == 0:
                self._wait()
            return
        if state in (_HIGH, _HIGH_OF_BOTH):
            byte = byte << 8 | (self._write_latch if state == _HIGH_OF_BOTH else 0)
        self._count = byte or _HIGHEST_COUNT
        if self._mode in _TRIGGERED:
            self._wait()
        elif self._mode != _NOT_PROGRAMMED:
            self._begin()

    # -- counting ----------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        self._waits, self.due_ns = True, None

    def _begin(self, counted_ns: int = 0) -> None:
        self._waits = False
        self._counted_ns = counted_ns
        self._since_ns = self._now_ns() if self.gate or self._mode in _TRIGGERED else None
        self._edges_seen = self._edges(counted_ns)
        self._set_due()

    def set_gate(self, gate: bool) -> None:
        """Drive the gate. Low stops the modes 0, 2, 3 and 4; a rising edge begins 1, 2, 3 and 5 anew."""
        rising, falling, self.gate = gate and not self.gate, self.gate and not gate, gate
        if self._mode in _TRIGGERED:
            if rising:
                self._begin()
        elif self._waits:
            return
        elif falling:
            self._counted_ns, self._since_ns = self._elapsed_ns(self._now_ns()), None
            self._set_due()
        elif rising:
            self._begin(0 if self._mode in _PERIODIC else self._counted_ns)

    @property
    def out(self) -> bool:
        """The level of the output."""
        if self._waits:
            return self._mode != 0
        ticks, n = _ticks(self._elapsed_ns(self._now_ns())), self._n
        match self._mode:
            case 0 | 1:
                return ticks >= n
            case 2:
                return not self.gate or ticks % n != n - 1
            case 3:
                return not self.gate or ticks % n < (n + 1) // 2
        return ticks != n  # a strobe of one tick

    def take_edge(self, now_ns: int) -> bool:
        """Tell whether the output has risen since this was asked last."""
        if self.due_ns is None or now_ns < self.due_ns:
            return False
        self._edges_seen = self._edges(self._elapsed_ns(now_ns))
        self._set_due()
        return True

    @property
    def _n(self) -> int:
        return _from_bcd(self._count) if self._bcd else self._count

    def _elapsed_ns(self, now_ns: int) -> int:
        return self._counted_ns + (0 if self._since_ns is None else max(now_ns - self._since_ns, 0))

    def _value(self) -> int:
        ticks, n = _ticks(self._elapsed_ns(self._now_ns())), self._n
        if self._waits:
            left = n
        elif self._mode == 3:  # it counts by two, twice: while the output is high, and while it is low
            phase, high = ticks % n, (n + 1) // 2
            left = (n & ~1) - 2 * (phase if phase < high else phase - high)
        else:
            left = n - (ticks % n if self._mode == 2 else ticks)
        return _to_bcd(left % 10_000) if self._bcd else left % _HIGHEST_COUNT

    def _first_edge(self) -> int:
        return self._n + 1 if self._mode in _STROBES else self._n

    def _edges(self, elapsed_ns: int) -> int:
        edges = _ticks(elapsed_ns) // self._first_edge()
        return edges if self._mode in _PERIODIC else min(edges, 1)

    def _set_due(self) -> None:
        self.due_ns = None
        if self._since_ns is not None and (self._mode in _PERIODIC or not self._edges_seen):
            ticks = (self._edges_seen + 1) * self._first_edge()
            self.due_ns = self._since_ns - self._counted_ns - (-ticks * _NS_PER_S // PIT_HZ)

    # -- state -------------------------------------------------------------------------------------------------------

    def save(self, now_ns: int) -> bytes:
        """Return KVM's structure of a counter."""
        return _COUNTER_STATE.pack(
            self._count,
            self._latched,
            self._latched_state,
            self._status is not None,
            self._status or 0,
            self._read_state,
            self._write_state,
            self._write_latch,
            self._rw,
            self._mode,
            self._bcd,
            self.gate,
            _WAITS if self._waits else self._elapsed_ns(now_ns),
        )

    def load(self, data: bytes) -> bool:
        """Replace the state; False: it cannot be one, and nothing changed."""
        *values, counted_ns = _COUNTER_STATE.unpack(data)
        count, latched, latched_state, has_status, status, *ways, mode, bcd, gate = values
        above = any(value > most for value, most in zip(values, _COUNTER_LIMITS, strict=True))
        if above or not count or mode not in _MODES or counted_ns < _WAITS:
            return False
        self._count, self._mode, self._bcd, self.gate = count, mode, bool(bcd), bool(gate)
        self._latched, self._latched_state, self._status = latched, latched_state, status if has_status else None
        self._read_state, self._write_state, self._write_latch, self._rw = ways
        if counted_ns == _WAITS or mode == _NOT_PROGRAMMED:
            self._wait()
        else:
            self._begin(counted_ns)
        return True


class Pit:
    """The timer, and what port 0x61 controls of it.

    Args:
        now_ns: guest time.
        line: of IRQ 0.
    """

    name = "pit"
    ports = range(PIT_PORT, PIT_PORT + 4)
    mmio = range(0)

    def __init__(self, now_ns: Callable[[], int], line: Line) -> None:
        self.now_ns = now_ns
        self._line = line
        self.counters = tuple(Counter(now_ns, gate=number != _GATED) for number in range(3))
        self.speaker = False
        self._advanced_ns = now_ns()

    def due_in_ns(self) -> int | None:
        """Return when IRQ 0 is due: how long from now, 0 or less if it is already; None: never."""
        due_ns = self.counters[0].due_ns
        return None if due_ns is None else due_ns - self.now_ns()

    def advance(self) -> None:
        """Raise IRQ 0 if it is due."""
        self._advanced_ns = self.now_ns()
        if self.counters[0].take_edge(self._advanced_ns):
            self._line(True)
            self._line(False)

    # -- what the guest sees -----------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Return counts and status; the control port cannot be read."""
        return read_bytes(lambda at: self.counters[at].read() if at < _CONTROL_PORT else 0xFF, offset, size)

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Take control words and counts; an interrupt that was due before that is not lost."""
        self.advance()
        write_bytes(self._write, offset, size, value)
        return None

    def _write(self, port: int, byte: int) -> None:
        if port < _CONTROL_PORT:
            self.counters[port].write(byte)
        elif port == _CONTROL_PORT:
            if byte >> 6 == _READ_BACK:
                self._read_back(byte)
            else:
                self.counters[byte >> 6].program(byte)

    def _read_back(self, command: int) -> None:
        for number, counter in enumerate(self.counters):
            if command & 2 << number:
                if not command & _NOT_COUNT:
                    counter.latch_count()
                if not command & _NOT_STATUS:
                    counter.latch_status()

    # -- state -------------------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """Return KVM's structure, as of the last :meth:`advance`: what is due later comes where it is loaded."""
        counters = b"".join(counter.save(self._advanced_ns) for counter in self.counters)
        return counters + _FLAGS_STATE.pack(_STATE_SPEAKER if self.speaker else 0)

    def load(self, data: bytes) -> None:
        """Replace the state; a counter goes on from where it was.

        Raises:
            VmError: it is not one of this device.
        """
        expect_size(self.name, data, _STATE_BYTES)
        flags = data[-_FLAGS_STATE.size :]
        states = (data[at * _COUNTER_STATE.size :][: _COUNTER_STATE.size] for at in range(3))
        fits = all(counter.load(state) for counter, state in zip(self.counters, states, strict=True))
        if not fits or flags not in (_FLAGS_STATE.pack(0), _FLAGS_STATE.pack(_STATE_SPEAKER)):
            raise VmError(f"the state of device {self.name} has registers that it cannot have")
        self.speaker = any(flags)
        self._advanced_ns = self.now_ns()


class SpeakerPort:
    """Port 0x61, with its state in the timer's.

    Bit 0: the gate of counter 2. Bit 1: the speaker. To be read only: bit 4, which memory refresh toggles, and bit 5,
    the output of counter 2.
    """

    ports = range(SPEAKER_PORT, SPEAKER_PORT + 1)
    mmio = range(0)

    def __init__(self, pit: Pit) -> None:
        self._pit = pit

    def read(self, offset: int, size: int) -> int:
        """Return the bits."""
        return read_bytes(lambda at: 0xFF if at else self._bits(), offset, size)

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Drive gate and speaker."""
        self._pit.counters[_GATED].set_gate(bool(value & _GATE))
        self._pit.speaker = bool(value & _SPEAKER)
        return None

    def _bits(self) -> int:
        pit, counter = self._pit, self._pit.counters[_GATED]
        refresh = pit.now_ns() // _REFRESH_NS & 1
        return counter.gate * _GATE | pit.speaker * _SPEAKER | refresh * _REFRESH | counter.out * _SPEAKER_OUT


def _other_half(state: int) -> int:
    return {_LOW_THEN_HIGH: _HIGH_OF_BOTH, _HIGH_OF_BOTH: _LOW_THEN_HIGH}.get(state, state)


def _ticks(ns: int) -> int:
    return ns * PIT_HZ // _NS_PER_S


def _from_bcd(count: int) -> int:
    return sum((count >> 4 * digit & 0xF) * 10**digit for digit in range(5))


def _to_bcd(number: int) -> int:
    return sum(number // 10**digit % 10 << 4 * digit for digit in range(4))
