"""Decoder: the bytes of a libxc migration stream -> records, no I/O.

Page data need not pass through here. Make the decoder with ``zero_copy=True`` and receive it where it belongs::

    while not decoder.ended:
        event = decoder.next_event()
        if event is NEED_DATA:
            decoder.feed(receive_some(at_most=decoder.wanted_bytes))   # decoder.eof() when the peer is gone
        elif isinstance(event, PageDataHeader):
            receive_exactly(event.payload_bytes, into=guest_pages(event))
            decoder.payload_received()

A caller that never reads more than ``wanted_bytes`` never has page data in a buffer of its own. Garbage either parses
or raises :class:`~pageferry.core.errors.RemoteStreamError`; nothing is allocated by a length that came from the peer
before that length was found to be in bounds.
"""

from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import run_of
from pageferry.core.errors import OrderError, RecordError, RemoteStreamError, TruncatedError, VersionError
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE
from pageferry.stream import format as fmt
from pageferry.stream.foreign import recognised
from pageferry.stream.format import BodyError, RecordType
from pageferry.stream.intake import NEED_DATA, Intake, Need
from pageferry.stream.order import Order, Role
from pageferry.stream.records import (
    DeltaPages,
    Event,
    PackedPages,
    PageData,
    PageDataHeader,
    SkippedRecord,
    StreamHeader,
    ZeroPages,
    parse_body,
)

#: The types of the pages of a run, which all carry data.
_ALL_NOTAB = np.full(fmt.MAX_PAGES_PER_RECORD, fmt.PageType.NOTAB, np.uint8)
_ALL_NOTAB.flags.writeable = False


class Decoder:
    """Reads one stream: feed bytes in any pieces, take records.

    Once an error was raised every later call raises it again.

    Args:
        zero_copy: True: PAGE_DATA comes as :class:`PageDataHeader` and the caller receives the page data by itself;
            :meth:`feed` then takes no more than ``wanted_bytes`` at a time. False: it comes as :class:`PageData`.
        gfn_limit: a page with memory behind it at or past this gfn is an error; None accepts any.
        agreed: the extensions that both ends agreed on.
        role: READER, or SECTION.

    Source: docs/reference/stream.md, part 1.
    """

    def __init__(
        self,
        *,
        zero_copy: bool = False,
        gfn_limit: int | None = None,
        agreed: Collection[RecordType] = (),
        role: Role = Role.READER,
    ) -> None:
        self._role = role
        self._zero_copy = zero_copy
        self._gfn_limit = gfn_limit
        self._agreed = agreed
        self._intake = Intake()
        self._order = Order(role, fmt.VERSION)
        self._failure: RemoteStreamError | None = None
        self._ended = False
        self._skip_bytes = 0
        self._due: PageDataHeader | None = None
        self._version = 0
        self._type = RecordType.END
        self._length = 0
        self._expect("image header", fmt.IMAGE_HEADER.size, self._image_header)

    @property
    def ended(self) -> bool:
        """Whether END was taken."""
        return self._ended

    @property
    def offset(self) -> int:
        """Bytes of the stream used so far, page data that the caller received included."""
        return self._intake.offset

    @property
    def trailing_data(self) -> bytes:
        """Bytes that were fed and are not used; after END they belong to what follows the stream."""
        return self._intake.peek(len(self._intake))

    @property
    def wanted_bytes(self) -> int:
        """How many more bytes can be used before page data or the end, at most 1 MiB at once.

        At least 1 after :meth:`next_event` returned NEED_DATA; 0 after END and while page data is due.
        """
        if self._ended or self._due is not None or self._failure is not None:
            return 0
        needed = self._skip_bytes or self._need
        return min(max(needed - len(self._intake), 0), fmt.MAX_WANTED_BYTES)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Give the decoder more of the stream.

        Raises:
            ValueError: with ``zero_copy``, more than ``wanted_bytes`` was given; nothing was taken.
        """
        if self._zero_copy and len(data) > self.wanted_bytes:
            raise ValueError(f"{len(data)} bytes fed where {self.wanted_bytes} are wanted")
        self._intake.feed(data)

    def next_event(self) -> Event | Need:
        """Return the next record, or NEED_DATA when more bytes are needed for it (and for ever after END).

        Raises:
            RemoteStreamError: the stream is malformed, out of order or of a version we do not read.
            RuntimeError: page data is due and :meth:`payload_received` was not called.
        """
        if self._failure is not None:
            raise self._failure
        if self._due is not None:
            raise RuntimeError("page data is due: receive it and call payload_received()")
        try:
            return self._advance()
        except BodyError as error:
            self._failure = RecordError(str(error), record=self._record, offset=self._record_offset)
            self._failure.__cause__ = error.__cause__
        except RemoteStreamError as error:
            self._failure = error
        raise self._failure

    def payload_received(self) -> None:
        """Say that the page data of the last :class:`PageDataHeader` was received in full (also when it is 0 bytes).

        Raises:
            RuntimeError: none is due.
        """
        if self._due is None:
            raise RuntimeError("no page data is due")
        self._intake.offset += self._due.payload_bytes
        self._due = None
        self._expect_record()

    def eof(self) -> None:
        """Say that no more bytes will come; call it after :meth:`next_event` returned NEED_DATA.

        Raises:
            TruncatedError: END was not taken.
            RecordError: it is a file of another tool, shorter than an image header.
            RemoteStreamError: the error that was raised before.
        """
        if self._failure is not None:
            raise self._failure
        if not self._ended:
            had = self._intake.offset + len(self._intake)
            if self._step == self._image_header:
                self._refuse_foreign(self._intake.peek(had))
            if had == self._record_offset and had:
                raise TruncatedError(f"the stream stops after {had} bytes, before END")
            raise TruncatedError(f"the stream stops after {had} bytes", record=self._record, offset=self._record_offset)

    def _expect(self, record: str, need: int, step: Callable[[bytes], Event | None]) -> None:
        self._record = record
        self._record_offset = self._intake.offset
        self._then(need, step)

    def _expect_record(self) -> None:
        self._expect("record header", fmt.RECORD_HEADER.size, self._record_header)

    def _then(self, need: int, step: Callable[[bytes], Event | None]) -> None:
        self._need = need
        self._step = step

    def _advance(self) -> Event | Need:
        while not self._ended:
            if self._skip_bytes:
                passed = min(self._skip_bytes, len(self._intake))
                self._intake.discard(passed)
                self._skip_bytes -= passed
                if self._skip_bytes:
                    break
                self._expect_record()
            if len(self._intake) < self._need:
                break
            event = self._step(self._intake.take(self._need))
            if event is not None:
                return event
        return NEED_DATA

    def _image_header(self, data: bytes) -> None:
        marker, image_id, version, options, reserved_16, reserved_32 = fmt.IMAGE_HEADER.unpack(data)
        if marker != fmt.MARKER or image_id != fmt.IMAGE_ID:
            self._refuse_foreign(data)
            raise BodyError("this is not a libxc migration stream: the first 12 bytes are not its marker")
        if not fmt.OLDEST_VERSION <= version <= fmt.VERSION:
            raise VersionError(
                f"stream version {version} is not one we read ({fmt.OLDEST_VERSION} to {fmt.VERSION})",
                record=self._record,
                offset=self._record_offset,
            )
        if options & fmt.OPTION_BIG_ENDIAN:
            raise BodyError("a big-endian stream; only little-endian ones (x86) are read")
        if options or reserved_16 or reserved_32:
            raise BodyError("a reserved field or option is not 0")
        self._version = version
        self._expect("domain header", fmt.DOMAIN_HEADER.size, self._domain_header)

    def _refuse_foreign(self, begin: bytes) -> None:
        foreign = recognised(begin)
        if foreign is not None:
            why = f"this is {foreign.name}, not a libxc migration stream"
            raise RecordError(why, record=self._record, offset=self._record_offset, hint=foreign.hint)

    def _domain_header(self, data: bytes) -> Event:
        domain_type, page_shift, reserved, xen_major, xen_minor = fmt.DOMAIN_HEADER.unpack(data)
        if domain_type != fmt.DOMAIN_X86_HVM:
            kind = "an x86 PV guest" if domain_type == fmt.DOMAIN_X86_PV else f"domain type {domain_type}"
            raise BodyError(f"{kind}; only x86 HVM guests are read")
        if page_shift != PAGE_SHIFT:
            raise BodyError(f"page shift {page_shift} is not {PAGE_SHIFT}")
        if reserved:
            raise BodyError("a reserved field is not 0")
        self._order = Order(self._role, self._version, self._agreed)
        self._expect_record()
        return StreamHeader(version=self._version, xen_major=xen_major, xen_minor=xen_minor)

    def _record_header(self, data: bytes) -> Event | None:
        number, length = fmt.RECORD_HEADER.unpack(data)
        self._record = fmt.record_name(number)
        if length > fmt.MAX_BODY_BYTES:
            raise BodyError(f"a body of {length} bytes is longer than {fmt.MAX_BODY_BYTES}")
        try:
            self._type = RecordType(number)
        except ValueError:
            return self._unknown(number, length)
        why = self._order.check(self._type)
        if why is not None:
            raise OrderError(why, record=self._record, offset=self._record_offset)
        low, high = fmt.BODY_BYTES[self._type]
        if not low <= length <= high:
            raise BodyError(f"a body of {length} bytes is not between {low} and {high}")
        self._length = length
        if self._type is RecordType.PAGE_DATA:
            # So many pages it names at the least: what comes before page data is asked for at once, most often all.
            pages = (length - fmt.PAGE_DATA_HEAD.size) // (8 + PAGE_SIZE)
            self._then(fmt.PAGE_DATA_HEAD.size + 8 * min(pages, fmt.MAX_PAGES_PER_RECORD), self._page_data_head)
        else:
            self._then(length + fmt.padding_bytes(length), self._body)
        return None

    def _unknown(self, number: int, length: int) -> Event:
        if not number & fmt.OPTIONAL:
            raise BodyError("a mandatory record of a type that is not known")
        self._skip_bytes = length + fmt.padding_bytes(length)
        event = SkippedRecord(record_type=number, length_bytes=length, offset=self._record_offset)
        if not self._skip_bytes:
            self._expect_record()
        return event

    def _body(self, data: bytes) -> Event:
        if any(data[self._length :]):
            raise BodyError("the padding is not 0")
        event = parse_body(self._type, data[: self._length])
        if isinstance(event, ZeroPages | PackedPages | DeltaPages):
            self._check_inside(event.pfns)
        self._finish_record()
        return event

    def _finish_record(self) -> None:
        self._order.passed(self._type)
        self._ended = self._type is RecordType.END
        if not self._ended:
            self._expect_record()

    def _page_data_head(self, data: bytes) -> Event | None:
        count, reserved = fmt.PAGE_DATA_HEAD.unpack_from(data)
        if not 0 < count <= fmt.MAX_PAGES_PER_RECORD:
            raise BodyError(f"{count} pages is not between 1 and {fmt.MAX_PAGES_PER_RECORD}")
        if reserved:
            raise BodyError("a reserved field is not 0")
        least = fmt.PAGE_DATA_HEAD.size + count * 8
        if not least <= self._length <= least + count * PAGE_SIZE:
            raise BodyError(f"a body of {self._length} bytes does not hold {count} pages")
        first = data[fmt.PAGE_DATA_HEAD.size :]  # of no more than count pages, as the body's length fits
        if len(first) == count * 8:
            return self._pfn_array(first)
        self._then(count * 8 - len(first), lambda rest: self._pfn_array(first + rest))
        return None

    def _pfn_array(self, data: bytes) -> Event | None:
        words = np.frombuffer(data, "<u8")
        pfns, types, run = words, _ALL_NOTAB[: words.size], self._run_of(words)
        if run is None:
            types = (words >> np.uint64(fmt.PAGE_TYPE_SHIFT)).astype(np.uint8)
            pfns = words & np.uint64((1 << fmt.PAGE_TYPE_SHIFT) - 1)
            self._check_pages(pfns, types)
            pfns.flags.writeable = types.flags.writeable = False
        due = fmt.payload_bytes(types) if run is None else len(run) * PAGE_SIZE
        expected = fmt.PAGE_DATA_HEAD.size + len(data) + due
        if self._length != expected:
            raise BodyError(f"a body of {self._length} bytes where its pages make {expected}")
        head = PageDataHeader(pfns=pfns, types=types, payload_bytes=due, offset=self._record_offset, run=run)
        self._order.passed(self._type)
        if self._zero_copy:
            self._due = head
            return head
        self._then(due, lambda payload: self._payload(head, payload))
        return None

    def _run_of(self, words: NDArray[np.uint64]) -> range | None:
        """Return the frames of a pfn array, if they are neighbours in the guest, ascend and are of type NOTAB."""
        last = int(words[-1])
        if last > fmt.PFN_MASK or (self._gfn_limit is not None and last >= self._gfn_limit):
            return None  # one of another type, too, is larger
        return run_of(words)

    def _payload(self, head: PageDataHeader, payload: bytes) -> Event:
        self._expect_record()
        return PageData(pfns=head.pfns, types=head.types, payload=payload, offset=head.offset)

    def _check_pages(self, pfns: NDArray[np.uint64], types: NDArray[np.uint8]) -> None:
        if int(pfns.max()) > fmt.PFN_MASK:
            raise BodyError(f"entry {int(np.argmax(pfns > fmt.PFN_MASK))}: bits 59 to 52 are not 0")
        known = fmt.known_page_types(types)
        if not known.all():
            where = int(np.argmin(known))
            raise BodyError(f"entry {where}: an HVM stream has no page type {int(types[where])}")
        self._check_inside(pfns[types != fmt.PageType.XTAB])

    def _check_inside(self, pfns: NDArray[np.uint64]) -> None:
        if self._gfn_limit is not None and pfns.size and int(pfns.max()) >= self._gfn_limit:
            raise BodyError(f"gfn {int(pfns[np.argmax(pfns >= self._gfn_limit)]):#x} is outside the guest")
