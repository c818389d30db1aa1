"""Lane: the way of pages from guest memory to one connection."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pageferry.core.errors import VmError
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.page_words import page_words, zero_pages
from pageferry.engine.pages.encode import Coded, PageCoder
from pageferry.engine.verify.audit import Proof
from pageferry.engine.wire.outlet import Outlet
from pageferry.stream.codec import Encoder
from pageferry.stream.format import MAX_DIGESTS, MAX_PAGES_PER_RECORD, PageType
from pageferry.stream.records import Audit, End, Fence, ZeroPages


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What was sent: ``pages`` in all; ``zero_pages`` of them by name only; the others as in :class:`Coded`."""

    pages: int = 0
    zero_pages: int = 0
    packed_pages: int = 0
    packed_bytes: int = 0
    delta_pages: int = 0
    delta_bytes: int = 0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    def __sub__(self, other: "Sent") -> "Sent":
        return Sent(**{name: getattr(self, name) - getattr(other, name) for name in self.__slots__})


class Lane:
    """Sends pages, batch by batch; for one thread at a time.

    Args:
        memory: the guest's.
        channel: where to.
        encoder: of the stream on that channel, which has begun.
        coder: makes records of pages with content.
        says_zero: whether a page that became zero may be named as such.
        on_sent: told of the frames of each batch when they are on the wire, on the thread that sends.
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
    ) -> None:
        self._on_sent = on_sent
        self._memory = memory
        self._words = page_words(memory)
        self._encoder = encoder
        self._coder = coder
        self._says_zero = says_zero
        self.channel = channel

    @property
    def batch_pages(self) -> int:
        """How many pages go into one record."""
        return MAX_PAGES_PER_RECORD if self.channel.pacer is None else self.channel.pacer.batch_pages

    def send(self, gfns: GfnArray, *, fresh: bool) -> Sent:
        """Send pages; frames that are no RAM any more are left out.

        Args:
            gfns: uint64[n], strictly ascending. Law 3: the CLEAN that reported them has returned.
            fresh: nothing was sent of these pages before, and the destination's memory began as zeros.

        Raises:
            OSError: cut or stalled.
        """
        sent = Sent()
        at = 0
        while at < gfns.size:  # the cap, and with it the size of a batch, may change meanwhile
            batch = gfns[at : at + self.batch_pages]
            sent += self._send_batch(batch, fresh=fresh)
            self._on_sent(batch)
            at += batch.size
        return sent

    def send_proof(self, proof: Proof) -> None:
        """Send digests of pages that were sent before.

        Raises:
            OSError: cut or stalled.
        """
        for at in range(0, proof.first_gfns.size, MAX_DIGESTS):
            piece = slice(at, at + MAX_DIGESTS)
            pages = proof.pages[piece].astype(np.uint32)
            record = Audit(first_gfns=proof.first_gfns[piece], pages=pages, digests=proof.digests[piece])
            self.channel.send([self._encoder.record(record)])

    def send_removed(self, gfns: GfnArray) -> None:
        """Tell that frames are no RAM of the guest any more (PAGE_DATA of type XTAB, without data).

        Args:
            gfns: uint64[n], strictly ascending; the guest is frozen.

        Raises:
            OSError: cut or stalled.
        """
        for at in range(0, gfns.size, MAX_PAGES_PER_RECORD):
            self.channel.send([self._named(gfns[at : at + MAX_PAGES_PER_RECORD], PageType.XTAB)])

    def send_fence(self, number: int) -> None:
        """Ask the destination to say when it is here.

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

    def _send_batch(self, gfns: GfnArray, *, fresh: bool) -> Sent:
        zero, coded, coded_pages = self._coded(gfns, fresh=fresh)
        if zero.size:
            self._coder.forget(zero)
            name = self._named(zero, PageType.XALLOC) if fresh else self._encoder.record(ZeroPages(pfns=zero))
            self.channel.send([name])
        self.channel.send(coded.buffers)
        return Sent(
            pages=zero.size + coded_pages,
            zero_pages=zero.size,
            packed_pages=coded.packed_pages,
            packed_bytes=coded.packed_bytes,
            delta_pages=coded.delta_pages,
            delta_bytes=coded.delta_bytes,
        )

    def _named(self, gfns: GfnArray, page_type: PageType) -> bytes:
        return self._encoder.page_data(gfns, np.full(gfns.size, page_type, np.uint8))

    def _coded(self, gfns: GfnArray, *, fresh: bool) -> tuple[GfnArray, Coded, int]:
        # Of the frames that are RAM (the guest may have given some back meanwhile) those that are zero, and the records
        # and number of the others.
        while True:
            present = gfns[self._memory.are_ram(gfns)]
            zero = zero_pages(self._words, present) if fresh or self._says_zero else np.zeros(present.size, np.bool_)
            others = present[~zero]
            try:
                coded = self._coder.code(others, fresh=fresh) if others.size else Coded(buffers=())
                return present[zero], coded, others.size
            except VmError:
                continue  # one more was given back between the lines
