"""What is written around a libxc stream is what Xen's tools write."""

import json
import lzma
import struct
from collections import Counter
from io import BytesIO
from pathlib import Path

from xen_files import DOMAIN, libxl_stream, record, xl_file

from pageferry.stream.walk import Walk
from pageferry.stream.xl import Envelope, Inside, libxl_head, libxl_tail, xl_head

LIBXC = (Path(__file__).parents[2] / "golden" / "pageferry-v3-1.bin").read_bytes()
GOLDEN_FILE = Path(__file__).parents[2] / "golden" / "xen-4.17-save.xl.xz"
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


def test_what_is_around_it_is_what_we_write():
    data = lzma.decompress(GOLDEN_FILE.read_bytes())
    (length,) = struct.unpack_from("<I", data, 48)
    assert data.startswith(xl_head(data[52 : 52 + length]))
    assert data.endswith(libxl_tail())
