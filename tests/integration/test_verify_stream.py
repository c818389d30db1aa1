"""Xen's own ``verify-stream-v2`` accepts the streams that we write, and the golden ones."""

import json
import lzma
from pathlib import Path

import pytest
from at_work import runs_on
from xen_files import DOMAIN
from xen_tools import find_xen_tools, verify_stream

from pageferry.core.errors import UnsupportedError
from pageferry.core.policies import XenPolicy
from pageferry.engine.image.save import Save
from pageferry.stream.xl import libxl_head, libxl_tail, xl_head

GOLDEN = Path(__file__).parents[1] / "golden"
STREAMS = sorted(path.name for path in GOLDEN.glob("*.bin*"))
FILES = sorted(path.name for path in GOLDEN.glob("*.xl.xz"))
OURS = (GOLDEN / "pageferry-v3-1.bin").read_bytes()


@pytest.fixture(scope="session")
def tools(tmp_path_factory):
    try:
        return find_xen_tools(tmp_path_factory.mktemp("xen"))
    except UnsupportedError as error:
        pytest.skip(f"no verify-stream-v2: {error} ({error.hint})")


def content(name):
    data = (GOLDEN / name).read_bytes()
    return lzma.decompress(data) if name.endswith(".xz") else data


@pytest.mark.parametrize("name", STREAMS)
def test_a_golden_stream_is_accepted(tools, tmp_path, name):
    (tmp_path / "stream").write_bytes(content(name))
    assert verify_stream(tools, tmp_path / "stream", "libxc") == ""


@pytest.mark.parametrize("name", FILES)
def test_a_golden_file_is_accepted(tools, tmp_path, name):
    (tmp_path / "file").write_bytes(content(name))
    assert verify_stream(tools, tmp_path / "file", "xl") == ""


@pytest.mark.parametrize(
    ("kind", "head"), [("libxl", libxl_head()), ("xl", xl_head(json.dumps(DOMAIN).encode() + b"\n\0"))]
)
def test_what_we_write_around_a_stream_is_accepted(tools, tmp_path, kind, head):
    (tmp_path / "file").write_bytes(head + OURS + libxl_tail())
    assert verify_stream(tools, tmp_path / "file", kind) == ""
    (tmp_path / "file").write_bytes(head + OURS)
    assert verify_stream(tools, tmp_path / "file", kind) != ""


@pytest.mark.parametrize("accel", ["soft"], indirect=True)
def test_a_guest_saved_at_work_is_accepted(tools, running, accel, tmp_path):
    vm = running("kv")
    Save(vm, tmp_path / "guest", XenPolicy(), on_event=lambda _: None).run()
    assert runs_on(vm)
    assert verify_stream(tools, tmp_path / "guest", "libxc") == ""
    whole = (tmp_path / "guest").read_bytes()
    (tmp_path / "guest").write_bytes(whole[:-8])  # without END
    assert verify_stream(tools, tmp_path / "guest", "libxc") != ""
