"""Proofs that an opening frame was made for this connection, by a peer that knows the migration's token.

Each side's preamble has a nonce, new for each connection. A proof is an HMAC-SHA256 (RFC 2104) over the frame's type
and both nonces, with the token as the key. So what was recorded on one connection is refused on another, and the token
goes over the wire once, in DESTINATION_HELLO. The hellos come before there is a token: their key is empty, and they
prove that they are fresh and nothing else. Who may talk at all is the matter of TLS.
"""

import hmac
from collections.abc import Mapping

from pageferry.stream.ferry_frames import FrameType
from pageferry.stream.ferry_order import Side

_CONTEXT = b"pageferry ferry 3"


def proof_of(frame_type: FrameType, nonces: Mapping[Side, bytes], token: str) -> str:
    """Return the proof in a frame of this type, 64 hexadecimal digits.

    Args:
        frame_type: of the frame.
        nonces: of both preambles.
        token: of the migration; empty in a hello.

    Raises:
        KeyError: a preamble has not passed.

    Source: docs/reference/stream.md, part 2, Proofs.
    """
    words = (_CONTEXT, frame_type.to_bytes(4, "little"), nonces[Side.SOURCE], nonces[Side.DESTINATION])
    return hmac.digest(token.encode(), b"".join(words), "sha256").hex()


def proves(proof: str, frame_type: FrameType, nonces: Mapping[Side, bytes], token: str) -> bool:
    """Tell whether ``proof`` is what :func:`proof_of` returns, in a time that tells nothing of it."""
    return hmac.compare_digest(proof.encode(), proof_of(frame_type, nonces, token).encode())
