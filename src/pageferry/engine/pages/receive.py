"""A migration's pages at the destination: from one or more connections straight into guest memory.

::

    connection 0:  read_stream -> PageWriter    on the thread that iterates Receiver.events
    connection 1:  read_stream -> PageWriter    on a thread of its own, and so on

A page comes on one connection only (:func:`~pageferry.engine.wire.connections.connection_of`), so what is said of it
is taken in the order in which it was said. A FENCE is reached when all connections have come to it.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from pageferry.core.bitmap import expand_runs, runs_of
from pageferry.core.errors import GuestAt, RecordError, TransportError, TruncatedError
from pageferry.core.events import Phase
from pageferry.core.frames import PAGE_SIZE, PAGES_PER_2M, GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.page_words import WORDS_PER_PAGE, PageWords, page_words
from pageferry.core.ram import byte_ranges
from pageferry.engine.host import THIS_HOST
from pageferry.engine.room import expect_more_room
from pageferry.engine.verify.compare import ReceivedPages
from pageferry.engine.verify.digests import ArrivalDigester
from pageferry.engine.wire.channel import Channel
from pageferry.engine.wire.connections import connection_of
from pageferry.stream.decoder import Decoder
from pageferry.stream.format import RECORD_HEADER, BodyError, PageType, RecordType, carries_data
from pageferry.stream.intake import Need
from pageferry.stream.order import Role
from pageferry.stream.packing import Packing, packer
from pageferry.stream.records import (
    Audit,
    DeltaPages,
    Event,
    Fence,
    PackedPages,
    PageDataHeader,
    SkippedRecord,
    ZeroPages,
)

#: How soon the reader of one connection hears that another failed.
_POLL_S = 0.1
#: How many pages arrive before the host is asked for room again: 64 MiB.
_ROOM_PAGES = 16_384
#: A record that has begun comes at this rate, once it has taken as long as the connection may stand still: half of the
#: least bandwidth that a source may be told to keep to.
_LEAST_BYTES_PER_S = 32 << 10
#: Received at once where it is digested right afterwards, 512 KiB: they are in a processor's cache still.
_PIECE_PAGES = 128
#: Runs of so many pages on average are received one by one, so that whole 2 MiB of them are digested.
_LONG_RUN = 256
#: Of so many pages in a row that became zero the storage is given back; fewer are written.
_GIVEN_BACK_PAGES = 16


def _pieces(run: range) -> Iterator[range]:
    """Cut a run at multiples of what is received at once."""
    at = run.start
    while at < run.stop:
        stop = min(at - at % _PIECE_PAGES + _PIECE_PAGES, run.stop)
        yield range(at, stop)
        at = stop


class PageWriter:
    """Takes the records of one connection into guest memory; page data is received straight into place.

    Each method raises a RecordError for a page that is outside the guest or belongs on another connection.

    Args:
        channel: where page data comes from.
        pages: what is known of the guest's pages.
        index: which connection this is, from 0.
        connections: how many there are.
        packing: what was agreed on.
        expect_room: called each 64 MiB; raises a UsageError when the host has no room for the next.
    """

    def __init__(
        self,
        channel: Channel,
        pages: ReceivedPages,
        *,
        index: int = 0,
        connections: int = 1,
        packing: Packing = Packing.NONE,
        expect_room: Callable[[GuestMemory], None] = expect_more_room,
    ) -> None:
        self._channel = channel
        self._expect_more_room = expect_room
        self._pages = pages
        self._memory = pages.memory
        self._words = page_words(pages.memory)
        self._index = index
        self._connections = connections
        self._unseen_pages = 0  # since the host was asked for room
        self._ahead = memoryview(bytearray(RECORD_HEADER.size))
        self._digester = ArrivalDigester()
        self._packer = None if packing is Packing.NONE else packer(packing)

    def page_data(self, header: PageDataHeader) -> memoryview:
        """Take one PAGE_DATA record, and receive its page data.

        Returns:
            What has come behind it already, of the header of the next record; valid until the next call.

        Raises:
            OSError: cut or stalled.
        """
        if header.run is not None and self._is_ours(header.run):
            self._expect_room(header.pfns.size)
            return self._ahead[: self._receive_runs([header.run], header.pfns)]
        self._pages.remove(header.pfns[header.types == PageType.XTAB])
        allocated = header.pfns[header.types == PageType.XALLOC]  # zeros, as they are from the beginning
        gfns = header.pfns[carries_data(header.types)]
        self._check(np.concatenate([gfns, allocated]), "PAGE_DATA", header.offset)
        ahead_bytes = self._receive_pages(gfns)
        if allocated.size:
            self._arrived(allocated)
        return self._ahead[:ahead_bytes]

    def _receive_pages(self, gfns: GfnArray) -> int:
        if gfns.size < 2 or bool((gfns[1:] > gfns[:-1]).all()):
            starts, lengths = runs_of(gfns)
            if starts.size * _LONG_RUN <= gfns.size:
                ends = (starts + lengths).tolist()
                return self._receive_runs(list(map(range, starts.tolist(), ends)), gfns)
            self._memory.advice.make_huge(starts, lengths)
            views = self._memory.views(starts, lengths)
        else:
            views = self._memory.page_views(gfns)
        ahead_bytes = self._channel.receive_into(views, self._ahead)
        self._arrived(gfns)
        return ahead_bytes

    def _receive_runs(self, runs: Sequence[range], gfns: GfnArray) -> int:
        """Receive long runs, ``gfns`` together; where audits are to come each whole 2 MiB of them is digested."""
        pieces = [piece for run in runs for piece in (_pieces(run) if self._pages.audits else (run,))]
        digests = []
        ahead_bytes = 0
        for run in runs:
            self._memory.advice.make_run_huge(run)
        for left, piece in zip(range(len(pieces) - 1, -1, -1), pieces, strict=True):
            view = self._memory.view(piece)
            ahead_bytes = self._channel.receive_into([view], None if left else self._ahead)
            if self._pages.audits and (digest := self._digester.take(piece, view)) is not None:
                digests.append((piece.stop - PAGES_PER_2M, digest))
        self._pages.arrived(gfns, runs[0] if len(runs) == 1 else None)
        for first_gfn, digest in digests:
            self._pages.digested(first_gfn, digest)
        return ahead_bytes

    def zero_pages(self, record: ZeroPages) -> None:
        """Make pages zero."""
        self._check(record.pfns, "ZERO_PAGES")
        starts, lengths = runs_of(record.pfns)
        long = lengths >= _GIVEN_BACK_PAGES
        if self._memory.release(byte_ranges(starts[long], lengths[long])):
            starts, lengths = starts[~long], lengths[~long]
        self._words[expand_runs(starts, lengths)] = 0
        self._arrived(record.pfns)

    def packed_pages(self, record: PackedPages) -> None:
        """Unpack pages into place.

        Raises:
            RecordError: the data is not what it should be.
        """
        self._check(record.pfns, "PACKED_PAGES")
        self._words[record.pfns] = self._unpacked(record.data, record.pfns.size, "PACKED_PAGES")
        self._arrived(record.pfns)

    def delta_pages(self, record: DeltaPages) -> None:
        """Change pages by what is unpacked.

        Raises:
            RecordError: the data is not what it should be.
        """
        self._check(record.pfns, "DELTA_PAGES")
        self._words[record.pfns] ^= self._unpacked(record.data, record.pfns.size, "DELTA_PAGES")  # each page once
        self._arrived(record.pfns)

    def audit(self, record: Audit) -> None:
        """Compare what was digested while the guest ran.

        Raises:
            AuditMismatchError: a run differs.
        """
        lengths = record.pages.astype(np.uint64)
        self._check(np.concatenate([record.first_gfns, record.first_gfns + lengths - np.uint64(1)]), "AUDIT")
        self._pages.audit(record.first_gfns, lengths, record.digests)

    def _whole_runs(self, gfns: GfnArray) -> list[memoryview]:
        runs = runs_of(gfns)
        self._memory.advice.make_huge(*runs)
        return self._memory.views(*runs)

    def _arrived(self, gfns: GfnArray) -> None:
        self._digester.forget()
        self._pages.arrived(gfns)

    def _unpacked(self, data: bytes, pages: int, record: str) -> PageWords:
        if self._packer is None:
            raise RecordError("nothing was agreed on how pages are packed", record=record)
        try:
            unpacked = self._packer.unpack(data, pages * PAGE_SIZE)
        except BodyError as error:
            raise RecordError(str(error), record=record) from error
        return np.frombuffer(unpacked, np.uint64).reshape(-1, WORDS_PER_PAGE)

    def _expect_room(self, pages: int) -> None:
        self._unseen_pages += pages
        if self._unseen_pages >= _ROOM_PAGES:
            self._unseen_pages = 0
            self._expect_more_room(self._memory)

    def _is_ours(self, run: range) -> bool:
        """Tell whether a run is RAM in one piece, and of this connection."""
        if self._connections > 1:
            piece = run.start // PAGES_PER_2M
            if piece % self._connections != self._index or (run.stop - 1) // PAGES_PER_2M != piece:
                return False
        return self._memory.holds(run)

    def _check(self, gfns: GfnArray, record: str, offset: int | None = None) -> None:
        self._expect_room(gfns.size)
        inside = self._memory.are_ram(gfns)
        if not inside.all():
            raise RecordError(f"gfn {int(gfns[~inside][0]):#x} is outside the guest", record=record, offset=offset)
        ours = connection_of(gfns, self._connections) == self._index if self._connections > 1 else inside
        if not ours.all():
            strange = int(gfns[~ours][0])
            raise RecordError(f"gfn {strange:#x} belongs on another connection", record=record, offset=offset)


class Activity:
    """The clock of all connections: one with nothing to carry is not stalled while another carries.

    Args:
        now_s: a monotonic clock in seconds.

    Attributes:
        failure: of the first connection that failed; it ends the others.
    """

    def __init__(self, now_s: Callable[[], float] = THIS_HOST.now_s) -> None:
        self.now_s = now_s
        self._last_s = now_s()
        self.failure: Exception | None = None

    def note(self) -> None:
        """Something came in."""
        self._last_s = self.now_s()

    def wait(self, channel: Channel) -> None:
        """Wait until something comes in on ``channel``.

        Raises:
            TimeoutError: nothing came in on any connection for as long as this one may stand still.
            Exception: the failure of another connection.
        """
        while True:
            if self.failure is not None:
                raise self.failure
            if channel.readable(_POLL_S):
                return
            self.check(channel.timeout_s)

    def check(self, timeout_s: float) -> None:
        """Raise what is wrong.

        Raises:
            TimeoutError: nothing came in on any connection for ``timeout_s``.
            Exception: the failure of another connection.
        """
        if self.failure is not None:
            raise self.failure
        if self.now_s() - self._last_s >= timeout_s:
            raise TimeoutError("stalled")


class _Pace:
    """How fast a record comes, from its first byte on; records that say nothing to us do not count as any.

    Args:
        timeout_s: for how long it may come as slowly as it likes.
        now_s: a monotonic clock in seconds.
    """

    def __init__(self, timeout_s: float, now_s: Callable[[], float]) -> None:
        self._timeout_s = timeout_s
        self._now_s = now_s
        self._began_s: float | None = None
        self._bytes = 0

    def came(self, size_bytes: int) -> None:
        """Note some of it.

        Raises:
            TimeoutError: it is a trickle.
        """
        now_s = self._now_s()
        self._began_s = now_s if self._began_s is None else self._began_s
        self._bytes += size_bytes
        if now_s - self._began_s > self._timeout_s + self._bytes / _LEAST_BYTES_PER_S:
            raise TimeoutError("stalled")


def read_stream(channel: Channel, decoder: Decoder, writer: PageWriter, activity: Activity) -> Iterator[Event]:
    """Read a stream, or a section, up to END: pages go to the writer, all else is yielded.

    Args:
        channel: where it comes from.
        decoder: of it, with ``zero_copy``.
        writer: takes the pages.
        activity: of all connections together.

    Raises:
        RemoteStreamError: it is not a legal one, or stops before END.
        AuditMismatchError: pages differ that were digested while the guest ran.
        OSError: cut or stalled.
    """
    pace = _Pace(channel.timeout_s, activity.now_s)
    while not decoder.ended:
        event = decoder.next_event()
        if not isinstance(event, Need | SkippedRecord):
            pace = _Pace(channel.timeout_s, activity.now_s)
        if isinstance(event, Need):
            activity.wait(channel)
            data = channel.receive_some(decoder.wanted_bytes)
            pace.came(len(data))
            activity.note()
            if not data:
                decoder.eof()
                raise TruncatedError("the stream stops before END")
            decoder.feed(data)
        elif isinstance(event, PageDataHeader):
            ahead = writer.page_data(event)
            activity.note()
            decoder.payload_received()
            decoder.feed(ahead)
        elif isinstance(event, ZeroPages):
            writer.zero_pages(event)
        elif isinstance(event, PackedPages):
            writer.packed_pages(event)
        elif isinstance(event, DeltaPages):
            writer.delta_pages(event)
        elif isinstance(event, Audit):
            writer.audit(event)
        else:
            yield event


class Receiver:
    """Reads a migration's stream from all its connections, for the length of a ``with`` block.

    What goes wrong on one of them is raised where the first is read, or at the end of the block in place of what was
    met there meanwhile. When the block fails by itself, all but the first are cut.

    Args:
        channels: the connections, in order; all but the first are closed at the end.
        pages: what is known of the guest's pages.
        agreed: the extensions of the stream that both ends agreed on.
        packing: how pages are packed.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        pages: ReceivedPages,
        *,
        agreed: Collection[RecordType],
        packing: Packing = Packing.NONE,
    ) -> None:
        self._channels = channels
        self._writers = [
            PageWriter(channel, pages, index=index, connections=len(channels), packing=packing)
            for index, channel in enumerate(channels)
        ]
        roles = [Role.READER, *(Role.SECTION for _ in channels[1:])]
        self._decoders = [
            Decoder(zero_copy=True, gfn_limit=pages.memory.gfn_limit, agreed=agreed, role=role) for role in roles
        ]
        host = self._host = channels[0].host
        self._activity = Activity(host.now_s)
        self._reached = [-1 for _ in channels[1:]]
        self._changed = host.condition()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Receiver":
        try:
            for index in range(1, len(self._channels)):
                self._threads.append(self._host.begin(self._read_section, f"section {index + 1}", index))
        except OSError:
            self._end_sections(cut=True)
            raise
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        failure = self._activity.failure  # before those of connections that are cut here
        self._end_sections(cut=error is not None)
        if error is None:
            failure = self._activity.failure
        if failure is not None and failure is not error:
            raise failure from error

    def _end_sections(self, *, cut: bool) -> None:
        if cut:
            for channel in self._channels[1:]:
                channel.abort()
        for thread in self._threads:
            thread.join()
        for channel in self._channels[1:]:
            channel.close()

    @property
    def stream_bytes(self) -> int:
        """How much of the stream was read from the first connection."""
        return self._decoders[0].offset

    def events(self) -> Iterator[Event]:
        """Read the stream up to END; yield what is not of pages, a Fence when all connections have come to it.

        Raises:
            RemoteStreamError, AuditMismatchError: as for :func:`read_stream`.
            OSError: a connection was cut, or nothing came in on any of them for as long as it may stand still.
            Exception: the failure of another connection.
        """
        for event in self._read(0):
            if isinstance(event, Fence):
                self._wait_reached(event.number)
            yield event

    def _read(self, index: int) -> Iterator[Event]:
        return read_stream(self._channels[index], self._decoders[index], self._writers[index], self._activity)

    def _wait_reached(self, number: int) -> None:
        with self._changed:
            while any(reached < number for reached in self._reached):
                self._changed.wait(_POLL_S)
                self._activity.check(self._channels[0].timeout_s)

    def _read_section(self, index: int) -> None:
        try:
            for event in self._read(index):
                if isinstance(event, Fence):
                    with self._changed:
                        self._reached[index - 1] = event.number
                        self._changed.notify_all()
        except (OSError, TruncatedError) as error:
            what = "stood still" if isinstance(error, TimeoutError) else "was cut"
            self._fail(TransportError(f"connection {index + 1} {what}", phase=Phase.PRECOPY, guest_at=GuestAt.SOURCE))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._activity.failure = self._activity.failure or error
