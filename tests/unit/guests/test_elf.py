import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.core.errors import UsageError
from pageferry.guests.elf import load_elf, parse_elf
from pageferry.guests.workloads import WORKLOADS, load_guest, load_workload

TEXT = 0x100000
DATA = 0x102000


def header(*, elfclass=2, order=1, kind=2, machine=62, entry=TEXT + 8, phoff=64, phentsize=56, phnum=2):
    ident = b"\x7fELF" + bytes([elfclass, order, 1]) + bytes(9)
    return ident + struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, entry, phoff, 0, 0, 64, phentsize, phnum, 64, 0, 0)


def segment(gpa, *, kind=1, flags=5, offset=0x100, in_file=16, in_memory=None):
    return struct.pack(
        "<IIQQQQQQ", kind, flags, offset, gpa, gpa, in_file, in_file if in_memory is None else in_memory, 0x1000
    )


def elf(*segments, body=bytes(range(32)), **fields):
    segments = segments or (segment(TEXT), segment(DATA, flags=6, offset=0x110, in_memory=0x1800))
    fields.setdefault("phnum", len(segments))
    return (header(**fields) + b"".join(segments)).ljust(0x100, b"\0") + body


def test_a_good_file_becomes_segments_entry_and_end():
    program = parse_elf(elf(segment(DATA, flags=6, offset=0x110, in_memory=0x1800), segment(TEXT)), name="good")
    assert program.entry == TEXT + 8
    assert [(s.gpa, s.data, s.size_bytes, s.writable) for s in program.segments] == [
        (TEXT, bytes(range(16)), 16, False),
        (DATA, bytes(range(16, 32)), 0x1800, True),
    ]
    assert program.end_gpa == 0x104000
    assert program.default_working_set_bytes is None


def test_what_is_not_loaded_is_not_looked_at():
    note = segment(0, kind=4, offset=1 << 40)
    assert len(parse_elf(elf(note, segment(TEXT)), name="n").segments) == 1
    assert len(parse_elf(elf(segment(0, in_file=0), segment(TEXT)), name="n").segments) == 1


BAD = {
    "is not an ELF file": b"#!/bin/sh\nexit 0\n",
    "ends inside the ELF header": elf()[:63],
    "is not a 64-bit ELF file": elf(elfclass=1),
    "is not a little-endian": elf(order=2),
    r"is not for x86-64 \(machine 183\)": elf(machine=183),
    "is position-independent": elf(kind=3),
    r"is not an executable \(type 1\)": elf(kind=1),
    "is dynamically linked": elf(segment(TEXT), segment(0x400000, kind=3)),
    "is dynamically linked, ": elf(segment(TEXT), segment(0x400000, kind=2)),
    "has nothing to load": elf(phnum=0),
    "has nothing to load$": elf(segment(TEXT, kind=4)),
    "malformed program header table": elf(phnum=65535),
    "malformed program header table ": elf(phentsize=32),
    "ends inside the program header table": elf(phoff=0x110),
    "ends inside the segment at 0x102000": elf()[:-1],
    "ends inside the segment at 0x100000": elf(segment(TEXT, in_file=1 << 62)),
    "more bytes in the file than in memory": elf(segment(TEXT, in_memory=4)),
    "loads at 0xff000, below 0x100000": elf(segment(0xFF000), segment(TEXT)),
    "beyond any guest's memory": elf(segment(TEXT), segment((1 << 64) - 4096)),
    "beyond any guest's memory$": elf(segment(TEXT, in_memory=1 << 63)),
    "overlapping segments at 0x100000 and 0x10000f": elf(segment(TEXT), segment(TEXT + 15)),
    "entry point 0x100010 outside": elf(entry=TEXT + 16),
    "entry point 0x0 outside": elf(entry=0),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_file_is_one_clear_error_with_a_hint(message):
    with pytest.raises(UsageError, match=f"^file {message.rstrip()}" if "^" in message else message) as caught:
        parse_elf(BAD[message], name="file")
    assert str(caught.value).startswith("file ")
    assert caught.value.hint
    assert "\n" not in str(caught.value) + caught.value.hint


@given(st.data())
def test_a_damaged_file_loads_or_is_refused_and_nothing_else(data):
    image = bytearray(elf())
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(0, 64 + 2 * 56 - 1))] = data.draw(st.integers(0, 255))
    del image[data.draw(st.integers(0, len(image))) :]
    try:
        program = parse_elf(bytes(image), name="fuzz")
    except UsageError:
        return
    assert program.segments[0].gpa >= 0x100000
    assert program.end_gpa % 4096 == 0


def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path):
    for path in (tmp_path / "none.elf", tmp_path):
        with pytest.raises(UsageError, match="cannot read"):
            load_elf(path)


def test_a_file_larger_than_any_program_is_refused(tmp_path):
    huge = tmp_path / "huge"
    huge.write_bytes(elf())
    os.truncate(huge, 1 << 30)
    with pytest.raises(UsageError, match="is larger than 256 MiB"):
        load_elf(huge)


def test_a_file_without_end_is_refused():
    with pytest.raises(UsageError, match="is larger than 256 MiB"):
        load_elf("/dev/zero")


def test_an_unknown_workload_lists_the_known():
    with pytest.raises(UsageError, match="unknown workload 'nope'") as caught:
        load_workload("nope")
    assert all(name in caught.value.hint for name in WORKLOADS)


@pytest.mark.parametrize("name", WORKLOADS)
def test_each_workload_has_an_image_that_loads(name):
    program = load_workload(name)
    assert program.entry == TEXT
    assert program.default_working_set_bytes == WORKLOADS[name].default_working_set_bytes
    assert WORKLOADS[name].summary


def test_a_guest_is_a_workload_or_a_file(tmp_path):
    mine = tmp_path / "mine.elf"
    mine.write_bytes(elf())
    assert load_guest("kv").name == "kv"
    assert load_guest(str(mine)).name == str(mine)
    with pytest.raises(UsageError, match=r"cannot read gone\.elf"):
        load_guest("gone.elf")
    with pytest.raises(UsageError, match="unknown workload"):
        load_guest("gone")
