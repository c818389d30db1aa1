"""Files of other tools are named for what they are; Xen's libxc streams are inspected where they lie in its files."""

import bz2
import contextlib
import gzip
import json
import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import GIVE_UP_S, one_line
from xen_files import DOMAIN, libxl_stream, record, xl_file

from pageferry.cli.streams import walked
from pageferry.core.errors import RemoteStreamError
from pageferry.stream.xl import Inside

GOLDEN = Path(__file__).parents[2] / "golden"
OURS, OURS_WITH_EVENTS = GOLDEN / "pageferry-v3-1.bin", GOLDEN / "pageferry-v3-2-cpu-events.bin"
XEN = GOLDEN / "xen-4.17-libxc-live.bin.xz"
LIBXC = OURS.read_bytes()


def reader(data):
    """Gives a few bytes at a time, as a pipe may."""
    at = 0

    def read(buffer):
        nonlocal at
        piece = data[at : at + min(len(buffer), 1000)]
        buffer[: len(piece)] = piece
        at += len(piece)
        return len(piece)

    return read


@pytest.fixture
def inspect(here):
    return lambda *arguments: here("inspect", *arguments)


@pytest.fixture
def write(tmp_path):
    def make(data, name="file"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return make


# -- what is refused by name -------------------------------------------------------------------------------------------

#: The beginning of what libvirt writes (magic, version, length of the XML, whether it ran, how it is packed).
LIBVIRT_HEADER = struct.pack("<IIII", 2, 600, 1, 0) + bytes(60) + b"<domain type='kvm'>"
FOREIGN = {
    "a QEMU guest that libvirt saved": b"LibvirtQemudSave" + LIBVIRT_HEADER,
    "a QEMU guest that libvirt did not finish to save": b"LibvirtQemudPart" + LIBVIRT_HEADER,
    "a Xen domain that libvirt saved": b"libvirt-xml\n \0 \r" + LIBVIRT_HEADER,
    "a domain that Xen's xm saved, before xl": b"LinuxGuestRecord" + bytes(100),
    "a QEMU migration stream": b"QEVM" + struct.pack(">I", 3) + bytes(100),
    "a file packed by bzip2": bz2.compress(LIBXC),
    "a disk image of QEMU (qcow2)": b"QFI\xfb" + bytes(100),
    "an ELF file": b"\x7fELF" + bytes(100),
}
FOR_RESTORE = {
    "a domain that Xen's xl saved": xl_file(libxl_stream(LIBXC)),
    "a libxl migration stream of Xen": libxl_stream(LIBXC),
    "a file packed by xz": lzma.compress(LIBXC),
    "a file packed by gzip": gzip.compress(LIBXC),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_inspect_names_what_it_does_not_read(inspect, write, name):
    result = inspect(write(FOREIGN[name]), "--check")
    assert result.returncode == 7
    assert f": this is {name}, not a libxc migration stream (in image header at byte 0)" in result.stderr


@pytest.mark.parametrize("name", FOREIGN | FOR_RESTORE)
def test_restore_names_what_it_does_not_restore(here, write, name):
    result = here("restore", write((FOREIGN | FOR_RESTORE)[name]), "--accel", "soft")
    assert (result.returncode, result.stdout) == (7, "")
    assert one_line(result).startswith(f"pageferry: this is {name}, not a libxc migration stream")


@pytest.mark.parametrize("bytes_after", [0, 3])
def test_a_file_shorter_than_our_header_is_named_once_its_magic_is_whole(inspect, here, write, bytes_after):
    file = write(b"QEVM" + bytes(bytes_after))
    for result in (inspect(file), here("restore", file, "--accel", "soft")):
        assert result.returncode == 7
        assert ": this is a QEMU migration stream, not a libxc migration stream" in result.stderr
        assert "hint: QEMU reads it, by -incoming" in result.stderr
    assert "the stream stops after 3 bytes" in inspect(write(b"QEV")).stderr


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs Debian's qemu-system-x86")
def test_a_stream_of_a_real_qemu_is_named(inspect, here, tmp_path):
    file = tmp_path / "stream"
    qemu = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio"]
    subprocess.run(
        qemu,
        input=f'migrate "exec:cat > {file}"\nquit\n',
        text=True,
        check=True,
        capture_output=True,
        timeout=GIVE_UP_S,
    )
    for result in (inspect(file), here("restore", file, "--accel", "soft")):
        assert result.returncode == 7
        assert "this is a QEMU migration stream, not a libxc migration stream" in result.stderr
        assert "hint: QEMU reads it, by -incoming" in result.stderr


# -- what is read inside Xen's files -----------------------------------------------------------------------------------

WRAPPED = {"xl": xl_file(libxl_stream(LIBXC)), "libxl": libxl_stream(LIBXC)}
AFTER = [["EMULATOR_XENSTORE_DATA", 4], ["EMULATOR_CONTEXT", 5], ["END", 0]]


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("pack", [bytes, lzma.compress])
def test_the_stream_inside_is_shown(inspect, write, kind, pack):
    data = WRAPPED[kind]
    file = write(pack(data))
    bare, shown = (json.loads(inspect(each, "--json").stdout) for each in (OURS, file))
    domain = DOMAIN["c_info"] if kind == "xl" else {}
    assert bare["envelope"] is None
    assert shown.pop("envelope") == {
        "kind": kind,
        "begins_at": data.index(LIBXC),
        "domain": domain,
        "records_after": AFTER,
    }
    assert shown == {key: value for key, value in bare.items() if key != "envelope"}
    table = inspect(file).stdout
    assert f"its libxc stream begins at byte {data.index(LIBXC):#x}, offsets count from there" in table
    assert "libxl records after it: EMULATOR_XENSTORE_DATA 4 B, EMULATOR_CONTEXT 5 B, END 0 B" in table
    assert ("name idle" in table) == (kind == "xl")
    assert "whole, 9 records" in inspect(file, "--check").stdout


def test_xens_own_stream_inside_its_own_file_is_compared(inspect, write):
    xen = lzma.decompress(XEN.read_bytes())
    file = write(xl_file(libxl_stream(xen, after=(record(0),))))
    assert inspect(file, "--diff", XEN).returncode == 0
    ours = write(libxl_stream(LIBXC), "ours")
    found = json.loads(inspect(ours, "--diff", OURS_WITH_EVENTS, "--json").stdout)
    assert list(found["values"]) == ["CPU_EVENTS 1"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (xl_file(b"", order=0x04030201), "saved on a host of another byte order (in xl header at byte 32)"),
        (xl_file(b"", mandatory=7), "needs what is not known: flags 0x4"),
        (xl_file(b"", mandatory=1), "the stream in it is of Xen before 4.6"),
        (xl_file(b"", length=1 << 31), "a configuration of 2147483648 bytes"),
        (xl_file(bytes(16)), "no libxl stream follows"),
        (libxl_stream(b"", version=3), "libxl stream version 3 is not 2 (in libxl header at byte 0)"),
        (libxl_stream(b"", options=1), "big-endian"),
        (libxl_stream(b"", before=[record(0)]), "there is no libxc stream in it (in libxl END at byte 16)"),
        (libxl_stream(b"", before=[record(9)]), "a libxl record of unknown type (in type 0x9 at byte 16)"),
        (libxl_stream(b"", before=[record(0, b"x")]), "it has a body (in libxl END at byte 16)"),
        (libxl_stream(LIBXC, after=[record(9)]), "a libxl record of unknown type"),
        (libxl_stream(LIBXC)[:-1], "the file stops after"),
    ],
)
def test_what_is_wrong_around_a_stream_is_named(inspect, write, data, says):
    result = inspect(write(data), "--check")
    assert result.returncode == 7
    assert says in one_line(result)


@pytest.mark.parametrize("config", [b"no JSON", b"[]", b"{}", b'{"c_info": 5}', b"\xff", b""])
def test_a_configuration_that_is_not_understood_does_not_matter(inspect, write, config):
    result = inspect(write(xl_file(libxl_stream(LIBXC), config=config)), "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout)["envelope"]["domain"] == {}


@given(st.data())
def test_no_cut_and_no_flipped_bit_around_a_stream_is_more_than_a_wrong_stream(data):
    around = xl_file(libxl_stream(b""))
    place = len(around) - len(libxl_stream(b"")) + 24
    at = data.draw(st.integers(0, len(around) - 1))
    flipped = bytearray(around)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    cut = around[:at] if at < place else around[:place] + LIBXC + around[place:at]
    for content, expected in (
        (cut, pytest.raises(RemoteStreamError)),
        (bytes(flipped[:place]) + LIBXC + bytes(flipped[place:]), contextlib.suppress(RemoteStreamError)),
    ):
        inside = Inside(reader(content))
        with expected:
            list(walked("it", inside))
            inside.finish()
