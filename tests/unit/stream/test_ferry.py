"""The conversation around the libxc stream: whole, out of order, malformed, and with the wrong peer."""

import dataclasses
import json
import struct
import tracemalloc

import numpy as np
import pytest
import xxhash

from pageferry.core.cpuid import MAX_LEAVES, SOFT_CPU, CpuidLeaf
from pageferry.core.errors import (
    LocalStreamError,
    OrderError,
    RecordError,
    RemoteStreamError,
    TruncatedError,
    VersionError,
)
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.host_cpu import HostCpu
from pageferry.stream.ferry import MAGIC, NONCE_BYTES, PROTOCOL_VERSION, FerryDecoder, FerryEncoder
from pageferry.stream.ferry_bodies import body_of, digest_of, parse_body
from pageferry.stream.ferry_frames import (
    MAX_BODY_BYTES,
    MAX_FEATURES,
    MAX_NAME_CHARS,
    MAX_POPULATED_RUNS,
    MAX_TEXT_CHARS,
    TYPE_OF,
    Commit,
    Complete,
    DestinationHello,
    Digests,
    Dropped,
    Failed,
    FrameType,
    Join,
    Joined,
    Known,
    Mismatch,
    Missing,
    Pages,
    Reached,
    Ready,
    Recover,
    Recovered,
    Refuse,
    Running,
    SourceHello,
    Switch,
    Wanted,
)
from pageferry.stream.ferry_order import Conversation, Side, Stage
from pageferry.stream.format import MAX_DIGESTS, PFN_MASK, RUN_DIGEST, BodyError, RecordType
from pageferry.stream.intake import NEED_DATA

HELLO = SourceHello(
    version="0.1.0",
    memory_bytes=256 << 20,
    cpus=2,
    accel="kvm",
    cpuid=SOFT_CPU,
    migration_id="6f1c",
    features=("a", "b"),
    machine="pageferry-1",
    name="sweep",
    populated=((0, 256), (1024, 1)),
    host_cpu=HostCpu(name="a CPU", family=25, model=17, stepping=1, features="00ff" * 4, keeps_cpuid=False),
)
ANSWER = DestinationHello(version="0.1.0", accel="soft", features=("a",), host_cpu=HELLO.host_cpu)
HOST_CPU = dataclasses.asdict(HELLO.host_cpu)
PREAMBLE = MAGIC + struct.pack("<II", PROTOCOL_VERSION, 0) + bytes(range(NONCE_BYTES))


def digests(*first_gfns, pages=16, last=False):
    count = len(first_gfns)
    return Digests(
        first_gfns=np.array(first_gfns, np.uint64),
        pages=np.full(count, pages, np.uint32),
        digests=np.arange(16 * count, dtype=np.uint8).reshape(count, 16),
        audited=np.zeros(count, np.bool_),
        last=last,
    )


MISSING = Missing(first_gfns=np.array([1, 16], np.uint64), pages=np.array([2, 1], np.uint64))
WANTED = Wanted(gfns=np.array([1, 16], np.uint64), urgent=True)
PAGES = Pages(gfns=np.array([1, 16], np.uint64), zero=np.array([False, True]), digest=bytes(range(16)))
CONTENT = np.arange(PAGE_SIZE, dtype=np.uint16).astype(np.uint8)
COMPLETE = Complete(waits=3, waited_ns=500, median_ns=50, p99_ns=60, longest_ns=400)
MISMATCH = Mismatch(first_gfn=16, page_digests=np.array([1, 1 << 63], np.uint64))


class End:
    """One end: its conversation, encoder and decoder."""

    def __init__(self, side):
        self.conversation = Conversation(side)
        self.encoder = FerryEncoder(self.conversation)
        self.decoder = FerryDecoder(self.conversation)

    @property
    def stage(self):
        return self.conversation.stage

    def tell(self, other, frame):
        other.decoder.feed(self.encoder.frame(frame))
        return other.decoder.next_event()


@pytest.fixture
def ends():
    source, destination = End(Side.SOURCE), End(Side.DESTINATION)
    source.decoder.feed(destination.encoder.preamble())
    destination.decoder.feed(source.encoder.preamble())
    return source, destination


def advance(ends, stage):
    """Bring both ends to ``stage`` by legal frames."""
    source, destination = ends
    steps = [
        (Stage.ANSWERING, lambda: source.tell(destination, HELLO)),
        (Stage.STREAMING, lambda: destination.tell(source, ANSWER)),
        (Stage.DIGESTING, lambda: [end.conversation.stream_passed(1000) for end in ends]),
        (Stage.COMPARING, lambda: source.tell(destination, digests(0, 16, last=True))),
        (Stage.READY, lambda: destination.tell(source, Ready(verified_pages=32))),
        (Stage.COMMITTED, lambda: source.tell(destination, Commit())),
        (Stage.RUNNING, lambda: destination.tell(source, Running())),
        (Stage.OVER, lambda: source.tell(destination, Dropped())),
    ]
    if stage is Stage.MISMATCHED:
        advance(ends, Stage.COMPARING)
        destination.tell(source, MISMATCH)
    elif stage is Stage.CLOSED:
        advance(ends, Stage.COMPARING)
        destination.tell(source, Failed(reason="x"))
    elif stage in (Stage.JOINING, Stage.JOIN_KNOWN, Stage.JOINED):
        source.tell(destination, Join(proof="p", index=1))
        if stage is not Stage.JOINING:
            destination.tell(source, Known(proof="p"))
        if stage is Stage.JOINED:
            destination.tell(source, Joined())
    elif stage in (Stage.SWITCHED, Stage.FETCHING, Stage.COMPLETE):
        advance(ends, Stage.READY)
        source.tell(destination, Switch())
        if stage is not Stage.SWITCHED:
            destination.tell(source, Running())
        if stage is Stage.COMPLETE:
            destination.tell(source, COMPLETE)
    elif stage in (Stage.RECOVERING, Stage.RECOVER_KNOWN):
        source.tell(destination, Recover(proof="p"))
        if stage is Stage.RECOVER_KNOWN:
            destination.tell(source, Known(proof="p"))
    elif stage is not Stage.GREETING:
        for reached, step in steps:
            step()
            if reached is stage:
                break
    assert [end.stage for end in ends] == [stage, stage]


# -- the conversation --------------------------------------------------------------------------------------------------


def test_a_whole_conversation(ends):
    source, destination = ends
    assert source.tell(destination, HELLO) == HELLO
    assert destination.tell(source, ANSWER) == ANSWER
    for end in ends:
        end.conversation.stream_passed(1000)
    heard = source.tell(destination, digests(0, 16))
    assert heard.first_gfns.tolist() == [0, 16]
    assert heard.pages.tolist() == [16, 16]
    assert heard.digests.tobytes() == bytes(range(32))
    assert not heard.last
    assert source.tell(destination, digests(32, last=True)).last
    assert destination.tell(source, Ready(verified_pages=48)) == Ready(verified_pages=48)
    assert source.tell(destination, Commit(paused=True)) == Commit(paused=True)
    assert destination.tell(source, Running()) == Running()
    assert source.tell(destination, Dropped()) == Dropped()
    for end in ends:
        assert end.stage is Stage.OVER
        assert end.decoder.next_event() is NEED_DATA
        end.decoder.eof()


def test_a_conversation_that_switches_and_is_cut_and_goes_on(ends):
    source, destination = ends
    advance(ends, Stage.DIGESTING)
    heard = source.tell(destination, MISSING)
    assert (heard.first_gfns.tolist(), heard.pages.tolist()) == ([1, 16], [2, 1])
    source.tell(destination, digests(32, last=True))
    destination.tell(source, Ready(verified_pages=16))
    assert source.tell(destination, Switch(paused=True)) == Switch(paused=True)
    assert destination.tell(source, Running()) == Running()
    source, destination = again = End(Side.SOURCE), End(Side.DESTINATION)
    source.decoder.feed(destination.encoder.preamble())
    destination.decoder.feed(source.encoder.preamble())
    assert source.tell(destination, Recover(proof="p")) == Recover(proof="p")
    assert destination.tell(source, Known(proof="q")) == Known(proof="q")
    assert destination.tell(source, Recovered()) == Recovered()
    wanted = destination.tell(source, WANTED)
    assert (wanted.gfns.tolist(), wanted.urgent) == ([1, 16], True)
    came = source.tell(destination, PAGES)
    assert (came.gfns.tolist(), came.zero.tolist(), came.digest) == ([1, 16], [False, True], PAGES.digest)
    offset = destination.decoder.offset
    destination.decoder.content_passed(PAGE_SIZE)
    assert destination.decoder.offset == offset + PAGE_SIZE
    assert destination.tell(source, COMPLETE) == COMPLETE
    assert source.tell(destination, Dropped()) == Dropped()
    for end in again:
        end.decoder.eof()


def test_a_mismatch_ends_with_failed(ends):
    source, destination = ends
    advance(ends, Stage.DIGESTING)
    source.tell(destination, digests(0, 16))
    heard = destination.tell(source, MISMATCH)
    assert heard.first_gfn == 16
    assert heard.page_digests.tolist() == [1, 1 << 63]
    source.tell(destination, digests(32, last=True))  # these were under way
    failed = Failed(reason="memory differs", hint="report it", gfn=17)
    assert source.tell(destination, failed) == failed
    assert [end.stage for end in ends] == [Stage.CLOSED] * 2


def test_a_refusal_may_come_before_the_hello_is_read(ends):
    source, destination = ends
    source.encoder.frame(HELLO)
    refuse = Refuse(reason="busy", hint="try later")
    assert destination.tell(source, refuse) == refuse
    source.decoder.eof()


EXAMPLES = [HELLO, ANSWER, Refuse(reason="r"), digests(100, last=True), MISMATCH]
EXAMPLES += [Ready(verified_pages=1), Commit(), Running(), Failed(reason="f"), Join(proof="p", index=15), Joined()]
EXAMPLES += [MISSING, Switch(), WANTED, PAGES, COMPLETE, Dropped(), Recover(proof="p"), Recovered(), Known(proof="p")]
EXAMPLES += [Reached(number=7)]
SOURCE, DESTINATION = Side.SOURCE, Side.DESTINATION
ALLOWED = {
    (Stage.GREETING, SOURCE): {SourceHello, Join, Recover},
    (Stage.GREETING, DESTINATION): {Refuse, Failed},
    (Stage.ANSWERING, SOURCE): set(),
    (Stage.ANSWERING, DESTINATION): {DestinationHello, Refuse, Failed},
    (Stage.STREAMING, SOURCE): set(),
    (Stage.STREAMING, DESTINATION): {Reached, Mismatch, Failed},
    (Stage.DIGESTING, SOURCE): {Missing, Digests, Failed},
    (Stage.DIGESTING, DESTINATION): {Mismatch, Failed},
    (Stage.COMPARING, SOURCE): {Failed},
    (Stage.COMPARING, DESTINATION): {Mismatch, Ready, Failed},
    (Stage.MISMATCHED, SOURCE): {Digests, Failed},
    (Stage.MISMATCHED, DESTINATION): {Failed},
    (Stage.READY, SOURCE): {Commit, Switch, Failed},
    (Stage.READY, DESTINATION): {Failed},
    (Stage.COMMITTED, SOURCE): set(),
    (Stage.COMMITTED, DESTINATION): {Running, Failed},
    (Stage.RUNNING, SOURCE): {Dropped},
    (Stage.RUNNING, DESTINATION): set(),
    (Stage.OVER, SOURCE): set(),
    (Stage.OVER, DESTINATION): set(),
    (Stage.CLOSED, SOURCE): set(),
    (Stage.CLOSED, DESTINATION): set(),
    (Stage.JOINING, SOURCE): set(),
    (Stage.JOINING, DESTINATION): {Known, Refuse, Failed},
    (Stage.JOIN_KNOWN, SOURCE): set(),
    (Stage.JOIN_KNOWN, DESTINATION): {Joined, Failed},
    (Stage.JOINED, SOURCE): set(),
    (Stage.JOINED, DESTINATION): set(),
    (Stage.SWITCHED, SOURCE): set(),
    (Stage.SWITCHED, DESTINATION): {Running, Failed},
    (Stage.FETCHING, SOURCE): {Pages},
    (Stage.FETCHING, DESTINATION): {Wanted, Complete},
    (Stage.RECOVERING, SOURCE): set(),
    (Stage.COMPLETE, SOURCE): {Pages, Dropped},
    (Stage.COMPLETE, DESTINATION): set(),
    (Stage.RECOVERING, DESTINATION): {Known, Refuse},
    (Stage.RECOVER_KNOWN, SOURCE): set(),
    (Stage.RECOVER_KNOWN, DESTINATION): {Recovered, Running, Failed},
}


@pytest.mark.parametrize("frame", EXAMPLES, ids=lambda frame: type(frame).__name__)
@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("stage", Stage)
def test_each_side_sends_and_hears_exactly_what_its_turn_allows(ends, stage, side, frame):
    advance(ends, stage)
    sender, listener = ends if side is Side.SOURCE else reversed(ends)
    body = body_of(frame)
    whole = struct.pack("<II", TYPE_OF[type(frame)], len(body)) + body
    if type(frame) in ALLOWED[stage, side]:
        assert sender.encoder.frame(frame) == whole
        listener.decoder.feed(whole)
        assert type(listener.decoder.next_event()) is type(frame)
        assert sender.stage == listener.stage
        return
    with pytest.raises(LocalStreamError, match=rf"the {side} may not send it while {stage} \(in "):
        sender.encoder.frame(frame)
    listener.decoder.feed(whole[:8])  # refused by its header alone
    with pytest.raises(OrderError, match=rf"the {side} may not send it while {stage} \(in "):
        listener.decoder.next_event()
    assert [end.stage for end in ends] == [stage, stage]


def test_ready_before_the_last_digests_were_sent_is_refused(ends):
    source, _ = ends
    advance(ends, Stage.DIGESTING)
    source.encoder.frame(digests(0))
    source.decoder.feed(struct.pack("<II", FrameType.READY, 20) + b'{"verified_pages":1}')
    with pytest.raises(OrderError, match=r"may not send it while digesting \(in READY"):
        source.decoder.next_event()


def test_digests_ascend_from_frame_to_frame(ends):
    source, destination = ends
    advance(ends, Stage.DIGESTING)
    source.tell(destination, digests(0, 16))
    with pytest.raises(LocalStreamError, match=r"do not ascend from frame to frame \(in DIGESTS"):
        source.encoder.frame(digests(31))
    body = body_of(digests(31))
    destination.decoder.feed(struct.pack("<II", FrameType.DIGESTS, len(body)) + body)
    with pytest.raises(RecordError, match=r"do not ascend from frame to frame \(in DIGESTS"):
        destination.decoder.next_event()


def test_the_stream_has_its_turn():
    with pytest.raises(LocalStreamError, match="cannot end while greeting"):
        Conversation(Side.SOURCE).stream_passed(1)


def test_offsets_count_the_stream_where_it_came_in(ends):
    source, destination = ends
    advance(ends, Stage.DIGESTING)
    before = len(PREAMBLE) + 8 + len(body_of(HELLO)) + 1000
    assert destination.decoder.offset == before
    assert source.decoder.offset == len(PREAMBLE) + 8 + len(body_of(ANSWER))
    destination.decoder.feed(struct.pack("<II", FrameType.COMMIT, 8))
    with pytest.raises(OrderError, match=rf"\(in COMMIT at byte {before}\)$"):
        destination.decoder.next_event()


def test_wanted_bytes_never_reaches_into_the_stream(ends):
    _, destination = ends
    hello = ends[0].encoder.frame(HELLO)
    at = 0
    while (event := destination.decoder.next_event()) is NEED_DATA:
        wanted = destination.decoder.wanted_bytes
        assert 0 < wanted <= len(hello) - at
        destination.decoder.feed(hello[at : at + wanted])
        at += wanted
    assert event == HELLO
    assert at == len(hello)
    assert destination.decoder.trailing_data == b""
    destination.decoder.feed(b"libxc")
    assert destination.decoder.trailing_data == b"libxc"


def test_the_preamble_comes_first_and_once():
    encoder = FerryEncoder(Conversation(Side.SOURCE))
    with pytest.raises(LocalStreamError, match="preamble comes first"):
        encoder.frame(HELLO)
    assert encoder.preamble()[:-NONCE_BYTES] == b"\x89PGFERRY\3\0\0\0\0\0\0\0"
    with pytest.raises(LocalStreamError, match="preamble comes once"):
        encoder.preamble()


# -- the wrong peer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "name"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "an HTTP server"),
        (b"GET / HTTP/1.1\r\n", "an HTTP client"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "an SSH peer"),
        (b'{"QMP": {"version": {}}}', "a QMP control socket"),
        (b"QEVM\0\0\0\3", "a QEMU migration stream"),
        (b"\xff" * 8 + b"XENF", "a bare libxc stream"),
        (b"\x15\x03\x01\x00\x02\x02\x46\x00", "a TLS server"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", "a TLS client"),
        (b"\0\1\2\3\4\5\6\7", r"something that begins with b'\x00\x01\x02\x03\x04\x05\x06\x07'"),
        (b"SSH", "something that begins with b'SSH'"),
    ],
)
def test_a_peer_that_is_not_pageferry_is_named(first, name):
    decoder = FerryDecoder(Conversation(Side.SOURCE))
    decoder.feed(first)

    def hear():
        assert decoder.next_event() is NEED_DATA
        decoder.eof()

    with pytest.raises(RemoteStreamError) as caught:
        hear()
    assert str(caught.value) == f"the peer is not pageferry; it looks like {name}"
    assert type(caught.value) is RemoteStreamError
    assert caught.value.hint


def test_a_future_version_is_told_with_a_hint():
    decoder = FerryDecoder(Conversation(Side.DESTINATION))
    decoder.feed(MAGIC + struct.pack("<II", 4, 0))
    with pytest.raises(
        VersionError, match=r"version 4 of the protocol and we speak 3 \(in preamble at byte 0\)"
    ) as caught:
        decoder.next_event()
    assert "same release" in caught.value.hint


def test_the_rest_of_the_preamble_is_zero():
    decoder = FerryDecoder(Conversation(Side.DESTINATION))
    decoder.feed(MAGIC + struct.pack("<II", PROTOCOL_VERSION, 1))
    with pytest.raises(RecordError, match="reserved"):
        decoder.next_event()


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 15, 16, 47, 48, 52, 56, 60])
def test_a_peer_that_goes_away_is_truncated(cut):
    body = body_of(HELLO)
    data = PREAMBLE + struct.pack("<II", FrameType.SOURCE_HELLO, len(body)) + body
    decoder = FerryDecoder(Conversation(Side.DESTINATION))
    decoder.feed(data[:cut])
    assert decoder.next_event() is NEED_DATA
    with pytest.raises(TruncatedError, match="the peer closed the connection"):
        decoder.eof()


@pytest.mark.parametrize("stage", [p for p in Stage if p not in (Stage.OVER, Stage.CLOSED, Stage.JOINED)])
def test_a_peer_that_goes_away_between_frames_is_truncated(ends, stage):
    advance(ends, stage)
    for end in ends:
        assert end.decoder.next_event() is NEED_DATA
        with pytest.raises(TruncatedError, match=f"closed the connection while {stage}$"):
            end.decoder.eof()


# -- malformed frames --------------------------------------------------------------------------------------------------


def test_no_frame_type_is_a_record_type():
    assert not {int(each) for each in FrameType} & {int(each) for each in RecordType}
    assert set(TYPE_OF.values()) == set(FrameType) == set(MAX_BODY_BYTES)
    decoder = FerryDecoder(Conversation(Side.DESTINATION))
    decoder.feed(PREAMBLE + struct.pack("<II", RecordType.END, 0))
    with pytest.raises(RecordError, match=r"frame type 0x0 is not known \(in frame header at byte 48\)"):
        decoder.next_event()


@pytest.mark.parametrize("frame_type", FrameType)
@pytest.mark.parametrize("excess", [1, None])
def test_an_over_long_frame_is_refused_by_its_header(ends, frame_type, excess):
    phases = {
        FrameType.SOURCE_HELLO: Stage.GREETING,
        FrameType.DESTINATION_HELLO: Stage.ANSWERING,
        FrameType.REFUSE: Stage.ANSWERING,
        FrameType.DIGESTS: Stage.DIGESTING,
        FrameType.COMMIT: Stage.READY,
        FrameType.RUNNING: Stage.COMMITTED,
        FrameType.JOIN: Stage.GREETING,
        FrameType.JOINED: Stage.JOIN_KNOWN,
        FrameType.KNOWN: Stage.JOINING,
        FrameType.MISSING: Stage.DIGESTING,
        FrameType.SWITCH: Stage.READY,
        FrameType.WANTED: Stage.FETCHING,
        FrameType.PAGES: Stage.FETCHING,
        FrameType.COMPLETE: Stage.FETCHING,
        FrameType.RECOVER: Stage.GREETING,
        FrameType.RECOVERED: Stage.RECOVER_KNOWN,
        FrameType.DROPPED: Stage.COMPLETE,
        FrameType.REACHED: Stage.STREAMING,
    }
    advance(ends, phases.get(frame_type, Stage.COMPARING))
    from_source = (FrameType.SOURCE_HELLO, FrameType.DIGESTS, FrameType.COMMIT, FrameType.JOIN)
    from_source += (FrameType.MISSING, FrameType.SWITCH, FrameType.PAGES, FrameType.RECOVER, FrameType.DROPPED)
    listener = ends[1 if frame_type in from_source else 0]
    length = 0xFFFF_FFFF if excess is None else MAX_BODY_BYTES[frame_type] + excess
    tracemalloc.start()
    listener.decoder.feed(struct.pack("<II", frame_type, length))
    with pytest.raises(RecordError, match=rf"body of {length} bytes is longer than .* \(in {frame_type.name} at byte"):
        listener.decoder.next_event()
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert listener.decoder.wanted_bytes == 0


def hello_with(**changes):
    fields = json.loads(body_of(HELLO))
    fields.update(changes)
    return json.dumps({key: value for key, value in fields.items() if value is not ...}).encode()


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", "not JSON text"),
        (b"\xff", "not JSON text"),
        (b"[" * 60000, "not JSON"),
        (b"1" * 60000, "not JSON text"),
        (b"[]", "not a JSON object"),
        (b"{}", "memory_bytes is missing"),
        (hello_with(version=...), "version is missing"),
        (hello_with(version=1), "version is not printable text"),
        (hello_with(version="x" * 65), "version is not printable text of at most 64"),
        (hello_with(accel="a\nb"), "accel is not printable text"),
        (hello_with(migration_id="\ud800"), "migration_id is not printable text"),
        (hello_with(memory_bytes=0), "memory_bytes is not an integer from 4096"),
        (hello_with(memory_bytes=4097), "memory_bytes is not a multiple of 4096"),
        (hello_with(memory_bytes=1 << 60), "memory_bytes is not an integer"),
        (hello_with(memory_bytes=4096.0), "memory_bytes is not an integer"),
        (hello_with(memory_bytes="4096"), "memory_bytes is not an integer"),
        (hello_with(cpus=True), "cpus is not an integer from 1 to 1024"),
        (hello_with(cpus=0), "cpus is not an integer"),
        (hello_with(cpus=1025), "cpus is not an integer"),
        (hello_with(features="a"), "features is not a list"),
        (hello_with(features=["a"] * 65), "features is not a list of at most 64"),
        (hello_with(features=[1]), "features is not printable text"),
        (hello_with(machine=None), "machine is not printable text"),
        (hello_with(name=5), "name is not text"),
        (hello_with(populated={}), "populated is not a list"),
        (hello_with(populated=[[0, 1]] * 1025), "populated is not a list of at most 1024 runs"),
        (hello_with(populated=[0]), r"not \[first gfn, pages\]"),
        (hello_with(populated=[[0]]), r"not \[first gfn, pages\]"),
        (hello_with(populated=[[0, True]]), r"not \[first gfn, pages\]"),
        (hello_with(populated=[[0, 0]]), "empty"),
        (hello_with(populated=[[-1, 1]]), "does not ascend"),
        (hello_with(populated=[[0, 2], [1, 1]]), "does not ascend"),
        (hello_with(populated=[[0, 1 << 52]]), "too long"),
        (hello_with(host_cpu=[]), "host_cpu is not a JSON object"),
        (hello_with(host_cpu={}), "name is missing"),
        (hello_with(host_cpu=HOST_CPU | {"name": "a\nb"}), "name is not printable text"),
        (hello_with(host_cpu=HOST_CPU | {"family": -1}), "family is not an integer"),
        (hello_with(host_cpu=HOST_CPU | {"features": None}), "features is not printable text"),
        (hello_with(host_cpu=HOST_CPU | {"keeps_cpuid": 1}), "keeps_cpuid is neither true nor false"),
        (hello_with(cpuid=...), "cpuid is missing"),
        (hello_with(cpuid=[]), "a table of 0 CPUID leaves"),
        (hello_with(cpuid={}), "cpuid is not a list of"),
        (hello_with(cpuid=[1]), "cpuid is not a list of"),
        (hello_with(cpuid=[[0, 0, 0, 0, 0]]), "cpuid is not a list of"),
        (hello_with(cpuid=[[0, 0, 0, 0, 0, True]]), "cpuid is not a list of"),
        (hello_with(cpuid=[[0, 0, 0, 0, 0, 1 << 32]]), "more than 32 bits"),
        (hello_with(cpuid=[[0, 0, 0, 0, 0, -1]]), "more than 32 bits"),
        (hello_with(cpuid=[[1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 1]]), "do not ascend"),
        (hello_with(cpuid=[[leaf, 0, 0, 0, 0, 0] for leaf in range(257)]), "a table of 257 CPUID leaves"),
    ],
)
def test_a_malformed_hello_is_refused(body, match):
    with pytest.raises(BodyError, match=match):
        parse_body(FrameType.SOURCE_HELLO, body)
    decoder = FerryDecoder(Conversation(Side.DESTINATION))
    decoder.feed(PREAMBLE + struct.pack("<II", FrameType.SOURCE_HELLO, len(body)) + body)
    with pytest.raises(RecordError, match=match + r".*\(in SOURCE_HELLO at byte 48\)"):
        decoder.next_event()


def test_the_longest_hello_there_is_can_be_said(ends):
    hello = dataclasses.replace(
        HELLO,
        name="\N{GRINNING FACE}" * MAX_TEXT_CHARS,
        features=("\N{GRINNING FACE}" * MAX_NAME_CHARS,) * MAX_FEATURES,
        populated=tuple((PFN_MASK - 2 * (MAX_POPULATED_RUNS - i), 1) for i in range(MAX_POPULATED_RUNS)),
        cpuid=tuple(CpuidLeaf(*(0xFFFF_FFFF - MAX_LEAVES + i,) * 6) for i in range(MAX_LEAVES)),
    )
    source, destination = ends
    assert source.tell(destination, hello) == hello


def test_unknown_keys_are_ignored():
    assert parse_body(FrameType.SOURCE_HELLO, hello_with(colour="blue")) == HELLO


def digest_body(rows, *, count=None, flags=0, extra=b"", digest=bytes(16)):
    entries = np.array([(*row, digest) for row in rows], "<u8,<u4,<u4,V16")
    return struct.pack("<II", len(rows) if count is None else count, flags) + entries.tobytes() + extra


@pytest.mark.parametrize(
    ("frame_type", "body", "match"),
    [
        (FrameType.DIGESTS, b"1234567", "too short"),
        (FrameType.DIGESTS, digest_body([]), "flags 0x0 with 0 digests"),
        (FrameType.DIGESTS, digest_body([(0, 1, 0)], flags=2), "flags 0x2"),
        (FrameType.DIGESTS, digest_body([(0, 1, 0)], count=2), "does not hold 2 digests"),
        (FrameType.DIGESTS, digest_body([(0, 1, 0)], count=0xFFFF_FFFF), "does not hold 4294967295 digests"),
        (FrameType.DIGESTS, digest_body([(0, 1, 0)], extra=b"x"), "does not hold 1 digests"),
        (FrameType.DIGESTS, digest_body([(0, 1, 2)]), "a flag of a range"),
        (FrameType.DIGESTS, digest_body([(0, 1, 1)], digest=b"x" * 16), "an audited range has a digest"),
        (FrameType.DIGESTS, digest_body([(0, 0, 0)]), "not 1 to 65536 pages"),
        (FrameType.DIGESTS, digest_body([(0, 65537, 0)]), "not 1 to 65536 pages"),
        (FrameType.DIGESTS, digest_body([(1 << 52, 1, 0)]), "past the largest gfn"),
        (FrameType.DIGESTS, digest_body([((1 << 64) - 1, 1, 0)]), "past the largest gfn"),
        (FrameType.DIGESTS, digest_body([(0, 2, 0), (1, 1, 0)]), "do not ascend"),
        (FrameType.MISMATCH, b"1234567", "too short"),
        (FrameType.MISMATCH, struct.pack("<QII", 0, 0, 0), "does not hold 0 page digests"),
        (FrameType.MISMATCH, struct.pack("<QIIQ", 0, 2, 0, 0), "does not hold 2 page digests"),
        (FrameType.MISMATCH, struct.pack("<QIIQ", 0, 1, 1, 0), "reserved"),
        (FrameType.MISMATCH, struct.pack("<QIIQ", 1 << 52, 1, 0, 0), "past the largest gfn"),
        (FrameType.READY, b'{"verified_pages":-1}', "verified_pages is not an integer"),
        (FrameType.READY, b"{}", "verified_pages is missing"),
        (FrameType.COMMIT, b"", "body of 0 bytes, not 8"),
        (FrameType.COMMIT, struct.pack("<II", 2, 0), "flags 0x2"),
        (FrameType.COMMIT, struct.pack("<II", 1, 1), "reserved 0x1"),
        (FrameType.MISSING, b"1234567", "too short"),
        (FrameType.MISSING, struct.pack("<II", 0, 0), "does not hold 0 entries"),
        (FrameType.MISSING, struct.pack("<IIQQ", 2, 0, 0, 1), "does not hold 2 entries"),
        (FrameType.MISSING, struct.pack("<IIQQ", 1, 1, 0, 1), "reserved"),
        (FrameType.MISSING, struct.pack("<IIQQ", 1, 0, 0, 0), "a run is empty"),
        (FrameType.MISSING, struct.pack("<IIQQ", 1, 0, 1 << 52, 1), "past the largest gfn"),
        (FrameType.MISSING, struct.pack("<IIQQ", 1, 0, 1, (1 << 64) - 1), "past the largest gfn"),
        (FrameType.MISSING, struct.pack("<IIQQ", 1, 0, (1 << 52) - 1, 2), "past the largest gfn"),
        (FrameType.MISSING, struct.pack("<IIQQQQ", 2, 0, 0, 2, 1, 1), "do not ascend"),
        (FrameType.SWITCH, b"", "body of 0 bytes, not 8"),
        (FrameType.SWITCH, struct.pack("<II", 2, 0), "flags 0x2"),
        (FrameType.WANTED, struct.pack("<II", 0, 0), "does not hold 0 entries"),
        (FrameType.WANTED, struct.pack("<II65Q", 65, 0, *range(65)), "does not hold 65 entries"),
        (FrameType.WANTED, struct.pack("<IIQ", 1, 2, 0), "flags 0x2"),
        (FrameType.WANTED, struct.pack("<IIQQ", 2, 0, 5, 5), "do not ascend"),
        (FrameType.WANTED, struct.pack("<IIQ", 1, 0, 1 << 52), "too large"),
        (FrameType.PAGES, struct.pack("<II16sQ", 2, 0, bytes(16), 0), "does not hold 2 entries"),
        (FrameType.PAGES, struct.pack("<II16sQ", 1, 1, bytes(16), 0), "reserved"),
        (FrameType.PAGES, struct.pack("<II16sQQ", 2, 0, bytes(16), 1, 0xE << 60), "do not ascend"),
        (FrameType.PAGES, struct.pack("<II16sQ", 1, 0, bytes(16), 0xD << 60), "too large"),
        (FrameType.PAGES, struct.pack("<II16sQ", 1, 0, bytes(16), 0xE << 60 | 1 << 52), "too large"),
        (FrameType.COMPLETE, bytes(16), "body of 16 bytes, not 40"),
        (FrameType.COMPLETE, struct.pack("<5Q", 1, 2, 1, 1, 3), "longer than more of them"),
        (FrameType.COMPLETE, struct.pack("<5Q", 9, 9, 2, 1, 3), "longer than more of them"),
        (FrameType.RECOVER, b"{}", "proof is missing"),
        (FrameType.REFUSE, b'{"hint":"x"}', "reason is missing"),
        (FrameType.FAILED, b'{"reason":null}', "reason is not text"),
        (FrameType.FAILED, b'{"reason":"x","gfn":-1}', "gfn is not an integer"),
        (FrameType.FAILED, b'{"reason":"x","gfn":true}', "gfn is not an integer"),
        (FrameType.FAILED, b'{"reason":"x","hint":1}', "hint is not text"),
    ],
)
def test_malformed_frames_are_refused(frame_type, body, match):
    with pytest.raises(BodyError, match=match):
        parse_body(frame_type, body)


def test_layouts_have_the_sizes_of_the_specification():
    assert RUN_DIGEST.itemsize == 32
    assert [RUN_DIGEST.fields[name][1] for name in RUN_DIGEST.names] == [0, 8, 12, 16]
    assert body_of(digests(7, last=True)) == struct.pack("<IIQII", 1, 1, 7, 16, 0) + bytes(range(16))
    assert body_of(MISMATCH) == struct.pack("<QIIQQ", 16, 2, 0, 1, 1 << 63)
    assert body_of(Commit(paused=True)) == body_of(Switch(paused=True)) == struct.pack("<II", 1, 0)
    assert body_of(MISSING) == struct.pack("<IIQQQQ", 2, 0, 1, 2, 16, 1)
    assert body_of(WANTED) == struct.pack("<IIQQ", 2, 1, 1, 16)
    assert body_of(PAGES) == struct.pack("<II16sQQ", 2, 0, bytes(range(16)), 1, 0xE << 60 | 16)
    assert body_of(COMPLETE) == struct.pack("<5Q", 3, 500, 50, 60, 400)


def test_the_digest_of_pages_is_of_what_stands_in_the_frame_and_after_it():
    expected = xxhash.xxh3_128_digest(struct.pack("<QQ", 1, 0xE << 60 | 16) + CONTENT.tobytes())
    assert digest_of(PAGES.gfns, PAGES.zero, [CONTENT[:5].data, CONTENT[5:].data]) == expected


@pytest.mark.parametrize(
    ("stage", "frame", "match"),
    [
        (Stage.GREETING, dataclasses.replace(HELLO, cpus=0), "cpus is no"),
        (Stage.DIGESTING, digests(*range(0, 16 * (MAX_DIGESTS + 1), 16)), "is longer than"),
        (Stage.DIGESTING, digests(), "flags 0x0 with 0 digests"),
        (Stage.DIGESTING, digests(-1 & (1 << 64) - 1), "past the largest gfn"),
        (Stage.DIGESTING, Failed(reason="x", gfn=1 << 60), "gfn is not an integer"),
        (
            Stage.GREETING,
            SourceHello(**{**{f: getattr(HELLO, f) for f in HELLO.__slots__}, "version": b"x"}),
            "written",
        ),
    ],
)
def test_what_the_peer_would_refuse_is_not_sent(ends, stage, frame, match):
    advance(ends, stage)
    with pytest.raises(LocalStreamError, match=match):
        ends[0].encoder.frame(frame)
    assert ends[0].stage is stage


def test_text_from_the_peer_is_safe_to_print():
    frame = parse_body(FrameType.FAILED, json.dumps({"reason": "a\x1b[2Jb\nc\ud800" + "x" * 5000}).encode())
    assert frame.reason == "a [2Jb c " + "x" * 1015
    assert len(frame.reason) == 1024
