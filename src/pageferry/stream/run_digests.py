"""Digests of runs of pages as bytes: the body of an AUDIT record and of a DIGESTS frame; docs/reference/stream.md."""

import numpy as np
from numpy.typing import NDArray

from pageferry.core.frames import GfnArray
from pageferry.stream.format import (
    MAX_RANGE_PAGES,
    PFN_MASK,
    RUN_AUDITED,
    RUN_DIGEST,
    RUN_DIGESTS_HEAD,
    BodyError,
)


def pack(
    first_gfns: GfnArray, pages: NDArray[np.uint32], digests: NDArray[np.uint8], audited: NDArray[np.bool_], flags: int
) -> bytes:
    """Return the body with these ranges; arrays as in :func:`parse`."""
    entries = np.zeros(len(first_gfns), RUN_DIGEST)
    entries["first_gfn"] = first_gfns
    entries["pages"] = pages
    entries["flags"] = np.where(audited, RUN_AUDITED, 0)
    entries["digest"] = digests
    return RUN_DIGESTS_HEAD.pack(entries.size, flags) + entries.tobytes()


def parse(body: bytes) -> tuple[GfnArray, NDArray[np.uint32], NDArray[np.uint8], NDArray[np.bool_], int]:
    """Return ``first_gfns`` uint64[n], ``pages`` uint32[n], ``digests`` uint8[n, 16], ``audited`` bool[n], and flags.

    Ranges ascend and are disjoint. A digest that is not given is all zeros.

    Raises:
        BodyError: the body is malformed.
    """
    if len(body) < RUN_DIGESTS_HEAD.size:
        raise BodyError(f"a body of {len(body)} bytes is too short")
    count, flags = RUN_DIGESTS_HEAD.unpack_from(body)
    if len(body) - RUN_DIGESTS_HEAD.size != count * RUN_DIGEST.itemsize:
        raise BodyError(f"a body of {len(body)} bytes does not hold {count} digests")
    entries = np.frombuffer(body, RUN_DIGEST, offset=RUN_DIGESTS_HEAD.size)
    first_gfns, pages, digests = entries["first_gfn"].copy(), entries["pages"].copy(), entries["digest"].copy()
    audited = entries["flags"] == RUN_AUDITED
    if (entries["flags"] & ~np.uint32(RUN_AUDITED)).any():
        raise BodyError("a flag of a range is not known")
    if digests[audited].any():
        raise BodyError("an audited range has a digest")
    if count and not 1 <= int(pages.min()) <= int(pages.max()) <= MAX_RANGE_PAGES:
        raise BodyError(f"a range is not 1 to {MAX_RANGE_PAGES} pages long")
    if count and int(first_gfns.max()) + MAX_RANGE_PAGES > PFN_MASK:
        raise BodyError("a range ends past the largest gfn")
    if (first_gfns[1:] < first_gfns[:-1] + pages[:-1]).any():
        raise BodyError("the ranges do not ascend")
    return first_gfns, pages, digests, audited, flags
