"""Encoder: records -> the bytes of a libxc migration stream, no I/O.

Page data need not pass through here: take the head of a PAGE_DATA record from :meth:`Encoder.page_data` and send the
pages after it straight from guest memory.
"""

from collections.abc import Collection
from struct import error as StructError

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pageferry.core.errors import LocalStreamError
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE, GfnArray
from pageferry.stream import format as fmt
from pageferry.stream.format import PageType, RecordType
from pageferry.stream.order import Order, Role
from pageferry.stream.records import TYPE_OF, PlainRecord, StreamHeader, body_of


class Encoder:
    """Writes one stream, or a section of one, record by record, in a legal order or not at all.

    Every method returns the bytes to send next. A method that raises has emitted nothing and changed nothing.

    Args:
        role: WRITER, or SECTION.

    Source: docs/reference/stream.md, part 1.
    """

    def __init__(self, role: Role = Role.WRITER) -> None:
        self._role = role
        self._order: Order | None = None
        self._offset = 0

    @property
    def offset(self) -> int:
        """Bytes of the stream so far, page data that the caller sends included."""
        return self._offset

    def header(self, header: StreamHeader | None = None, *, agreed: Collection[RecordType] = ()) -> bytes:
        """Begin the stream: return image and domain header (40 bytes).

        Args:
            header: version and Xen release to name; ours when None.
            agreed: the extensions that the reader agreed on; with none the stream is one that Xen knows.

        Raises:
            LocalStreamError: the stream has begun already, or no such version can be written.
        """
        header = header or StreamHeader()
        if self._order is not None:
            raise LocalStreamError("the stream has begun already", record="image header", offset=self._offset)
        if not fmt.OLDEST_VERSION <= header.version <= fmt.VERSION:
            raise LocalStreamError(f"version {header.version} cannot be written", record="image header", offset=0)
        image = fmt.IMAGE_HEADER.pack(fmt.MARKER, fmt.IMAGE_ID, header.version, 0, 0, 0)
        try:
            domain = fmt.DOMAIN_HEADER.pack(fmt.DOMAIN_X86_HVM, PAGE_SHIFT, 0, header.xen_major, header.xen_minor)
        except StructError as error:
            raise LocalStreamError("no such Xen release", record="domain header", offset=len(image)) from error
        self._order = Order(self._role, header.version, agreed)
        self._offset = fmt.HEADER_BYTES
        return image + domain

    def record(self, record: PlainRecord) -> bytes:
        """Return a whole record: header, body, padding. END completes the stream.

        Raises:
            LocalStreamError: the record may not come now, is too long, or a field does not fit its width.
        """
        record_type = TYPE_OF[type(record)]
        order = self._in_order(record_type)
        try:
            body = body_of(record)
        except StructError as error:
            raise self._refusal(record_type, "a field does not fit its width") from error
        low, high = fmt.BODY_BYTES[record_type]
        if not low <= len(body) <= high:
            raise self._refusal(record_type, f"a body of {len(body)} bytes is not between {low} and {high}")
        order.passed(record_type)
        whole = fmt.RECORD_HEADER.pack(record_type, len(body)) + body + bytes(fmt.padding_bytes(len(body)))
        self._offset += len(whole)
        return whole

    def page_data(self, pfns: ArrayLike, types: NDArray[np.uint8] | None = None) -> bytes:
        """Return the head of a PAGE_DATA record: record header and pfn array, without page data.

        On success the caller must send exactly ``payload_bytes(types)`` bytes next: the 4,096 bytes of each page that
        carries data, in the order of ``pfns``. No padding follows.

        Args:
            pfns: integers[n], 1 to 1,024 of them, each below 2**52.
            types: uint8[n], a ``PageType`` each; None is NOTAB for all.

        Raises:
            LocalStreamError: PAGE_DATA may not come now, or the arguments are not as above.
        """
        order = self._in_order(RecordType.PAGE_DATA)
        array = np.asarray(pfns)
        if array.ndim != 1 or not 0 < array.size <= fmt.MAX_PAGES_PER_RECORD or array.dtype.kind not in "iu":
            raise self._refusal(RecordType.PAGE_DATA, f"not 1 to {fmt.MAX_PAGES_PER_RECORD} integers")
        if int(array.max()) > fmt.PFN_MASK or int(array.min()) < 0:
            raise self._refusal(RecordType.PAGE_DATA, f"a pfn does not fit {fmt.PFN_BITS} bits")
        words = array.astype("<u8")
        if types is None:
            data_bytes = words.size * PAGE_SIZE
        else:
            if types.shape != array.shape or types.dtype != np.uint8 or int(types.max()) >= 16:
                raise self._refusal(RecordType.PAGE_DATA, "the page types are not one uint8 below 16 for each pfn")
            if not fmt.known_page_types(types).all():
                raise self._refusal(RecordType.PAGE_DATA, "a page type that an HVM stream does not have")
            words |= types.astype("<u8") << np.uint64(fmt.PAGE_TYPE_SHIFT)
            data_bytes = fmt.payload_bytes(types)
        order.passed(RecordType.PAGE_DATA)
        body_bytes = fmt.PAGE_DATA_HEAD.size + words.nbytes + data_bytes
        self._offset += fmt.RECORD_HEADER.size + body_bytes
        head = fmt.RECORD_HEADER.pack(RecordType.PAGE_DATA, body_bytes) + fmt.PAGE_DATA_HEAD.pack(words.size, 0)
        return head + words.tobytes()

    def named(self, pfns: GfnArray, page_type: PageType) -> bytes:
        """Return PAGE_DATA records that name pages and carry no data, as many as it takes, all but the last full.

        Args:
            pfns: uint64[n], each below 2**52.
            page_type: of all of them; one that carries no data.

        Raises:
            LocalStreamError: PAGE_DATA may not come now, or the arguments are not as above.
        """
        full = pfns.size // fmt.MAX_PAGES_PER_RECORD
        if full < 2:
            pieces = range(0, pfns.size, fmt.MAX_PAGES_PER_RECORD)
            types = np.full(fmt.MAX_PAGES_PER_RECORD, page_type, np.uint8)
            some = [pfns[at : at + fmt.MAX_PAGES_PER_RECORD] for at in pieces]
            return b"".join(self.page_data(each, types[: each.size]) for each in some)
        order = self._in_order(RecordType.PAGE_DATA)
        if int(pfns.max()) > fmt.PFN_MASK or fmt.carries_data(np.array([page_type], np.uint8)).any():
            raise self._refusal(RecordType.PAGE_DATA, "these pages cannot be named without data")
        whole = full * fmt.MAX_PAGES_PER_RECORD
        records = np.empty((full, 2 + fmt.MAX_PAGES_PER_RECORD), "<u8")
        body_bytes = fmt.PAGE_DATA_HEAD.size + 8 * fmt.MAX_PAGES_PER_RECORD
        records[:, 0] = int.from_bytes(fmt.RECORD_HEADER.pack(RecordType.PAGE_DATA, body_bytes), "little")
        records[:, 1] = int.from_bytes(fmt.PAGE_DATA_HEAD.pack(fmt.MAX_PAGES_PER_RECORD, 0), "little")
        np.bitwise_or(
            pfns[:whole].reshape(full, -1), np.uint64(page_type) << np.uint64(fmt.PAGE_TYPE_SHIFT), out=records[:, 2:]
        )
        order.passed(RecordType.PAGE_DATA)
        self._offset += records.nbytes
        return records.tobytes() + self.named(pfns[whole:], page_type)

    def _in_order(self, record_type: RecordType) -> Order:
        why = "the headers come first" if self._order is None else self._order.check(record_type)
        if why is not None or self._order is None:
            raise self._refusal(record_type, why or "")
        return self._order

    def _refusal(self, record_type: RecordType, why: str) -> LocalStreamError:
        return LocalStreamError(why, record=record_type.name, offset=self._offset)
