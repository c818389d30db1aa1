"""Pages that come in: one connection's writer, all connections of a migration with one clock."""

import contextlib
import socket
import struct
import threading
from dataclasses import replace

import numpy as np
import pytest
from at_work import until

from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import RecordError, TransportError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.memory import GuestMemory
from pageferry.engine.pages.receive import Activity, PageWriter, Receiver, read_stream
from pageferry.engine.verify.compare import AuditMismatchError, ReceivedPages
from pageferry.engine.verify.digests import digest_runs
from pageferry.engine.wire.channel import Channel
from pageferry.stream.decoder import Decoder
from pageferry.stream.encoder import Encoder
from pageferry.stream.format import EXTENSIONS, PageType, carries_data
from pageferry.stream.order import Role
from pageferry.stream.records import (
    DeltaPages,
    End,
    Fence,
    PackedPages,
    PageDataHeader,
    StaticDataEnd,
    StreamHeader,
    ZeroPages,
)

GIVE_UP_S = 60


def gfns(*numbers):
    return np.array(numbers, np.uint64)


@pytest.fixture
def memory():
    made = GuestMemory.linear(8 << 20)
    yield made
    made.close()


@pytest.fixture
def pages(memory):
    return ReceivedPages(memory, audits=False)


def page_of(memory, gfn):
    return memory.read(gfn * PAGE_SIZE, PAGE_SIZE)


# -- the writer --------------------------------------------------------------------------------------------------------


class Content:
    """A channel that has each page full of its place in the record."""

    def __init__(self):
        self._at = 0

    def receive_into(self, views, ahead=None):
        for view in views:
            for begin in range(0, len(view), PAGE_SIZE):
                self._at += 1
                view[begin : begin + PAGE_SIZE] = bytes([self._at & 0xFF]) * PAGE_SIZE
        return 0


def page_data(*pfns, types=None):
    numbers = gfns(*pfns)
    kinds = np.full(numbers.size, PageType.NOTAB, np.uint8) if types is None else np.array(types, np.uint8)
    return PageDataHeader(pfns=numbers, types=kinds, payload_bytes=int(carries_data(kinds).sum()) * PAGE_SIZE, offset=0)


def test_page_data_lands_where_it_belongs_in_any_order(memory, pages):
    PageWriter(Content(), pages).page_data(page_data(7, 3, 4))
    assert [page_of(memory, gfn)[0] for gfn in (7, 3, 4)] == [1, 2, 3]


def test_a_run_lands_where_it_belongs_and_is_proven_no_longer(memory):
    pages = ReceivedPages(memory, audits=True)
    runs = gfns(20), gfns(4)
    pages.audit(*runs, digest_runs(memory, *runs))
    pages.remove(gfns(22))
    marked = []
    memory.on_write(lambda written: marked.extend(written.tolist()))
    PageWriter(Content(), pages).page_data(replace(page_data(22, 23), run=range(22, 24)))
    assert [page_of(memory, gfn)[0] for gfn in (22, 23)] == [1, 2]
    assert marked == [22, 23]
    assert pages.arrived_pages == 2
    assert pages.populated().gfns().tolist() == [22, 23]
    assert pages.removed().size == 0
    assert pages.all_proven(gfns(20), gfns(2))
    assert not pages.all_proven(gfns(23), gfns(1))


def arrive(writer, run):
    writer.page_data(replace(page_data(*run), run=run))


def behind_its_back(memory, gfn):
    """Change a page so that only who reads it again can know."""
    memory.mapping.view[gfn * PAGE_SIZE] ^= 0xFF


def is_read_for_an_audit(pages, gfn, audited):
    """Tell whether an audit of runs reads this page, whose content it should find."""
    theirs = digest_runs(pages.memory, *audited)
    behind_its_back(pages.memory, gfn)
    try:
        pages.audit(*audited, theirs)
    except AuditMismatchError:
        return True
    finally:
        behind_its_back(pages.memory, gfn)
    return False


SECOND_2M = gfns(512), gfns(512)


@pytest.mark.parametrize(
    "records",
    [[range(512, 1024)], [range(1024)], [range(300, 800), range(800, 1030)], [range(512, 513), range(513, 1024)]],
)
def test_2_mib_that_came_in_order_are_not_read_again_for_an_audit(memory, records):
    pages = ReceivedPages(memory, audits=True)
    writer = PageWriter(Content(), pages)
    for run in records:
        arrive(writer, run)
    assert not is_read_for_an_audit(pages, 700, SECOND_2M)
    assert is_read_for_an_audit(pages, 700, (gfns(512), gfns(511)))
    assert is_read_for_an_audit(pages, 700, (gfns(600), gfns(200)))
    with pytest.raises(AuditMismatchError):
        pages.audit(*SECOND_2M, np.zeros((1, 16), np.uint8))
    arrive(writer, range(1023, 1024))
    assert is_read_for_an_audit(pages, 700, SECOND_2M)


@pytest.mark.parametrize(
    "between",
    [
        lambda writer: writer.zero_pages(ZeroPages(pfns=gfns(600))),
        lambda writer: writer.page_data(page_data(600, 601)),
        lambda writer: arrive(writer, range(600, 601)),
        lambda writer: arrive(writer, range(512, 600)),
        lambda writer: writer.page_data(page_data(3, types=[PageType.XALLOC])),
    ],
)
def test_2_mib_are_read_again_for_an_audit_when_something_came_between(memory, between):
    pages = ReceivedPages(memory, audits=True)
    writer = PageWriter(Content(), pages)
    arrive(writer, range(512, 800))
    between(writer)
    arrive(writer, range(800, 1024))
    assert is_read_for_an_audit(pages, 700, SECOND_2M)


def test_several_long_runs_of_one_record_are_digested_as_one_is(memory):
    pages = ReceivedPages(memory, audits=True)
    PageWriter(Content(), pages).page_data(page_data(*range(512), *range(1024, 1536)))
    assert not is_read_for_an_audit(pages, 1100, (gfns(1024), gfns(512)))
    assert page_of(memory, 1024)[0] == 513 & 0xFF


@pytest.mark.parametrize(
    ("run", "why"), [(range(2047, 2049), "outside the guest"), (range(511, 513), "another connection")]
)
def test_a_run_that_is_not_all_ours_is_refused(pages, run, why):
    with pytest.raises(RecordError, match=why):
        PageWriter(Content(), pages, index=0, connections=2).page_data(replace(page_data(*run), run=run))


def test_pages_without_content_and_removed_ones_are_told_apart(memory, pages):
    kinds = [PageType.NOTAB, PageType.XALLOC, PageType.XTAB]
    writer = PageWriter(Content(), pages)
    writer.page_data(page_data(3, 4, 5, types=kinds))
    assert pages.removed().tolist() == [5]
    assert page_of(memory, 4) == bytes(PAGE_SIZE)
    writer.zero_pages(ZeroPages(pfns=gfns(3, 5)))
    assert page_of(memory, 3) == bytes(PAGE_SIZE)
    assert pages.removed().size == 0


@pytest.mark.parametrize("may_release", [True, False])
def test_of_many_pages_in_a_row_that_became_zero_the_storage_is_given_back(memory, pages, monkeypatch, may_release):
    full = gfns(*range(8, 40))
    memory.write(8 * PAGE_SIZE, b"\xff" * (32 * PAGE_SIZE))
    if not may_release:
        monkeypatch.setattr(memory, "release", lambda ranges: False)
    PageWriter(Content(), pages).zero_pages(ZeroPages(pfns=gfns(8, 10, *range(20, 36))))
    stored = expand_runs(*memory.populated())
    assert np.setdiff1d(full, stored).tolist() == (list(range(20, 36)) if may_release else [])
    zero = [page_of(memory, gfn) == bytes(PAGE_SIZE) for gfn in range(8, 40)]
    assert [gfn for gfn, is_zero in enumerate(zero, 8) if is_zero] == [8, 10, *range(20, 36)]


@pytest.mark.parametrize(("gfn", "why"), [(1 << 40, "outside the guest"), (512, "belongs on another connection")])
def test_a_page_that_is_not_this_connections_is_refused_in_every_record(pages, gfn, why):
    writer = PageWriter(Content(), pages, index=0, connections=2)
    for refused in (
        lambda: writer.page_data(page_data(gfn)),
        lambda: writer.zero_pages(ZeroPages(pfns=gfns(gfn))),
        lambda: writer.packed_pages(PackedPages(pfns=gfns(gfn), data=b"")),
        lambda: writer.delta_pages(DeltaPages(pfns=gfns(gfn), data=b"")),
    ):
        with pytest.raises(RecordError, match=why):
            refused()


def test_packed_pages_that_were_not_agreed_on_are_refused(pages):
    with pytest.raises(RecordError, match="nothing was agreed"):
        PageWriter(Content(), pages).packed_pages(PackedPages(pfns=gfns(1), data=b""))


# -- all connections ---------------------------------------------------------------------------------------------------


def test_a_connection_with_nothing_to_carry_is_not_stalled_while_another_carries():
    now = [0.0]
    activity = Activity(lambda: now[0])
    stalls = []

    class Idle:
        timeout_s = 30

        def readable(self, wait_s):
            now[0] += 30
            stalls.append(now[0])
            if len(stalls) < 3:
                now[0] -= 1
                activity.note()  # another connection, a second ago
                now[0] += 1
            return False

    with pytest.raises(TimeoutError):
        next(read_stream(Idle(), Decoder(zero_copy=True), None, activity))
    assert stalls == [30, 60, 90]


@pytest.fixture
def wires():
    """Three connections: what the source has of each, and what the destination has."""
    pairs = [socket.socketpair() for _ in range(3)]
    ends = [[Channel(end, GIVE_UP_S) for end in side] for side in zip(*pairs, strict=True)]
    yield ends
    for channel in [*ends[0], *ends[1]]:
        channel.close()


class Reading(threading.Thread):
    """A destination that reads; ``events`` so far, ``error`` that it ended with."""

    def __init__(self, channels, pages):
        super().__init__(daemon=True)
        self.events, self.error = [], None
        self._receiver = Receiver(channels, pages, agreed=EXTENSIONS)
        self.start()

    def run(self):
        try:
            with self._receiver as receiver:
                for event in receiver.events():
                    self.events.append(event)
        except Exception as error:
            self.error = error

    def ended(self):
        self.join(GIVE_UP_S)
        assert not self.is_alive()
        return self.error


def begun(channels):
    """Encoders of a stream and its sections, each begun."""
    encoders = [Encoder(Role.SECTION if index else Role.WRITER) for index in range(len(channels))]
    for channel, encoder in zip(channels, encoders, strict=True):
        channel.send([encoder.header(agreed=EXTENSIONS), encoder.record(StaticDataEnd())])
    return encoders


def test_a_fence_is_reached_when_all_connections_have_come_to_it(wires, memory, pages):
    ours, theirs = wires
    reading = Reading(theirs, pages)
    encoders = begun(ours)
    memory.write(1024 * PAGE_SIZE, b"old")
    ours[0].send([encoders[0].page_data(gfns(0), np.array([PageType.XALLOC], np.uint8))])
    for index in (0, 1):
        ours[index].send([encoders[index].record(Fence(number=0))])
    until(lambda: reading._receiver._reached == [0, -1], "fence of the second connection")
    assert not any(isinstance(event, Fence) for event in reading.events)
    ours[2].send([encoders[2].record(ZeroPages(pfns=gfns(1024))), encoders[2].record(Fence(number=0))])
    until(lambda: any(isinstance(event, Fence) for event in reading.events), "fence")
    assert page_of(memory, 1024) == bytes(PAGE_SIZE)
    ours[0].abort()
    assert reading.ended() is not None


@pytest.mark.parametrize("cut", [1, 2])
def test_a_connection_that_is_cut_ends_the_reading_of_all(wires, pages, cut):
    ours, theirs = wires
    reading = Reading(theirs, pages)
    begun(ours)
    ours[cut].abort()
    error = reading.ended()
    assert isinstance(error, TransportError)
    assert error.reason == f"connection {cut + 1} was cut"
    for channel in theirs[1:]:
        with pytest.raises(OSError, match=r"closed|Bad file"):
            channel.send([b"x"])


def test_a_page_on_the_wrong_connection_ends_the_reading_of_all(wires, pages):
    ours, theirs = wires
    reading = Reading(theirs, pages)
    encoders = begun(ours)
    ours[2].send([encoders[2].record(ZeroPages(pfns=gfns(0)))])
    error = reading.ended()
    assert isinstance(error, RecordError)
    assert "another connection" in str(error)


def test_one_connection_is_read_up_to_its_end(memory, pages, wires):
    ours, theirs = wires
    encoder = Encoder(Role.SECTION)
    ours[0].send([encoder.header(agreed=EXTENSIONS), encoder.record(StaticDataEnd())])
    memory.write(3 * PAGE_SIZE, b"old")
    ours[0].send([encoder.record(ZeroPages(pfns=gfns(3))), encoder.record(Fence(number=4)), encoder.record(End())])
    decoder = Decoder(zero_copy=True, gfn_limit=memory.gfn_limit, agreed=EXTENSIONS, role=Role.SECTION)
    events = list(read_stream(theirs[0], decoder, PageWriter(theirs[0], pages), Activity()))
    assert [type(event) for event in events] == [StreamHeader, StaticDataEnd, Fence, End]
    assert page_of(memory, 3) == bytes(PAGE_SIZE)


def test_the_host_is_asked_for_room_each_64_mib(pages):
    asked = []
    writer = PageWriter(None, pages, expect_room=asked.append)
    for _ in range(40):
        writer.zero_pages(ZeroPages(pfns=np.arange(1024, dtype=np.uint64)))
    assert asked == [pages.memory] * 2


def test_a_record_that_trickles_is_a_stall(pages):
    """Each byte comes in time, and the record never ends."""
    left, right = socket.socketpair()
    channel = Channel(right, 0.3)
    stop = threading.Event()
    encoder = Encoder()

    def trickle():
        with left, contextlib.suppress(OSError):
            left.sendall(encoder.header() + encoder.record(StaticDataEnd()) + struct.pack("<II", 0x8AAA_AAAA, 1 << 20))
            while not stop.wait(0.01):
                left.sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        with pytest.raises(TimeoutError, match="stalled"):
            list(read_stream(channel, Decoder(zero_copy=True), PageWriter(channel, pages), Activity()))
    finally:
        stop.set()
        thread.join()
        channel.close()
