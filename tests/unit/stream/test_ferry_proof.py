"""What a proof is bound to, and the value that another implementation must come to."""

import itertools

import pytest

from pageferry.stream.ferry_frames import FrameType
from pageferry.stream.ferry_order import Side
from pageferry.stream.ferry_proof import proof_of, proves

NONCES = {Side.SOURCE: bytes(range(32)), Side.DESTINATION: bytes(range(32, 64))}


def test_a_proof_is_what_the_format_says():
    """Computed by `openssl dgst -sha256 -hmac token` over the bytes that docs/reference/stream.md names."""
    assert proof_of(FrameType.JOIN, NONCES, "token") == (
        "2feffa962bb79575363e89af95f59af24c655e5af9850e195ba7d3db6ccf6e90"
    )


def test_a_proof_is_for_one_frame_of_one_connection_of_one_migration():
    swapped = {Side.SOURCE: NONCES[Side.DESTINATION], Side.DESTINATION: NONCES[Side.SOURCE]}
    worlds = [
        *((frame_type, NONCES, "token") for frame_type in FrameType),
        (FrameType.JOIN, NONCES, ""),
        (FrameType.JOIN, NONCES, "tokem"),
        (FrameType.JOIN, swapped, "token"),
        (FrameType.JOIN, {**NONCES, Side.SOURCE: bytes(32)}, "token"),
        (FrameType.JOIN, {**NONCES, Side.DESTINATION: bytes(32)}, "token"),
    ]
    for ours, theirs in itertools.product(worlds, worlds):
        assert proves(proof_of(*ours), *theirs) == (ours is theirs)


def test_no_text_of_a_peer_is_more_than_no_proof():
    for text in ("", "x", "\N{SNOWMAN}", "0" * 64):
        assert not proves(text, FrameType.JOIN, NONCES, "token")


def test_there_is_no_proof_before_both_preambles():
    with pytest.raises(KeyError):
        proof_of(FrameType.JOIN, {Side.SOURCE: bytes(32)}, "token")
