import bz2
import gzip
import lzma
import os
import struct
import sys

import lz4.block
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from kernels import with_size

from pageferry.guests.linux.payload import PayloadError, unpack

LIMIT = 32 << 20
CONTENT = os.urandom(100_000) + bytes(9 << 20) + b"the end"


def lz4_legacy(data):
    blocks = [lz4.block.compress(data[at : at + (8 << 20)], store_size=False) for at in range(0, len(data), 8 << 20)]
    return b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(block)) + block for block in blocks)


PACKERS = {
    "gzip": gzip.compress,
    "bzip2": lambda data: with_size(bz2.compress(data), data),
    "xz": lambda data: with_size(lzma.compress(data, check=lzma.CHECK_CRC32), data),
    "lzma": lambda data: with_size(lzma.compress(data, format=lzma.FORMAT_ALONE), data),
    "lz4": lambda data: with_size(lz4_legacy(data), data),
    "zstd": lambda data: with_size(zstandard.compress(data), data),
}


@pytest.mark.parametrize("packer", PACKERS)
def test_what_was_packed_comes_out(packer):
    assert unpack(PACKERS[packer](CONTENT), limit_bytes=LIMIT) == CONTENT


@pytest.mark.parametrize("packer", PACKERS)
def test_one_that_says_it_is_too_large_is_refused(packer):
    with pytest.raises(PayloadError, match="more than any kernel"):
        unpack(PACKERS[packer](CONTENT), limit_bytes=len(CONTENT) - 1)


@pytest.mark.parametrize("packer", PACKERS)
def test_a_bomb_that_says_it_is_small_is_stopped_soon(packer):
    bomb = PACKERS[packer](bytes(24 << 20))[:-4] + struct.pack("<I", 1000)
    with pytest.raises(PayloadError, match=r"(1,001|8,388,608) bytes or more came out"):  # LZ4 has blocks of 8 MiB
        unpack(bomb, limit_bytes=LIMIT)


@pytest.mark.parametrize("packer", PACKERS)
def test_one_that_is_cut_or_damaged_is_refused(packer):
    packed = PACKERS[packer](CONTENT)
    with pytest.raises(PayloadError):
        unpack(packed[: len(packed) // 2] + packed[-4:], limit_bytes=LIMIT)
    with pytest.raises(PayloadError):
        unpack(packed[:10_000] + bytes(b ^ 0x55 for b in packed[10_000:10_100]) + packed[10_100:-4], limit_bytes=LIMIT)


@given(st.sampled_from(list(PACKERS)), st.data())
def test_whatever_is_damaged_unpacks_or_is_refused(packer, data):
    packed = bytearray(PACKERS[packer](b"a kernel" * 1000))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(6, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        unpacked = unpack(bytes(packed), limit_bytes=1 << 20)
    except PayloadError:
        return
    assert unpacked is not None
    assert len(unpacked) <= 1 << 20


@pytest.mark.parametrize(("packer", "module"), [("lz4", "lz4.block"), ("zstd", "zstandard")])
def test_without_the_extra_it_stays_packed(packer, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert unpack(PACKERS[packer](CONTENT), limit_bytes=LIMIT) is None


def test_an_unknown_way_of_packing_stays_packed():
    assert unpack(b"\x89LZO" + bytes(100), limit_bytes=LIMIT) is None


def test_what_is_not_packed_stays_as_it_is():
    assert unpack(b"\x7fELF and so on", limit_bytes=LIMIT) == b"\x7fELF and so on"
