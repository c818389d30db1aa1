"""The order of records, against an independent statement of it."""

import itertools

import numpy as np
import pytest

from pageferry.core.cpuid import CpuidLeaf
from pageferry.core.errors import LocalStreamError, OrderError
from pageferry.stream.decoder import Decoder
from pageferry.stream.encoder import Encoder
from pageferry.stream.format import EXTENSIONS, RecordType
from pageferry.stream.intake import NEED_DATA
from pageferry.stream.order import Order, Role
from pageferry.stream.records import (
    Audit,
    CpuidPolicy,
    End,
    HvmContext,
    HvmParams,
    MsrEntry,
    MsrPolicy,
    StaticDataEnd,
    StreamHeader,
    TscInfo,
)

LETTERS = {
    "c": RecordType.CPUID_POLICY,
    "m": RecordType.MSR_POLICY,
    "s": RecordType.STATIC_DATA_END,
    "P": RecordType.PAGE_DATA,
    "a": RecordType.AUDIT,
    "t": RecordType.TSC_INFO,
    "h": RecordType.HVM_PARAMS,
    "x": RecordType.HVM_CONTEXT,
    "E": RecordType.END,
}
ALL_STATE = ["".join(each) for each in itertools.permutations("thx")]
READABLE_STATE = [*ALL_STATE, "tx", "xt"]


def legal(version, role):
    """Every legal stream with at most two PAGE_DATA and one AUDIT."""
    static = ["s", "cs", "ms", "cms", "mcs"] if version == 3 else [""]
    state = ALL_STATE if role is Role.WRITER else READABLE_STATE
    pages = ("P", "PP", "Pa", "PaP", "PPa") if version == 3 else ("P", "PP")
    return {s + p + x + "E" for s in static for p in pages for x in state}


@pytest.mark.parametrize("role", [Role.WRITER, Role.READER])
@pytest.mark.parametrize("version", [2, 3])
def test_exactly_the_legal_streams_pass(version, role):
    whole = legal(version, role)
    prefixes = {stream[:length] for stream in whole for length in range(len(stream) + 1)}
    for prefix in prefixes:
        for letter, record in LETTERS.items():
            order = Order(role, version, EXTENSIONS)
            for past in prefix:
                assert order.check(LETTERS[past]) is None, prefix
                order.passed(LETTERS[past])
            if prefix.endswith(("P", "a")) and prefix.count(letter) == {"P": 2, "a": 1}.get(letter):
                continue  # the statement above has no more
            assert (order.check(record) is None) == (prefix + letter in prefixes), prefix + letter


@pytest.mark.parametrize("record", [r for r in RecordType if r not in LETTERS.values() and r not in EXTENSIONS])
@pytest.mark.parametrize("version", [2, 3])
def test_other_kinds_of_records_never_pass(version, record):
    assert "has no such record" in Order(Role.READER, version).check(record)


@pytest.mark.parametrize("role", [Role.WRITER, Role.READER])
def test_zero_pages_come_where_page_data_does_and_only_where_both_ends_agreed(role):
    assert "not agreed on" in Order(role, 3).check(RecordType.ZERO_PAGES)
    assert "has no such record" in Order(role, 2, EXTENSIONS).check(RecordType.ZERO_PAGES)
    for past, why in (("", "too early"), ("s", "too early"), ("sP", None), ("sPP", None), ("sPt", "too late")):
        order = Order(role, 3, EXTENSIONS)
        for letter in past:
            order.passed(LETTERS[letter])
        answer = order.check(RecordType.ZERO_PAGES)
        assert answer is None if why is None else why in answer, past


@pytest.mark.parametrize("role", [Role.WRITER, Role.READER])
def test_a_fence_comes_where_page_data_does(role):
    for past, why in (("s", "too early"), ("sP", None), ("sPP", None), ("sPt", "too late")):
        order = Order(role, 3, EXTENSIONS)
        for letter in past:
            order.passed(LETTERS[letter])
        answer = order.check(RecordType.FENCE)
        assert answer is None if why is None else why in answer, past


@pytest.mark.parametrize("role", [Role.WRITER, Role.READER])
def test_packed_pages_come_where_page_data_does_and_stand_for_it(role):
    for past, why in (("", "too early"), ("s", None), ("sP", None), ("sPt", "too late")):
        order = Order(role, 3, EXTENSIONS)
        for letter in past:
            order.passed(LETTERS[letter])
        answer = order.check(RecordType.PACKED_PAGES)
        assert answer is None if why is None else why in answer, past
    order = Order(role, 3, EXTENSIONS)
    order.passed(RecordType.STATIC_DATA_END)
    assert "too early" in order.check(RecordType.DELTA_PAGES)
    order.passed(RecordType.PACKED_PAGES)
    assert order.check(RecordType.DELTA_PAGES) is None
    assert order.check(RecordType.TSC_INFO) is None
    assert order.check(RecordType.ZERO_PAGES) is None


def test_a_section_has_pages_and_nothing_else():
    for past, record, why in (
        ("", RecordType.PAGE_DATA, "too early"),
        ("", RecordType.CPUID_POLICY, "section of an x86 HVM guest has no such record"),
        ("s", RecordType.STATIC_DATA_END, "only once"),
        ("s", RecordType.PAGE_DATA, None),
        ("s", RecordType.ZERO_PAGES, None),
        ("s", RecordType.FENCE, None),
        ("sP", RecordType.PAGE_DATA, None),
        ("sP", RecordType.TSC_INFO, "no such record"),
        ("sP", RecordType.HVM_CONTEXT, "no such record"),
        ("s", RecordType.END, None),
        ("sPE", RecordType.PAGE_DATA, "after END"),
    ):
        order = Order(Role.SECTION, 3, EXTENSIONS)
        for letter in past:
            order.passed(LETTERS[letter])
        answer = order.check(record)
        assert answer is None if why is None else why in answer, (past, record)


EVENTS = {
    "c": CpuidPolicy(leaves=(CpuidLeaf(leaf=0, subleaf=0, eax=0, ebx=0, ecx=0, edx=0),)),
    "m": MsrPolicy(entries=(MsrEntry(index=1, value=2),)),
    "s": StaticDataEnd(),
    "a": Audit(first_gfns=np.zeros(1, np.uint64), pages=np.ones(1, np.uint32), digests=np.full((1, 16), 7, np.uint8)),
    "t": TscInfo(),
    "h": HvmParams(),
    "x": HvmContext(data=b"x"),
    "E": End(),
}


def write(stream, version=3):
    encoder = Encoder()
    pieces = [encoder.header(StreamHeader(version=version), agreed=EXTENSIONS)]
    for letter in stream:
        pieces += [encoder.page_data([1]), bytes(4096)] if letter == "P" else [encoder.record(EVENTS[letter])]
    return pieces


@pytest.mark.parametrize(
    ("stream", "match"),
    [
        ("P", r"too early: STATIC_DATA_END not seen yet \(in PAGE_DATA"),
        ("cc", r"may come only once \(in CPUID_POLICY"),
        ("sc", r"too late: STATIC_DATA_END seen already \(in CPUID_POLICY"),
        ("st", r"too early: PAGE_DATA not seen yet \(in TSC_INFO"),
        ("sa", r"too early: PAGE_DATA not seen yet \(in AUDIT"),
        ("sPxa", r"too late: HVM_CONTEXT seen already \(in AUDIT"),
        ("sPtP", r"too late: TSC_INFO seen already \(in PAGE_DATA"),
        ("sPtt", r"may come only once \(in TSC_INFO"),
        ("sPE", "too early: TSC_INFO, HVM_CONTEXT"),
        ("sPthxEE", "nothing may come after END"),
    ],
)
def test_encoder_and_decoder_keep_the_order_and_say_what_is_wrong(stream, match):
    with pytest.raises(LocalStreamError, match=match):
        write(stream)
    if stream.endswith("EE"):
        return  # a decoder stops at the first END
    pieces = write(stream[:-1])
    decoder = Decoder(agreed=EXTENSIONS)
    decoder.feed(b"".join(pieces) + int(LETTERS[stream[-1]]).to_bytes(4, "little") + bytes(4))
    with pytest.raises(OrderError, match=match):
        list(iter(decoder.next_event, NEED_DATA))
