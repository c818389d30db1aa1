"""What differs between two streams: pages, the CPU's description, and the state, register by register.

Source: docs/reference/stream.md, part 1.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pageferry.core.errors import RecordError
from pageferry.core.frames import PAGE_SIZE, GfnArray
from pageferry.core.state import VcpuState
from pageferry.stream.format import RECORD_HEADER, PageType, carries_data
from pageferry.stream.hvm_context import decode_cpu
from pageferry.stream.hvm_entries import Entry, Typecode
from pageferry.stream.page_index import without_repeats
from pageferry.stream.records import (
    CpuidPolicy,
    HvmContext,
    HvmParams,
    MsrPolicy,
    PageDataHeader,
    StreamHeader,
    TscInfo,
)
from pageferry.stream.walk import RecordSeen, context_entries

#: Frames that are followed, 512 GiB; no guest here is larger. The kernel makes the tables as they are touched.
_FRAMES = 1 << 27
_DIGEST_BYTES = 16
_AT_ONCE = 1 << 18
_ZEROS = np.frombuffer(xxhash.xxh3_128_digest(bytes(PAGE_SIZE)), np.uint8)

_NOTHING, _MEMORY, _BROKEN = range(3)
_KIND = np.zeros(16, np.uint8)
_KIND[[PageType.NOTAB, PageType.XALLOC, PageType.XTAB, PageType.BROKEN]] = (_MEMORY, _MEMORY, _NOTHING, _BROKEN)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PageDifferences:
    """Frames, uint64[n] ascending: that only the first stream has, only the second, and both with other content."""

    only_first: GfnArray
    only_second: GfnArray
    changed: GfnArray


class PageContents:
    """What every page of one stream holds in the end, as one digest each.

    ``beyond`` counts mentions of frames that are too far up to be followed.
    """

    def __init__(self) -> None:
        self._kinds = np.zeros(_FRAMES, np.uint8)
        self._digests = np.zeros((_FRAMES, _DIGEST_BYTES), np.uint8)
        self._limit = 0
        self.beyond = 0

    def take(self, header: PageDataHeader, payload: memoryview) -> None:
        """Follow one record."""
        digests = np.zeros((header.pfns.size, _DIGEST_BYTES), np.uint8)
        pages = [payload[at : at + PAGE_SIZE] for at in range(0, len(payload), PAGE_SIZE)]
        found = np.frombuffer(b"".join(map(xxhash.xxh3_128_digest, pages)), np.uint8).reshape(-1, _DIGEST_BYTES)
        digests[carries_data(header.types)] = np.where((found == _ZEROS).all(axis=1)[:, None], 0, found)
        inside = header.pfns < _FRAMES
        self.beyond += int(np.count_nonzero(~inside))
        pfns, types, digests = header.pfns[inside], header.types[inside], digests[inside]
        if not pfns.size:
            return
        self._limit = max(self._limit, int(pfns.max()) + 1)
        for part in without_repeats(pfns):
            self._put(pfns[part], types[part], digests[part])

    def _put(self, pfns: GfnArray, types: NDArray[np.uint8], digests: NDArray[np.uint8]) -> None:
        # To allocate a page that has content already changes nothing.
        new = (types != PageType.XALLOC) | (self._kinds[pfns] != _MEMORY)
        self._kinds[pfns] = _KIND[types]
        self._digests[pfns[new]] = digests[new]

    def compare(self, other: "PageContents") -> PageDifferences:
        """Compare with a second stream; a page that was never written and one that holds zeros are the same."""
        found: tuple[list[GfnArray], ...] = ([], [], [])
        for first in range(0, max(self._limit, other._limit), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            ours, theirs = self._kinds[part], other._kinds[part]
            content = (self._digests[part] != other._digests[part]).any(axis=1)
            only = (ours == _MEMORY) & (theirs != _MEMORY), (ours != _MEMORY) & (theirs == _MEMORY)
            changed = ~only[0] & ~only[1] & (content | (ours != theirs))
            for gfns, chosen in zip(found, (*only, changed), strict=True):
                gfns.append(np.flatnonzero(chosen).astype(np.uint64) + np.uint64(first))
        only_first, only_second, both = (np.concatenate([*gfns, np.empty(0, np.uint64)]) for gfns in found)
        return PageDifferences(only_first=only_first, only_second=only_second, changed=both)


@dataclass(slots=True)
class Snapshot:
    """All of a stream that can be compared: pages as digests, everything else by name, as text or numbers."""

    pages: PageContents = field(default_factory=PageContents)
    values: dict[str, Any] = field(default_factory=dict)

    def take(self, seen: RecordSeen) -> None:
        """Add a record, of PAGE_DATA nothing: ``pages.take`` is for that."""
        self.values |= _values(seen)

    def differences(self, other: "Snapshot") -> tuple[PageDifferences, dict[str, tuple[Any, Any]]]:
        """Return what differs in a second stream: pages; and other values by name, (ours, theirs), None: not there."""
        names = dict.fromkeys([*self.values, *other.values])
        pairs = {name: (self.values.get(name), other.values.get(name)) for name in names}
        return self.pages.compare(other.pages), {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _values(seen: RecordSeen) -> dict[str, Any]:
    match seen.event:
        case StreamHeader() as header:
            return {"version": header.version, "xen": f"{header.xen_major}.{header.xen_minor}"}
        case CpuidPolicy() as policy:
            return {
                f"CPUID {row[0]:#x}.{row[1]:#x}": " ".join(f"{word:08x}" for word in row[2:]) for row in policy.leaves
            }
        case MsrPolicy() as msrs:
            return {f"MSR {entry.index:#x}": f"{entry.value:#x}" for entry in msrs.entries}
        case TscInfo() as tsc:
            return {f"TSC_INFO {part.name}": getattr(tsc, part.name) for part in fields(TscInfo)}
        case HvmParams() as params:
            return {f"HVM_PARAM {index}": f"{value:#x}" for index, value in params.params}
        case HvmContext() as context:
            values: dict[str, Any] = {}
            for entry in context_entries(context, seen.offset + RECORD_HEADER.size):
                values |= _entry_values(entry)
            return values
    return {}


def _entry_values(entry: Entry) -> dict[str, Any]:
    name = entry.name.removeprefix("HVM_CONTEXT ")
    if entry.typecode == Typecode.CPU:
        try:
            vcpu = decode_cpu(entry)
        except RecordError:
            return {name: entry.body.hex()}
        return {f"{name} {part.name}": _shown(getattr(vcpu, part.name)) for part in fields(VcpuState)}
    return {name: entry.body.hex()}


def _shown(value: Any) -> Any:  # noqa: ANN401  # a register of any kind
    if isinstance(value, bytes):
        return value.hex()
    return f"{value:#x}" if isinstance(value, int) else str(value)
