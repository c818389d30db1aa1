"""Checks of the devices' state: on another host each answers a guest as it would have answered at the first.

No guest runs: the checks play the guest on the bus, and the hosts' clocks are theirs. The host that the guest left is
the reference; what a device should answer is not said twice.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pageferry.core.vm import MachineModel
from pageferry.devices.clock import CLOCK_PORT, TIMER_PORT
from pageferry.devices.dma import DMA_MMIO
from pageferry.devices.rtc import RTC_PORT
from pageferry.devices.uart import CONSOLE_PORT
from pageferry.testing.conformance import Check, check_of
from pageferry.testing.lab import Lab, require

_MS = 10**6
_S = 10**9
_DOWNTIME_NS = 90 * _S
#: More than any host counts while a guest is loaded.
TSC_JUMP = 1 << 42
_1_JUNE_2027_NS = 1_811_808_000 * _S


class _Host:
    """A machine whose devices live by clocks that are set here; ``boot_ns`` is how long its host is up."""

    def __init__(self, vm: Any, boot_ns: int) -> None:
        self.vm = vm
        self._bus = vm.platform.bus
        self._monotonic_ns = boot_ns
        self._real_ns = _1_JUNE_2027_NS + _S // 2  # no second begins while the clock is read
        clock, rtc = vm.platform.clock, vm.platform.rtc
        clock._now_ns, clock._zero_ns = lambda: self._monotonic_ns, boot_ns
        rtc._real_ns, rtc._looked_ns = lambda: self._real_ns, self._real_ns

    def later(self, ns: int) -> None:
        """Let time pass."""
        self._monotonic_ns += ns
        self._real_ns += ns

    def write(self, port: int, *values: int, size: int = 1) -> None:
        """Store to a port, once for each value."""
        for value in values:
            self._bus.port_write(port, size, value)

    def read(self, *ports: int, size: int = 1) -> list[int]:
        """Load from ports."""
        return [self._bus.port_read(port, size) for port in ports]


@contextmanager
def _two_hosts(lab: Lab) -> Iterator[tuple[_Host, _Host]]:
    with lab.guest("idle") as here, lab.guest("idle") as there:
        yield _Host(here.vm, 100 * _S), _Host(there.vm, 7 * _S)


def _require_same(here: _Host, there: _Host, what: str, look: Callable[[_Host], list[int]]) -> None:
    expected, found = look(here), look(there)
    require(found == expected, f"{what}: the guest reads {found}, and would have read {expected}")


def console_moves(lab: Lab) -> None:
    """A UART with every register set, a full FIFO, input on the line and interrupts pending is the same elsewhere."""
    data, ier, fcr, lcr, mcr, lsr, msr, scr = range(CONSOLE_PORT, CONSOLE_PORT + 8)

    def look(host: _Host) -> list[int]:
        seen = host.read(ier, lcr, mcr, scr, *[fcr] * 2, lsr, fcr, msr, fcr)
        for _ in range(60):
            seen += host.read(lsr, data)
        host.write(lcr, 0x80)
        return seen + host.read(data, ier)

    for enabled in (0x0F, 0x02):  # all interrupts; that of the transmitter alone
        with _two_hosts(lab) as (here, there):
            here.write(lcr, 0x80)
            here.write(data, 3)
            here.write(ier, 1)
            here.write(lcr, 0x1B)
            here.write(fcr, 0xC1)
            here.write(mcr, 0x1F)
            here.write(data, *range(0x41, 0x52))  # looped back, one more than there is room for
            here.write(mcr, 0x0B)
            here.write(scr, 0x5A)
            here.write(ier, enabled)
            require(here.vm.type_console(b"typed, and not yet read") > 0, "the line takes no input")
            there.vm.load_state(here.vm.save_state())
            _require_same(here, there, "console", look)


def guest_time_moves(lab: Lab) -> None:
    """Guest time and the timer go on from where they were, however long the move took."""

    def look(host: _Host) -> list[int]:
        return host.read(CLOCK_PORT, TIMER_PORT, TIMER_PORT + 4, size=4)

    with _two_hosts(lab) as (here, there):
        here.later(5 * _S)
        here.write(TIMER_PORT, 1000, size=4)
        here.later(2 * _MS + _MS // 2)
        here.write(TIMER_PORT + 4, 0, size=4)
        state = here.vm.save_state()
        there.later(_DOWNTIME_NS)
        there.vm.load_state(state)
        for pause_ns in (0, _MS // 4, _MS):  # the same period; the next one, not acknowledged yet
            here.later(pause_ns)
            there.later(pause_ns)
            _require_same(here, there, "guest time", look)


def wall_clock_moves(lab: Lab) -> None:
    """The wall clock shows what the guest had set it to, and has not stood still during the move."""

    def look(host: _Host) -> list[int]:
        seen = []
        for register in (*range(0x0C), 0x0D, 0x32, 0x40, 0x7F):
            host.write(RTC_PORT, register)
            seen += host.read(RTC_PORT + 1)
        return seen

    def set_register(host: _Host, register: int, value: int) -> None:
        host.write(RTC_PORT, register)
        host.write(RTC_PORT + 1, value)

    with _two_hosts(lab) as (here, there):
        for register, value in ((0x0B, 0x06), (9, 31), (0, 58), (0x40, 0x77), (1, 0x15)):
            set_register(here, register, value)
        state = here.vm.save_state()
        for host in (here, there):
            host.later(_DOWNTIME_NS)
        there.vm.load_state(state)
        _require_same(here, there, "wall clock", look)


def interrupts_move(lab: Lab) -> None:
    """What a PC's devices asked for before the freeze, and what was due by then, interrupts elsewhere: once."""
    first, second, end, poll, mode_0, timer_due = 0x20, 0xA0, 0x20, 0x0C, 0x30, _MS

    def take(host: _Host) -> list[int]:
        seen = []
        for pic in (first, second):
            host.write(pic, poll)
            seen += host.read(pic)
            host.write(pic, end)
        return seen

    def look(host: _Host) -> list[int]:
        host.vm.platform.bus.advance()  # as a CPU does
        seen = [number for _ in range(4) for number in take(host)]
        host.vm.type_console(b"b")  # no edge: the line is high still
        seen += take(host) + host.read(CONSOLE_PORT, CONSOLE_PORT)
        host.vm.type_console(b"c")
        return seen + take(host) + take(host)

    pcs = replace(lab, make_vm=lambda config: lab.make_vm(replace(config, machine=MachineModel.PC)))
    with _two_hosts(pcs) as (here, there):
        for pic, words in ((first, (0x30, 4, 1, 0)), (second, (0x38, 2, 1, 0))):
            here.write(pic, 0x11)
            here.write(pic + 1, *words)
        here.write(CONSOLE_PORT + 4, 8)
        here.write(CONSOLE_PORT + 1, 1)
        here.write(0x43, mode_0)
        here.write(0x40, 0, 1)
        here.write(RTC_PORT, 0x0B)
        here.write(RTC_PORT + 1, 0x12)  # interrupt at the end of each second
        here.vm.type_console(b"a")
        here.later(timer_due)
        there.vm.load_state(here.vm.save_state())
        for host in (here, there):
            host.later(_S)
        _require_same(here, there, "interrupts", look)


def time_stamps_move(lab: Lab) -> None:
    """A vCPU's time-stamp counter goes on from where it was, forwards, and not by more than a load may take."""
    with _two_hosts(lab) as (here, there):
        saved = here.vm.save_state()
        there.vm.load_state(saved)
        for before, after in zip(saved.vcpus, there.vm.save_state().vcpus, strict=True):
            went_on = after.tsc - before.tsc
            require(0 <= went_on < TSC_JUMP // 2, f"the time-stamp counter goes on by {went_on}")


def dma_moves(lab: Lab) -> None:
    """The DMA engine's registers are the same elsewhere."""
    base = DMA_MMIO

    def look(host: _Host) -> list[int]:
        return [host.vm.platform.bus.mmio_read(base + at, 4) for at in range(0, 0x38, 4)]

    with _two_hosts(lab) as (here, there):
        for at, value in ((0x00, 0x14_0000), (0x08, 0x15_0000), (0x10, 64), (0x18, 0x16_0000), (0x20, 0xABCD)):
            here.vm.platform.bus.mmio_write(base + at, 8, value)
        here.vm.platform.bus.mmio_write(base + 0x28, 4, 1)
        there.vm.load_state(here.vm.save_state())
        _require_same(here, there, "dma", look)


CHECKS: tuple[Check, ...] = tuple(
    check_of(None, function)
    for function in (console_moves, guest_time_moves, wall_clock_moves, interrupts_move, time_stamps_move, dma_moves)
)
