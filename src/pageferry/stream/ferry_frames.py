"""The ferry's frames as values, their types, layouts and limits.

The normative text is ``docs/reference/stream.md``, part 2.
"""

from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pageferry.core.cpuid import Leaves
from pageferry.core.device_spec import DeviceSpec
from pageferry.core.frames import GfnArray
from pageferry.core.host_cpu import HostCpu
from pageferry.stream.format import MAX_DIGESTS, MAX_RANGE_PAGES, RUN_DIGEST, RUN_DIGESTS_HEAD

MAX_HELLO_BYTES = 128 << 10
MAX_MESSAGE_BYTES = 32 << 10
MAX_POPULATED_RUNS = 1024
MAX_FEATURES = 64
MAX_NAME_CHARS = 64
MAX_TEXT_CHARS = 1024
MAX_CPUS = 1024
#: Most connections of one migration.
MAX_CONNECTIONS = 16
MAX_LEASE_MS = 86_400_000
DEFAULT_LEASE_MS = 30_000

DIGESTS_LAST = 1 << 0
MISMATCH_HEAD = Struct("<QII")
#: flags u32, reserved u32.
COMMIT_BODY = Struct("<II")
COMMIT_PAUSED = 1 << 0

#: count u32, flags u32.
COUNT_HEAD = Struct("<II")
MISSING_RUN = np.dtype([("first_gfn", "<u8"), ("pages", "<u8")])
MAX_MISSING_RUNS = 1 << 16
#: Most pages of one WANTED: a thread that needs another page now may have to wait for them.
MAX_WANTED_PAGES = 64
WANTED_URGENT = 1 << 0
DIGEST_BYTES = 16
MAX_MISSING_BYTES = COUNT_HEAD.size + MAX_MISSING_RUNS * MISSING_RUN.itemsize
MAX_WANTED_BYTES = COUNT_HEAD.size + MAX_WANTED_PAGES * 8
MAX_PAGES_BYTES = COUNT_HEAD.size + DIGEST_BYTES + MAX_WANTED_PAGES * 8
#: waits, waited_ns, median_ns, p99_ns, longest_ns; u64 each.
COMPLETE_BODY = Struct("<QQQQQ")


class FrameType(IntEnum):
    """Frame types. None is a record type of the libxc stream, so neither can be taken for the other."""

    SOURCE_HELLO = 0x5046_0001
    DESTINATION_HELLO = 0x5046_0002
    REFUSE = 0x5046_0003
    DIGESTS = 0x5046_0004
    MISMATCH = 0x5046_0005
    READY = 0x5046_0006
    COMMIT = 0x5046_0007
    RUNNING = 0x5046_0008
    FAILED = 0x5046_0009
    JOIN = 0x5046_000A
    JOINED = 0x5046_000B
    MISSING = 0x5046_000C
    SWITCH = 0x5046_000D
    WANTED = 0x5046_000E
    PAGES = 0x5046_000F
    COMPLETE = 0x5046_0010
    RECOVER = 0x5046_0011
    RECOVERED = 0x5046_0012
    DROPPED = 0x5046_0013
    REACHED = 0x5046_0014
    KNOWN = 0x5046_0015


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceHello:
    """What the source wants to move.

    ``populated_pages`` is how many pages hold memory when this is sent. ``populated`` is a hint: the longest runs of
    them, ascending and disjoint, as (first gfn, pages), at most 1,024. ``name`` is the guest's, for people; ``machine``
    names the machine model and ``features`` what the source offers. ``devices``: the guest's virtio devices, each with
    what stands behind it at the source. ``cpuid`` is the guest's CPUID table. ``connections`` is how many it wants to
    use, this one counted. ``host_cpu``: on which CPU the guest runs, for a warning; None: not told. ``lease_ms``: for
    how long after READY the destination may take it at its word, COMMIT or SWITCH; 1 to 86,400,000. ``proof``: that it
    was made for this connection, see :mod:`~pageferry.stream.ferry_proof`.
    """

    version: str
    memory_bytes: int
    cpus: int
    accel: str
    cpuid: Leaves
    migration_id: str
    features: tuple[str, ...] = ()
    machine: str = ""
    devices: tuple[DeviceSpec, ...] = ()
    name: str = ""
    populated: tuple[tuple[int, int], ...] = ()
    populated_pages: int = 0
    connections: int = 1
    host_cpu: HostCpu | None = None
    lease_ms: int = DEFAULT_LEASE_MS
    proof: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationHello:
    """The destination will take the guest; ``features`` is the part of the source's offer that it uses.

    ``token``: which further connections prove that they know, and a source that asks for its guest. ``host_cpu``: on
    which CPU the guest will run, for a warning; None: not told. ``proof``: that it was made for this connection.
    """

    version: str
    accel: str
    features: tuple[str, ...] = ()
    token: str = ""
    host_cpu: HostCpu | None = None
    proof: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """The destination will not take the guest; it has not begun anything."""

    reason: str
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Digests:
    """Digests of the source's memory at the pause.

    Range i is pages ``first_gfns[i] .. first_gfns[i] + pages[i] - 1``; ranges ascend and are disjoint, within a frame
    and from frame to frame. ``first_gfns`` uint64[n], ``pages`` uint32[n] (1 to 65,536 each), ``digests`` uint8[n, 16]
    (xxh3-128 of the range's bytes, canonical form); n at most 32,768, and at least 1 unless ``last``.
    ``audited`` bool[n]: the digest is not given (zeros): an AUDIT record had it, and the range was not sent since.
    ``last``: no DIGESTS follow; a page of RAM that was in no range is all zeros at the source.
    """

    first_gfns: GfnArray
    pages: NDArray[np.uint32]
    digests: NDArray[np.uint8]
    audited: NDArray[np.bool_]
    last: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mismatch:
    """A range whose digest differs at the destination, with its digest of each page there.

    ``page_digests`` is uint64[pages]: xxh3-64 of each page's bytes, as integers; 1 to 65,536 pages.
    """

    first_gfn: int
    page_digests: NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """The destination has taken in whatever came before the FENCE of this number, on every connection."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The destination's memory and state are complete and proven; it waits for the commit."""

    verified_pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The source gives the guest away: from here on it never runs there unless FAILED is the answer.

    ``paused``: the guest was paused by its user and stays so.
    """

    paused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """The guest runs at the destination, and needs nothing more of the source, unless it was asked to switch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The sender gives up. From a destination it is a promise: the guest has not run here and never will.

    ``gfn`` is the page it was about, where there is one.
    """

    reason: str
    hint: str = ""
    gfn: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """A further connection of the migration whose token it proves to know: number ``index``, from 1."""

    proof: str
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """The destination has that migration, and proves it in its turn; its answer follows."""

    proof: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The connection belongs to the migration; a section of the stream follows on it."""


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

    ``urgent``: a thread there waits for them.
    """

    gfns: GfnArray
    urgent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pages:
    """The answer to one WANTED: the same ``gfns``, and which of them are ``zero``, bool[n].

    The content of the others follows the frame, 4,096 bytes each. ``digest`` is 16 bytes:
    :func:`~pageferry.stream.ferry_bodies.digest_of` all that.
    """

    gfns: GfnArray
    zero: NDArray[np.bool_]
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Complete:
    """The destination needs nothing more: every missing page has come, or the guest has ended there.

    ``waits``: how often a thread there had to wait for a page; ``waited_ns``: how long, all of it added up;
    ``median_ns``, ``p99_ns``, ``longest_ns``: half of them, 99 in 100 and all of them were no longer than that.
    """

    waits: int = 0
    waited_ns: int = 0
    median_ns: int = 0
    p99_ns: int = 0
    longest_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """The source has heard that the guest needs nothing more, and keeps no page any longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recover:
    """A new connection in place of one that was cut after COMMIT or SWITCH; it proves to know the migration's token."""

    proof: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """The guest is here and waits for its pages; WANTED follows."""


Frame: TypeAlias = (
    SourceHello
    | DestinationHello
    | Refuse
    | Digests
    | Mismatch
    | Ready
    | Commit
    | Running
    | Failed
    | Join
    | Joined
    | Missing
    | Switch
    | Wanted
    | Pages
    | Complete
    | Recover
    | Recovered
    | Dropped
    | Reached
    | Known
)

TYPE_OF: dict[type[Frame], FrameType] = {
    SourceHello: FrameType.SOURCE_HELLO,
    DestinationHello: FrameType.DESTINATION_HELLO,
    Refuse: FrameType.REFUSE,
    Digests: FrameType.DIGESTS,
    Mismatch: FrameType.MISMATCH,
    Ready: FrameType.READY,
    Commit: FrameType.COMMIT,
    Running: FrameType.RUNNING,
    Failed: FrameType.FAILED,
    Join: FrameType.JOIN,
    Joined: FrameType.JOINED,
    Missing: FrameType.MISSING,
    Switch: FrameType.SWITCH,
    Wanted: FrameType.WANTED,
    Pages: FrameType.PAGES,
    Complete: FrameType.COMPLETE,
    Recover: FrameType.RECOVER,
    Recovered: FrameType.RECOVERED,
    Dropped: FrameType.DROPPED,
    Reached: FrameType.REACHED,
    Known: FrameType.KNOWN,
}
#: Longest body of each frame, in bytes.
MAX_BODY_BYTES: dict[FrameType, int] = {
    FrameType.SOURCE_HELLO: MAX_HELLO_BYTES,
    FrameType.DESTINATION_HELLO: MAX_HELLO_BYTES,
    FrameType.REFUSE: MAX_MESSAGE_BYTES,
    FrameType.DIGESTS: RUN_DIGESTS_HEAD.size + MAX_DIGESTS * RUN_DIGEST.itemsize,
    FrameType.MISMATCH: MISMATCH_HEAD.size + MAX_RANGE_PAGES * 8,
    FrameType.READY: MAX_MESSAGE_BYTES,
    FrameType.COMMIT: COMMIT_BODY.size,
    FrameType.RUNNING: 0,
    FrameType.FAILED: MAX_MESSAGE_BYTES,
    FrameType.JOIN: MAX_MESSAGE_BYTES,
    FrameType.JOINED: 0,
    FrameType.MISSING: MAX_MISSING_BYTES,
    FrameType.SWITCH: COMMIT_BODY.size,
    FrameType.WANTED: MAX_WANTED_BYTES,
    FrameType.PAGES: MAX_PAGES_BYTES,
    FrameType.COMPLETE: COMPLETE_BODY.size,
    FrameType.RECOVER: MAX_MESSAGE_BYTES,
    FrameType.RECOVERED: 0,
    FrameType.DROPPED: 0,
    FrameType.REACHED: MAX_MESSAGE_BYTES,
    FrameType.KNOWN: MAX_MESSAGE_BYTES,
}
