"""What is written around a libxc stream is what Xen's tools write."""

import json
from io import BytesIO
from pathlib import Path

from xen_files import DOMAIN, libxl_stream, record, xl_file

from pageferry.stream.walk import Walk
from pageferry.stream.xl import Inside, libxl_head, libxl_tail, xl_head

LIBXC = (Path(__file__).parents[2] / "golden" / "pageferry-v3-1.bin").read_bytes()
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
