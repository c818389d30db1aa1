"""Finds what differs between two streams: pages, the CPU's description, and the state, register by register.

Source: docs/reference/stream.md, part 1.
"""

import os
import tempfile
import weakref
from collections.abc import Iterator
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

_DIGEST_WORDS = 2
_ZEROS = np.frombuffer(xxhash.xxh3_128_digest(bytes(PAGE_SIZE)), np.uint64)

#: What a mention does to its page: there is none; memory with this content; lost; memory, zeros if there was none.
_NOTHING, _MEMORY, _BROKEN, _ALLOCATED = range(4)
_KIND = np.zeros(16, np.uint8)
_KIND[[PageType.NOTAB, PageType.XALLOC, PageType.XTAB, PageType.BROKEN]] = (_MEMORY, _ALLOCATED, _NOTHING, _BROKEN)
_MENTION = np.dtype([("pfn", np.uint64), ("kind", np.uint8), ("digest", np.uint64, _DIGEST_WORDS)])
Mentions = NDArray[np.void]

#: Mentions that are put in order at once, and that are read back at once: 3.1 MiB and 50 KiB.
_BATCH, _PIECE = 1 << 17, 1 << 11
#: Beyond this they go to an unnamed file in the folder for such files.
_IN_MEMORY_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PageDifferences:
    """Frames, uint64[n] ascending: that only the first stream has, only the second, and both with other content."""

    only_first: GfnArray
    only_second: GfnArray
    changed: GfnArray


class PageContents:
    """What every page of one stream holds in the end, as one digest each, in constant memory.

    Mentions of pages are put in order batch by batch, written away, and merged when they are read.

    Args:
        batch: how many mentions to put in order at once.
        piece: how many of each batch to read at once.
    """

    def __init__(self, *, batch: int = _BATCH, piece: int = _PIECE) -> None:
        self._batch = batch
        self._piece = piece
        self._new: list[Mentions] = []
        self._new_count = 0
        self._lengths: list[int] = []  # of the batches in the file, in mentions
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115  # closed with this object
        weakref.finalize(self, self._file.close)

    def take(self, header: PageDataHeader, payload: memoryview) -> None:
        """Follow one record.

        Raises:
            OSError: there is no room for a temporary file.
        """
        mentions = np.zeros(header.pfns.size, _MENTION)
        mentions["pfn"] = header.pfns
        mentions["kind"] = _KIND[header.types]
        pages = [payload[at : at + PAGE_SIZE] for at in range(0, len(payload), PAGE_SIZE)]
        found = np.frombuffer(b"".join(map(xxhash.xxh3_128_digest, pages)), np.uint64).reshape(-1, _DIGEST_WORDS)
        mentions["digest"][carries_data(header.types)] = np.where((found == _ZEROS).all(axis=1)[:, None], 0, found)
        self._new.append(mentions)
        self._new_count += mentions.size
        if self._new_count >= self._batch:
            self._write_away()

    def _write_away(self) -> None:
        if not self._new_count:
            return
        batch = _latest(np.concatenate(self._new))
        self._new, self._new_count = [], 0
        self._file.seek(0, os.SEEK_END)
        self._file.write(batch.tobytes())
        self._lengths.append(batch.size)

    def _pieces(self) -> Iterator[Mentions]:
        """Yield what became of every page that was mentioned, in order of pfn, piece by piece."""
        self._write_away()
        ends = np.cumsum(self._lengths, dtype=np.int64).tolist()
        at = [end - length for end, length in zip(ends, self._lengths, strict=True)]
        buffers = [np.empty(0, _MENTION) for _ in ends]
        while True:
            for index, buffer in enumerate(buffers):
                if not buffer.size and at[index] < ends[index]:
                    buffers[index] = self._read(at[index], min(self._piece, ends[index] - at[index]))
                    at[index] += buffers[index].size
            # What lies beyond the least last pfn of a batch that goes on may be mentioned again in what was not read.
            limits = [buffer["pfn"][-1] for index, buffer in enumerate(buffers) if at[index] < ends[index]]
            parts = []
            for index, buffer in enumerate(buffers):
                upto = np.searchsorted(buffer["pfn"], min(limits), "right") if limits else buffer.size
                parts.append(buffer[:upto])
                buffers[index] = buffer[upto:]
            merged = _latest(np.concatenate([np.empty(0, _MENTION), *parts]))
            if not merged.size:
                return
            yield merged

    def _read(self, first: int, count: int) -> Mentions:
        self._file.seek(first * _MENTION.itemsize)
        return np.frombuffer(self._file.read(count * _MENTION.itemsize), _MENTION)

    def compare(self, other: "PageContents") -> PageDifferences:
        """Compare with a second stream; a page that was never written and one that holds zeros are the same.

        Raises:
            OSError: there is no room for a temporary file.
        """
        found: tuple[list[GfnArray], ...] = ([], [], [])
        for pfns, ours, theirs in _side_by_side(self._pieces(), other._pieces()):
            content = (ours["digest"] != theirs["digest"]).any(axis=1)
            ours_has, theirs_has = ours["kind"] == _MEMORY, theirs["kind"] == _MEMORY
            changed = (ours_has == theirs_has) & (content | (ours["kind"] != theirs["kind"]))
            for gfns, chosen in zip(found, (ours_has & ~theirs_has, ~ours_has & theirs_has, changed), strict=True):
                gfns.append(pfns[chosen])
        only_first, only_second, both = (np.concatenate([*gfns, np.empty(0, np.uint64)]) for gfns in found)
        return PageDifferences(only_first=only_first, only_second=only_second, changed=both)


def _latest(mentions: Mentions) -> Mentions:
    """Return what mentions come to together: one of each page, in order of pfn.

    Args:
        mentions: in the order in which they were made, of any pages.
    """
    if not mentions.size:
        return mentions
    ordered = mentions[np.argsort(mentions["pfn"], kind="stable")]
    starts = np.flatnonzero(np.r_[True, ordered["pfn"][1:] != ordered["pfn"][:-1]])
    last = np.r_[starts[1:], ordered.size] - 1
    # To allocate a page that has content already changes nothing: the last mention but those counts, if there is one.
    places = np.arange(ordered.size)
    telling = np.maximum.reduceat(np.where(ordered["kind"] == _ALLOCATED, -1, places), starts)
    result = ordered[np.where(telling < 0, last, telling)]
    result["kind"][(telling >= 0) & (telling < last)] = _MEMORY  # without content it has no digest
    return result


def _side_by_side(
    ours: Iterator[Mentions], theirs: Iterator[Mentions]
) -> Iterator[tuple[GfnArray, Mentions, Mentions]]:
    """Yield parts of two lists of mentions: pfns, ascending, and of each list a mention of each of them."""
    sides, nothing = (ours, theirs), np.empty(0, _MENTION)
    buffers = [next(side, nothing) for side in sides]
    while any(buffer.size for buffer in buffers):
        limit = min(buffer["pfn"][-1] for buffer in buffers if buffer.size)
        parts = []
        for index, buffer in enumerate(buffers):
            upto = np.searchsorted(buffer["pfn"], limit, "right")
            parts.append(buffer[:upto])
            buffers[index] = buffer[upto:] if upto < buffer.size else next(sides[index], nothing)
        pfns = np.union1d(parts[0]["pfn"], parts[1]["pfn"])
        yield pfns, _spread(parts[0], pfns), _spread(parts[1], pfns)


def _spread(mentions: Mentions, pfns: GfnArray) -> Mentions:
    """Return a mention for each of ``pfns``: of nothing where there is none; allocated memory is zeros."""
    spread = np.zeros(pfns.size, _MENTION)
    spread[np.searchsorted(pfns, mentions["pfn"])] = mentions
    spread["kind"][spread["kind"] == _ALLOCATED] = _MEMORY
    return spread


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
