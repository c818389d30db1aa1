"""The pair of 8259A as its data sheet has it, driven as a guest and a CPU drive it."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.core.errors import VmError
from pageferry.devices.pc.pic import PicPair

FIRST, SECOND = 0x20, 0x28
EOI, AUTO_ROTATE = 0x20, 0x80
READ_IRR, READ_ISR, POLL, SPECIAL_MASK, NO_SPECIAL_MASK = 0x0A, 0x0B, 0x0C, 0x68, 0x48
AUTO_EOI, SPECIAL_FULLY_NESTED = 0x02, 0x10


class Pc:
    """A pair, initialised as an operating system does it, with nothing masked."""

    def __init__(self, icw4=0):
        self.pics = PicPair()
        self.raised = 0
        self.pics.on_raise = self.count
        for index, base in enumerate((FIRST, SECOND)):
            self.command(index, 0x11)
            for word in (base, 2 if index else 4, 1 | icw4):
                self.mask(index, word)
            self.mask(index, 0)

    def count(self):
        self.raised += 1

    def command(self, index, byte):
        self.pics.chips[index].write(0, 1, byte)

    def mask(self, index, byte):
        self.pics.chips[index].write(1, 1, byte)

    def read(self, index, what):
        self.command(index, what)
        return self.pics.chips[index].read(0, 1)

    def pulse(self, *irqs):
        for irq in irqs:
            self.pics.set_line(irq, True)
            self.pics.set_line(irq, False)

    def take(self):
        """Return the IRQ that the CPU gets, None if it is not interrupted."""
        return self.pics.acknowledge() - FIRST if self.pics.pending else None

    def end(self, irq):
        if irq >= 8:
            self.command(1, EOI)
        self.command(0, EOI)

    def states(self):
        return [chip.save() for chip in self.pics.chips]

    def load(self, states):
        for chip, state in zip(self.pics.chips, states, strict=True):
            chip.load(state)


@pytest.fixture
def pc():
    return Pc()


def test_an_edge_interrupts_once(pc):
    pc.pics.set_line(4, True)
    assert (pc.raised, pc.take()) == (1, 4)
    assert pc.take() is None
    pc.end(4)
    assert pc.take() is None
    pc.pics.set_line(4, True)
    assert pc.take() is None
    pc.pulse(4)
    assert pc.take() is None, "the line was high all the time"
    pc.pulse(4)
    assert pc.take() == 4


def test_a_level_interrupts_as_long_as_it_is_high(pc):
    pc.pics.elcr.write(0, 2, 0x0C00)
    assert pc.pics.elcr.read(0, 2) == 0x0C00
    pc.pics.set_line(10, True)
    for _ in range(2):
        assert pc.take() == 10
        assert pc.take() is None
        pc.end(10)
    pc.pics.set_line(10, False)
    assert pc.take() is None


def test_pcis_inputs_are_level_triggered_from_the_beginning(pc):
    assert pc.pics.elcr.read(0, 2) == 0x0C00


def test_edges_that_must_be_edges_stay_so(pc):
    pc.pics.elcr.write(0, 2, 0xFFFF)
    assert pc.pics.elcr.read(0, 2) == 0xDEF8


def test_an_input_that_becomes_level_triggered_asks_what_its_line_says(pc):
    pc.pics.elcr.write(1, 1, 0)
    pc.pics.set_line(11, True)
    pc.pulse(10)
    assert (pc.take(), pc.end(10)) == (10, None)
    assert (pc.take(), pc.end(11)) == (11, None)
    pc.pics.elcr.write(1, 1, 0x0C)
    assert (pc.take(), pc.end(11)) == (11, None)
    pc.pics.set_line(11, False)
    assert pc.take() is None


def test_priorities_and_nesting(pc):
    pc.pulse(5, 3, 14, 9, 0)
    taken = []
    while (irq := pc.take()) is not None:
        taken.append(irq)
        pc.end(irq)
    assert taken == [0, 9, 14, 3, 5]
    pc.pulse(5)
    assert pc.take() == 5
    pc.pulse(6, 3)
    assert pc.take() == 3, "the higher comes at once"
    assert pc.take() is None
    pc.end(3)
    assert pc.take() is None, "the lower waits for the end of 5"
    pc.end(5)
    assert pc.take() == 6


def test_the_mask_holds_and_does_not_lose(pc):
    pc.mask(0, 0x10)
    pc.pulse(4)
    assert pc.take() is None
    assert pc.read(0, READ_IRR) == 0x10
    pc.mask(0, 0)
    assert pc.take() == 4
    assert (pc.read(0, READ_IRR), pc.read(0, READ_ISR), pc.pics.chips[0].read(1, 1)) == (0, 0x10, 0)


def test_the_second_chip_interrupts_through_the_first(pc):
    pc.pulse(8)
    assert (pc.read(0, READ_IRR), pc.read(1, READ_IRR)) == (4, 1)
    assert pc.pics.acknowledge() == SECOND
    assert (pc.read(0, READ_ISR), pc.read(1, READ_ISR)) == (4, 1)
    pc.pulse(15)
    pc.command(1, EOI)
    pc.command(0, EOI)
    assert pc.take() == 15


def test_the_second_chip_asks_again_for_what_is_left(pc):
    """In automatic EOI nothing is in service that would hold off the rest until its end."""
    pc = Pc(AUTO_EOI)
    pc.pulse(12, 9, 15)
    assert [pc.take() for _ in range(4)] == [9, 12, 15, None]


def test_what_is_withdrawn_is_spurious(pc):
    pc.pics.elcr.write(0, 2, 0x0808)
    for irq in (3, 11):
        pc.pics.set_line(irq, True)
        assert pc.pics.pending
        pc.pics.set_line(irq, False)
        assert not pc.pics.pending
        assert pc.pics.acknowledge() == FIRST + 7
        assert (pc.read(0, READ_ISR), pc.read(1, READ_ISR)) == (0, 0)


def test_a_request_that_only_the_first_chip_remembers_is_spurious(pc):
    """KVM's pair keeps it when a level of the second chip falls, and such a state may come here."""
    states = pc.states()
    pc.load([states[0][:1] + b"\x04" + states[0][2:], states[1]])
    assert pc.pics.acknowledge() == SECOND + 7
    assert (pc.read(0, READ_ISR), pc.read(1, READ_ISR)) == (4, 0)


@pytest.mark.parametrize(
    ("commands", "order"),
    [
        ((), [0, 1, 3, 4, 5, 6, 7]),
        ((0xC3,), [4, 5, 6, 7, 0, 1, 3]),
        ((0xC7,), [0, 1, 3, 4, 5, 6, 7]),
        ((0x40,), [0, 1, 3, 4, 5, 6, 7]),
    ],
)
def test_priorities_turn(pc, commands, order):
    for command in commands:
        pc.command(0, command)
    pc.pulse(*order)
    taken = []
    while (irq := pc.take()) is not None:
        taken.append(irq)
        pc.command(0, EOI)
    assert taken == order


def test_rotation_at_the_end_of_an_interrupt(pc):
    pc.pulse(4)
    assert pc.take() == 4
    pc.command(0, 0xA0)  # rotate on non-specific EOI
    pc.pulse(3, 5)
    assert pc.take() == 5
    pc.command(0, 0xE5)  # rotate on specific EOI of 5
    pc.pulse(6)
    assert pc.take() == 6
    pc.command(0, 0x66)  # specific EOI of 6, no rotation
    assert pc.take() == 3


def test_automatic_rotation():
    pc = Pc(AUTO_EOI)
    pc.command(0, AUTO_ROTATE)
    pc.pulse(4)
    assert (pc.take(), pc.read(0, READ_ISR)) == (4, 0)
    pc.pulse(3, 5)
    assert [pc.take(), pc.take()] == [5, 3]
    pc.command(0, 0)
    pc.pulse(4)
    assert pc.take() == 4
    pc.pulse(3, 4)
    assert [pc.take(), pc.take()] == [4, 3], "3 is the lowest still"


def test_special_mask_mode_lets_lower_ones_in(pc):
    pc.pulse(3)
    assert pc.take() == 3
    pc.pulse(6)
    pc.mask(0, 0x08)
    assert pc.take() is None
    pc.command(0, SPECIAL_MASK)
    assert pc.take() == 6
    pc.command(0, EOI)
    assert pc.read(0, READ_ISR) == 0x08, "what is masked does not end by a non-specific EOI"
    pc.command(0, 0x63)
    assert pc.read(0, READ_ISR) == 0
    pc.pulse(4)
    assert pc.take() == 4
    pc.command(0, NO_SPECIAL_MASK)
    pc.mask(0, 0x10)
    pc.pulse(5)
    assert pc.take() is None


def test_special_fully_nested_mode_lets_the_second_chip_nest():
    for icw4, taken in ((0, None), (SPECIAL_FULLY_NESTED, 9)):
        pc = Pc(icw4)
        pc.pulse(12)
        assert pc.take() == 12
        pc.pulse(9)
        assert pc.take() == taken
        pc.pulse(3)
        assert pc.take() is None


def test_a_poll_takes_the_interrupt(pc):
    pc.pulse(5)
    pc.command(0, POLL)
    assert pc.pics.chips[0].read(0, 1) == 0x85
    assert (pc.pics.pending, pc.read(0, READ_ISR)) == (False, 0x20)
    pc.command(0, POLL)
    assert pc.pics.chips[0].read(1, 1) == 0, "none that is above the one in service"
    assert pc.pics.chips[0].read(1, 1) == 0, "the mask: one poll is one read"


def test_initialisation_forgets_edges_and_masks_nothing(pc):
    pc.pics.elcr.write(0, 1, 0x20)
    pc.mask(0, 0xFF)
    pc.pics.set_line(4, True)
    pc.pics.set_line(5, True)
    pc.command(0, READ_ISR)
    pc.command(0, 0x10)  # without ICW4
    assert pc.pics.chips[0].read(0, 1) == 0x20, "IRR, of the level only"
    pc.mask(0, 0x47)
    pc.mask(0, 4)
    pc.mask(0, 0)
    assert pc.pics.acknowledge() == 0x45, "the base's low bits are the input's number"
    pc.pics.set_line(4, False)
    pc.pics.set_line(4, True)
    assert pc.pics.acknowledge() == 0x44


def test_wide_accesses_are_bytes(pc):
    pc.pics.chips[0].write(0, 2, 0xFB0A)
    assert pc.pics.chips[0].read(1, 1) == 0xFB
    assert pc.pics.chips[0].read(0, 2) == 0xFB00
    assert pc.pics.chips[0].read(1, 4) == 0xFFFF_FFFB


def test_the_state_is_kvms_structure(pc):
    pc.pics.elcr.write(0, 2, 0x0CE0)
    pc.pics.set_line(4, True)
    pc.pics.set_line(10, True)
    pc.mask(1, 0x80)
    assert pc.take() == 10
    fields = [struct.unpack("<16B", state) for state in pc.states()]
    assert fields[0] == (0x10, 0x10, 0, 4, 0, FIRST, 0, 0, 0, 0, 0, 0, 0, 1, 0xE0, 0xF8)
    assert fields[1] == (0x04, 0x04, 0x80, 4, 0, SECOND, 0, 0, 0, 0, 0, 0, 0, 1, 0x0C, 0xDE)


@pytest.mark.parametrize(
    "change", [{4: 8}, {5: 1}, {6: 2}, {7: 2}, {8: 2}, {9: 4}, {10: 2}, {11: 2}, {12: 2}, {13: 2}, {14: 1}, {15: 0}]
)
def test_a_state_that_cannot_be_is_refused(pc, change):
    state = bytearray(pc.states()[0])
    for at, value in change.items():
        state[at] = value
    with pytest.raises(VmError, match="device pic0 has registers that it cannot have"):
        pc.pics.chips[0].load(bytes(state))
    with pytest.raises(VmError, match="15 bytes, not 16"):
        pc.pics.chips[0].load(bytes(15))


STEPS = st.one_of(
    st.tuples(st.just("line"), st.sampled_from([irq for irq in range(16) if irq != 2]), st.booleans()),
    st.tuples(st.just("port"), st.sampled_from([(0, 0), (0, 1), (1, 0), (1, 1)]), st.integers(0, 255)),
    st.tuples(st.just("elcr"), st.integers(0, 1), st.integers(0, 255)),
    st.tuples(st.just("take"), st.none(), st.none()),
)


def do(pc, step):
    kind, where, what = step
    if kind == "line":
        pc.pics.set_line(where, what)
    elif kind == "port":
        pc.pics.chips[where[0]].write(where[1], 1, what)
    elif kind == "elcr":
        pc.pics.elcr.write(where, 1, what)
    elif pc.pics.pending:
        return pc.pics.acknowledge()
    return pc.pics.pending, [chip.read(at, 1) for chip in pc.pics.chips for at in (0, 1)]


@given(before=st.lists(STEPS, max_size=30), after=st.lists(STEPS, max_size=30))
def test_a_pair_that_moves_goes_on_as_if_it_had_not(before, after):
    here, there = Pc(), Pc(AUTO_EOI)
    for step in before:
        do(here, step)
    there.load(here.states())
    assert there.pics.pending == here.pics.pending
    assert [do(here, step) for step in after] == [do(there, step) for step in after]
