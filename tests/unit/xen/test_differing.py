"""What differs at the pause from what was sent is found page by page."""

import numpy as np
import pytest

from pageferry.core.errors import VmError
from pageferry.core.memory import GuestMemory
from pageferry.stream.encoder import Encoder
from pageferry.stream.records import StaticDataEnd
from pageferry.xen.missed import DigestedCoder, differing_pages

PAGES = 1500


@pytest.fixture
def memory():
    made = GuestMemory.linear(PAGES << 12)
    made.write(0, np.random.default_rng(1).bytes(PAGES << 12))
    yield made
    made.close()


@pytest.fixture
def coder(memory):
    """All but frame 7 was sent."""
    encoder = Encoder()
    encoder.header()
    encoder.record(StaticDataEnd())
    made = DigestedCoder(memory, encoder)
    gfns = np.arange(PAGES, dtype=np.uint64)
    for part in (gfns[:7], gfns[8:1000], gfns[1000:]):
        made.code(part, fresh=True)
    return made


def test_what_is_sent_is_what_was_digested_whatever_is_written_meanwhile(memory, coder):
    gfns = np.array([3, 4], np.uint64)
    before = memory.read(3 << 12, 2 << 12)
    _, copies = coder.code(gfns, fresh=False).buffers
    memory.write(3 << 12, b"later")
    assert bytes(copies) == before
    assert differing_pages(memory, coder).tolist() == [3, 7]


@pytest.mark.parametrize("gfn", [0, 6, 8, 999, 1000, 1024, PAGES - 1])
def test_one_changed_byte_is_found(memory, coder, gfn):
    (before,) = memory.read((gfn << 12) + 4095, 1)
    memory.write((gfn << 12) + 4095, bytes([before ^ 0x80]))
    assert differing_pages(memory, coder).tolist() == sorted({7, gfn})


def test_what_came_later_was_not_sent_and_what_is_gone_is_not_looked_at(memory, coder):
    later = GuestMemory.linear((PAGES + 1) << 12)
    later.write(0, memory.read(0, PAGES << 12))
    later.remove(np.array([7], np.uint64))
    assert differing_pages(later, coder).tolist() == [PAGES]


def test_a_frame_that_is_gone_is_not_sent(memory, coder):
    memory.remove(np.array([5], np.uint64))
    with pytest.raises(VmError):
        coder.code(np.array([4, 5], np.uint64), fresh=False)
