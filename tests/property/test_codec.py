"""The codec under any chunking, truncation and mutation: it parses, or raises RemoteStreamError."""

import contextlib
import dataclasses
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.core.cpuid import SOFT_CPU, CpuidLeaf
from pageferry.core.errors import RemoteStreamError, TruncatedError
from pageferry.core.state import (
    INITIAL_FPU_REGS,
    DescriptorTable,
    DeviceState,
    ExtendedState,
    LapicState,
    MachineState,
    MpState,
    PendingException,
    Segment,
    VcpuState,
)
from pageferry.stream.decoder import Decoder
from pageferry.stream.encoder import Encoder
from pageferry.stream.ferry import FerryDecoder, FerryEncoder
from pageferry.stream.ferry_bodies import body_of as frame_body
from pageferry.stream.ferry_bodies import parse_body as parse_frame
from pageferry.stream.ferry_frames import (
    TYPE_OF,
    Commit,
    DestinationHello,
    Digests,
    Failed,
    Join,
    Joined,
    Mismatch,
    Ready,
    Refuse,
    Running,
    SourceHello,
)
from pageferry.stream.ferry_order import Conversation, Side
from pageferry.stream.format import EXTENSIONS, OPTIONAL, PageType, RecordType, payload_bytes
from pageferry.stream.hvm_context import decode_machine_state, encode_machine_state
from pageferry.stream.intake import NEED_DATA
from pageferry.stream.records import (
    BodyError,
    CpuidPolicy,
    DeltaPages,
    End,
    HvmContext,
    HvmParams,
    MsrEntry,
    MsrPolicy,
    PackedPages,
    PageData,
    PageDataHeader,
    StaticDataEnd,
    TscInfo,
    ZeroPages,
)

# -- streams -----------------------------------------------------------------------------------------------------------

u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
leaves = st.builds(CpuidLeaf, leaf=u32, subleaf=u32, eax=u32, ebx=u32, ecx=u32, edx=u32)
msrs = st.builds(MsrEntry, index=u32, flags=u32, value=u64)
unknown_types = st.integers(OPTIONAL, (1 << 32) - 1).filter(lambda number: number not in frozenset(RecordType))
pages = st.lists(st.tuples(st.integers(0, (1 << 52) - 1), st.sampled_from(list(PageType))), min_size=1, max_size=6)


@st.composite
def streams(draw):
    """A legal stream: its bytes, and where each record begins."""
    encoder = Encoder()
    pieces, starts = [encoder.header(agreed=EXTENSIONS)], [0]

    def write(piece):
        starts.append(sum(map(len, pieces)))
        pieces.append(piece)

    if draw(st.booleans()):
        write(encoder.record(CpuidPolicy(leaves=tuple(draw(st.lists(leaves, min_size=1, max_size=3))))))
    if draw(st.booleans()):
        write(encoder.record(MsrPolicy(entries=tuple(draw(st.lists(msrs, min_size=1, max_size=3))))))
    write(encoder.record(StaticDataEnd()))
    for batch in draw(st.lists(pages, min_size=1, max_size=3)):
        types = np.array([page_type for _, page_type in batch], np.uint8)
        head = encoder.page_data(np.array([pfn for pfn, _ in batch], np.uint64), types)
        write(head + np.resize(np.arange(251, dtype=np.uint8), payload_bytes(types)).tobytes())
    if draw(st.booleans()):
        zero = draw(st.sets(st.integers(0, (1 << 52) - 1), min_size=1, max_size=6))
        write(encoder.record(ZeroPages(pfns=np.array(sorted(zero), np.uint64))))
    if draw(st.booleans()):
        packed = draw(st.sets(st.integers(0, (1 << 52) - 1), min_size=1, max_size=6))
        data = draw(st.binary(min_size=1, max_size=50))
        kind = draw(st.sampled_from([PackedPages, DeltaPages]))
        write(encoder.record(kind(pfns=np.array(sorted(packed), np.uint64), data=data)))
    if draw(st.booleans()):
        body = draw(st.binary(max_size=20))
        write(struct.pack("<II", draw(unknown_types), len(body)) + body + bytes(-len(body) % 8))
    state = [
        TscInfo(mode=draw(u32), khz=draw(u32), nsec=draw(u64), incarnation=draw(u32)),
        HvmParams(params=tuple(draw(st.lists(st.tuples(u64, u64), max_size=3)))),
        HvmContext(data=draw(st.binary(min_size=1, max_size=40))),
    ]
    for record in (*draw(st.permutations(state)), End()):
        write(encoder.record(record))
    return b"".join(pieces), starts


def comparable(event):
    if isinstance(event, PageData | PageDataHeader):
        payload = event.payload if isinstance(event, PageData) else event.payload_bytes
        return event.offset, event.pfns.tolist(), event.types.tolist(), payload
    if isinstance(event, ZeroPages):
        return event.pfns.tolist()
    if isinstance(event, PackedPages | DeltaPages):
        return type(event), event.pfns.tolist(), event.data
    return event


def drain(decoder, into):
    while (event := decoder.next_event()) is not NEED_DATA:
        into.append(comparable(event))


def decode(data):
    decoder, events = Decoder(agreed=EXTENSIONS), []
    decoder.feed(data)
    drain(decoder, events)
    return decoder, events


@given(streams(), st.lists(st.integers(1, 5000), min_size=1, max_size=10))
def test_any_chunking_gives_the_same_records(stream, sizes):
    data, _ = stream
    whole = decode(data)[1]
    decoder, events, at, turn = Decoder(agreed=EXTENSIONS), [], 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        decoder.feed(memoryview(data)[at : at + size])
        drain(decoder, events)
        at, turn = at + size, turn + 1
    decoder.eof()
    assert events == whole


@given(streams())
def test_one_byte_at_a_time_gives_the_same_records(stream):
    data, _ = stream
    decoder, events = Decoder(agreed=EXTENSIONS), []
    for at in range(len(data)):
        decoder.feed(data[at : at + 1])
        drain(decoder, events)
    decoder.eof()
    assert events == decode(data)[1]


@given(streams())
def test_feeding_what_is_wanted_never_leaves_a_byte_over(stream):
    data, starts = stream
    decoder, at, records = Decoder(zero_copy=True, agreed=EXTENSIONS), 0, []
    while not decoder.ended:
        event = decoder.next_event()
        if event is NEED_DATA:
            assert decoder.trailing_data == b""
            wanted = decoder.wanted_bytes
            assert 0 < wanted <= len(data) - at
            decoder.feed(data[at : at + wanted])
            at += wanted
            continue
        records.append(event)
        if isinstance(event, PageDataHeader):
            assert decoder.trailing_data == b""
            at += event.payload_bytes
            decoder.payload_received()
    assert at == decoder.offset == len(data)
    assert [event.offset for event in records if isinstance(event, PageDataHeader)] == [
        start for start in starts if data[start : start + 4] == b"\1\0\0\0"
    ]


@given(streams(), st.data())
def test_a_cut_anywhere_is_truncated_and_never_wrong(stream, choose):
    data, starts = stream
    cut = choose.draw(st.integers(0, len(data) - 1) | st.sampled_from(starts), label="cut")
    decoder, events = decode(data[:cut])
    assert events == decode(data)[1][: len(events)]
    with pytest.raises(TruncatedError) as caught:
        decoder.eof()
    assert caught.value.offset is None or caught.value.offset in [*starts, 24]


def mutate(draw, data):
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        match draw(st.sampled_from(["set", "flip", "word", "delete", "insert"])):
            case "set":
                data[at] = draw(st.integers(0, 255))
            case "flip":
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "word":
                data[at : at + 4] = draw(st.sampled_from([bytes(4), b"\xff" * 4, b"\1\0\0\0", b"\0\0\0\x80"]))
            case "delete":
                del data[at : at + draw(st.integers(1, 16))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
        if not data:
            data = bytearray(b"x")
    return bytes(data)


def taken_or_refused(decoder, data):
    decoder.feed(data)
    try:
        while decoder.next_event() is not NEED_DATA:
            pass
        decoder.eof()
    except RemoteStreamError:
        with pytest.raises(RemoteStreamError):
            decoder.eof()  # it stays so


@given(streams(), st.data())
def test_mutated_bytes_parse_or_raise_remote_stream_error(stream, choose):
    taken_or_refused(Decoder(gfn_limit=1 << 51), mutate(choose.draw, stream[0]))


@given(st.binary(max_size=200), st.sampled_from(["nothing", "headers", "static", "page"]))
def test_garbage_parses_or_raises_remote_stream_error(garbage, after):
    encoder = Encoder()
    prefix = [encoder.header(), encoder.record(StaticDataEnd()), encoder.page_data([0]) + bytes(4096)]
    count = ["nothing", "headers", "static", "page"].index(after)
    taken_or_refused(Decoder(agreed=EXTENSIONS), b"".join(prefix[:count]) + garbage)


# -- machine state -----------------------------------------------------------------------------------------------------

segments = st.builds(Segment, selector=u16, base=u64, limit=u32, attributes=st.integers(0, 0xFFF))
tables = st.builds(DescriptorTable, base=u64, limit=u32)
_WIDE = [
    *("rax", "rcx", "r8", "r15", "rip", "rflags", "cr0", "cr2", "cr3", "cr4", "dr6", "dr7"),
    *("sysenter_eip", "shadow_gs", "lstar", "efer", "tsc_aux", "tsc"),
]
exceptions = st.builds(PendingException, vector=st.integers(0, 31), error_code=st.none() | u32, payload=st.none() | u64)
extended_states = st.builds(ExtendedState, xcr0=u64.map(lambda bits: bits | 1)) | st.builds(
    ExtendedState,
    xcr0=u64.map(lambda bits: bits | 1),
    in_use=st.integers(1, (1 << 62) - 1).map(lambda bits: bits << 2),
    area=st.binary(min_size=1, max_size=99),
)
lapics = st.builds(
    LapicState, base=u64, registers=st.binary(min_size=16, max_size=16).map(lambda data: data * 64), tsc_deadline=u64
)
vcpus = st.builds(
    VcpuState,
    **dict.fromkeys(_WIDE, u64),
    **dict.fromkeys(["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldtr"], segments),
    **dict.fromkeys(["gdtr", "idtr"], tables),
    pending_event=u32,
    error_code=u32,
    interrupt_shadow=st.integers(0, 3),
    nmi_pending=st.booleans(),
    nmi_masked=st.booleans(),
    triple_fault_pending=st.booleans(),
    pending_exception=st.none() | exceptions,
    mp_state=st.sampled_from(MpState),
    extended=st.none() | extended_states,
    fpu_regs=st.just(INITIAL_FPU_REGS) | st.just(bytes(512)) | st.binary(min_size=512, max_size=512),
    msrs=st.dictionaries(u32, u64, max_size=3).map(lambda found: tuple(sorted(found.items()))),
)
device_names = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=64)
with_lapics = st.lists(st.builds(dataclasses.replace, vcpus, lapic=lapics), min_size=1, max_size=3)
machines = st.builds(
    MachineState,
    vcpus=(st.lists(vcpus, min_size=1, max_size=3) | with_lapics).map(tuple),
    tsc_khz=st.none() | u32.filter(bool),
    kvm_clock_ns=st.none() | u64,
    devices=st.dictionaries(device_names, st.binary(max_size=50), max_size=3).map(
        lambda found: tuple(DeviceState(name=name, data=data) for name, data in found.items())
    ),
)


@given(machines)
def test_machine_state_goes_there_and_back(state):
    assert decode_machine_state(encode_machine_state(state)) == state


_CONTEXT = encode_machine_state(
    MachineState(
        vcpus=(
            VcpuState(
                rip=1,
                rflags=2,
                cr0=0,
                cr3=0,
                cr4=0,
                efer=0,
                fpu_regs=INITIAL_FPU_REGS,
                msrs=((1, 2), (3, 4)),
                nmi_masked=True,
                pending_exception=PendingException(vector=14, error_code=2, payload=5),
                extended=ExtendedState(xcr0=7, in_use=4, area=bytes(range(20))),
                lapic=LapicState(base=0xFEE0_0900, registers=bytes(1024)),
                **dict.fromkeys(
                    ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldtr"],
                    Segment(selector=0, base=0, limit=0, attributes=0),
                ),
                **dict.fromkeys(["gdtr", "idtr"], DescriptorTable(base=0, limit=0)),
            ),
        ),
        devices=(DeviceState(name="com1", data=b"data"),),
        kvm_clock_ns=1,
    )
)


@given(st.data())
def test_mutated_context_parses_or_raises_remote_stream_error(choose):
    data = mutate(choose.draw, _CONTEXT)
    with contextlib.suppress(RemoteStreamError):
        state = decode_machine_state(data)
        assert decode_machine_state(encode_machine_state(state)) == state


# -- the ferry ---------------------------------------------------------------------------------------------------------

names = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=64)
texts = st.text(max_size=100)
gfns = st.integers(0, (1 << 40) - 1)


@st.composite
def runs(draw, most=8):
    """Ascending, disjoint (first gfn, pages)."""
    found, at = [], 0
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(1, 65536)), max_size=most)):
        found.append((at + gap, length))
        at += gap + length
    return tuple(found)


@st.composite
def digests(draw):
    found = draw(runs())
    data = draw(st.binary(min_size=16 * len(found), max_size=16 * len(found)))
    audited = np.array(draw(st.lists(st.booleans(), min_size=len(found), max_size=len(found))), np.bool_)
    given = np.frombuffer(data, np.uint8).reshape(-1, 16).copy()
    given[audited] = 0
    return Digests(
        first_gfns=np.array([first for first, _ in found], np.uint64),
        pages=np.array([length for _, length in found], np.uint32),
        digests=given,
        audited=audited,
        last=True if not found else draw(st.booleans()),
    )


cpuid_tables = st.lists(leaves, min_size=1, max_size=6, unique_by=lambda leaf: leaf[:2]).map(sorted).map(tuple)
frames = st.one_of(
    st.builds(
        SourceHello,
        version=names,
        memory_bytes=st.integers(1, 1 << 30).map(lambda pages: pages * 4096),
        cpus=st.integers(1, 1024),
        accel=names,
        cpuid=cpuid_tables,
        migration_id=names,
        features=st.lists(names, max_size=4).map(tuple),
        machine=names,
        name=names,
        populated=runs(),
        connections=st.integers(1, 16),
    ),
    st.builds(
        DestinationHello, version=names, accel=names, features=st.lists(names, max_size=4).map(tuple), token=names
    ),
    st.builds(Join, proof=names, index=st.integers(1, 15)),
    st.builds(Joined),
    st.builds(Refuse, reason=names, hint=names),
    digests(),
    st.builds(
        Mismatch,
        first_gfn=gfns,
        page_digests=st.lists(u64, min_size=1, max_size=5).map(lambda d: np.array(d, np.uint64)),
    ),
    st.builds(Ready, verified_pages=gfns),
    st.builds(Commit, paused=st.booleans()),
    st.builds(Running),
    st.builds(Failed, reason=names, hint=names, gfn=st.none() | gfns),
)


@given(frames)
def test_frames_go_there_and_back(frame):
    body = frame_body(frame)
    back = parse_frame(TYPE_OF[type(frame)], body)
    assert frame_body(back) == body
    if not isinstance(frame, Digests | Mismatch):
        assert back == frame


@given(frames, st.data())
def test_mutated_frames_parse_or_are_body_errors(frame, choose):
    body = mutate(choose.draw, frame_body(frame) or b"{}")
    with contextlib.suppress(BodyError):
        assert isinstance(parse_frame(TYPE_OF[type(frame)], body), type(frame))


@given(texts, texts)
def test_any_reason_can_be_sent_and_is_safe_to_print(reason, hint):
    encoder = FerryEncoder(Conversation(Side.DESTINATION))
    decoder = FerryDecoder(Conversation(Side.SOURCE))
    decoder.feed(encoder.preamble() + encoder.frame(Failed(reason=reason * 20, hint=hint * 20)))
    frame = decoder.next_event()
    assert isinstance(frame, Failed)
    assert frame.reason.isprintable()
    assert frame.hint.isprintable()
    assert len(frame.reason) == min(len(reason) * 20, 1024)


HELLO = SourceHello(
    version="0.1.0", memory_bytes=1 << 28, cpus=1, accel="soft", cpuid=SOFT_CPU, migration_id="1", populated=((0, 16),)
)


def said_by_source():
    """A source's whole side, and its decoder's peer's."""
    source, destination = Conversation(Side.SOURCE), Conversation(Side.DESTINATION)
    ours, theirs = FerryEncoder(source), FerryEncoder(destination)
    heard, answered = FerryDecoder(destination), FerryDecoder(source)
    data = [ours.preamble(), ours.frame(HELLO)]
    answer = [theirs.preamble()]
    for piece in data:
        heard.feed(piece)
    assert heard.next_event() == HELLO
    answer.append(theirs.frame(DestinationHello(version="1", accel="kvm")))
    for piece in answer:
        answered.feed(piece)
    assert isinstance(answered.next_event(), DestinationHello)
    return b"".join(data), b"".join(answer)


@given(st.data())
def test_mutated_conversation_parses_or_raises_remote_stream_error(choose):
    from_source, from_destination = said_by_source()
    side = choose.draw(st.sampled_from(Side))
    conversation = Conversation(side)
    if side is Side.SOURCE:
        encoder = FerryEncoder(conversation)
        encoder.preamble()
        encoder.frame(HELLO)
    data = from_destination if side is Side.SOURCE else from_source
    taken_or_refused(FerryDecoder(conversation), mutate(choose.draw, data))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_any_chunking_of_a_conversation_gives_the_same_frames(sizes):
    data, _ = said_by_source()
    decoder, events, at, turn = FerryDecoder(Conversation(Side.DESTINATION)), [], 0, 0
    while at < len(data):
        decoder.feed(data[at : at + sizes[turn % len(sizes)]])
        at, turn = at + sizes[turn % len(sizes)], turn + 1
        drain(decoder, events)
    assert events == [HELLO]
