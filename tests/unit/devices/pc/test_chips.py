"""The chips of a PC in software, on the bus: lines, vectors, time, and one state that both machines have."""

import struct

import pytest

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.state import DeviceState
from pageferry.devices.bus import DeviceBus
from pageferry.devices.clock import Clock
from pageferry.devices.pc.chips import PcChips
from pageferry.devices.uart import CONSOLE_PORT, Uart

BASE = 0x30
IER, IIR, MCR = CONSOLE_PORT + 1, CONSOLE_PORT + 2, CONSOLE_PORT + 4


class Pc:
    def __init__(self, now_ns=0):
        self.now_ns = now_ns
        self.bus = DeviceBus()
        self.uart = Uart(self.bus.lines.line(4))
        clock = Clock(lambda: self.now_ns)
        self.bus.add(self.uart, clock)
        self.chips = PcChips(self.bus, clock)

    def start(self):
        for port, words in ((0x20, (0x11, BASE, 4, 1, 0)), (0xA0, (0x11, BASE + 8, 2, 1, 0))):
            for at, word in enumerate(words):
                self.bus.port_write(port + bool(at), 1, word)
        return self

    def take(self):
        if not self.chips.pending:
            return None
        irq = self.chips.acknowledge() - BASE
        self.bus.port_write(0x20, 1, 0x20)
        return irq


@pytest.fixture
def pc():
    return Pc().start()


def test_the_console_interrupts_when_it_is_connected(pc):
    raised = []
    pc.chips.on_raise = lambda: raised.append(pc.chips.pending)
    pc.bus.port_write(IER, 1, 1)
    pc.uart.type(b"a")
    assert pc.take() is None, "OUT2 is off"
    pc.bus.port_write(MCR, 1, 8)
    assert (raised, pc.take(), pc.take()) == ([True], 4, None)
    pc.uart.type(b"b")
    assert pc.take() is None, "the line is still high"
    assert pc.bus.port_read(CONSOLE_PORT, 1) == ord("a")
    assert pc.take() == 4, "the next byte came from the line"


def test_each_byte_sent_is_an_edge(pc):
    pc.bus.port_write(MCR, 1, 8)
    pc.bus.port_write(IER, 1, 2)
    assert pc.take() == 4
    pc.bus.port_write(CONSOLE_PORT, 1, ord("x"))
    assert pc.take() == 4
    assert pc.bus.port_read(IIR, 1) == 2
    assert pc.take() is None


def test_loopback_takes_the_interrupt_from_the_bus(pc):
    pc.bus.port_write(MCR, 1, 0x18)
    pc.bus.port_write(IER, 1, 2)
    assert pc.take() is None


def test_the_timer_ticks_while_the_guest_looks(pc):
    assert pc.bus.due_in_ns() is None
    for port, byte in ((0x43, 0x34), (0x40, 0), (0x40, 0x10)):
        pc.bus.port_write(port, 1, byte)
    due_in_ns = pc.bus.due_in_ns()
    pc.now_ns += due_in_ns - 1
    pc.bus.advance()
    assert pc.take() is None
    pc.now_ns += 1
    pc.bus.advance()
    assert (pc.take(), pc.take()) == (0, None)
    assert pc.bus.port_read(0x61, 1) & 3 == 0


def test_what_is_due_or_requested_at_the_save_arrives(pc):
    for port, byte in ((0x43, 0x30), (0x40, 0), (0x40, 1), (0x4D0, 0x20), (MCR, 8), (IER, 1)):
        pc.bus.port_write(port, 1, byte)
    pc.uart.type(b"a")
    pc.now_ns += 10**9  # the timer is due, and was not looked at
    there = Pc(7)
    there.bus.load(pc.bus.save())
    assert there.chips.pending
    assert [there.take() for _ in range(3)] == [0, 4, None]
    assert there.bus.port_read(CONSOLE_PORT, 1) == ord("a")
    there.uart.type(b"b")
    assert there.take() == 4, "the line fell and rose again"


def test_a_line_that_moved_is_low_when_its_device_is(pc):
    """A machine that is loaded anew forgets what its devices drove before."""
    there = Pc().start()
    there.bus.port_write(MCR, 1, 8)
    there.bus.port_write(IER, 1, 1)
    there.uart.type(b"a")
    assert there.take() == 4
    there.bus.load(pc.bus.save())
    assert there.bus.port_read(0x20, 1) == 0
    there.bus.port_write(MCR, 1, 8)
    there.bus.port_write(IER, 1, 1)
    there.uart.type(b"a")
    assert there.take() == 4


def ioapic(*, inputs=0, last_entry=0x10000):
    return struct.pack("<Q4I24Q", 0xFEC0_0000, 0, 0, inputs, 0, *[0x10000] * 23, last_entry)


def test_an_ioapic_that_was_not_used_is_accepted(pc):
    *others, ours = pc.bus.save()
    assert ours == DeviceState(name="ioapic", data=ioapic())
    pc.bus.load([*others, DeviceState(name="ioapic", data=ioapic(inputs=0x10))])
    with pytest.raises(UnsupportedError, match="the guest uses its IOAPIC") as caught:
        pc.bus.load([*others, DeviceState(name="ioapic", data=ioapic(last_entry=0x31))])
    assert caught.value.capability == "ioapic"
    with pytest.raises(VmError, match="0 bytes"):
        pc.bus.load([*others, DeviceState(name="ioapic", data=b"")])
