"""The 16550, register by register: what the data sheet says, and what this line is."""

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.core.errors import VmError
from pageferry.devices.uart import FIFO_BYTES, LINE_BYTES, Uart

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
FCR = IIR
NONE, LINE_STATUS, DATA_READY, TIMEOUT, THR_EMPTY, MODEM = 0x01, 0x06, 0x04, 0x0C, 0x02, 0x00
LOOPBACK = 0x10


@pytest.fixture
def uart():
    return Uart(lambda level: None)


def put(uart, register, value):
    assert uart.write(register, 1, value) is None


def get(uart, register):
    return uart.read(register, 1)


def received(uart):
    data = bytearray()
    while get(uart, LSR) & 1:
        data.append(get(uart, DATA))
    return bytes(data)


def test_registers_after_reset(uart):
    assert [get(uart, register) for register in range(8)] == [0, 0, NONE, 0, 0, 0x60, 0xB0, 0]


def test_bytes_go_out_at_once_and_the_transmitter_is_always_empty(uart):
    sent = []
    uart.sink = sent.append
    for byte in b"hi\0\xff":
        put(uart, DATA, byte)
        assert get(uart, LSR) == 0x60
    assert sent == [b"h", b"i", b"\0", b"\xff"]
    uart.sink = None
    put(uart, DATA, 1)


@pytest.mark.parametrize(("register", "kept"), [(IER, 0x0F), (LCR, 0x7F), (MCR, 0x1F), (SCR, 0xFF)])
def test_registers_keep_the_bits_that_exist(uart, register, kept):
    for value in (0x55, 0xAA, 0x7F, 0xFF & (kept | 0x60)):
        put(uart, register, value & ~0x80 if register == LCR else value)
        assert get(uart, register) == value & kept


def test_status_registers_ignore_writes(uart):
    for register in (LSR, MSR):
        put(uart, register, 0xFF)
    assert (get(uart, LSR), get(uart, MSR)) == (0x60, 0xB0)


def test_the_divisor_is_behind_dlab(uart):
    sent = []
    uart.sink = sent.append
    uart.type(b"x")
    put(uart, IER, 5)
    put(uart, LCR, 0x83)
    assert (get(uart, DATA), get(uart, IER)) == (12, 0)  # 9600 baud
    put(uart, DATA, 0x34)
    put(uart, IER, 0x12)
    assert (get(uart, DATA), get(uart, IER), get(uart, LCR)) == (0x34, 0x12, 0x83)
    assert not sent
    put(uart, LCR, 0x03)
    assert (get(uart, IER), get(uart, DATA)) == (5, ord("x"))


def test_wide_accesses_are_accesses_of_each_byte(uart):
    sent = []
    uart.sink = sent.append
    uart.write(DATA, 2, 0x0741)
    assert (sent, get(uart, IER)) == ([b"A"], 7)
    assert uart.read(LCR, 4) == 0xB0600000
    uart.write(SCR, 4, 0xAABBCC99)
    assert uart.read(SCR, 2) == 0xFF99
    uart.write(LCR, 2, 0x0313)
    assert (get(uart, LCR), get(uart, MCR)) == (0x13, 3)


def test_without_fifos_one_byte_is_held_and_the_rest_waits_on_the_line(uart):
    assert uart.type(b"abc") == 3
    assert get(uart, LSR) == 0x61
    assert received(uart) == b"abc"
    assert get(uart, LSR) == 0x60
    assert get(uart, DATA) == 0


def test_the_line_refuses_what_finds_no_room(uart):
    put(uart, FCR, 1)
    assert uart.type(bytes(LINE_BYTES + 5)) == LINE_BYTES
    assert uart.type(bytes(100)) == FIFO_BYTES  # the receiver took so many off the line
    assert uart.type(b"x") == 0
    get(uart, DATA)
    assert uart.type(b"xy") == 1
    assert not get(uart, LSR) & 2
    assert received(uart) == bytes(LINE_BYTES + FIFO_BYTES - 1) + b"x"


def test_switching_fifos_and_clearing_the_receiver_lose_what_it_holds_not_the_line(uart):
    uart.type(b"abc")
    put(uart, FCR, 1)
    assert received(uart) == b"bc"
    uart.type(b"0123456789abcdef")
    uart.type(b"line")
    put(uart, FCR, 0xC2)  # not programmed without bit 0, which is a switch by itself
    assert get(uart, IIR) == NONE
    assert received(uart) == b"line"
    put(uart, FCR, 1)
    uart.type(b"old")
    put(uart, FCR, 5)  # the transmitter's alone
    assert get(uart, LSR) & 1
    put(uart, FCR, 3)
    assert received(uart) == b""


def test_loopback_is_a_wire_from_transmitter_to_receiver(uart):
    sent = []
    uart.sink = sent.append
    put(uart, FCR, 1)
    put(uart, MCR, LOOPBACK)
    uart.type(b"waits")
    for byte in b"0123456789abcdef":
        put(uart, DATA, byte)
    assert get(uart, LSR) == 0x61
    put(uart, DATA, ord("!"))  # the 17th is lost
    assert get(uart, LSR) == 0x63
    assert get(uart, LSR) == 0x61
    assert received(uart) == b"0123456789abcdef"
    put(uart, MCR, 0)
    assert received(uart) == b"waits"
    assert not sent


def test_an_overrun_without_fifos_replaces_the_byte(uart):
    put(uart, MCR, LOOPBACK)
    put(uart, DATA, 1)
    put(uart, DATA, 2)
    assert get(uart, LSR) == 0x63
    assert received(uart) == b"\2"


@pytest.mark.parametrize(("output", "status"), [(1, 0x20), (2, 0x10), (4, 0x40), (8, 0x80)])
def test_modem_outputs_are_modem_inputs_in_loopback(uart, output, status):
    put(uart, MCR, LOOPBACK)
    assert get(uart, MSR) == 0x0B  # DCD, DSR and CTS went off
    assert get(uart, MSR) == 0
    put(uart, MCR, LOOPBACK | output)
    change = status >> 4
    assert get(uart, MSR) == status | (change if output != 4 else 0)
    put(uart, MCR, LOOPBACK)
    assert get(uart, MSR) == change  # of the ring indicator this is the edge that counts
    put(uart, MCR, 0)
    assert get(uart, MSR) == 0xBB


def test_interrupts_are_told_by_priority_and_only_when_enabled(uart):
    put(uart, MCR, LOOPBACK)
    put(uart, DATA, 1)
    put(uart, DATA, 2)
    assert get(uart, IIR) == NONE
    put(uart, IER, 0x0F)
    assert get(uart, IIR) == LINE_STATUS
    get(uart, LSR)
    assert get(uart, IIR) == DATA_READY
    get(uart, DATA)
    assert get(uart, IIR) == THR_EMPTY
    assert get(uart, IIR) == MODEM  # reading it took the transmitter's back
    get(uart, MSR)
    assert get(uart, IIR) == NONE
    put(uart, DATA, 3)
    get(uart, DATA)
    assert get(uart, IIR) == THR_EMPTY


def test_enabling_the_transmitter_interrupt_makes_it_pending_as_it_is_empty(uart):
    put(uart, IER, 2)
    assert (get(uart, IIR), get(uart, IIR)) == (THR_EMPTY, NONE)
    put(uart, IER, 2)
    assert get(uart, IIR) == NONE
    put(uart, IER, 0)
    put(uart, IER, 2)
    assert get(uart, IIR) == THR_EMPTY


@pytest.mark.parametrize(("trigger", "level"), [(0, 1), (1, 4), (2, 8), (3, 14)])
def test_the_trigger_level_separates_data_from_a_timeout(uart, trigger, level):
    put(uart, FCR, 1 | trigger << 6)
    put(uart, IER, 1)
    assert get(uart, IIR) == 0xC0 | NONE
    for count in range(1, FIFO_BYTES + 1):
        uart.type(b"x")
        assert get(uart, IIR) == 0xC0 | (DATA_READY if count >= level else TIMEOUT)


@st.composite
def actions(draw):
    kind = draw(st.sampled_from(["type", "read", "clear", "fifos", "move"]))
    return kind, draw(st.binary(max_size=40)) if kind == "type" else draw(st.booleans())


@given(st.lists(actions(), max_size=60))
def test_the_receiver_is_a_queue_whatever_happens(steps):
    uart, fifo, line, fifos = Uart(lambda level: None), deque(), deque(), False
    for kind, value in steps:
        if kind == "type":
            assert uart.type(value) == len(value)
            line.extend(value)
        elif kind == "read":
            assert get(uart, LSR) & 1 == bool(fifo)
            assert get(uart, DATA) == (fifo.popleft() if fifo else 0)
        elif kind == "clear":
            put(uart, FCR, fifos | 2)
            fifo.clear() if fifos else None
        elif kind == "fifos":
            put(uart, FCR, value)
            fifo.clear() if value != fifos else None
            fifos = value
        else:
            uart, old = Uart(lambda level: None), uart
            uart.load(old.save())
            assert uart.save() == old.save()
        while line and len(fifo) < (FIFO_BYTES if fifos else 1):
            fifo.append(line.popleft())
    assert received(uart) == bytes(fifo) + bytes(line)


def test_everything_is_saved(uart):
    put(uart, LCR, 0x83)
    put(uart, DATA, 0x34)
    put(uart, IER, 0x12)
    put(uart, LCR, 0x1B)
    put(uart, SCR, 0x77)
    put(uart, FCR, 0x81)
    put(uart, MCR, LOOPBACK | 3)
    put(uart, IER, 0x0F)
    for byte in range(18):
        put(uart, DATA, byte)
    uart.type(b"later")
    other = Uart(lambda level: None)
    other.load(uart.save())
    for one in (uart, other):
        assert get(one, IIR) == 0xC0 | LINE_STATUS
        assert [get(one, register) for register in (IER, LCR, MCR, LSR, MSR, SCR)] == [15, 0x1B, 0x13, 0x63, 0x38, 0x77]
        assert received(one) == bytes(range(16))
        assert get(one, IIR) == 0xC0 | THR_EMPTY
        put(one, MCR, 0)
        put(one, LCR, 0x80)
        assert one.read(DATA, 2) == 0x1234
        put(one, LCR, 0)
        assert received(one) == b"later"


def broken(state, at, value):
    return state[:at] + bytes([value]) + state[at + 1 :]


@pytest.mark.parametrize(
    ("at", "value"),
    [(0, 0x10), (1, 0x02), (1, 0x80), (3, 0x20), (5, 2), (6, 0x10), (7, 2), (10, 2), (12, 9), (13, 0x80)],
)
def test_a_state_that_no_uart_has_is_refused(uart, at, value):
    uart.type(b"ab")
    good = uart.save()
    uart.load(good)
    for bad in (broken(good, at, value), good[:10], good[:-1], good + b"x"):
        with pytest.raises(VmError, match="device console"):
            uart.load(bad)
    assert uart.save() == good


def test_more_than_a_receiver_or_a_line_holds_is_refused(uart):
    put(uart, FCR, 1)
    uart.type(bytes(FIFO_BYTES + LINE_BYTES))
    uart.type(bytes(FIFO_BYTES))
    good = uart.save()
    assert len(good) == 14 + FIFO_BYTES + LINE_BYTES
    for fcr, held, waiting in ((1, 17, 4096), (1, 16, 4097), (0, 2, 0)):
        head = broken(good, 1, fcr)[:10] + held.to_bytes(2, "little") + waiting.to_bytes(2, "little")
        with pytest.raises(VmError, match="cannot have"):
            Uart(lambda level: None).load(head + bytes(held + waiting))
