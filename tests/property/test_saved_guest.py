"""A guest in a file: what of it counts, and every way in which a file can be wrong."""

import contextlib
import functools
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pageferry.core.cpuid import SOFT_CPU
from pageferry.core.errors import RecordError, RemoteStreamError, TruncatedError, UsageError
from pageferry.core.memory import GuestMemory
from pageferry.core.state import MachineState, reset_state
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.stream.encoder import Encoder
from pageferry.stream.format import BodyError, PageType, carries_data
from pageferry.stream.hvm_context import encode_machine_state
from pageferry.stream.page_index import GONE, UNNAMED, ZERO, PageIndex
from pageferry.stream.records import (
    CpuidPolicy,
    End,
    HvmContext,
    HvmParams,
    PageDataHeader,
    StaticDataEnd,
    TscInfo,
)

PAGES = 512  # 2 MiB, the smallest guest
STATE = MachineState(vcpus=(reset_state(),), devices=())


def page(number):
    return bytes([number & 0xFF or 1]) * 4096


def stream(*records, cpuid=SOFT_CPU, pages=PAGES, context=None):
    """The bytes of a stream: its RAM named, then ``records`` of (pfns, types, contents); and where records begin."""
    encoder = Encoder()
    pieces, starts = [encoder.header()], []

    def add(data, *payload):
        starts.append(sum(map(len, pieces)))
        pieces.extend((data, *payload))

    if cpuid:
        add(encoder.record(CpuidPolicy(leaves=cpuid)))
    add(encoder.record(StaticDataEnd()))
    everything = np.arange(pages, dtype=np.uint64)
    for pfns, types, contents in ((everything, np.full(pages, PageType.XALLOC, np.uint8), ()), *records):
        if len(pfns):
            add(encoder.page_data(np.array(pfns, np.uint64), np.array(types, np.uint8)), *contents)
    context = encode_machine_state(STATE) if context is None else context
    for record in (TscInfo(), HvmParams(), HvmContext(data=context), End()):
        add(encoder.record(record))
    return b"".join(pieces), starts


@contextlib.contextmanager
def opened(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "guest.bin"
        path.write_bytes(data)
        with SavedGuest(path) as saved:
            yield saved


def contents_of(saved):
    memory = GuestMemory.linear(saved.config.memory_bytes)
    saved.load(memory, saved.data_pages)
    return memory


TWO = ([3, 5, 4], [0, 0, 0], [page(3), page(5), page(4)]), ([5, 9], [0, 0], [page(50), page(9)])


def test_the_last_content_of_each_page_counts():
    with opened(stream(*TWO)[0]) as saved:
        assert saved.config.memory_bytes == PAGES << 12
        assert saved.config.cpus == 1
        assert saved.config.cpu == SOFT_CPU
        assert saved.state == STATE
        assert saved.data_pages.tolist() == [3, 4, 5, 9]
        memory = contents_of(saved)
    for gfn, number in ((3, 3), (4, 4), (5, 50), (9, 9)):
        assert memory.read(gfn << 12, 4096) == page(number)
    assert not any(memory.read(6 << 12, 3 * 4096))


mentions = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from([0x0, 0x0, 0xE, 0xF])), min_size=1, max_size=8), max_size=6
)


@given(mentions)
@example([[(1, 0), (1, 0xE), (1, 0xF), (1, 0xE)], [(1, 0xE), (1, 0)], [(12, 0), (1, 0xE)]])
def test_the_index_says_what_one_mention_after_another_says(records):
    index, expected, at = PageIndex(12), {}, 40
    for record in records:
        pfns = np.array([pfn for pfn, _ in record], np.uint64)
        types = np.array([kind for _, kind in record], np.uint8)
        payload_bytes = 4096 * int(np.count_nonzero(carries_data(types)))
        index.note(PageDataHeader(pfns=pfns, types=types, payload_bytes=payload_bytes, offset=at), at)
        for pfn, kind in record:
            if kind == PageType.NOTAB:
                expected[pfn] = at
                at += 4096
            elif kind == PageType.XTAB:
                expected[pfn] = GONE
            elif expected.get(pfn, ZERO) < 0:
                expected[pfn] = ZERO
    assert index.places.tolist() == [expected.get(pfn, UNNAMED) for pfn in range(12)]
    with_data = [pfn for pfn in range(12) if expected.get(pfn, UNNAMED) > 0]
    assert index.with_data().tolist() == sorted(with_data, key=expected.get)
    assert index.named_limit == max((pfn + 1 for pfn in expected if pfn < 12), default=0)


def test_broken_memory_is_refused():
    pfns, types = np.array([6, 7], np.uint64), np.array([0xE, 0xD], np.uint8)
    header = PageDataHeader(pfns=pfns, types=types, payload_bytes=0, offset=0)
    with pytest.raises(BodyError, match="gfn 0x7 is broken"):
        PageIndex(12).note(header, 0)
    data, starts = stream(([7], [0xD], []))
    with pytest.raises(RecordError, match=rf"\(in PAGE_DATA at byte {starts[3]}\)$"), opened(data):
        pass


@functools.cache
def whole():
    return stream(*TWO)


@given(st.data())
def test_a_file_cut_anywhere_is_refused_by_record_and_offset(data):
    content, starts = whole()
    edges = [near for start in starts for near in (start - 1, start, start + 1, start + 7)]
    end = data.draw(st.one_of(st.sampled_from(edges), st.integers(0, len(content) - 1)))
    with pytest.raises(TruncatedError) as refused, opened(content[:end]):
        pass
    begun = [start for start in (0, 24, *starts) if start < end]
    if end not in (0, 24, *starts):
        assert refused.value.offset == begun[-1]
        assert refused.value.record
    assert f"after {end} bytes" in str(refused.value)


@given(st.data())
def test_a_flipped_bit_is_refused_or_is_in_a_field_that_may_have_it(data):
    content, _ = whole()
    at = data.draw(st.integers(0, len(content) - 1))
    flipped = bytearray(content)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(RemoteStreamError), opened(flipped) as saved:
        contents_of(saved)


@given(st.binary(max_size=300))
def test_what_is_not_a_stream_is_refused(data):
    with pytest.raises(RemoteStreamError), opened(data):
        pass


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: stream(*TWO, cpuid=()), r"which CPU the guest has \(in CPUID_POLICY"),
        (lambda: stream(([514], [0], [page(1)])), "gfn 0x200 is RAM of the guest, and no record says what it holds"),
        (lambda: stream(([0xC0000], [0xE], [])), "gfn 0x200 is RAM of the guest"),
        (lambda: stream(([1 << 40], [0], [page(1)])), r"gfn 0x10000000000 is outside the guest \(in PAGE_DATA"),
        (lambda: stream(pages=100), "100 frames make no guest"),
        (lambda: stream(*TWO, context=b"\1\0\0\0"), r"an entry header is cut \(in HVM_CONTEXT at byte"),
    ],
)
def test_a_stream_that_makes_no_guest_is_refused(made, says):
    with pytest.raises(RecordError, match=says), opened(made()[0]):
        pass


def test_offsets_in_the_context_are_offsets_in_the_file():
    context = encode_machine_state(STATE)[:-8] + b"\x0d\0\0\0" + bytes(12)
    data, starts = stream(context=context)
    with pytest.raises(RecordError, match=r"no machine here can hold this state \(in HVM_CONTEXT PMTIMER 0") as refused:
        opened(data).__enter__()
    assert refused.value.offset == starts[-2] + 8 + len(context) - 16


def test_a_page_in_the_hole_is_refused():
    encoder_pages = (3 << 30) >> 12
    named = ([*range(at, at + 1024)] for at in range(PAGES, encoder_pages, 1024))
    records = [(pfns, np.full(len(pfns), PageType.XALLOC, np.uint8), ()) for pfns in named]
    data, _ = stream(*records, ([encoder_pages, (4 << 30 >> 12)], [0xE, 0xE], []))
    with pytest.raises(RecordError, match="gfn 0xc0000 is not RAM of the guest"), opened(data):
        pass


def test_a_file_that_became_shorter_is_found_when_its_pages_are_read(tmp_path):
    path = tmp_path / "guest.bin"
    path.write_bytes(stream(*TWO)[0])
    with SavedGuest(path) as saved:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(TruncatedError, match=r"has become shorter since it was checked \(at byte"):
            contents_of(saved)


def test_what_is_not_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, says in (
        ("pipe", "not a regular file"),
        (".", "not a regular file"),
        ("none", "cannot read .*No such file"),
    ):
        with pytest.raises(UsageError, match=says):
            SavedGuest(tmp_path / name)
