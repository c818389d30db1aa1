"""Every way to send pages ends in equal memory, whatever changes under the encoder."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.memory import GuestMemory
from pageferry.core.page_words import WORDS_PER_PAGE, page_words
from pageferry.engine.pages.cache import PageCache
from pageferry.engine.pages.encode import PackingCoder, PlainCoder
from pageferry.engine.pages.receive import Activity, PageWriter, read_stream
from pageferry.engine.pages.send import Lane
from pageferry.engine.verify.compare import ReceivedPages
from pageferry.stream.decoder import Decoder
from pageferry.stream.encoder import Encoder
from pageferry.stream.format import EXTENSIONS
from pageferry.stream.order import Role
from pageferry.stream.packing import Packing, available, packer
from pageferry.stream.records import End, Fence, StaticDataEnd, StreamHeader

PAGES = 512  # the least that a guest can have
USED = 12
SLOTS = 6

HERE, THERE = GuestMemory.linear(PAGES * PAGE_SIZE), GuestMemory.linear(PAGES * PAGE_SIZE)

#: A change of a page: which, from which word, how many words, and the seed of what they become (0: zeros).
changes = st.lists(
    st.tuples(
        st.integers(0, 3) | st.integers(0, USED - 1),
        st.just(0) | st.integers(0, WORDS_PER_PAGE - 1),
        st.just(WORDS_PER_PAGE) | st.integers(1, WORDS_PER_PAGE),
        st.just(0) | st.integers(0, 9),
    ),
    max_size=8,
)
#: A round: what changes before, and what changes while it is packed.
rounds = st.lists(st.tuples(changes, changes), min_size=1, max_size=8)


def change(words, what):
    for gfn, at, count, seed in what:
        piece = words[gfn, at : at + count]
        piece[:] = 0 if not seed else np.random.default_rng(seed).integers(0, 1 << 63, piece.size, np.uint64)


class Pipe:
    """A channel to nowhere: what is sent can be received."""

    pacer = None
    timeout_s = 60.0

    def __init__(self):
        self._bytes = bytearray()
        self._at = 0

    def send(self, buffers):
        self._bytes += b"".join(bytes(each) for each in buffers)

    def readable(self, wait_s):
        return True

    def receive_some(self, at_most_bytes):
        begin, self._at = self._at, self._at + at_most_bytes
        return bytes(self._bytes[begin : self._at])

    def receive_into(self, views, ahead=None):
        for view in views:
            view[:] = self.receive_some(len(view))
        return 0


class Disturbed:
    """A packer under which the guest writes, before and after."""

    def __init__(self, sound, disturb):
        self._sound = sound
        self._disturb = disturb

    def pack(self, data):
        self._disturb()
        packed = self._sound.pack(data)
        self._disturb()
        return packed


@pytest.fixture(params=["plain", "lz4", "zstd", "lz4+cache", "zstd+cache"], scope="module")
def way(request):
    name, _, cache = request.param.partition("+")
    if name == "plain":
        return Packing.NONE, False
    if Packing(name) not in available():
        pytest.skip(f"the library for {name} is not installed")
    return Packing(name), bool(cache)


@settings(max_examples=60)
@given(story=rounds, batch=st.integers(1, SLOTS))
def test_the_destination_ends_with_what_the_source_has(way, story, batch):
    packing, cached = way
    here, there = page_words(HERE), page_words(THERE)
    here[:USED] = there[:USED] = 0
    pipe, encoder = Pipe(), Encoder(Role.SECTION)
    pending = []
    coder = PlainCoder(HERE, encoder)
    if packing is not Packing.NONE:
        sound = Disturbed(packer(packing), lambda: change(here, pending[: len(pending) // 2]))
        coder = PackingCoder(HERE, encoder, sound, PageCache(SLOTS * PAGE_SIZE, PAGES) if cached else None)
    lane = Lane(HERE, pipe, encoder, coder, says_zero=True, on_sent=lambda gfns: None)
    pipe.send([encoder.header(agreed=EXTENSIONS), encoder.record(StaticDataEnd())])
    dirty, fresh = set(range(USED)), True
    for before, during in [*story, ([], [])]:  # the last round is of a guest that stands still
        change(here, before)
        dirty |= {gfn for gfn, *_ in before}
        pending[:] = during
        frames = np.array(sorted(dirty), np.uint64)
        for at in range(0, frames.size, batch):
            lane.send(frames[at : at + batch], fresh=fresh)
        change(here, during)
        dirty, fresh = {gfn for gfn, *_ in during}, False
    lane.send_fence(7)
    lane.finish()
    writer = PageWriter(pipe, ReceivedPages(THERE, audits=False), packing=packing)
    decoder = Decoder(zero_copy=True, gfn_limit=PAGES, agreed=EXTENSIONS, role=Role.SECTION)
    events = list(read_stream(pipe, decoder, writer, Activity()))
    assert [type(event) for event in events] == [StreamHeader, StaticDataEnd, Fence, End]
    assert events[2].number == 7
    assert np.array_equal(here[:USED], there[:USED])


@given(
    st.integers(1, 6),
    st.lists(
        st.tuples(
            st.sampled_from(["fill", "swap", "swap", "forget"]), st.sets(st.integers(0, 11), min_size=1, max_size=6)
        ),
        max_size=30,
    ),
)
def test_a_cache_knows_what_was_put_in_last_or_nothing(slots, story):
    cache = PageCache(slots * PAGE_SIZE + 17, 12)
    assert cache.capacity_pages == slots
    last, put = {}, []
    for stamp, (operation, frames) in enumerate(story, 1):
        gfns = np.array(sorted(frames), np.uint64)[:slots]
        if operation == "forget":
            cache.forget(gfns)
            for gfn in gfns.tolist():
                last.pop(gfn, None)
            continue
        if operation == "fill":
            gfns = np.array([gfn for gfn in gfns.tolist() if gfn not in last][: max(0, slots - len(put))], np.uint64)
        pages = np.full((gfns.size, WORDS_PER_PAGE), stamp, np.uint64) + gfns[:, None] * np.uint64(1000)
        if operation == "fill":
            cache.fill(gfns, pages)
            put += gfns.tolist()
            last.update(zip(gfns.tolist(), pages[:, 0].tolist(), strict=True))
            continue
        known, old = cache.swap(gfns, pages)
        assert old.shape == (int(known.sum()), WORDS_PER_PAGE)
        for gfn, row in zip(gfns[known].tolist(), old, strict=True):
            assert (row == last[gfn]).all()
        recent = [gfn for gfn in put[-slots:] if gfn in last]
        assert all(is_known for gfn, is_known in zip(gfns.tolist(), known, strict=True) if gfn in recent)
        put += gfns[~known].tolist()
        last.update(zip(gfns.tolist(), pages[:, 0].tolist(), strict=True))


def test_a_cache_is_no_larger_than_the_guest():
    cache = PageCache(1 << 50, 12)
    assert cache.capacity_pages == 12
    gfns = np.arange(12, dtype=np.uint64)
    pages = gfns[:, None] + np.zeros(WORDS_PER_PAGE, np.uint64)
    cache.fill(gfns, pages)
    for _ in range(2):
        known, old = cache.swap(gfns, pages)
        assert known.all()
        assert (old == pages).all()


def test_a_cache_that_the_host_has_no_memory_for_is_refused():
    with pytest.raises(UsageError, match="no memory for a delta cache of 128 TiB"):
        PageCache(1 << 50, 1 << 35)


def test_a_full_cache_keeps_what_it_has_when_pages_are_sent_first():
    cache = PageCache(2 * PAGE_SIZE, 12)
    pages = np.arange(3, dtype=np.uint64)[:, None] + np.zeros(WORDS_PER_PAGE, np.uint64)
    cache.fill(np.array([4, 5, 6], np.uint64), pages)
    cache.fill(np.array([7], np.uint64), pages[:1])
    known, old = cache.swap(np.array([5, 7], np.uint64), pages[:2])
    assert (known.tolist(), old[:, 0].tolist()) == ([True, False], [1])


def test_a_change_of_a_word_takes_few_bytes_the_second_time():
    for packing in available():
        encoder = Encoder(Role.SECTION)
        encoder.header(agreed=EXTENSIONS)
        encoder.record(StaticDataEnd())
        coder = PackingCoder(HERE, encoder, packer(packing), PageCache(1024 * PAGE_SIZE, PAGES))
        gfns = np.arange(USED, dtype=np.uint64)
        words = page_words(HERE)
        words[:USED] = np.random.default_rng(1).integers(0, 1 << 63, (USED, WORDS_PER_PAGE), np.uint64)
        first = coder.code(gfns, fresh=True)
        words[:USED, 5] += np.uint64(1)
        second = coder.code(gfns, fresh=False)
        assert (first.counts.delta_pages, second.counts.delta_pages) == (0, USED)
        assert second.counts.delta_bytes == len(b"".join(second.buffers)) < USED * PAGE_SIZE // 20
        coder.forget(gfns[:4])
        assert coder.code(gfns, fresh=False).counts.delta_pages == USED - 4
