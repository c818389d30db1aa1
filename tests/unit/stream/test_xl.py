"""What is written around a libxc stream is what Xen's tools write."""

import json
import lzma
import struct
from collections import Counter
from io import BytesIO
from pathlib import Path

import pytest
from xen_files import DOMAIN, libxl_stream, record, xl_file

from pageferry.core.frames import PAGE_SHIFT
from pageferry.core.memory import GuestMemory
from pageferry.guests import abi
from pageferry.stream.decoder import Decoder
from pageferry.stream.records import End, PageData
from pageferry.stream.walk import Walk
from pageferry.stream.xl import Envelope, Inside, libxl_head, libxl_tail, xl_head

LIBXC = (Path(__file__).parents[2] / "golden" / "pageferry-v3-1.bin").read_bytes()
GOLDEN_FILE = Path(__file__).parents[2] / "golden" / "xen-4.17-save.xl.xz"
#: What ``pageferry save xen:`` wrote on Xen 4.17, and ``xl restore`` took.
OUR_FILE = GOLDEN_FILE.with_name("xen-4.17-pageferry-save.xl.xz")
CONFIGURATION = json.dumps(DOMAIN).encode()


def test_the_file_is_byte_for_byte_as_xl_has_it():
    ours = xl_head(CONFIGURATION) + LIBXC + libxl_tail()
    assert ours == xl_file(libxl_stream(LIBXC, after=(record(0),)))


def test_the_stream_is_byte_for_byte_as_libxl_has_it():
    assert libxl_head() + LIBXC + libxl_tail() == libxl_stream(LIBXC, after=(record(0),))


def test_what_was_written_is_read_back():
    inside = Inside(BytesIO(xl_head(CONFIGURATION) + LIBXC + libxl_tail()).readinto)
    assert [seen.name for seen in Walk(inside)][-1] == "END"
    assert inside.envelope is not None
    assert inside.envelope.begins_at == len(xl_head(CONFIGURATION))
    assert inside.envelope.domain == DOMAIN["c_info"]
    assert inside.finish() == [("END", 0)]


def test_what_xl_saved_is_read_to_its_end():
    """``xl save -c`` of Xen 4.17: a PVH guest of 8 MiB that was suspended first, so each page is there once."""
    data = lzma.decompress(GOLDEN_FILE.read_bytes())
    inside = Inside(BytesIO(data).readinto)
    seen = list(Walk(inside))
    assert inside.envelope == Envelope(
        kind="xl",
        begins_at=869,
        domain={"name": "golden", "uuid": "65b46029-c0c4-4d8a-ab6a-fc24d1737ca4", "type": "pvh"},
    )
    assert inside.finish() == [("END", 0)]
    names = Counter(each.name for each in seen)
    assert names["PAGE_DATA"] == 1020
    assert [each.name for each in seen[-4:]] == ["TSC_INFO", "HVM_CONTEXT", "HVM_PARAMS", "END"]


def test_what_pageferry_saved_of_a_running_domain_is_read_to_its_end():
    """A PVH guest of 8 MiB at work (``sweep``): 36 of its pages were written while it was copied, and go again."""
    inside = Inside(BytesIO(lzma.decompress(OUR_FILE.read_bytes())).readinto)
    seen = list(Walk(inside))
    assert inside.envelope == Envelope(
        kind="xl",
        begins_at=846,
        domain={"name": "golden-ours", "uuid": "1780f2fa-98bf-4051-b62a-fb713566fdc2", "type": "pvh"},
    )
    assert inside.finish() == [("END", 0)]
    assert [each.name for each in seen[:4]] == ["headers", "CPUID_POLICY", "MSR_POLICY", "STATIC_DATA_END"]
    assert [each.name for each in seen[-4:]] == ["TSC_INFO", "HVM_CONTEXT", "HVM_PARAMS", "END"]
    pages = Counter()
    for each in seen:
        pages.update(each.details.get("pages", {}))
    assert pages == {"NOTAB": 2065 + 36, "XTAB": 1042415}


def test_what_pageferry_saved_is_the_memory_of_one_instant():
    """``sweep`` writes the number of its pass to each page in turn and counts: pages of two instants do not fit."""
    data = lzma.decompress(OUR_FILE.read_bytes())
    memory, times = GuestMemory.linear(8 << 20), Counter()
    decoder = Decoder()
    decoder.feed(data[846 : -len(libxl_tail())])
    while not isinstance(event := decoder.next_event(), End):
        if isinstance(event, PageData) and event.payload:
            for at, pfn in enumerate(event.pfns.tolist()):
                times[pfn] += 1
                if pfn < memory.gfn_limit:
                    memory.write(pfn << PAGE_SHIFT, event.payload[at << PAGE_SHIFT : (at + 1) << PAGE_SHIFT])
    working_set = range(0x101, 0x121)
    assert [times[gfn] for gfn in working_set] == [2] * 32
    (status,) = abi.read_status(memory, 1)
    passes = [int.from_bytes(memory.read(gfn << PAGE_SHIFT, 8), "little") for gfn in working_set]
    done = passes.count(status.values[0])
    assert passes == [status.values[0]] * done + [status.values[0] - 1] * (32 - done)
    # The page of its next write may be written, and not counted yet.
    assert (status.values[0] - 1) * 32 + done - status.work in (0, 1)


@pytest.mark.parametrize("path", [GOLDEN_FILE, OUR_FILE], ids=["theirs", "ours"])
def test_what_is_around_it_is_what_we_write(path):
    data = lzma.decompress(path.read_bytes())
    (length,) = struct.unpack_from("<I", data, 48)
    assert data.startswith(xl_head(data[52 : 52 + length]))
    assert data.endswith(libxl_tail())
