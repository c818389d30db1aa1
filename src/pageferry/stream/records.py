"""The records of a libxc stream as values, and their bodies as bytes.

A body is decoded only after its length was found to be within ``format.BODY_BYTES``. Every ``parse_*`` raises
:class:`BodyError` with one line on what is wrong; the caller adds the record's name and offset.
"""

from dataclasses import dataclass, field
from struct import Struct
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pageferry.core.cpuid import CpuidLeaf
from pageferry.core.frames import PAGE_SIZE, GfnArray
from pageferry.stream import format as fmt
from pageferry.stream import run_digests
from pageferry.stream.format import BodyError, RecordType


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamHeader:
    """Image header and domain header: what comes first."""

    version: int = fmt.VERSION
    xen_major: int = fmt.XEN_MAJOR
    xen_minor: int = fmt.XEN_MINOR


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuidPolicy:
    """CPUID_POLICY: the CPU features the guest was started with. 1 to 4,096 leaves."""

    leaves: tuple[CpuidLeaf, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MsrEntry:
    """One model-specific register of the policy: ``index`` u32, ``flags`` u32 (0 so far), ``value`` u64."""

    index: int
    flags: int = 0
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MsrPolicy:
    """MSR_POLICY: the MSRs that describe the CPU the guest was started on. 1 to 4,096 entries."""

    entries: tuple[MsrEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticDataEnd:
    """STATIC_DATA_END: what does not change while the guest runs is complete."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PageDataHeader:
    """PAGE_DATA without its page data, which the caller receives by itself.

    ``pfns`` is uint64[n] and ``types`` uint8[n] (:class:`~pageferry.stream.format.PageType`), n at most 1,024, both
    read-only. ``payload_bytes`` bytes follow: 4,096 for each page with ``carries_data(types)``, in order.
    ``offset`` is the record's first byte in the stream. ``run``: the same frames, where they are neighbours, ascend and
    all carry data; None: they may not.
    """

    pfns: GfnArray
    types: NDArray[np.uint8]
    payload_bytes: int
    offset: int
    run: range | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PageData:
    """PAGE_DATA with its page data; fields as in :class:`PageDataHeader`, ``payload`` is ``payload_bytes`` long."""

    pfns: GfnArray
    types: NDArray[np.uint8]
    payload: bytes = field(repr=False)
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Audit:
    """AUDIT: digests of pages that were sent before this record and have not changed since.

    Range i is pages ``first_gfns[i] .. first_gfns[i] + pages[i] - 1``; ranges ascend and are disjoint. ``first_gfns``
    uint64[n], ``pages`` uint32[n] (1 to 65,536 each), ``digests`` uint8[n, 16] (xxh3-128, canonical
    form); n from 1 to 32,768.
    """

    first_gfns: GfnArray
    pages: NDArray[np.uint32]
    digests: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """FENCE: the destination is to say when it has taken in all that came before it; ``number`` is u32."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ZeroPages:
    """ZERO_PAGES: these pages are all zeros now, whatever they were.

    ``pfns`` is uint64[n], 1 to 1,024, strictly ascending, read-only.
    """

    pfns: GfnArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedPages:
    """PACKED_PAGES: the contents of pages, packed together as both ends agreed.

    ``pfns`` is uint64[n], 1 to 1,024, strictly ascending, read-only; ``data`` unpacks to n times 4,096 bytes.
    """

    pfns: GfnArray
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeltaPages:
    """DELTA_PAGES: what changed in pages, XORed with what was said of them last, packed; fields as PackedPages."""

    pfns: GfnArray
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class TscInfo:
    """TSC_INFO: how the guest's time stamp counter was provided. ``nsec`` is the guest's time in ns (u64)."""

    mode: int = 0
    khz: int = 0
    nsec: int = 0
    incarnation: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HvmParams:
    """HVM_PARAMS: (index, value) pairs, u64 each, at most 1,024. Xen writes only those that are not 0."""

    params: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HvmContext:
    """HVM_CONTEXT: vCPUs and devices, opaque here; see :mod:`pageferry.stream.hvm_context`."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """END: the stream is complete; nothing of it follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedRecord:
    """An optional record of a type we do not know: reported, its body passed over. ``offset`` is its first byte."""

    record_type: int
    length_bytes: int
    offset: int


#: Records that an encoder writes whole.
PlainRecord: TypeAlias = (
    CpuidPolicy
    | MsrPolicy
    | StaticDataEnd
    | Audit
    | Fence
    | ZeroPages
    | PackedPages
    | DeltaPages
    | TscInfo
    | HvmParams
    | HvmContext
    | End
)
#: What a decoder returns.
Event: TypeAlias = StreamHeader | PlainRecord | PageDataHeader | PageData | SkippedRecord

TYPE_OF: dict[type[PlainRecord], RecordType] = {
    CpuidPolicy: RecordType.CPUID_POLICY,
    MsrPolicy: RecordType.MSR_POLICY,
    StaticDataEnd: RecordType.STATIC_DATA_END,
    Audit: RecordType.AUDIT,
    Fence: RecordType.FENCE,
    ZeroPages: RecordType.ZERO_PAGES,
    PackedPages: RecordType.PACKED_PAGES,
    DeltaPages: RecordType.DELTA_PAGES,
    TscInfo: RecordType.TSC_INFO,
    HvmParams: RecordType.HVM_PARAMS,
    HvmContext: RecordType.HVM_CONTEXT,
    End: RecordType.END,
}


def body_of(record: PlainRecord) -> bytes:
    """Return the record's body, without padding.

    Raises:
        struct.error: a field does not fit its width.
    """
    match record:
        case CpuidPolicy():
            return b"".join(fmt.CPUID_LEAF.pack(*leaf) for leaf in record.leaves)
        case MsrPolicy():
            return b"".join(fmt.MSR_ENTRY.pack(entry.index, entry.flags, entry.value) for entry in record.entries)
        case Audit():
            given = np.zeros(len(record.first_gfns), np.bool_)
            return run_digests.pack(record.first_gfns, record.pages, record.digests, given, 0)
        case Fence():
            return fmt.FENCE.pack(record.number, 0)
        case ZeroPages():
            return _page_array(record.pfns)
        case PackedPages() | DeltaPages():
            return _page_array(record.pfns) + record.data
        case TscInfo():
            return fmt.TSC_INFO.pack(record.mode, record.khz, record.nsec, record.incarnation, 0)
        case HvmParams():
            pairs = b"".join(fmt.HVM_PARAM.pack(index, value) for index, value in record.params)
            return fmt.HVM_PARAMS_HEAD.pack(len(record.params), 0) + pairs
        case HvmContext():
            return record.data
        case StaticDataEnd() | End():
            return b""


def parse_body(record_type: RecordType, body: bytes) -> PlainRecord:
    """Return the record with this body.

    Args:
        record_type: any but PAGE_DATA.
        body: its length is within ``format.BODY_BYTES[record_type]``.

    Raises:
        BodyError: the body is malformed.
    """
    match record_type:
        case RecordType.CPUID_POLICY:
            return CpuidPolicy(leaves=tuple(CpuidLeaf(*row) for row in _rows(fmt.CPUID_LEAF, body)))
        case RecordType.MSR_POLICY:
            rows = _rows(fmt.MSR_ENTRY, body)
            return MsrPolicy(entries=tuple(MsrEntry(index=i, flags=f, value=v) for i, f, v in rows))
        case RecordType.AUDIT:
            return _parse_audit(body)
        case RecordType.FENCE:
            number, reserved = fmt.FENCE.unpack(body)
            _reserved(reserved)
            return Fence(number=number)
        case RecordType.ZERO_PAGES:
            return _parse_zero_pages(body)
        case RecordType.PACKED_PAGES:
            pfns, data = _parse_packed(body)
            return PackedPages(pfns=pfns, data=data)
        case RecordType.DELTA_PAGES:
            pfns, data = _parse_packed(body)
            return DeltaPages(pfns=pfns, data=data)
        case RecordType.TSC_INFO:
            mode, khz, nsec, incarnation, reserved = fmt.TSC_INFO.unpack(body)
            _reserved(reserved)
            return TscInfo(mode=mode, khz=khz, nsec=nsec, incarnation=incarnation)
        case RecordType.HVM_PARAMS:
            return _parse_hvm_params(body)
        case RecordType.HVM_CONTEXT:
            return HvmContext(data=body)
        case RecordType.STATIC_DATA_END:
            return StaticDataEnd()
        case RecordType.END:
            return End()
        case _:
            raise AssertionError(f"no body parser for {record_type!r}")


def _parse_audit(body: bytes) -> Audit:
    first_gfns, pages, digests, audited, reserved = run_digests.parse(body)
    _reserved(reserved)
    if not first_gfns.size or audited.any():
        raise BodyError("a digest is missing")
    return Audit(first_gfns=first_gfns, pages=pages, digests=digests)


def _parse_zero_pages(body: bytes) -> ZeroPages:
    pfns, rest = _parse_page_array(body)
    if rest:
        raise BodyError(f"a body of {len(body)} bytes holds more than {pfns.size} pages")
    return ZeroPages(pfns=pfns)


def _parse_packed(body: bytes) -> tuple[GfnArray, bytes]:
    pfns, data = _parse_page_array(body)
    if not 0 < len(data) < pfns.size * PAGE_SIZE:
        raise BodyError(f"{len(data)} bytes are not {pfns.size} pages packed")
    return pfns, data


def _page_array(pfns: GfnArray) -> bytes:
    # How each record of our own that names pages begins.
    return fmt.PAGE_DATA_HEAD.pack(pfns.size, 0) + pfns.astype("<u8").tobytes()


def _parse_page_array(body: bytes) -> tuple[GfnArray, bytes]:
    # The pages (uint64[n], 1 to 1,024, strictly ascending, read-only), and what follows them.
    count, reserved = fmt.PAGE_DATA_HEAD.unpack_from(body)
    _reserved(reserved)
    end = fmt.PAGE_DATA_HEAD.size + count * 8
    if not 0 < count <= fmt.MAX_PAGES_PER_RECORD or len(body) < end:
        raise BodyError(f"a body of {len(body)} bytes does not hold {count} pages")
    pfns = np.frombuffer(body, "<u8", count, fmt.PAGE_DATA_HEAD.size).astype(np.uint64)
    if int(pfns.max()) > fmt.PFN_MASK:
        raise BodyError(f"entry {int(np.argmax(pfns > fmt.PFN_MASK))}: bits 63 to 52 are not 0")
    if (pfns[1:] <= pfns[:-1]).any():
        raise BodyError("the pages do not ascend")
    pfns.flags.writeable = False
    return pfns, body[end:]


def _parse_hvm_params(body: bytes) -> HvmParams:
    count, reserved = fmt.HVM_PARAMS_HEAD.unpack_from(body)
    _reserved(reserved)
    rest = body[fmt.HVM_PARAMS_HEAD.size :]
    if len(rest) != count * fmt.HVM_PARAM.size:
        raise BodyError(f"{count} parameters do not take {len(rest)} bytes")
    return HvmParams(params=tuple((index, value) for index, value in _rows(fmt.HVM_PARAM, rest)))


def _rows(row: Struct, body: bytes) -> list[tuple[Any, ...]]:
    if len(body) % row.size:
        raise BodyError(f"a body of {len(body)} bytes is not a multiple of {row.size}")
    return list(row.iter_unpack(body))


def _reserved(value: int) -> None:
    if value:
        raise BodyError(f"a reserved field is {value:#x}, not 0")
