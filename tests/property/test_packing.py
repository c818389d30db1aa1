"""Packers: what goes in comes out, and whatever comes in instead is refused without a large allocation."""

import contextlib
import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.stream.format import BodyError
from pageferry.stream.packing import Packing, available, packer

SIZE = 4096
pages = st.one_of(
    st.integers(0, 1000).map(lambda seed: random.Random(seed).randbytes(SIZE)),
    st.binary(min_size=1, max_size=64).map(lambda piece: (piece * SIZE)[:SIZE]),
)


@pytest.fixture(params=[Packing.LZ4, Packing.ZSTD], ids=str, scope="module")
def ours(request):
    if request.param not in available():
        pytest.skip(f"the library for {request.param} is not installed")
    return packer(request.param)


@given(batch=st.lists(pages, min_size=1, max_size=3))
def test_what_was_packed_comes_out(ours, batch):
    data = b"".join(batch)
    assert ours.unpack(ours.pack(memoryview(data)), len(data)) == data


@given(page=pages, cut=st.integers(0, 200), tail=st.binary(max_size=200), other=st.sampled_from([-1, 1, 4096]))
def test_anything_else_is_refused_or_of_the_right_size(ours, page, cut, tail, other):
    packed = ours.pack(memoryview(page))
    with contextlib.suppress(BodyError):
        assert len(ours.unpack(packed[: max(len(packed) - cut, 1)] + tail, SIZE)) == SIZE
    with pytest.raises(BodyError):
        ours.unpack(packed, SIZE + other)


def test_a_zstd_frame_that_says_that_it_holds_much_allocates_nothing():
    if Packing.ZSTD not in available():
        pytest.skip("the library for zstd is not installed")
    # Magic, a descriptor for one segment with 8 bytes of content size (1 TiB), one raw block of no bytes, the last.
    frame = struct.pack("<IBQ", 0xFD2FB528, 0b1110_0000, 1 << 40) + b"\1\0\0"
    with pytest.raises(BodyError, match="does not say that it holds 4096"):
        packer(Packing.ZSTD).unpack(frame, SIZE)
