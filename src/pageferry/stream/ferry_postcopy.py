"""The ferry's frames of post-copy: what is missing at the switch, and how it is asked for and comes.

The normative text is ``docs/stream.md``, part 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct

import numpy as np
import xxhash
from numpy.typing import NDArray

from pageferry.core.frames import GfnArray
from pageferry.stream.format import PAGE_TYPE_SHIFT, PFN_MASK, BodyError, PageType

#: count u32, flags u32.
COUNT_HEAD = Struct("<II")
MISSING_RUN = np.dtype([("first_gfn", "<u8"), ("pages", "<u8")])
MAX_MISSING_RUNS = 1 << 16
#: Most pages of one WANTED: what somebody who needs another page now may have to wait for.
MAX_WANTED_PAGES = 64
WANTED_URGENT = 1 << 0
DIGEST_BYTES = 16
MAX_MISSING_BYTES = COUNT_HEAD.size + MAX_MISSING_RUNS * MISSING_RUN.itemsize
MAX_WANTED_BYTES = COUNT_HEAD.size + MAX_WANTED_PAGES * 8
MAX_PAGES_BYTES = COUNT_HEAD.size + DIGEST_BYTES + MAX_WANTED_PAGES * 8
#: waits, waited_ns, median_ns, p99_ns, longest_ns; u64 each.
COMPLETE_BODY = Struct("<QQQQQ")
_ZERO = np.uint64(PageType.XALLOC << PAGE_TYPE_SHIFT)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Missing:
    """Pages that come after the switch: what the destination has of them is old.

    Run i is pages ``first_gfns[i] .. first_gfns[i] + pages[i] - 1``, uint64[n] each, ascending and disjoint; n is 1 to
    65,536.
    """

    first_gfns: GfnArray
    pages: GfnArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """As :class:`Commit`, for a guest some of whose pages are missing: the source keeps them and answers WANTED."""

    paused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Wanted:
    """The destination asks for missing pages: ``gfns`` uint64[n], strictly ascending, n from 1 to 64.

    ``urgent``: somebody there waits for them.
    """

    gfns: GfnArray
    urgent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pages:
    """The answer to one WANTED: the same ``gfns``, and which of them are ``zero``, bool[n].

    The content of the others follows the frame, 4,096 bytes each. ``digest`` is 16 bytes: :func:`digest_of` all that.
    """

    gfns: GfnArray
    zero: NDArray[np.bool_]
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Complete:
    """The destination needs nothing more: every missing page has come, or the guest has ended there.

    ``waits``: how often somebody there had to wait for a page; ``waited_ns``: how long, all of it added up;
    ``median_ns``, ``p99_ns``, ``longest_ns``: half of them, 99 in 100 and all of them were no longer than that.
    """

    waits: int = 0
    waited_ns: int = 0
    median_ns: int = 0
    p99_ns: int = 0
    longest_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """The source has COMPLETE, and keeps no page any longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recover:
    """A new connection in place of one that was cut after the switch, of the migration with this ``token``."""

    token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """The guest is here and waits for its pages; WANTED follows."""


def digest_of(gfns: GfnArray, zero: NDArray[np.bool_], content: Sequence[memoryview]) -> bytes:
    """Return what :attr:`Pages.digest` must be, 16 bytes: of the entries, as they are in the frame, and the content.

    Args:
        gfns: uint64[n].
        zero: bool[n].
        content: of those that are not zero, one after another, in pieces of any size.
    """
    digest = xxhash.xxh3_128(_entries(gfns, zero).data)
    for piece in content:
        digest.update(piece)
    return digest.digest()


def _entries(gfns: GfnArray, zero: NDArray[np.bool_]) -> NDArray[np.uint64]:
    return (gfns | np.where(zero, _ZERO, np.uint64(0))).astype("<u8")


def pack(frame: Missing | Wanted | Pages | Complete) -> bytes:
    """Return the frame's body. What the parsers below would refuse is not caught here."""
    match frame:
        case Missing():
            runs = np.empty(len(frame.first_gfns), MISSING_RUN)
            runs["first_gfn"], runs["pages"] = frame.first_gfns, frame.pages
            return COUNT_HEAD.pack(runs.size, 0) + runs.tobytes()
        case Wanted():
            flags = WANTED_URGENT if frame.urgent else 0
            return COUNT_HEAD.pack(len(frame.gfns), flags) + frame.gfns.astype("<u8").tobytes()
        case Pages():
            return COUNT_HEAD.pack(len(frame.gfns), 0) + frame.digest + _entries(frame.gfns, frame.zero).tobytes()
        case Complete():
            return COMPLETE_BODY.pack(frame.waits, frame.waited_ns, frame.median_ns, frame.p99_ns, frame.longest_ns)


def _counted(body: bytes, most: int, entry_bytes: int, fixed_bytes: int = 0) -> tuple[int, int]:
    """Return count and flags of a body that begins with them, its length checked."""
    if len(body) < COUNT_HEAD.size:
        raise BodyError(f"a body of {len(body)} bytes is too short")
    count, flags = COUNT_HEAD.unpack_from(body)
    if not 1 <= count <= most or len(body) != COUNT_HEAD.size + fixed_bytes + count * entry_bytes:
        raise BodyError(f"a body of {len(body)} bytes does not hold {count} entries")
    return count, flags


def _checked(gfns: GfnArray) -> GfnArray:
    if (gfns[1:] <= gfns[:-1]).any() or int(gfns[-1]) > PFN_MASK:
        raise BodyError("the gfns do not ascend, or one is too large")
    return gfns


def parse_missing(body: bytes) -> Missing:
    """Return the MISSING frame with this body.

    Raises:
        BodyError: the body is malformed.
    """
    count, flags = _counted(body, MAX_MISSING_RUNS, MISSING_RUN.itemsize)
    if flags:
        raise BodyError("a reserved field is not 0")
    runs = np.frombuffer(body, MISSING_RUN, count, COUNT_HEAD.size)
    first_gfns, pages = runs["first_gfn"].astype(np.uint64), runs["pages"].astype(np.uint64)
    if not pages.all():
        raise BodyError("a run is empty")
    if int(first_gfns.max()) > PFN_MASK or (pages > np.uint64(PFN_MASK) - first_gfns).any():
        raise BodyError("a run ends past the largest gfn")
    if (first_gfns[1:] < first_gfns[:-1] + pages[:-1]).any():
        raise BodyError("the runs do not ascend")
    return Missing(first_gfns=first_gfns, pages=pages)


def parse_wanted(body: bytes) -> Wanted:
    """Return the WANTED frame with this body.

    Raises:
        BodyError: the body is malformed.
    """
    count, flags = _counted(body, MAX_WANTED_PAGES, 8)
    if flags & ~WANTED_URGENT:
        raise BodyError(f"flags {flags:#x}")
    gfns = np.frombuffer(body, "<u8", count, COUNT_HEAD.size).astype(np.uint64)
    return Wanted(gfns=_checked(gfns), urgent=bool(flags))


def parse_pages(body: bytes) -> Pages:
    """Return the PAGES frame with this body.

    Raises:
        BodyError: the body is malformed.
    """
    count, flags = _counted(body, MAX_WANTED_PAGES, 8, DIGEST_BYTES)
    if flags:
        raise BodyError("a reserved field is not 0")
    at = COUNT_HEAD.size + DIGEST_BYTES
    entries = np.frombuffer(body, "<u8", count, at).astype(np.uint64)
    zero = entries & ~np.uint64(PFN_MASK) == _ZERO
    gfns = np.where(zero, entries & np.uint64(PFN_MASK), entries)
    return Pages(gfns=_checked(gfns), zero=zero, digest=body[COUNT_HEAD.size : at])


def parse_complete(body: bytes) -> Complete:
    """Return the COMPLETE frame with this body.

    Raises:
        BodyError: the body is malformed.
    """
    if len(body) != COMPLETE_BODY.size:
        raise BodyError(f"a body of {len(body)} bytes, not {COMPLETE_BODY.size}")
    waits, waited_ns, median_ns, p99_ns, longest_ns = COMPLETE_BODY.unpack(body)
    if not median_ns <= p99_ns <= longest_ns <= waited_ns:
        raise BodyError("a few waits were longer than more of them")
    return Complete(waits=waits, waited_ns=waited_ns, median_ns=median_ns, p99_ns=p99_ns, longest_ns=longest_ns)
