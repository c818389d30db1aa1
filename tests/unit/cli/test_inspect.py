"""Streams taken apart and compared: Xen's own record by record, and what is wrong where."""

import gzip
import io
import json
import lzma
import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pageferry.cli.inspect import compared, print_differences, print_json, print_table, print_verdict
from pageferry.cli.streams import WrongStreamError, opened, walked
from pageferry.core.errors import UsageError
from pageferry.stream.decoder import Decoder
from pageferry.stream.diff import PageContents, Snapshot
from pageferry.stream.format import PageType, RecordType, carries_data
from pageferry.stream.intake import NEED_DATA
from pageferry.stream.records import PageDataHeader

GOLDEN = Path(__file__).parents[2] / "golden"
XEN = GOLDEN / "xen-4.17-libxc-live.bin.xz"
OURS, OURS_WITH_EVENTS = GOLDEN / "pageferry-v3-1.bin", GOLDEN / "pageferry-v3-2-cpu-events.bin"


@pytest.fixture(scope="module")
def xen_bytes():
    return lzma.decompress(XEN.read_bytes())


def reader(data):
    return io.BytesIO(data).readinto


def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def inspect(here):
    return lambda *arguments: here("inspect", *arguments)


def inspect_stdin(file):
    command = [sys.executable, "-m", "pageferry", "inspect", "-", "--check"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, stdin=file)


def test_xens_stream_record_by_record(xen_bytes):
    """Against a count of its own: headers are 40 bytes, then each record says how long it is."""
    expected, at = [], 40
    while at < len(xen_bytes):
        kind, length = struct.unpack_from("<II", xen_bytes, at)
        expected.append((len(expected), at, RecordType(kind).name, length))
        at += 8 + length + -length % 8
    seen = list(walked("xen", reader(xen_bytes)))
    assert (seen[0].name, seen[0].index, seen[0].offset) == ("headers", None, 0)
    assert seen[0].details == {"version": 3, "xen": "4.17"}
    assert [(each.index, each.offset, each.name, each.body_bytes) for each in seen[1:]] == expected
    assert len(expected) == 1030
    counts = Counter()
    for each in seen:
        counts.update(each.details.get("pages", {}))
    assert counts == {"NOTAB": 4196, "XTAB": 1040367}
    (context,) = [each for each in seen if each.name == "HVM_CONTEXT"]
    for entry in context.details["entries"]:
        _, instance, length = struct.unpack_from("<HHI", xen_bytes, entry["offset"])
        assert (entry["name"].split()[1], entry["body_bytes"]) == (str(instance), length)
    assert [entry["name"] for entry in context.details["entries"]] == [
        *("HEADER 0", "CPU 0", "LAPIC 0", "LAPIC_REGS 0", "PCI_IRQ 0", "ISA_IRQ 0", "PCI_LINK 0", "MTRR 0"),
        *("VMCE_VCPU 0", "TSC_ADJUST 0", "END 0"),
    ]
    assert context.details["entries"][1]["rip"] == "0x1013a8"
    pci_irq = context.details["entries"][4]["offset"]
    assert context.details["restorable"] is False
    assert (
        f"no machine here can hold this state (in HVM_CONTEXT PCI_IRQ 0 at byte {pci_irq})" in context.details["reason"]
    )


def test_a_person_and_a_program_are_told_the_same_of_xens_stream(capsys):
    told = console()
    with opened(str(XEN), console()) as read:
        print_table(str(XEN), read, told)
    text = told.file.getvalue()
    for line in (
        "version 3, xen 4.17",
        "3-1025          0x5e8  PAGE_DATA        24.37 MiB  pages 4,196 NOTAB, 1,040,367 XTAB",
        "rip 0x1013a8",
    ):
        assert line in text
    with opened(str(XEN), console()) as read:
        print_json(str(XEN), read)
    shown = json.loads(capsys.readouterr().out)
    assert [record["index"] for record in shown["records"]] == list(range(1030))
    assert shown["headers"] == {"version": 3, "xen": "4.17"}
    assert (shown["trailing"], shown["error"]) == (False, None)
    with opened(str(XEN), console()) as read:
        print_verdict("xen", read, told)
    assert "xen: whole, 1,030 records, pages 4,196 NOTAB, 1,040,367 XTAB" in told.file.getvalue()


@pytest.mark.parametrize("pack", [bytes, lzma.compress, gzip.compress])
def test_streams_come_packed_or_not_from_files_and_pipes(inspect, tmp_path, pack):
    path = tmp_path / "stream"
    path.write_bytes(pack(OURS.read_bytes()))
    with path.open("rb") as file:
        for result in (inspect(path, "--check"), inspect_stdin(file)):
            assert result.returncode == 0, result.stderr
            assert "whole, 9 records" in result.stdout
    path.write_bytes(pack(OURS.read_bytes() + b"\0"))
    assert "bytes follow END" in inspect(path).stdout
    path.write_bytes(pack(OURS.read_bytes())[:-9])
    cut = inspect(path, "--check")
    assert (cut.returncode, cut.stdout) == (7, "")
    (line,) = cut.stderr.splitlines()
    assert line.startswith(f"pageferry: {path}: ")


def test_what_is_wrong_is_named_after_what_was_right(capsys):
    data = bytearray(OURS.read_bytes())
    fourth = list(walked("", reader(data)))[5]
    assert (fourth.index, fourth.name) == (4, "PAGE_DATA")
    data[fourth.offset] = 0x77
    with pytest.raises(WrongStreamError, match=rf"^it: record 4: .* \(in record type 0x77 at byte {fourth.offset}\)$"):
        print_json("it", reader(data))
    shown = json.loads(capsys.readouterr().out)
    assert [record["index"] for record in shown["records"]] == [0, 1, 2, 3]
    assert (shown["error"]["index"], shown["error"]["offset"]) == (4, fourth.offset)
    told = console()
    with pytest.raises(WrongStreamError):
        print_table("it", reader(data), told)
    assert "PAGE_DATA" in told.file.getvalue()
    untold = console()
    with pytest.raises(WrongStreamError):
        print_table("it", reader(bytes(100)), untold)
    assert untold.file.getvalue() == ""  # no heading of a table that has no line
    with pytest.raises(
        WrongStreamError, match=r"^it: this is not a libxc migration stream.* \(in image header at byte 0\)$"
    ):
        print_verdict("it", reader(bytes(100)), told)


@pytest.mark.parametrize("index", range(9))
def test_whichever_record_is_wrong_it_is_named_with_its_offset(index):
    data = bytearray(OURS.read_bytes())
    record = list(walked("", reader(data)))[index + 1]
    data[record.offset] = 0x77
    with pytest.raises(WrongStreamError, match=rf"^it: record {index}: .* at byte {record.offset}\)$"):
        print_verdict("it", reader(data), console())


def test_an_optional_record_is_shown_and_passed_over():
    data = OURS.read_bytes()
    end = list(walked("", reader(data)))[-1].offset
    optional = struct.pack("<II", 0x80000042, 13) + bytes(16)
    seen = list(walked("", reader(data[:end] + optional + data[end:])))
    assert [(each.index, each.offset, each.body_bytes) for each in seen[-2:]] == [(8, end, 13), (9, end + 24, 0)]
    assert "skipped" in seen[-2].details


@given(st.data())
def test_no_cut_and_no_flipped_bit_is_more_than_a_wrong_stream(data):
    whole = OURS_WITH_EVENTS.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    snapshot = Snapshot()

    def walk(content):
        for seen in walked("it", reader(content), snapshot.pages.take):
            json.dumps(seen.details)
            snapshot.take(seen)

    with pytest.raises(WrongStreamError) as cut:
        walk(whole[:at])
    assert f"after {at} bytes" in str(cut.value)
    begun = [seen.index for seen in walked("", reader(whole)) if seen.offset < at]  # None: the headers
    assert cut.value.index in (*begun, len(begun) - 1 if begun else None)  # the next may be missing from its first byte
    flipped = bytearray(whole)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        walk(flipped)
    except WrongStreamError as wrong:
        json.dumps(wrong.to_json())


# -- comparing ---------------------------------------------------------------------------------------------------------


def decoded(data):
    decoder = Decoder()
    decoder.feed(data)
    while (event := decoder.next_event()) is not NEED_DATA:
        yield event


def test_a_stream_is_the_same_as_itself_and_packed(inspect, tmp_path, xen_bytes):
    (tmp_path / "xen").write_bytes(xen_bytes)
    assert compared(str(tmp_path / "xen"), str(XEN), console())["same"] is True
    result = inspect(OURS, "--diff", OURS)
    assert result.returncode == 0
    assert "hold the same guest" in result.stdout


def test_a_page_a_register_and_a_feature_that_differ_are_told(tmp_path, xen_bytes):
    changed = bytearray(xen_bytes)
    seen = {each.name: each for each in walked("", reader(xen_bytes))}
    cpu = seen["HVM_CONTEXT"].details["entries"][1]["offset"]
    changed[cpu + 8 + 512] ^= 1  # rax
    changed[seen["CPUID_POLICY"].offset + 8 + 8] ^= 1  # eax of leaf 0
    changed[seen["MSR_POLICY"].offset + 8 + 8] ^= 1
    changed[seen["HVM_PARAMS"].offset + 8 + 16] ^= 1
    last, at = {}, 40
    for event in walked("", reader(xen_bytes)):
        if isinstance(event.event, PageDataHeader):
            data = carries_data(event.event.types)
            at = event.offset + 16 + 8 * data.size
            for rank, pfn in enumerate(event.event.pfns[data].tolist()):
                last[pfn] = at + 4096 * rank
    changed[last[7] + 100] ^= 0xFF
    changed[last[8] + 100] ^= 0xFF
    superseded = min(
        event.offset + 16 + 8 * event.event.pfns.size
        for event in walked("", reader(xen_bytes))
        if isinstance(event.event, PageDataHeader)
    )
    assert superseded == last[0] or superseded not in last.values()
    (tmp_path / "changed").write_bytes(changed)
    found = compared(str(XEN), str(tmp_path / "changed"), console())
    assert found["pages_changed"] == [[7, 2]]
    assert found["pages_only_first"] == found["pages_only_second"] == []
    names = list(found["values"])
    assert names[0].startswith("CPUID 0x0.")
    assert names[1:] == ["MSR 0xce", "CPU 0 rax", "HVM_PARAM 1"]
    told = console()
    print_differences(found, "a", "b", told)
    assert "both have, with other content, 2 pages: gfn 0x7-0x8" in told.file.getvalue()
    assert "MSR 0xce: 0x80000000 -> 0x80000001" in told.file.getvalue()


def test_state_that_one_has_and_the_other_not_is_told(inspect):
    result = inspect(OURS, "--diff", OURS_WITH_EVENTS, "--json")
    assert result.returncode == 10
    found = json.loads(result.stdout)
    assert found["values"] == {"CPU_EVENTS 1": [None, "0201010000000000"]}
    result = inspect(OURS, "--diff", OURS_WITH_EVENTS)
    assert result.returncode == 10
    assert result.stdout == "CPU_EVENTS 1: nothing -> 0201010000000000\n"


mentions = st.lists(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from([0x0, 0x0, 0xD, 0xE, 0xF]), st.integers(0, 2)),
        min_size=1,
        max_size=8,
    ),
    max_size=5,
)


def contents_and_model(records, sizes):
    contents, model = PageContents(batch=sizes[0], piece=sizes[1]), {}
    for record in records:
        pfns, types, numbers = (np.array(column) for column in zip(*record, strict=True))
        types = types.astype(np.uint8)
        payload = b"".join(bytes([number]) * 4096 for number in numbers[types == PageType.NOTAB].tolist())
        header = PageDataHeader(pfns=pfns.astype(np.uint64), types=types, payload_bytes=len(payload), offset=0)
        contents.take(header, memoryview(payload))
        for pfn, kind, number in record:
            if kind == PageType.NOTAB:
                model[pfn] = number
            elif kind == PageType.XTAB:
                model.pop(pfn, None)
            elif kind == PageType.BROKEN:
                model[pfn] = "broken"
            elif model.get(pfn) in (None, "broken"):
                model[pfn] = 0
    return contents, model


sizes = st.tuples(st.integers(1, 20), st.integers(1, 4))


@given(mentions, mentions, sizes, sizes)
def test_pages_differ_where_their_last_contents_do(first, second, sizes_of_first, sizes_of_second):
    (ours, left) = contents_and_model(first, sizes_of_first)
    (theirs, right) = contents_and_model(second, sizes_of_second)
    found = ours.compare(theirs)
    has = {
        name: {pfn for pfn, content in model.items() if content != "broken"}
        for name, model in (("left", left), ("right", right))
    }
    assert found.only_first.tolist() == sorted(has["left"] - has["right"])
    assert found.only_second.tolist() == sorted(has["right"] - has["left"])
    both = set(range(6)) - (has["left"] ^ has["right"])
    assert found.changed.tolist() == sorted(pfn for pfn in both if left.get(pfn) != right.get(pfn))


def with_wide_mentions(data, count):
    """A stream with this many more pages, each without content and alone in its 2 MiB."""
    before = next(each.offset for each in walked("", reader(data)) if each.name == "TSC_INFO")
    entries = (np.uint64(PageType.XALLOC) << np.uint64(60)) + (np.arange(1, count + 1, dtype=np.uint64) << np.uint64(9))
    records = [
        struct.pack("<IIII", RecordType.PAGE_DATA, 8 + part.nbytes, part.size, 0) + part.tobytes()
        for part in np.split(entries, range(1024, count, 1024))
    ]
    return data[:before] + b"".join(records) + data[before:]


def peak_bytes(*arguments):
    """The most memory that a command had at once."""
    process = subprocess.Popen([sys.executable, "-m", "pageferry", *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode in (0, 10)
    return usage.ru_maxrss << 10


def test_a_comparison_takes_no_more_memory_where_guests_are_large(tmp_path):
    """Guests of 512 GiB and 1 TiB, of which a small file tells."""
    few, many = tmp_path / "few", tmp_path / "many"
    few.write_bytes(with_wide_mentions(OURS.read_bytes(), 1 << 18))
    many.write_bytes(with_wide_mentions(OURS.read_bytes(), 1 << 19))
    alone = peak_bytes("inspect", many, "--check")
    assert peak_bytes("inspect", few, "--diff", many, "--json") - alone < 80 << 20


def test_bad_questions_are_refused(inspect, tmp_path):
    for name, says in (("none", "No such file"), (".", "Is a directory")):
        with pytest.raises(UsageError, match=f"cannot read .*{says}"), opened(str(tmp_path / name), console()):
            pass
    for arguments in (("-", "--diff", "-"), (OURS, "--diff", OURS, "--check")):
        result = inspect(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert "--diff compares two streams" in result.stderr
