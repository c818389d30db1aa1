"""The libxc stream's codec: layouts, both ways to take page data, and every way to be wrong."""

import struct
import tracemalloc

import numpy as np
import pytest

from pageferry.core.cpuid import CpuidLeaf
from pageferry.core.errors import LocalStreamError, OrderError, RecordError, TruncatedError, VersionError
from pageferry.stream import format as fmt
from pageferry.stream.decoder import Decoder
from pageferry.stream.encoder import Encoder
from pageferry.stream.format import BodyError, PageType, RecordType
from pageferry.stream.intake import NEED_DATA
from pageferry.stream.records import (
    TYPE_OF,
    Audit,
    CpuidPolicy,
    DeltaPages,
    End,
    Fence,
    HvmContext,
    HvmParams,
    MsrEntry,
    MsrPolicy,
    PackedPages,
    PageData,
    PageDataHeader,
    SkippedRecord,
    StaticDataEnd,
    StreamHeader,
    TscInfo,
    ZeroPages,
    parse_body,
)

HEADER = Encoder().header()
PAGE = bytes(range(256)) * 16


def record(number, body=b"", *, length=None, padding=None):
    pad = bytes(-len(body) % 8) if padding is None else padding
    return struct.pack("<II", number, len(body) if length is None else length) + body + pad


def page_record(words, payload=b"", *, count=None, reserved=0):
    count = len(words) if count is None else count
    return record(1, struct.pack(f"<II{len(words)}Q", count, reserved, *words) + payload)


STATIC = record(0x10)
ONE_PAGE = page_record([0], PAGE)
TSC = record(8, bytes(24))
PARAMS = record(0xA, bytes(8))
CONTEXT = record(9, b"context")
END = record(0)


def drain(data, **options):
    decoder = Decoder(**options)
    decoder.feed(data)
    events = []
    while (event := decoder.next_event()) is not NEED_DATA:
        events.append(event)
    return decoder, events


def begun(version=3):
    encoder = Encoder()
    encoder.header(StreamHeader(version=version))
    if version == 3:
        encoder.record(StaticDataEnd())
    return encoder


def with_page(version=3):
    encoder = begun(version)
    encoder.page_data([0])
    return encoder


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_layouts_have_the_sizes_of_the_specification():
    sizes = {
        fmt.IMAGE_HEADER: 24,
        fmt.DOMAIN_HEADER: 16,
        fmt.RECORD_HEADER: 8,
        fmt.PAGE_DATA_HEAD: 8,
        fmt.CPUID_LEAF: 24,
        fmt.MSR_ENTRY: 16,
        fmt.TSC_INFO: 24,
        fmt.HVM_PARAMS_HEAD: 8,
        fmt.HVM_PARAM: 16,
    }
    assert {layout: layout.size for layout in sizes} == sizes


def test_headers_byte_by_byte():
    expected = "ffffffffffffffff 58454e46 00000003 0000 000000000000  02000000 0c00 0000 04000000 11000000"
    assert expected.replace(" ", "") == HEADER.hex()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (
            CpuidPolicy(leaves=(CpuidLeaf(leaf=1, subleaf=2, eax=3, ebx=4, ecx=5, edx=6),)),
            struct.pack("<6I", *range(1, 7)),
        ),
        (MsrPolicy(entries=(MsrEntry(index=0xCE, flags=0, value=1 << 63),)), struct.pack("<IIQ", 0xCE, 0, 1 << 63)),
        (StaticDataEnd(), b""),
    ],
)
def test_static_records_byte_by_byte(value, expected):
    encoder = Encoder()
    encoder.header()
    whole = encoder.record(value)
    assert whole[4:] == struct.pack("<I", len(expected)) + expected
    assert drain(HEADER + whole)[1][1] == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (TscInfo(mode=1, khz=2, nsec=3 << 32, incarnation=4), struct.pack("<IIQII", 1, 2, 3 << 32, 4, 0)),
        (HvmParams(params=((1, 2), (3, 4))), struct.pack("<II4Q", 2, 0, 1, 2, 3, 4)),
        (HvmContext(data=b"abc"), b"abc"),
    ],
)
def test_state_records_byte_by_byte(value, expected):
    whole = with_page().record(value)
    assert whole[4:] == struct.pack("<I", len(expected)) + expected + bytes(-len(expected) % 8)
    assert drain(HEADER + STATIC + ONE_PAGE + whole)[1][3] == value


def test_page_data_byte_by_byte():
    head = begun().page_data(np.array([5, 1 << 51, 6, 7]), np.array([0, 0xF, 0xE, 0], np.uint8))
    words = [5, 0xF << 60 | 1 << 51, 0xE << 60 | 6, 7]
    assert head == struct.pack("<IIII4Q", 1, 8 + 32 + 8192, 4, 0, *words)


def test_zero_pages_byte_by_byte():
    encoder = Encoder()
    header = encoder.header(agreed={RecordType.ZERO_PAGES})
    assert header == HEADER
    encoder.record(StaticDataEnd())
    encoder.page_data([0])
    whole = encoder.record(ZeroPages(pfns=np.array([7, (1 << 52) - 1], np.uint64)))
    assert whole == struct.pack("<IIII2Q", 0x50470001, 24, 2, 0, 7, (1 << 52) - 1)
    _, events = drain(HEADER + STATIC + ONE_PAGE + whole, agreed={RecordType.ZERO_PAGES})
    assert events[3].pfns.tolist() == [7, (1 << 52) - 1]
    with pytest.raises(ValueError, match="read-only"):
        events[3].pfns[0] = 1


@pytest.mark.parametrize(("kind", "number"), [(PackedPages, 0x50470002), (DeltaPages, 0x50470003)])
def test_packed_pages_byte_by_byte(kind, number):
    encoder = Encoder()
    encoder.header(agreed={number})
    encoder.record(StaticDataEnd())
    encoder.page_data([0])
    before = encoder.offset
    whole = encoder.record(kind(pfns=np.array([7, 9], np.uint64), data=b"small"))
    assert whole == struct.pack("<IIII2Q", number, 29, 2, 0, 7, 9) + b"small\0\0\0"
    assert encoder.offset == before + len(whole)
    _, events = drain(HEADER + STATIC + ONE_PAGE + whole, agreed={number})
    assert isinstance(events[3], kind)
    assert events[3].pfns.tolist() == [7, 9]
    assert events[3].data == b"small"
    with pytest.raises(ValueError, match="read-only"):
        events[3].pfns[0] = 1


ONE = np.array([1], np.uint64)


AUDIT = Audit(first_gfns=ONE, pages=np.array([1], np.uint32), digests=np.zeros((1, 16), np.uint8))


OURS = [ZeroPages(pfns=ONE), PackedPages(pfns=ONE, data=b"x"), DeltaPages(pfns=ONE, data=b"x"), AUDIT]
OURS += [Fence(number=1)]


@pytest.mark.parametrize("record_of_ours", OURS)
def test_an_extension_needs_an_agreement_at_both_ends_and_is_mandatory_if_it_changes_memory(record_of_ours):
    extension = TYPE_OF[type(record_of_ours)]
    assert extension in fmt.EXTENSIONS
    assert bool(extension & fmt.OPTIONAL) == (extension in (RecordType.AUDIT, RecordType.FENCE))
    with pytest.raises(LocalStreamError, match="not agreed on"):
        with_page().record(record_of_ours)
    refused(HEADER + STATIC + ONE_PAGE + record(extension, struct.pack("<IIQ", 1, 0, 1)), OrderError, "not agreed on")


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (struct.pack("<II", 0, 0), "body of 8 bytes is not between 16 and 8200"),
        (struct.pack("<II1025Q", 1025, 0, *range(1025)), "body of 8208 bytes"),
        (struct.pack("<IIQ", 2, 0, 1), "does not hold 2 pages"),
        (struct.pack("<IIQ", 1, 1, 1), "reserved"),
        (struct.pack("<IIQ", 1, 0, 1 << 52), "bits 63 to 52"),
        (struct.pack("<IIQ", 1, 0, 100), "gfn 0x64 is outside the guest"),
        (struct.pack("<IIQQ", 2, 0, 5, 5), "do not ascend"),
        (struct.pack("<IIQQ", 1, 0, 5, 6), "holds more than 1 pages"),
    ],
)
def test_wrong_zero_pages(body, match):
    data = HEADER + STATIC + ONE_PAGE + record(RecordType.ZERO_PAGES, body)
    refused(data, RecordError, match, agreed={RecordType.ZERO_PAGES}, gfn_limit=100)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (struct.pack("<IIQ", 1, 0, 1), "body of 16 bytes is not between 17 and"),
        (struct.pack("<IIQ", 0, 0, 1) + b"x", "does not hold 0 pages"),
        (struct.pack("<II1025Q", 1025, 0, *range(1025)) + b"x", "does not hold 1025 pages"),
        (struct.pack("<IIQ", 3, 0, 1) + b"x", "does not hold 3 pages"),
        (struct.pack("<IIQ", 1, 1, 1) + b"x", "reserved"),
        (struct.pack("<IIQ", 1, 0, 1 << 52) + b"x", "bits 63 to 52"),
        (struct.pack("<IIQQ", 2, 0, 6, 5) + b"x", "do not ascend"),
        (struct.pack("<IIQ", 1, 0, 100) + b"x", "gfn 0x64 is outside the guest"),
        (struct.pack("<IIQQ", 2, 0, 5, 6), "0 bytes are not 2 pages packed"),
        (struct.pack("<IIQ", 1, 0, 5) + PAGE, "4096 bytes are not 1 pages packed"),
    ],
)
@pytest.mark.parametrize("number", [RecordType.PACKED_PAGES, RecordType.DELTA_PAGES])
def test_wrong_packed_pages(body, match, number):
    data = HEADER + STATIC + ONE_PAGE + record(number, body)
    refused(data, RecordError, match, agreed={number}, gfn_limit=100)


def test_encoder_counts_the_page_data_that_the_caller_sends():
    encoder = begun()
    before = encoder.offset
    head = encoder.page_data([1, 2])
    assert encoder.offset == before + len(head) + 8192


# -- reading -----------------------------------------------------------------------------------------------------------


def test_page_data_comes_with_its_payload():
    _, events = drain(HEADER + STATIC + page_record([9, 0xF << 60 | 8, 7], PAGE + PAGE[::-1]))
    page_data = events[2]
    assert isinstance(page_data, PageData)
    assert page_data.pfns.tolist() == [9, 8, 7]
    assert page_data.types.tolist() == [0, 15, 0]
    assert page_data.payload == PAGE + PAGE[::-1]
    assert page_data.offset == len(HEADER + STATIC)


def test_zero_copy_never_wants_a_byte_of_page_data():
    first, second = page_record([9, 0xF << 60 | 8, 7], PAGE + PAGE[::-1]), page_record([0xE << 60 | 3])
    stream = HEADER + STATIC + first + second + TSC + CONTEXT + END
    decoder, at, received, events = Decoder(zero_copy=True), 0, b"", []
    while not decoder.ended:
        event = decoder.next_event()
        if event is NEED_DATA:
            piece = stream[at : at + decoder.wanted_bytes]
            assert piece
            decoder.feed(piece)
            at += len(piece)
        elif isinstance(event, PageDataHeader):
            assert decoder.wanted_bytes == 0
            received += stream[at : at + event.payload_bytes]
            at += event.payload_bytes
            decoder.payload_received()
            events.append(event)
        else:
            events.append(event)
    assert received == PAGE + PAGE[::-1]
    assert at == decoder.offset == len(stream)
    assert [event.payload_bytes for event in events if isinstance(event, PageDataHeader)] == [8192, 0]
    decoder.eof()


@pytest.mark.parametrize(
    ("entries", "run"),
    [
        ([5], range(5, 6)),
        ([5, 6, 7], range(5, 8)),
        ([5, 7, 8], None),
        ([5, 5, 7], None),
        ([5, 7, 6, 8], None),
        ([7, 6, 5], None),
        ([5, 0xF << 60 | 6], None),
        ([0xE << 60 | 5, 0xE << 60 | 6], None),
    ],
)
def test_neighbours_that_all_carry_data_are_told_as_a_run(entries, run):
    carried = sum(not entry >> 60 for entry in entries)
    decoder = Decoder(zero_copy=True)
    decoder.feed(b"")
    stream, at = HEADER + STATIC + page_record(entries, PAGE * carried), 0
    while not isinstance(event := decoder.next_event(), PageDataHeader):
        if event is NEED_DATA:
            piece = stream[at : at + decoder.wanted_bytes]
            decoder.feed(piece)
            at += len(piece)
    assert event.run == run
    assert event.pfns.tolist() == [entry & (1 << 60) - 1 for entry in entries]
    assert event.types.tolist() == [entry >> 60 for entry in entries]
    assert event.payload_bytes == 4096 * carried
    for array in (event.pfns, event.types):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_run_outside_the_guest_is_refused():
    decoder = Decoder(gfn_limit=7)
    decoder.feed(HEADER + STATIC + page_record([5, 6, 7], PAGE * 3))
    for _ in range(2):
        decoder.next_event()
    with pytest.raises(RecordError, match="gfn 0x7 is outside the guest"):
        decoder.next_event()


def test_zero_copy_misuse_is_the_callers_error():
    decoder = Decoder(zero_copy=True)
    with pytest.raises(ValueError, match="25 bytes fed where 24 are wanted"):
        decoder.feed(bytes(25))
    with pytest.raises(RuntimeError, match="no page data is due"):
        decoder.payload_received()
    for piece in (HEADER[:24], HEADER[24:], STATIC, ONE_PAGE[:8], ONE_PAGE[8:16], ONE_PAGE[16:24]):
        decoder.feed(piece)
        event = decoder.next_event()
        while event is not NEED_DATA and not isinstance(event, PageDataHeader):
            event = decoder.next_event()
    with pytest.raises(RuntimeError, match="page data is due"):
        decoder.next_event()
    with pytest.raises(ValueError, match="1 bytes fed where 0 are wanted"):
        decoder.feed(b"x")
    with pytest.raises(TruncatedError, match="in PAGE_DATA"):
        decoder.eof()


def test_pages_cannot_be_written_to():
    head = drain(HEADER + STATIC + ONE_PAGE)[1][2]
    with pytest.raises(ValueError, match="read-only"):
        head.pfns[0] = 1


def test_version_2_has_no_static_data():
    encoder = Encoder()
    stream = encoder.header(StreamHeader(version=2)) + encoder.page_data([0]) + PAGE
    stream += b"".join(encoder.record(each) for each in (TscInfo(), HvmParams(), HvmContext(data=b"x"), End()))
    decoder, events = drain(stream)
    assert decoder.ended
    assert events[0].version == 2
    with pytest.raises(
        OrderError, match=r"version 2 stream of an x86 HVM guest has no such record \(in STATIC_DATA_END at"
    ):
        drain(stream[:40] + STATIC)
    encoder = begun(version=2)
    with pytest.raises(LocalStreamError, match="has no such record"):
        encoder.record(StaticDataEnd())


def test_what_follows_the_end_is_kept():
    decoder, _ = drain(HEADER + STATIC + ONE_PAGE + TSC + CONTEXT + END + b"more")
    assert decoder.ended
    assert decoder.trailing_data == b"more"
    assert decoder.wanted_bytes == 0
    decoder.eof()


def test_unknown_optional_record_is_reported_and_skipped():
    for body in (b"", b"x", bytes(100_000)):
        unknown = record(0x8000_0055, body)
        decoder, events = drain(HEADER + unknown + STATIC)
        assert events[1:] == [
            SkippedRecord(record_type=0x8000_0055, length_bytes=len(body), offset=40),
            StaticDataEnd(),
        ]
        with pytest.raises(TruncatedError, match="stops after"):
            decoder.eof()


def test_a_skipped_body_is_not_kept():
    decoder = Decoder()
    decoder.feed(HEADER + struct.pack("<II", 0x8000_0001, 128 << 20))
    assert [type(decoder.next_event()) for _ in range(2)] == [StreamHeader, SkippedRecord]
    tracemalloc.start()
    for _ in range(128):
        assert decoder.next_event() is NEED_DATA
        assert decoder.wanted_bytes == 1 << 20
        decoder.feed(bytes(1 << 20))
    assert decoder.next_event() is NEED_DATA
    assert decoder.wanted_bytes == 8
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    decoder.feed(STATIC)
    assert decoder.next_event() == StaticDataEnd()


# -- what is wrong -----------------------------------------------------------------------------------------------------


def refused(data, error, match, **options):
    with pytest.raises(error, match=match) as caught:
        drain(data, **options)
    assert type(caught.value) is error
    return caught.value


def image(marker=fmt.MARKER, image_id=fmt.IMAGE_ID, version=3, options=0, reserved=0):
    return struct.pack(">QIIHHI", marker, image_id, version, options, 0, reserved)


@pytest.mark.parametrize(
    ("header", "error", "match"),
    [
        (image(marker=0), RecordError, r"not a libxc migration stream.* \(in image header at byte 0\)"),
        (image(image_id=1), RecordError, "not a libxc migration stream"),
        (image(version=4), VersionError, r"version 4 is not one we read \(2 to 3\) \(in image header at byte 0\)"),
        (image(version=1), VersionError, "version 1"),
        (image(options=1), RecordError, "big-endian"),
        (image(options=2), RecordError, "reserved"),
        (image(reserved=1), RecordError, "reserved"),
        (
            image() + struct.pack("<IHHII", 1, 12, 0, 4, 17),
            RecordError,
            r"x86 PV guest.* \(in domain header at byte 24\)",
        ),
        (image() + struct.pack("<IHHII", 3, 12, 0, 4, 17), RecordError, "domain type 3"),
        (image() + struct.pack("<IHHII", 2, 16, 0, 4, 17), RecordError, "page shift 16"),
        (image() + struct.pack("<IHHII", 2, 12, 1, 4, 17), RecordError, "reserved"),
    ],
)
def test_wrong_headers(header, error, match):
    refused(header, error, match)


@pytest.mark.parametrize(
    ("tail", "match"),
    [
        (record(0x13), r"mandatory record of a type that is not known \(in record type 0x13 at byte 40\)"),
        (record(0x11, bytes(25)), r"25 bytes is not a multiple of 24 \(in CPUID_POLICY"),
        (record(0x11), "body of 0 bytes is not between 24 and"),
        (record(0x12, bytes(17)), "17 bytes is not a multiple of 16"),
        (record(0x10, b"x"), r"body of 1 bytes is not between 0 and 0 \(in STATIC_DATA_END"),
        (STATIC + ONE_PAGE + record(8, bytes(16)), r"body of 16 bytes is not between 24 and 24 \(in TSC_INFO"),
        (STATIC + ONE_PAGE + record(8, bytes(23) + b"\1"), "reserved field"),
        (STATIC + ONE_PAGE + record(9), "body of 0 bytes is not between 1 and"),
        (STATIC + ONE_PAGE + record(9, b"x", padding=b"\0\0\0\1\0\0\0"), r"padding is not 0 \(in HVM_CONTEXT"),
        (STATIC + ONE_PAGE + record(0xA, struct.pack("<IIQQ", 2, 0, 1, 2)), "2 parameters do not take 16 bytes"),
        (STATIC + ONE_PAGE + record(0xA, struct.pack("<II", 0, 1)), "reserved"),
        (STATIC + record(1, bytes(8)), "body of 8 bytes is not between 16"),
        (STATIC + page_record([0], count=0), "0 pages is not between 1 and 1024"),
        (STATIC + page_record([0], count=1025), "1025 pages is not between 1 and 1024"),
        (STATIC + page_record([0], PAGE, reserved=1), "reserved"),
        (STATIC + page_record([0], PAGE[:-1]), "body of 4111 bytes where its pages make 4112"),
        (STATIC + page_record([0, 0xF << 60], PAGE * 2), "where its pages make"),
        (STATIC + page_record([0], PAGE * 2), "does not hold 1 pages"),
        (STATIC + page_record([0, 1 << 52], PAGE * 2), "entry 1: bits 59 to 52"),
        (STATIC + page_record([1 << 59], PAGE), "entry 0: bits 59 to 52"),
        (STATIC + page_record([0, 1 << 60], PAGE), "entry 1: an HVM stream has no page type 1"),
    ],
)
def test_wrong_records(tail, match):
    error = refused(HEADER + tail, RecordError, match)
    assert error.record
    assert error.offset is not None
    assert error.offset >= 40


@pytest.mark.parametrize(
    ("page_type", "accepted"),
    [(PageType.NOTAB, False), (PageType.XALLOC, False), (PageType.BROKEN, False), (PageType.XTAB, True)],
)
def test_a_gfn_outside_the_guest_is_refused_unless_it_says_that_there_is_nothing(page_type, accepted):
    stream = HEADER + STATIC + page_record([page_type << 60 | 100], PAGE if page_type == 0 else b"")
    drain(stream, gfn_limit=101)
    if accepted:
        drain(stream, gfn_limit=100)
    else:
        refused(stream, RecordError, r"gfn 0x64 is outside the guest \(in PAGE_DATA at byte 48\)", gfn_limit=100)


@pytest.mark.parametrize("number", [0, 1, 8, 9, 0xA, 0x10, 0x11, 0x12, 0x77, 0x8000_0000])
def test_a_length_of_4_gib_allocates_nothing(number):
    prefix = {0: STATIC + ONE_PAGE + TSC + CONTEXT, 1: STATIC, 8: STATIC + ONE_PAGE, 9: STATIC + ONE_PAGE}
    prefix[0xA] = prefix[8]
    data = HEADER + prefix.get(number, b"") + record(number, length=0xFFFF_FFFF)
    tracemalloc.start()
    refused(data, RecordError, "longer than 134217728")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_length_of_128_mib_is_not_asked_for_at_once():
    decoder, _ = drain(HEADER + STATIC + record(1, length=128 << 20))
    assert decoder.wanted_bytes == fmt.PAGE_DATA_HEAD.size + 8 * fmt.MAX_PAGES_PER_RECORD
    decoder, _ = drain(HEADER + record(0x8000_0000, length=128 << 20))
    assert decoder.wanted_bytes == fmt.MAX_WANTED_BYTES
    decoder, _ = drain(HEADER + STATIC + ONE_PAGE + record(9, length=16 << 20))
    assert decoder.wanted_bytes == fmt.MAX_WANTED_BYTES


def test_an_error_is_final():
    decoder = Decoder()
    decoder.feed(bytes(24))
    for _ in range(2):
        with pytest.raises(RecordError, match="not a libxc"):
            decoder.next_event()
    with pytest.raises(RecordError, match="not a libxc"):
        decoder.eof()
    assert decoder.wanted_bytes == 0


def test_nothing_at_all_is_truncated():
    with pytest.raises(TruncatedError, match=r"stops after 0 bytes \(in image header"):
        Decoder().eof()


def test_the_end_between_records_says_so():
    decoder, _ = drain(HEADER + STATIC)
    with pytest.raises(TruncatedError, match=r"^the stream stops after 48 bytes, before END$"):
        decoder.eof()


# -- writing what is wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (([],), "not 1 to 1024 integers"),
        ((np.arange(1025),), "not 1 to 1024 integers"),
        (([[1]],), "not 1 to 1024 integers"),
        (([1.0],), "not 1 to 1024 integers"),
        (([1 << 52],), "does not fit 52 bits"),
        (([-1],), "does not fit 52 bits"),
        (([1], np.array([1], np.uint8)), "a page type that an HVM stream does not have"),
        (([1], np.array([16], np.uint8)), "one uint8 below 16"),
        (([1], np.array([0, 0], np.uint8)), "one uint8 below 16"),
        (([1], np.array([0])), "one uint8 below 16"),
    ],
)
def test_encoder_refuses_illegal_pages(arguments, match):
    encoder = begun()
    before = encoder.offset
    with pytest.raises(LocalStreamError, match=match):
        encoder.page_data(*arguments)
    assert encoder.offset == before


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (TscInfo(khz=1 << 32), r"does not fit its width \(in TSC_INFO"),
        (TscInfo(nsec=-1), "does not fit its width"),
        (HvmParams(params=((0, 1 << 64),)), "does not fit its width"),
        (HvmParams(params=((0, 0),) * 1025), "is not between 8 and"),
        (HvmContext(data=b""), "is not between 1 and"),
        (HvmContext(data=bytes((16 << 20) + 1)), "is not between 1 and"),
    ],
)
def test_encoder_refuses_what_a_decoder_would(value, match):
    encoder = with_page()
    with pytest.raises(LocalStreamError, match=match):
        encoder.record(value)
    encoder.record(TscInfo())  # nothing was remembered of the failure


def test_encoder_refuses_illegal_headers():
    encoder = Encoder()
    with pytest.raises(LocalStreamError, match="headers come first"):
        encoder.record(StaticDataEnd())
    with pytest.raises(LocalStreamError, match="headers come first"):
        encoder.page_data([1])
    for header in (StreamHeader(version=4), StreamHeader(version=1), StreamHeader(xen_major=-1)):
        with pytest.raises(LocalStreamError, match=r"cannot be written|no such Xen release"):
            encoder.header(header)
    encoder.header()
    with pytest.raises(LocalStreamError, match="begun already"):
        encoder.header()


def test_every_known_record_has_limits_or_is_not_for_hvm():
    others = {number for number in RecordType if "PV" in number.name}
    others |= {RecordType(number) for number in (0x7, 0xB, 0xD, 0xE, 0xF)}
    assert set(RecordType) - others == set(fmt.BODY_BYTES)
    for number in others:
        refused(HEADER + STATIC + record(number), OrderError, rf"has no such record \(in {number.name} at byte 48\)")


def audit_body(rows, reserved=0):
    return struct.pack("<II", len(rows), reserved) + b"".join(struct.pack("<QII16s", *row) for row in rows)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (audit_body([(1, 1, 0, b"x" * 16)], reserved=1), "reserved"),
        (audit_body([(1, 1, 1, bytes(16))]), "a digest is missing"),
        (audit_body([(1, 0, 0, b"x" * 16)]), "not 1 to 65536 pages"),
        (audit_body([(1, 2, 0, b"x" * 16), (2, 1, 0, b"x" * 16)]), "do not ascend"),
        (audit_body([(1, 1, 0, b"x" * 16)]) + bytes(8), "does not hold 1 digests"),
    ],
)
def test_a_malformed_audit_is_refused(body, match):
    with pytest.raises(BodyError, match=match):
        parse_body(RecordType.AUDIT, body)


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 1025, 2047, 2048, 5000])
@pytest.mark.parametrize("page_type", [PageType.XTAB, PageType.XALLOC])
def test_many_pages_are_named_at_once_as_one_record_after_another_would(count, page_type):
    def begun():
        encoder = Encoder()
        encoder.header()
        encoder.record(StaticDataEnd())
        return encoder

    one, other = begun(), begun()
    pfns = np.arange(7, 7 + count, dtype=np.uint64)
    types = np.full(count, page_type, np.uint8)
    pieces = [slice(at, at + 1024) for at in range(0, count, 1024)]
    expected = b"".join(one.page_data(pfns[piece], types[piece]) for piece in pieces)
    assert other.named(pfns, page_type) == expected
    assert other.offset == one.offset


@pytest.mark.parametrize(("pfn", "page_type"), [(1 << 52, PageType.XTAB), (5, PageType.NOTAB)])
def test_what_cannot_be_named_without_data_is_refused_and_nothing_was_written(pfn, page_type):
    encoder = Encoder()
    encoder.header()
    encoder.record(StaticDataEnd())
    before = encoder.offset
    with pytest.raises(LocalStreamError):
        encoder.named(np.full(3000, pfn, np.uint64), page_type)
    assert encoder.offset == before
