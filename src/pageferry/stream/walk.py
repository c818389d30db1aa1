"""Walking a stream from its first byte to its last, one record at a time, in constant memory: what ``inspect`` shows.

Source: docs/reference/stream.md, part 1.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pageferry.core.errors import RecordError, RemoteStreamError, TruncatedError
from pageferry.core.frames import PAGE_SIZE
from pageferry.stream import format as fmt
from pageferry.stream.decoder import Decoder
from pageferry.stream.format import PageType, record_name
from pageferry.stream.hvm_context import decode_cpu, state_in_stream
from pageferry.stream.hvm_entries import Entry, Typecode, split_entries
from pageferry.stream.intake import Need
from pageferry.stream.records import (
    TYPE_OF,
    CpuidPolicy,
    Event,
    HvmContext,
    HvmParams,
    MsrPolicy,
    PageData,
    PageDataHeader,
    SkippedRecord,
    StreamHeader,
    TscInfo,
    body_of,
)

_MAX_PAYLOAD_BYTES = fmt.MAX_PAGES_PER_RECORD * PAGE_SIZE

#: What is shown of a vCPU.
_REGISTERS = ("rip", "rsp", "rflags", "cr0", "cr3")

Read = Callable[[memoryview], int]
"""Fills some of a buffer, as ``readinto`` does; returns how many bytes, 0 at the end."""
OnPages = Callable[[PageDataHeader, memoryview], None]
"""Sees the page data of one record, which is valid during the call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSeen:
    """One record as it was found.

    ``index`` counts records from 0; the image and domain header are not one and have None. ``offset`` is the first
    byte in the stream, ``body_bytes`` the length without header and padding. ``details`` are values for JSON.
    ``event`` is the record itself (of PAGE_DATA, its head).
    """

    index: int | None
    offset: int
    name: str
    body_bytes: int
    details: dict[str, Any]
    event: Event = field(repr=False)


@dataclass(slots=True)
class Walk:
    """One walk along a stream; iterate over it, once.

    Args:
        read: where the bytes come from.
        on_pages: sees page data.

    ``index`` is that of the record that comes next, or in which an error is; ``offset`` is how far the walk is.
    """

    read: Read
    on_pages: OnPages | None = None
    index: int = 0
    offset: int = 0

    def __iter__(self) -> Iterator[RecordSeen]:
        """Yield the headers, then every record up to END.

        Raises:
            RemoteStreamError: the stream is wrong: in record number ``index``, which the error names with its offset.
        """
        decoder = Decoder(zero_copy=True)
        payload = memoryview(bytearray(_MAX_PAYLOAD_BYTES))
        begin = 0
        while not decoder.ended:
            event = decoder.next_event()
            if isinstance(event, Need):
                data = payload[: decoder.wanted_bytes]
                got = self.read(data)
                if not got:
                    decoder.eof()
                decoder.feed(data[:got])
                continue
            if isinstance(event, PageDataHeader):
                self._take_pages(decoder, event, payload[: event.payload_bytes])
            seen = self._seen(event, begin)
            begin = decoder.offset
            if isinstance(event, SkippedRecord):
                begin += event.length_bytes + fmt.padding_bytes(event.length_bytes)
            self.offset = decoder.offset
            yield seen
            self.index += seen.index is not None

    def _take_pages(self, decoder: Decoder, header: PageDataHeader, payload: memoryview) -> None:
        at = 0
        while at < len(payload):
            got = self.read(payload[at:])
            if not got:
                stopped = f"the stream stops after {decoder.offset + at} bytes"
                raise TruncatedError(stopped, record=fmt.RecordType.PAGE_DATA.name, offset=header.offset)
            at += got
        decoder.payload_received()
        if self.on_pages is not None:
            self.on_pages(header, payload)

    def _seen(self, event: Event, offset: int) -> RecordSeen:
        match event:
            case StreamHeader():
                name, body_bytes = "headers", fmt.HEADER_BYTES
            case PageDataHeader():
                name = fmt.RecordType.PAGE_DATA.name
                body_bytes = fmt.PAGE_DATA_HEAD.size + 8 * event.pfns.size + event.payload_bytes
            case SkippedRecord():
                name, body_bytes = record_name(event.record_type), event.length_bytes
            case PageData():
                raise AssertionError("a decoder that copies nothing returned page data")
            case _:
                name, body_bytes = TYPE_OF[type(event)].name, len(body_of(event))
        return RecordSeen(
            index=None if isinstance(event, StreamHeader) else self.index,
            offset=offset,
            name=name,
            body_bytes=body_bytes,
            details=_details(event, offset + fmt.RECORD_HEADER.size),
            event=event,
        )


def pass_over(read: Read, check: Callable[[], None]) -> None:
    """Read a stream to its end, and look at nothing but that it is one.

    Args:
        read: where the bytes come from.
        check: called between records; raises to give up.

    Raises:
        RemoteStreamError: the stream is wrong.
    """
    decoder, payload = Decoder(zero_copy=True), memoryview(bytearray(_MAX_PAYLOAD_BYTES))
    while not decoder.ended:
        event = decoder.next_event()
        if isinstance(event, Need):
            data = payload[: decoder.wanted_bytes]
            got = read(data)
            if not got:
                decoder.eof()
            decoder.feed(data[:got])
        elif isinstance(event, PageDataHeader):
            check()
            at = 0
            while at < event.payload_bytes:
                got = read(payload[at : event.payload_bytes])
                if not got:
                    raise TruncatedError("the stream stops within its pages", record="PAGE_DATA", offset=event.offset)
                at += got
            decoder.payload_received()


def page_counts(types: NDArray[np.uint8]) -> dict[str, int]:
    """Return how many pages of each type there are, by name; types that do not occur are left out."""
    numbers, counts = np.unique(types, return_counts=True)
    return {PageType(number).name: count for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)}


def _details(event: Event, body_offset: int) -> dict[str, Any]:
    match event:
        case StreamHeader():
            return {"version": event.version, "xen": f"{event.xen_major}.{event.xen_minor}"}
        case PageDataHeader():
            return {"pages": page_counts(event.types), "first": int(event.pfns.min()), "last": int(event.pfns.max())}
        case CpuidPolicy():
            return {"leaves": len(event.leaves)}
        case MsrPolicy():
            return {"entries": [[entry.index, entry.flags, entry.value] for entry in event.entries]}
        case TscInfo():
            return {"mode": event.mode, "khz": event.khz, "nsec": event.nsec, "incarnation": event.incarnation}
        case HvmParams():
            return {"params": [list(pair) for pair in event.params]}
        case HvmContext():
            entries = context_entries(event, body_offset)
            return {
                "entries": [_entry_details(entry, body_offset) for entry in entries],
                **_machine_state(event, body_offset),
            }
        case SkippedRecord():
            return {"skipped": "an optional record of a type that is not known"}
    return {}


def context_entries(context: HvmContext, body_offset: int) -> tuple[Entry, ...]:
    """Return the entries of an HVM_CONTEXT whose body begins at ``body_offset``.

    Raises:
        RecordError: it does not fall apart; with the offset in the stream.
    """
    try:
        return split_entries(context.data)
    except RecordError as error:
        raise RecordError(error.reason, record=error.record, offset=body_offset + (error.offset or 0)) from error


def _machine_state(context: HvmContext, body_offset: int) -> dict[str, Any]:
    """Tell whether a machine here could hold this state, and why not."""
    end = body_offset + len(context.data) + fmt.padding_bytes(len(context.data))
    try:
        state = state_in_stream(context, end_offset=end)
    except RecordError as error:
        return {"restorable": False, "reason": str(error)}
    return {"restorable": True, "vcpus": len(state.vcpus), "devices": [device.name for device in state.devices]}


def _entry_details(entry: Entry, body_offset: int) -> dict[str, Any]:
    details: dict[str, Any] = {
        "name": entry.name.removeprefix("HVM_CONTEXT "),
        "offset": body_offset + (entry.offset or 0),
        "body_bytes": len(entry.body),
    }
    if entry.typecode == Typecode.CPU:
        try:
            vcpu = decode_cpu(entry)
        except RemoteStreamError as error:
            details["error"] = error.reason
        else:
            details |= {register: f"{getattr(vcpu, register):#x}" for register in _REGISTERS}
    return details
