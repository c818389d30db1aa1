"""The second reading finds every page that is not in the file as it is in memory, and no other."""

import numpy as np
import pytest

from pageferry.core.memory import GuestMemory
from pageferry.engine.image.outlet import FileOutlet
from pageferry.stream.encoder import Encoder
from pageferry.stream.records import StaticDataEnd
from pageferry.xen.missed import PlacedCoder, missed_pages

PAGES = 600


@pytest.fixture
def written(tmp_path):
    """Memory of random content, and a file behind an odd beginning with all of it but frame 7; frame 9 twice."""
    memory = GuestMemory.linear(PAGES << 12)
    memory.write(0, np.random.default_rng(1).bytes(PAGES << 12))
    file, encoder = FileOutlet(tmp_path / "file"), Encoder()
    file.send([b"odd", encoder.header(), encoder.record(StaticDataEnd())])
    coder = PlacedCoder(memory, encoder, file)
    gfns = np.arange(PAGES, dtype=np.uint64)
    file.send(coder.code(gfns[gfns != 7], fresh=True).buffers)
    memory.write(9 << 12, b"changed")
    file.send(coder.code(gfns[9:10], fresh=False).buffers)
    yield memory, coder, file
    file.close()


def found(memory, coder, file):
    return missed_pages(memory, coder.places, file.fileno(), file.sent_bytes).tolist()


def test_what_was_never_written_is_missed(written):
    assert found(*written) == [7]


@pytest.mark.parametrize("gfn", [0, 6, 8, 9, 10, 300, PAGES - 1])
@pytest.mark.parametrize("byte", [0, 4095])
def test_one_changed_byte_is_found_wherever_it_is(written, gfn, byte):
    memory = written[0]
    (before,) = memory.read((gfn << 12) + byte, 1)
    memory.write((gfn << 12) + byte, bytes([before ^ 1]))
    assert found(*written) == sorted({7, gfn})


def test_what_is_no_memory_any_more_is_not_looked_at(written):
    memory = written[0]
    memory.write(300 << 12, b"gone")
    memory.remove(np.array([7, 300], np.uint64))
    assert found(*written) == []


def test_frames_that_came_later_are_missed(written):
    memory, coder, file = written
    later = GuestMemory.linear((PAGES + 2) << 12)
    later.write(0, memory.read(0, PAGES << 12))
    assert found(later, coder, file) == [7, PAGES, PAGES + 1]
