"""Layouts, numbers and limits of the libxc migration stream; the normative text is ``docs/reference/stream.md``.

Everything here is transcription: no behaviour but the names of numbers.
"""

from enum import IntEnum
from struct import Struct

import numpy as np
from numpy.typing import NDArray

from pageferry.core.frames import PAGE_SIZE

#: Image header, big-endian: marker u64, id u32, version u32, options u16, reserved u16 and u32.
IMAGE_HEADER = Struct(">QIIHHI")
#: Domain header: type u32, page_shift u16, reserved u16, xen_major u32, xen_minor u32.
DOMAIN_HEADER = Struct("<IHHII")
#: Record header: type u32, body length u32 (without padding).
RECORD_HEADER = Struct("<II")
#: Head of the body of PAGE_DATA and of our own page records: count u32, reserved u32.
PAGE_DATA_HEAD = Struct("<II")
#: One leaf of CPUID_POLICY: leaf, subleaf, eax, ebx, ecx, edx, all u32.
CPUID_LEAF = Struct("<6I")
#: One entry of MSR_POLICY: index u32, flags u32, value u64.
MSR_ENTRY = Struct("<IIQ")
#: TSC_INFO: mode u32, khz u32, nsec u64, incarnation u32, reserved u32.
TSC_INFO = Struct("<IIQII")
#: Head of an AUDIT body, and of a DIGESTS frame's: count u32, flags u32 (0 in AUDIT).
RUN_DIGESTS_HEAD = Struct("<II")
#: One range in them, and the flag of one whose digest is not given because an AUDIT record had it.
RUN_DIGEST = np.dtype([("first_gfn", "<u8"), ("pages", "<u4"), ("flags", "<u4"), ("digest", "u1", (16,))])
RUN_AUDITED = 1 << 0
#: FENCE: number u32, reserved u32.
FENCE = Struct("<II")
#: Head of HVM_PARAMS: count u32, reserved u32.
HVM_PARAMS_HEAD = Struct("<II")
#: One entry of HVM_PARAMS: index u64, value u64.
HVM_PARAM = Struct("<QQ")

MARKER = 0xFFFF_FFFF_FFFF_FFFF
IMAGE_ID = 0x58454E46  # "XENF"
VERSION = 3
OLDEST_VERSION = 2
OPTION_BIG_ENDIAN = 1 << 0
DOMAIN_X86_PV = 1
DOMAIN_X86_HVM = 2
#: The Xen release whose stream this is; what our domain header says.
XEN_MAJOR, XEN_MINOR = 4, 17

HEADER_BYTES = IMAGE_HEADER.size + DOMAIN_HEADER.size
RECORD_ALIGN = 8
#: A record type with this bit may be ignored by a reader that does not know it.
OPTIONAL = 1 << 31

PFN_BITS = 52
PFN_MASK = (1 << PFN_BITS) - 1
PAGE_TYPE_SHIFT = 60

#: Longest body of any record (Xen's own limit).
MAX_BODY_BYTES = 128 << 20
#: Most pages in one PAGE_DATA record (ours; Xen never writes more).
MAX_PAGES_PER_RECORD = 1024
#: Longest body of packed pages: packed they take less than as they are.
MAX_PACKED_BODY_BYTES = PAGE_DATA_HEAD.size + MAX_PAGES_PER_RECORD * (8 + PAGE_SIZE)
#: Most leaves and entries that a policy may have, and most parameters.
MAX_CPUID_LEAVES = 4096
MAX_MSR_ENTRIES = 4096
MAX_HVM_PARAMS = 1024
#: Most ranges with digests in one body, and most pages in one range.
MAX_DIGESTS = 32768
MAX_RANGE_PAGES = 65536
#: Longest HVM context: the machine state of all vCPUs and devices.
MAX_HVM_CONTEXT_BYTES = 16 << 20
#: The most that a decoder asks for at once.
MAX_WANTED_BYTES = 1 << 20


class BodyError(ValueError):
    """A record's body or field is not what the format says; never leaves this room."""


class RecordType(IntEnum):
    """Record types of the stream; the ones of other kinds of guests are here to be named in errors."""

    END = 0
    PAGE_DATA = 1
    X86_PV_INFO = 2
    X86_PV_P2M_FRAMES = 3
    X86_PV_VCPU_BASIC = 4
    X86_PV_VCPU_EXTENDED = 5
    X86_PV_VCPU_XSAVE = 6
    SHARED_INFO = 7
    TSC_INFO = 8
    HVM_CONTEXT = 9
    HVM_PARAMS = 0xA
    TOOLSTACK = 0xB
    X86_PV_VCPU_MSRS = 0xC
    VERIFY = 0xD
    CHECKPOINT = 0xE
    CHECKPOINT_DIRTY_PFN_LIST = 0xF
    STATIC_DATA_END = 0x10
    CPUID_POLICY = 0x11
    MSR_POLICY = 0x12
    AUDIT = 0xD046_0001  # optional, and ours
    FENCE = 0xD046_0002  # optional, and ours
    ZERO_PAGES = 0x5047_0001
    PACKED_PAGES = 0x5047_0002
    DELTA_PAGES = 0x5047_0003


#: Records that are not Xen's: only in a stream whose two ends agreed on them. What changes memory is mandatory.
EXTENSIONS = frozenset(
    {RecordType.ZERO_PAGES, RecordType.PACKED_PAGES, RecordType.DELTA_PAGES, RecordType.AUDIT, RecordType.FENCE}
)


class PageType(IntEnum):
    """Page types that an HVM stream may have. All but NOTAB carry no data."""

    NOTAB = 0x0
    BROKEN = 0xD
    XALLOC = 0xE
    XTAB = 0xF


#: Shortest and longest body of each record that an HVM stream may have, in bytes.
BODY_BYTES: dict[RecordType, tuple[int, int]] = {
    RecordType.END: (0, 0),
    RecordType.PAGE_DATA: (PAGE_DATA_HEAD.size + 8, MAX_BODY_BYTES),
    RecordType.TSC_INFO: (TSC_INFO.size, TSC_INFO.size),
    RecordType.HVM_CONTEXT: (1, MAX_HVM_CONTEXT_BYTES),
    RecordType.HVM_PARAMS: (HVM_PARAMS_HEAD.size, HVM_PARAMS_HEAD.size + MAX_HVM_PARAMS * HVM_PARAM.size),
    RecordType.STATIC_DATA_END: (0, 0),
    RecordType.CPUID_POLICY: (CPUID_LEAF.size, MAX_CPUID_LEAVES * CPUID_LEAF.size),
    RecordType.AUDIT: (
        RUN_DIGESTS_HEAD.size + RUN_DIGEST.itemsize,
        RUN_DIGESTS_HEAD.size + MAX_DIGESTS * RUN_DIGEST.itemsize,
    ),
    RecordType.FENCE: (FENCE.size, FENCE.size),
    RecordType.MSR_POLICY: (MSR_ENTRY.size, MAX_MSR_ENTRIES * MSR_ENTRY.size),
    RecordType.ZERO_PAGES: (PAGE_DATA_HEAD.size + 8, PAGE_DATA_HEAD.size + MAX_PAGES_PER_RECORD * 8),
    RecordType.PACKED_PAGES: (PAGE_DATA_HEAD.size + 9, MAX_PACKED_BODY_BYTES),
    RecordType.DELTA_PAGES: (PAGE_DATA_HEAD.size + 9, MAX_PACKED_BODY_BYTES),
}

_KNOWN_PAGE_TYPES = np.zeros(16, np.bool_)
_KNOWN_PAGE_TYPES[[int(page_type) for page_type in PageType]] = True


def record_name(record_type: int) -> str:
    """Return the name of a record type for errors, with the number where it has none."""
    try:
        return RecordType(record_type).name
    except ValueError:
        return f"record type {record_type:#x}"


def padding_bytes(length_bytes: int) -> int:
    """Return how many zero bytes follow a body of ``length_bytes``."""
    return -length_bytes % RECORD_ALIGN


def known_page_types(types: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Tell for each of ``types`` (uint8[n], each below 16) whether an HVM stream may have it."""
    return _KNOWN_PAGE_TYPES[types]


def carries_data(types: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Tell for each of ``types`` (uint8[n]) whether 4,096 bytes of data follow for that page, as bool[n]."""
    carries: NDArray[np.bool_] = types == PageType.NOTAB
    return carries


def payload_bytes(types: NDArray[np.uint8]) -> int:
    """Return how many bytes of page data follow the pfn array of a record with these page types."""
    return int(np.count_nonzero(carries_data(types))) * PAGE_SIZE
