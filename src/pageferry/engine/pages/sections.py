"""Sections: the stream as it comes in over one or more connections, at the destination."""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import GuestAt, TransportError, TruncatedError
from pageferry.core.events import Phase
from pageferry.engine.pages.arrivals import Arrivals
from pageferry.engine.wire.channel import Channel
from pageferry.stream.codec import Decoder
from pageferry.stream.format import RecordType
from pageferry.stream.intake import Need
from pageferry.stream.order import Role
from pageferry.stream.records import (
    Audit,
    DeltaPages,
    Event,
    Fence,
    PackedPages,
    PageDataHeader,
    StreamHeader,
    ZeroPages,
)

#: How soon the reader of one connection hears that another failed.
_POLL_S = 0.1


class Activity:
    """What goes on on all connections: one with nothing to carry for long is not stalled, and none outlives another.

    Attributes:
        failure: of the first connection that failed.
    """

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._last_s = now_s()
        self.failure: Exception | None = None

    def note(self) -> None:
        """Something came in."""
        self._last_s = self._now_s()

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
        if self._now_s() - self._last_s >= timeout_s:
            raise TimeoutError("stalled")


def read_stream(
    channel: Channel, decoder: Decoder, arrivals: Arrivals, activity: Activity, reached: Callable[[int], None]
) -> Iterator[Event]:
    """Read a stream, or a section, up to END: pages go where they belong, all else is yielded.

    Args:
        channel: where it comes from.
        decoder: of it, with ``zero_copy``.
        arrivals: takes the pages.
        activity: of all connections together.
        reached: called with the number of each FENCE, when all that came before it is in place.

    Raises:
        RemoteStreamError: it is not a legal one, or stops before END.
        AuditMismatchError: pages differ that were digested while the guest ran.
        OSError: cut or stalled.
    """
    while not decoder.ended:
        event = decoder.next_event()
        if isinstance(event, Need):
            activity.wait(channel)
            data = channel.receive_some(decoder.wanted_bytes)
            activity.note()
            if not data:
                decoder.eof()
                raise TruncatedError("the stream stops before END")
            decoder.feed(data)
        elif isinstance(event, PageDataHeader):
            arrivals.page_data(event)
            activity.note()
            decoder.payload_received()
        elif isinstance(event, Audit):
            arrivals.audit(event)
        elif isinstance(event, Fence):
            reached(event.number)
        elif isinstance(event, ZeroPages):
            arrivals.zero_pages(event)
        elif isinstance(event, PackedPages):
            arrivals.packed_pages(event)
        elif isinstance(event, DeltaPages):
            arrivals.delta_pages(event)
        elif not isinstance(event, StreamHeader):
            yield event


class Sections:
    """Reads the sections of all connections but the first, each on a thread, for the length of a ``with`` block.

    What goes wrong in one is raised where the first connection is read, or at the end of the block in place of what
    that reader met then. When that reader fails by itself, all are cut.

    Args:
        others: the other connections, in order; they are closed at the end.
        make_arrivals: makes what takes the pages of connection number i.
        gfn_limit: of the guest's memory.
        agreed: the extensions of the stream that both ends agreed on.

    Attributes:
        activity: of all connections; the reader of the first one takes part in it.
    """

    def __init__(
        self,
        others: Sequence[Channel],
        make_arrivals: Callable[[Channel, int], Arrivals],
        *,
        gfn_limit: int,
        agreed: Collection[RecordType],
    ) -> None:
        self._others = others
        self._gfn_limit = gfn_limit
        self._agreed = agreed
        self._reached = [-1] * len(others)
        self._changed = threading.Condition()
        self._arrivals = [make_arrivals(channel, index) for index, channel in enumerate(others, 1)]
        self.activity = Activity()
        self._threads = [
            threading.Thread(target=self._read, args=(index,), name=f"section {index + 1}", daemon=True)
            for index in range(len(others))
        ]

    def __enter__(self) -> "Sections":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        failure = self.activity.failure  # before those of connections that are cut here
        if error is not None:
            for channel in self._others:
                channel.abort()
        for thread in self._threads:
            thread.join()
        for channel in self._others:
            channel.close()
        if error is None:
            failure = self.activity.failure
        if failure is not None and failure is not error:
            raise failure from error

    def wait_reached(self, number: int) -> None:
        """Wait until all these connections have come to a FENCE.

        Raises:
            TimeoutError: nothing came in on any of them for as long as it may stand still.
            Exception: the failure of one of them.
        """
        with self._changed:
            while any(reached < number for reached in self._reached):
                self._changed.wait(_POLL_S)
                self.activity.check(self._others[0].timeout_s)

    def removed(self) -> DirtyBitmap:
        """Return the frames of these connections' pages that the source has none for, once all is read."""
        gone = DirtyBitmap(self._gfn_limit)
        for arrivals in self._arrivals:
            gone |= arrivals.removed
        return gone

    def _read(self, index: int) -> None:
        channel = self._others[index]
        decoder = Decoder(zero_copy=True, gfn_limit=self._gfn_limit, agreed=self._agreed, role=Role.SECTION)
        try:
            for _ in read_stream(channel, decoder, self._arrivals[index], self.activity, partial(self._note, index)):
                pass  # the end of static data, and optional records that nobody here knows
        except (OSError, TruncatedError) as error:
            what = "stood still" if isinstance(error, TimeoutError) else "was cut"
            self._fail(TransportError(f"connection {index + 1} {what}", phase=Phase.PRECOPY, guest_at=GuestAt.SOURCE))
        except Exception as error:
            self._fail(error)

    def _note(self, index: int, number: int) -> None:
        with self._changed:
            self._reached[index] = number
            self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        self.activity.failure = self.activity.failure or error
