"""The bodies of the ferry's frames: values <-> bytes, every field checked for its type and bounds.

Text from the peer is made safe to print: a character that is not printable becomes a space in a reason or hint, and
is refused in a name. Reasons and hints longer than ``MAX_TEXT_CHARS`` are cut.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pageferry.core.cpuid import CpuidLeaf, Leaves, check_leaves
from pageferry.core.device_spec import DeviceSpec, specs_from_json
from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SIZE, GfnArray
from pageferry.core.host_cpu import HostCpu
from pageferry.stream import run_digests
from pageferry.stream.ferry_frames import (
    COMMIT_BODY,
    COMMIT_PAUSED,
    COMPLETE_BODY,
    COUNT_HEAD,
    DEFAULT_LEASE_MS,
    DIGEST_BYTES,
    DIGESTS_LAST,
    MAX_CONNECTIONS,
    MAX_CPUS,
    MAX_FEATURES,
    MAX_LEASE_MS,
    MAX_MISSING_RUNS,
    MAX_NAME_CHARS,
    MAX_POPULATED_RUNS,
    MAX_TEXT_CHARS,
    MAX_WANTED_PAGES,
    MISMATCH_HEAD,
    MISSING_RUN,
    WANTED_URGENT,
    Commit,
    Complete,
    DestinationHello,
    Digests,
    Dropped,
    Failed,
    Frame,
    FrameType,
    Join,
    Joined,
    Known,
    Mismatch,
    Missing,
    Pages,
    Reached,
    Ready,
    Recover,
    Recovered,
    Refuse,
    Running,
    SourceHello,
    Switch,
    Wanted,
)
from pageferry.stream.format import MAX_RANGE_PAGES, PAGE_TYPE_SHIFT, PFN_MASK, BodyError, PageType

_MAX_U32 = (1 << 32) - 1
_ZERO = np.uint64(PageType.XALLOC << PAGE_TYPE_SHIFT)
_TEXTS = frozenset({"name", "reason", "hint"})


def body_of(frame: Frame) -> bytes:
    """Return the frame's body. What :func:`parse_body` would refuse is not caught here.

    Raises:
        ValueError, TypeError, OverflowError, struct.error: a field cannot be written at all.
    """
    match frame:
        case Digests():
            flags = DIGESTS_LAST if frame.last else 0
            return run_digests.pack(frame.first_gfns, frame.pages, frame.digests, frame.audited, flags)
        case Mismatch():
            head = MISMATCH_HEAD.pack(frame.first_gfn, len(frame.page_digests), 0)
            return head + frame.page_digests.astype("<u8").tobytes()
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
        case Commit() | Switch():
            return COMMIT_BODY.pack(COMMIT_PAUSED if frame.paused else 0, 0)
        case Running() | Joined() | Dropped() | Recovered():
            return b""
        case _:
            fields = {name: getattr(frame, name) for name in frame.__slots__}
            present = {name: value for name, value in fields.items() if value is not None}
            for name in _TEXTS & present.keys():  # whatever an error said must be sendable
                present[name] = _printable(present[name])
            return json.dumps(present, separators=(",", ":"), allow_nan=False, default=asdict).encode("ascii")


def parse_body(frame_type: FrameType, body: bytes) -> Frame:
    """Return the frame with this body, at most ``MAX_BODY_BYTES[frame_type]`` long.

    Raises:
        BodyError: the body is malformed, or a field is missing, of the wrong type or out of bounds.
    """
    return _PARSERS[frame_type](body)


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


def check_ascent(frame: Frame, digested_to: int) -> int:
    """Return where the next DIGESTS may begin; ``digested_to`` is where this one may.

    Raises:
        BodyError: it begins before that.
    """
    if not isinstance(frame, Digests) or not frame.first_gfns.size:
        return digested_to
    if int(frame.first_gfns[0]) < digested_to:
        raise BodyError("the ranges do not ascend from frame to frame")
    return int(frame.first_gfns[-1]) + int(frame.pages[-1])


def _parse_digests(body: bytes) -> Digests:
    first_gfns, pages, digests, audited, flags = run_digests.parse(body)
    if flags & ~DIGESTS_LAST or (not first_gfns.size and not flags):
        raise BodyError(f"flags {flags:#x} with {first_gfns.size} digests")
    return Digests(
        first_gfns=first_gfns, pages=pages, digests=digests, audited=audited, last=bool(flags & DIGESTS_LAST)
    )


def _parse_mismatch(body: bytes) -> Mismatch:
    if len(body) < MISMATCH_HEAD.size:
        raise BodyError(f"a body of {len(body)} bytes is too short")
    first_gfn, pages, reserved = MISMATCH_HEAD.unpack_from(body)
    if reserved:
        raise BodyError("a reserved field is not 0")
    if not 1 <= pages <= MAX_RANGE_PAGES or len(body) - MISMATCH_HEAD.size != pages * 8:
        raise BodyError(f"a body of {len(body)} bytes does not hold {pages} page digests")
    if first_gfn + pages > PFN_MASK:
        raise BodyError("the range ends past the largest gfn")
    return Mismatch(
        first_gfn=first_gfn, page_digests=np.frombuffer(body, "<u8", offset=MISMATCH_HEAD.size).astype(np.uint64)
    )


def _paused(body: bytes) -> bool:
    if len(body) != COMMIT_BODY.size:
        raise BodyError(f"a body of {len(body)} bytes, not {COMMIT_BODY.size}")
    flags, reserved = COMMIT_BODY.unpack(body)
    if flags & ~COMMIT_PAUSED or reserved:
        raise BodyError(f"flags {flags:#x}, reserved {reserved:#x}")
    return bool(flags & COMMIT_PAUSED)


def _fields(body: bytes) -> "_Fields":
    try:
        value = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BodyError("the body is not JSON text") from error
    return _Fields("the body", value)


class _Fields:
    """A JSON object; each method returns one field, checked. Keys that are not asked for are ignored."""

    def __init__(self, what: str, value: object) -> None:
        if type(value) is not dict:
            raise BodyError(f"{what} is not a JSON object")
        self._values: dict[str, Any] = value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self._required(key) if default is None else self._values.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise BodyError(f"{key} is not an integer from {low} to {high}")
        return value

    def flag(self, key: str) -> bool:
        value = self._required(key)
        if type(value) is not bool:
            raise BodyError(f"{key} is neither true nor false")
        return value

    def gfn_or_none(self, key: str) -> int | None:
        return None if self._values.get(key) is None else self.integer(key, 0, PFN_MASK)

    def name(self, key: str, default: str | None = None) -> str:
        return _name(key, self._required(key) if default is None else self._values.get(key, default))

    def text(self, key: str, default: str | None = None) -> str:
        value = self._required(key) if default is None else self._values.get(key, default)
        if type(value) is not str:
            raise BodyError(f"{key} is not text")
        return _printable(value)

    def names(self, key: str) -> tuple[str, ...]:
        value = self._values.get(key, [])
        if type(value) is not list or len(value) > MAX_FEATURES:
            raise BodyError(f"{key} is not a list of at most {MAX_FEATURES} names")
        return tuple(_name(key, item) for item in value)

    def cpuid(self, key: str) -> Leaves:
        value = self._required(key)
        if type(value) is not list or any(
            type(item) is not list or len(item) != 6 or any(type(number) is not int for number in item)
            for item in value
        ):
            raise BodyError(f"{key} is not a list of [leaf, sub-leaf, eax, ebx, ecx, edx]")
        leaves = tuple(CpuidLeaf(*item) for item in value)
        try:
            check_leaves(leaves)
        except UsageError as error:
            raise BodyError(f"{key}: {error}") from error
        return leaves

    def devices(self, key: str) -> tuple[DeviceSpec, ...]:
        try:
            return specs_from_json(self._values.get(key, []))
        except ValueError as error:
            raise BodyError(f"{key}: {error}") from error

    def host_cpu(self, key: str) -> HostCpu | None:
        if self._values.get(key) is None:
            return None
        fields = _Fields(key, self._values[key])
        return HostCpu(
            name=fields.name("name"),
            family=fields.integer("family", 0, _MAX_U32),
            model=fields.integer("model", 0, _MAX_U32),
            stepping=fields.integer("stepping", 0, _MAX_U32),
            features=fields.name("features"),
            keeps_cpuid=fields.flag("keeps_cpuid"),
        )

    def runs(self, key: str) -> tuple[tuple[int, int], ...]:
        value = self._values.get(key, [])
        if type(value) is not list or len(value) > MAX_POPULATED_RUNS:
            raise BodyError(f"{key} is not a list of at most {MAX_POPULATED_RUNS} runs")
        runs: list[tuple[int, int]] = []
        end = 0
        for item in value:
            if type(item) is not list or len(item) != 2 or any(type(number) is not int for number in item):
                raise BodyError(f"{key} holds something that is not [first gfn, pages]")
            first_gfn, pages = item
            if first_gfn < end or pages < 1 or first_gfn + pages > PFN_MASK:
                raise BodyError(f"{key} does not ascend, or a run is empty or too long")
            runs.append((first_gfn, pages))
            end = first_gfn + pages
        return tuple(runs)

    def _required(self, key: str) -> Any:  # noqa: ANN401  # JSON: whatever the peer wrote
        if key not in self._values:
            raise BodyError(f"{key} is missing")
        return self._values[key]


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:MAX_TEXT_CHARS])


def _name(key: str, value: object) -> str:
    if type(value) is not str or len(value) > MAX_NAME_CHARS or not value.isprintable():
        raise BodyError(f"{key} is not printable text of at most {MAX_NAME_CHARS} characters")
    return value


def _parse_source_hello(body: bytes) -> SourceHello:
    fields = _fields(body)
    memory_bytes = fields.integer("memory_bytes", PAGE_SIZE, PFN_MASK)
    if memory_bytes % PAGE_SIZE:
        raise BodyError(f"memory_bytes is not a multiple of {PAGE_SIZE}")
    return SourceHello(
        version=fields.name("version"),
        memory_bytes=memory_bytes,
        cpus=fields.integer("cpus", 1, MAX_CPUS),
        accel=fields.name("accel"),
        cpuid=fields.cpuid("cpuid"),
        migration_id=fields.name("migration_id"),
        features=fields.names("features"),
        machine=fields.name("machine", ""),
        devices=fields.devices("devices"),
        name=fields.text("name", ""),
        populated=fields.runs("populated"),
        populated_pages=fields.integer("populated_pages", 0, PFN_MASK, default=0),
        connections=fields.integer("connections", 1, MAX_CONNECTIONS, default=1),
        host_cpu=fields.host_cpu("host_cpu"),
        proof=fields.name("proof"),
        lease_ms=fields.integer("lease_ms", 1, MAX_LEASE_MS, default=DEFAULT_LEASE_MS),
    )


def _parse_destination_hello(body: bytes) -> DestinationHello:
    fields = _fields(body)
    return DestinationHello(
        version=fields.name("version"),
        accel=fields.name("accel"),
        features=fields.names("features"),
        token=fields.name("token", ""),
        host_cpu=fields.host_cpu("host_cpu"),
        proof=fields.name("proof"),
    )


def _parse_refuse(body: bytes) -> Refuse:
    fields = _fields(body)
    return Refuse(reason=fields.text("reason"), hint=fields.text("hint", ""))


def _parse_reached(body: bytes) -> Reached:
    return Reached(number=_fields(body).integer("number", 0, _MAX_U32))


def _parse_ready(body: bytes) -> Ready:
    return Ready(verified_pages=_fields(body).integer("verified_pages", 0, PFN_MASK))


def _parse_failed(body: bytes) -> Failed:
    fields = _fields(body)
    return Failed(reason=fields.text("reason"), hint=fields.text("hint", ""), gfn=fields.gfn_or_none("gfn"))


def _parse_join(body: bytes) -> Join:
    fields = _fields(body)
    return Join(proof=fields.name("proof"), index=fields.integer("index", 1, MAX_CONNECTIONS - 1))


def _entries(gfns: GfnArray, zero: NDArray[np.bool_]) -> NDArray[np.uint64]:
    return (gfns | np.where(zero, _ZERO, np.uint64(0))).astype("<u8")


def _counted(body: bytes, most: int, entry_bytes: int, fixed_bytes: int = 0) -> tuple[int, int]:
    # Count and flags of a body that begins with them, its length checked.
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


def _parse_missing(body: bytes) -> Missing:
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


def _parse_wanted(body: bytes) -> Wanted:
    count, flags = _counted(body, MAX_WANTED_PAGES, 8)
    if flags & ~WANTED_URGENT:
        raise BodyError(f"flags {flags:#x}")
    gfns = np.frombuffer(body, "<u8", count, COUNT_HEAD.size).astype(np.uint64)
    return Wanted(gfns=_checked(gfns), urgent=bool(flags))


def _parse_pages(body: bytes) -> Pages:
    count, flags = _counted(body, MAX_WANTED_PAGES, 8, DIGEST_BYTES)
    if flags:
        raise BodyError("a reserved field is not 0")
    at = COUNT_HEAD.size + DIGEST_BYTES
    entries = np.frombuffer(body, "<u8", count, at).astype(np.uint64)
    zero = entries & ~np.uint64(PFN_MASK) == _ZERO
    gfns = np.where(zero, entries & np.uint64(PFN_MASK), entries)
    return Pages(gfns=_checked(gfns), zero=zero, digest=body[COUNT_HEAD.size : at])


def _parse_complete(body: bytes) -> Complete:
    if len(body) != COMPLETE_BODY.size:
        raise BodyError(f"a body of {len(body)} bytes, not {COMPLETE_BODY.size}")
    waits, waited_ns, median_ns, p99_ns, longest_ns = COMPLETE_BODY.unpack(body)
    if not median_ns <= p99_ns <= longest_ns <= waited_ns:
        raise BodyError("a few waits were longer than more of them")
    return Complete(waits=waits, waited_ns=waited_ns, median_ns=median_ns, p99_ns=p99_ns, longest_ns=longest_ns)


_PARSERS: dict[FrameType, Callable[[bytes], Frame]] = {
    FrameType.SOURCE_HELLO: _parse_source_hello,
    FrameType.DESTINATION_HELLO: _parse_destination_hello,
    FrameType.REFUSE: _parse_refuse,
    FrameType.DIGESTS: _parse_digests,
    FrameType.MISMATCH: _parse_mismatch,
    FrameType.REACHED: _parse_reached,
    FrameType.KNOWN: lambda body: Known(proof=_fields(body).name("proof")),
    FrameType.READY: _parse_ready,
    FrameType.COMMIT: lambda body: Commit(paused=_paused(body)),
    FrameType.RUNNING: lambda _: Running(),
    FrameType.FAILED: _parse_failed,
    FrameType.JOIN: _parse_join,
    FrameType.JOINED: lambda _: Joined(),
    FrameType.MISSING: _parse_missing,
    FrameType.SWITCH: lambda body: Switch(paused=_paused(body)),
    FrameType.WANTED: _parse_wanted,
    FrameType.PAGES: _parse_pages,
    FrameType.COMPLETE: _parse_complete,
    FrameType.DROPPED: lambda _: Dropped(),
    FrameType.RECOVER: lambda body: Recover(proof=_fields(body).name("proof")),
    FrameType.RECOVERED: lambda _: Recovered(),
}
