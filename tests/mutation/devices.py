"""Faults of what devices save and load: uart.py, clock.py, rtc.py, pic.py, pit.py, dma.py; marks are in writers.py."""

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from altered import alter

from mutation.device_checks import TSC_JUMP
from mutation.fault import Faults, Room
from pageferry.core.state import VcpuState
from pageferry.devices import clock, rtc, uart
from pageferry.hypervisor.domain import Domain

fault = Faults(Room.HYPERVISOR)


def _load_then(device: Any, spoil: Callable[[], object]) -> None:
    """Have a device loaded as it should be, and spoiled then."""

    def wrap(sound: Any) -> Any:
        def load(data: bytes) -> None:
            sound(data)
            spoil()

        return load

    alter(device, "load", wrap)


@fault(
    "no bug on record: a device's registers are saved, and not what is in its buffers",
    law=None,
    found_by=("console-moves",),
)
def uart_fifo_not_saved(domain: Domain) -> None:
    """The UART's state has its registers, and no byte that was received and not read."""
    _without(domain.platform.console, "_received")


@fault(
    "no bug on record: input that the device has accepted and not yet shown to the guest belongs to it too",
    law=None,
    found_by=("console-moves",),
)
def uart_line_not_saved(domain: Domain) -> None:
    """The UART's state has what was received, and not the input that waits on the line."""
    _without(domain.platform.console, "_line")


def _without(console: uart.Uart, queue: str) -> None:
    def wrap(sound: Any) -> Any:
        def save() -> bytes:
            kept = list(getattr(console, queue))
            getattr(console, queue).clear()
            state: bytes = sound()
            getattr(console, queue).extend(kept)
            return state

        return save

    alter(console, "save", wrap)


@fault(
    "no bug on record: an interrupt is pending, and no register that can be read says so",
    law=None,
    found_by=("console-moves",),
)
def uart_interrupt_not_loaded(domain: Domain) -> None:
    """A UART that is loaded has no interrupt pending: a guest that waits for one waits for ever."""
    console = domain.platform.console
    _load_then(console, lambda: setattr(console, "_thr_interrupt", False))


@fault(
    "no bug on record: a clock that is the host's own is right until the guest moves",
    law=None,
    found_by=("guest-time-moves",),
)
def guest_time_is_the_hosts(domain: Domain) -> None:
    """Guest time is not loaded: it goes on from what the destination's clock says, back or ahead."""
    alter(domain.platform.clock, "load", lambda _: lambda data: None)
    alter(domain.platform.timer, "load", lambda sound: lambda data: _load_timer_late(domain, sound, data))


def _load_timer_late(domain: Domain, sound: Any, data: bytes) -> None:
    period_us, started_us, seen = clock._TIMER_STATE.unpack(data)
    sound(clock._TIMER_STATE.pack(period_us, min(started_us, domain.platform.clock.now_us()), seen))


@fault(
    "no bug on record: a period is saved, and not how far it has come",
    law=None,
    found_by=("guest-time-moves",),
)
def timer_starts_anew(domain: Domain) -> None:
    """A timer that is loaded begins a new period, and counts from 0."""
    timer = domain.platform.timer
    _load_then(timer, lambda: timer.write(clock._PERIOD_OR_LEFT, 4, timer._period_us))


@fault(
    "no bug on record: what the guest had acknowledged comes once more",
    law=None,
    found_by=("guest-time-moves",),
)
def timer_acknowledgement_forgotten(domain: Domain) -> None:
    """A timer that is loaded does not know which periods the guest has seen end."""
    timer = domain.platform.timer
    _load_then(timer, lambda: setattr(timer, "_seen", 0))


@fault(
    "no bug on record: the time of day in the state is the one at which it was saved",
    law=None,
    found_by=("wall-clock-moves",),
)
def rtc_stands_still_while_moving(domain: Domain) -> None:
    """The wall clock goes on from the time that it was saved at: it is late by the downtime."""
    device = domain.platform.rtc

    def wrap_save(sound: Any) -> Any:
        def save() -> bytes:
            state: bytes = sound()
            return state + struct.pack("<Q", device._real_ns())

        return save

    def wrap_load(sound: Any) -> Any:
        def load(data: bytes) -> None:
            sound(data[:-8])
            (saved_ns,) = struct.unpack("<Q", data[-8:])
            device._offset_s -= (device._real_ns() - saved_ns) // rtc._NS_PER_S

        return load

    alter(device, "save", wrap_save)
    alter(device, "load", wrap_load)


@fault(
    "no bug on record: to have the host's time is not to have the guest's",
    law=None,
    found_by=("wall-clock-moves",),
)
def rtc_shows_the_hosts_time(domain: Domain) -> None:
    """What the guest had set the wall clock to is lost: after the move it shows the host's time."""
    device = domain.platform.rtc
    _load_then(device, lambda: setattr(device, "_offset_s", 0))


def _of_a_pc(domain: Domain, name: str) -> Any:
    """Return a device that only a PC has; None: this is none."""
    return next((device for device in domain.platform.bus.devices if device.name == name), None)


@fault(
    "no bug on record: the interrupt controller is saved, and the timer's tick is put into it then",
    law=None,
    found_by=("interrupts-move",),
)
def tick_lost_at_the_freeze(domain: Domain) -> None:
    """The timer is saved as of now, and its tick that is due by now is given to the interrupt controller afterwards."""
    bus, pit = domain.platform.bus, _of_a_pc(domain, "pit")
    if pit is None:
        return

    def wrap(sound: Any) -> Any:
        def save() -> Any:
            timed, bus.timed = bus.timed, ()
            pit._advanced_ns = pit.now_ns()
            states = sound()
            bus.timed = timed
            bus.advance()
            return states

        return save

    alter(bus, "save", wrap)


@fault(
    "no bug on record: what a controller is asked for lies between a device and a CPU, and is neither's",
    law=None,
    found_by=("interrupts-move",),
)
def requests_not_loaded(domain: Domain) -> None:
    """Interrupts that were requested and not taken before the freeze are not there after it."""
    pic = _of_a_pc(domain, "pic0")
    if pic is not None:
        _load_then(pic, lambda: setattr(pic, "_irr", 0))


@fault(
    "no bug on record: a line's level is a device's, and its edge is made where it leads",
    law=None,
    found_by=("interrupts-move",),
)
def line_not_driven_after_loading(domain: Domain) -> None:
    """A UART that is loaded does not drive its interrupt line before it is used: the next byte is an edge too many."""
    console = domain.platform.console

    def wrap(sound: Any) -> Any:
        def load(data: bytes) -> None:
            line, console._interrupt = console._interrupt, lambda level: None
            sound(data)
            console._interrupt = line

        return load

    alter(console, "load", wrap)


@fault(
    "no bug on record: a counter is restored by its distance from the host's, which is another at each host",
    law=None,
    found_by=("time-stamps-move",),
)
def tsc_jumps(domain: Domain) -> None:
    """The time-stamp counter of a vCPU that is loaded jumps: an operating system that tells the time by it does too."""

    def wrap(sound: Any) -> Any:
        def load(vcpus: tuple[VcpuState, ...], tsc_khz: int | None) -> None:
            sound(tuple(replace(vcpu, tsc=vcpu.tsc + TSC_JUMP) for vcpu in vcpus), tsc_khz)

        return load

    alter(domain, "_load_vcpus", wrap)


@fault(
    "no bug on record: registers of a device that is idle, which a guest sets once and counts on",
    law=None,
    found_by=("dma-moves",),
)
def dma_registers_not_loaded(domain: Domain) -> None:
    """The DMA engine is loaded as new: a guest that set it up before the move finds other registers."""
    alter(domain.platform.dma, "load", lambda _: lambda data: None)
