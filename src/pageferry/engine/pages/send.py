"""Sends guest pages: one lane for each connection, or one for a file.

The lane of a page depends on its gfn alone, so what is said of a page arrives in the order in which it was said,
however far one connection runs ahead of another.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from pageferry.core.errors import VmError
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.page_counts import NO_PAGES, PageCounts
from pageferry.core.page_words import page_words, zero_pages
from pageferry.engine.host import THIS_HOST, Host
from pageferry.engine.pages.encode import PageCoder
from pageferry.engine.verify.digests import RunDigests
from pageferry.engine.wire.connections import connection_of
from pageferry.engine.wire.pacer import Pacer
from pageferry.stream.encoder import Encoder
from pageferry.stream.format import MAX_DIGESTS, MAX_PAGES_PER_RECORD, PageType
from pageferry.stream.records import Audit, End, Fence, ZeroPages

#: How much waits for a connection: enough that it never idles, little enough that CLEAN and copy stay close.
_WAITING_TASKS = 2
#: Up to so many records of each lane are sent before anything else is looked at, while the wire takes them so fast.
_MOST_RECORDS, _QUICK_S = 4, 0.01
#: How many frames that carry no data are named by one call: 512 KiB.
_NAMED_AT_ONCE = 64 * MAX_PAGES_PER_RECORD


class Outlet(Protocol):
    """Takes a stream: a connection, or a file.

    ``pacer``: keeps it to a bandwidth, if anything does. ``sent_bytes``: how many bytes went there so far.
    """

    pacer: Pacer | None
    sent_bytes: int

    def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send all of ``buffers`` in order.

        Raises:
            OSError: it could not be done; some of it may have gone.
        """

    def abort(self) -> None:
        """Have a thread that is sending come back soon, if it can be; from any thread."""

    def close(self) -> None:
        """Stop sending. May be called twice."""


class Lane:
    """Sends guest pages over one connection, or into a file; used by one thread at a time.

    Args:
        memory: the guest's.
        channel: where to.
        encoder: of the stream on that channel, which has begun.
        coder: makes records of pages with content.
        says_zero: whether a page that became zero may be named as such.
        on_sent: told of the frames of each batch when they are on the wire, on the thread that sends.
        begins_zero: whether memory begins as zeros where the stream goes, so that a fresh page of zeros need not be
            sent.
    """

    def __init__(
        self,
        memory: GuestMemory,
        channel: Outlet,
        encoder: Encoder,
        coder: PageCoder,
        *,
        says_zero: bool,
        on_sent: Callable[[GfnArray], None],
        begins_zero: bool = True,
    ) -> None:
        self.channel = channel
        self.counts = NO_PAGES
        """What was sent, without bytes: those are the channel's."""
        self._memory = memory
        self._words = page_words(memory)
        self._encoder = encoder
        self._coder = coder
        self._says_zero = says_zero
        self._begins_zero = begins_zero
        self._on_sent = on_sent

    @property
    def batch_pages(self) -> int:
        """How many pages may go into one record now; the bandwidth cap may change that."""
        return MAX_PAGES_PER_RECORD if self.channel.pacer is None else self.channel.pacer.batch_pages

    def send(self, gfns: GfnArray, *, fresh: bool) -> None:
        """Send pages, as many records as it takes; frames that are not RAM any more are left out.

        Args:
            gfns: uint64[n], strictly ascending. Law 3: the CLEAN that reported them has returned.
            fresh: nothing was sent of these pages before, and the destination's memory began as zeros.

        Raises:
            OSError: cut or stalled.
        """
        present = gfns[self._memory.are_ram(gfns)]
        looks = self._says_zero or (fresh and self._begins_zero)
        zero = zero_pages(self._words, present) if looks else np.zeros(present.size, np.bool_)
        others = present
        if zero.any():
            for batch in self._batches(present[zero]):
                self._name_zero(batch, fresh=fresh)
            others = present[~zero]
        for batch in self._batches(others):
            self._send_content(batch, fresh=fresh)
        self._on_sent(gfns)

    def _batches(self, gfns: GfnArray) -> Iterator[GfnArray]:
        at = 0
        while at < gfns.size:  # the cap, and so how much goes into a record, may have changed since the last
            batch = gfns[at : at + self.batch_pages]
            yield batch
            at += batch.size

    def send_audit(self, audit: RunDigests) -> None:
        """Send digests of pages that were sent before.

        Raises:
            OSError: cut or stalled.
        """
        for at in range(0, audit.first_gfns.size, MAX_DIGESTS):
            piece = slice(at, at + MAX_DIGESTS)
            pages = audit.pages[piece].astype(np.uint32)
            record = Audit(first_gfns=audit.first_gfns[piece], pages=pages, digests=audit.digests[piece])
            self.channel.send([self._encoder.record(record)])

    def send_removed(self, gfns: GfnArray) -> None:
        """Tell that frames are not RAM of the guest any more (PAGE_DATA of type XTAB, without data).

        Args:
            gfns: uint64[n], strictly ascending; the guest is frozen.

        Raises:
            OSError: cut or stalled.
        """
        self._name(gfns, PageType.XTAB)

    def name_untouched(self, gfns: GfnArray) -> None:
        """Tell that frames are RAM and zeros (PAGE_DATA of type XALLOC, without data); arguments as above."""
        self._name(gfns, PageType.XALLOC)

    def send_fence(self, number: int) -> None:
        """Ask the destination to say when it has come so far.

        Raises:
            OSError: cut or stalled.
        """
        self.channel.send([self._encoder.record(Fence(number=number))])

    def finish(self) -> None:
        """End a section.

        Raises:
            OSError: cut or stalled.
        """
        self.channel.send([self._encoder.record(End())])

    def _name_zero(self, gfns: GfnArray, *, fresh: bool) -> None:
        self._coder.forget(gfns)
        name = self._encoder.named(gfns, PageType.XALLOC) if fresh else self._encoder.record(ZeroPages(pfns=gfns))
        self.channel.send([name])
        self.counts += PageCounts(sent_pages=gfns.size, zero_pages=gfns.size)

    def _send_content(self, gfns: GfnArray, *, fresh: bool) -> None:
        while gfns.size:
            try:
                coded = self._coder.code(gfns, fresh=fresh)
            except VmError:  # the guest gives pages back at any time: one of these just now
                gfns = gfns[self._memory.are_ram(gfns)]
            else:
                self.channel.send(coded.buffers)
                self.counts += coded.counts + PageCounts(sent_pages=gfns.size)
                return

    def _name(self, gfns: GfnArray, page_type: PageType) -> None:
        for begin in range(0, gfns.size, _NAMED_AT_ONCE):
            self.channel.send([self._encoder.named(gfns[begin : begin + _NAMED_AT_ONCE], page_type)])


class Lanes:
    """Sends pages over one or more connections, each page on its own.

    Args:
        main: the first; what goes there is sent on the thread that calls.
        others: each is given a thread, which :meth:`close` ends.
        host: of these threads.
    """

    def __init__(self, main: Lane, others: Sequence[Lane] = (), host: Host = THIS_HOST) -> None:
        self.all = (main, *others)
        """Every lane, the main one first."""
        self._now_s = host.now_s
        self._workers: list[_Worker] = []
        try:
            for lane in others:
                self._workers.append(_Worker(lane, host))
        except OSError:
            self.close()
            raise

    @property
    def counts(self) -> PageCounts:
        """What was sent so far; complete after :meth:`drain`."""
        sent_bytes = sum(lane.channel.sent_bytes for lane in self.all)
        return replace(sum((lane.counts for lane in self.all), NO_PAGES), sent_bytes=sent_bytes)

    def batches(self, gfns: GfnArray) -> Iterator[GfnArray]:
        """Cut frames (uint64[n]) into batches for :meth:`send`, each when the one before it was sent.

        A batch is a record of each lane, and more where the wire is so fast that it takes but a moment.
        """
        records, at = 1, 0
        while at < gfns.size:
            began_s = self._now_s()
            batch = gfns[at : at + records * self.all[0].batch_pages * len(self.all)]
            yield batch
            at += batch.size
            records = min(2 * records, _MOST_RECORDS) if self._now_s() - began_s < _QUICK_S else 1

    def send(self, gfns: GfnArray, *, fresh: bool) -> None:
        """Send pages, each on its lane; all but the main lane may still be at it afterwards.

        Args:
            gfns: as for :meth:`Lane.send`.
            fresh: as there.

        Raises:
            OSError: a connection was cut or stalled.
        """
        if self._workers:
            lanes = connection_of(gfns, len(self.all))
            for index, worker in enumerate(self._workers, 1):
                if (part := gfns[lanes == index]).size:
                    worker.send(part, fresh=fresh)
            gfns = gfns[lanes == 0]
        self.all[0].send(gfns, fresh=fresh)

    def send_audit(self, audit: RunDigests) -> None:
        """Send digests, each on the lane of its pages: a run lies in one piece of 2 MiB.

        Raises:
            OSError: a connection was cut or stalled.
        """
        lanes = connection_of(audit.first_gfns, len(self.all))
        for index, worker in enumerate(self._workers, 1):
            worker.send_audit(audit.part(lanes == index))
        self.all[0].send_audit(audit.part(lanes == 0))

    def drain(self) -> None:
        """Wait until all pages and digests that the lanes were given are sent.

        Raises:
            OSError: a connection was cut or stalled.
        """
        for worker in self._workers:
            worker.wait()

    def send_removed(self, gfns: GfnArray) -> None:
        """As :meth:`Lane.send_removed`, each page on its lane, behind whatever the lane was given before."""
        self.drain()
        lanes = connection_of(gfns, len(self.all))
        for index, lane in enumerate(self.all):
            lane.send_removed(gfns[lanes == index])

    def send_fence(self, number: int) -> None:
        """As :meth:`Lane.send_fence`, on every lane, behind whatever the lane was given before."""
        self.drain()
        for lane in self.all:
            lane.send_fence(number)

    def finish(self) -> None:
        """End the sections, behind whatever they were given before; the main stream goes on.

        Raises:
            OSError: a connection was cut or stalled.
        """
        self.drain()
        for worker in self._workers:
            worker.lane.finish()

    def close(self) -> None:
        """End the threads and their connections, whatever is still waiting there. May be repeated."""
        for worker in self._workers:
            worker.close()


class _Worker:
    """A lane with a thread."""

    def __init__(self, lane: Lane, host: Host) -> None:
        self.lane = lane
        self._tasks = host.queue(_WAITING_TASKS)  # of Callable[[], None], or None at the end
        self._failure: BaseException | None = None
        self._thread = host.begin(self._run, "lane")

    def send(self, gfns: GfnArray, *, fresh: bool) -> None:
        self._put(lambda: self.lane.send(gfns, fresh=fresh))

    def send_audit(self, audit: RunDigests) -> None:
        self._put(lambda: self.lane.send_audit(audit))

    def wait(self) -> None:
        self._tasks.join()
        self._check()

    def close(self) -> None:
        self.lane.channel.abort()
        if self._thread.is_alive():
            self._tasks.put(None)
            self._thread.join()
        self.lane.channel.close()

    def _put(self, task: Callable[[], None]) -> None:
        self._check()
        self._tasks.put(task)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                if self._failure is None:  # after a failure tasks are only taken off the queue
                    task()
            except BaseException as error:
                self._failure = error
            finally:
                self._tasks.task_done()
