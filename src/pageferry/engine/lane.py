"""Lane: the way of pages from guest memory to one connection."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from pageferry.core.bitmap import runs_of
from pageferry.core.errors import VmError
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.page_words import page_words, zero_pages
from pageferry.engine.audit import Proof
from pageferry.engine.transport import Channel
from pageferry.stream.codec import Encoder
from pageferry.stream.format import MAX_DIGESTS, MAX_PAGES_PER_RECORD, PageType, RecordType
from pageferry.stream.records import Audit, End, ZeroPages


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What was sent: ``pages`` in all, of which ``zero_pages`` as a mere word that they are zero."""

    pages: int = 0
    zero_pages: int = 0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(pages=self.pages + other.pages, zero_pages=self.zero_pages + other.zero_pages)

    def __sub__(self, other: "Sent") -> "Sent":
        return Sent(pages=self.pages - other.pages, zero_pages=self.zero_pages - other.zero_pages)


def _ignore(_: GfnArray) -> None:
    """Do nothing."""


class Lane:
    """Sends batches of pages, gathered from where they lie.

    Args:
        memory: the guest's.
        channel: where to.
        encoder: of the stream on that channel, which has begun.
        agreed: the extensions of the stream that may be used.
        on_wire: told of the frames, uint64[n], of each batch when they have gone.
    """

    def __init__(
        self,
        memory: GuestMemory,
        channel: Channel,
        encoder: Encoder,
        agreed: Collection[RecordType] = (),
        on_wire: Callable[[GfnArray], None] = _ignore,
    ) -> None:
        self._memory = memory
        self._words = page_words(memory)
        self._encoder = encoder
        self._on_wire = on_wire
        self._may_say_zero = RecordType.ZERO_PAGES in agreed
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
        for at in range(0, gfns.size, self.batch_pages):
            sent += self._send_batch(gfns[at : at + self.batch_pages], fresh=fresh)
        return sent

    def _send_batch(self, gfns: GfnArray, *, fresh: bool) -> Sent:
        present, zero, views = self._present(gfns, look_for_zeros=fresh or self._may_say_zero)
        buffers: list[bytes | memoryview] = []
        if fresh and present.size:
            types = np.where(zero, PageType.XALLOC, PageType.NOTAB).astype(np.uint8)
            buffers = [self._encoder.page_data(present, types), *views]
        elif present.size:
            if zero.any():
                buffers.append(self._encoder.record(ZeroPages(pfns=present[zero])))
            if not zero.all():
                buffers += [self._encoder.page_data(present[~zero]), *views]
        self.channel.send(buffers)
        self._on_wire(present)
        return Sent(pages=present.size, zero_pages=int(np.count_nonzero(zero)))

    def send_proof(self, proof: Proof) -> None:
        """Send digests of pages that went this way before.

        Raises:
            OSError: cut or stalled.
        """
        for at in range(0, proof.first_gfns.size, MAX_DIGESTS):
            part = slice(at, at + MAX_DIGESTS)
            pages = proof.pages[part].astype(np.uint32)
            record = Audit(first_gfns=proof.first_gfns[part], pages=pages, digests=proof.digests[part])
            self.channel.send([self._encoder.record(record)])

    def send_removed(self, gfns: GfnArray) -> None:
        """Tell that frames are no RAM of the guest any more (PAGE_DATA of type XTAB, without data).

        Args:
            gfns: uint64[n], strictly ascending; the guest is frozen.

        Raises:
            OSError: cut or stalled.
        """
        for at in range(0, gfns.size, MAX_PAGES_PER_RECORD):
            batch = gfns[at : at + MAX_PAGES_PER_RECORD]
            self.channel.send([self._encoder.page_data(batch, np.full(batch.size, PageType.XTAB, np.uint8))])

    def finish(self) -> None:
        """End a section.

        Raises:
            OSError: cut or stalled.
        """
        self.channel.send([self._encoder.record(End())])

    def _present(
        self, gfns: GfnArray, *, look_for_zeros: bool
    ) -> tuple[GfnArray, np.typing.NDArray[np.bool_], list[memoryview]]:
        # Those of the frames that are RAM (the guest may have given some back meanwhile), which of them are zero, and
        # views of the others.
        while True:
            present = gfns[self._memory.are_ram(gfns)]
            zero = zero_pages(self._words, present) if look_for_zeros else np.zeros(present.size, np.bool_)
            try:
                return present, zero, self._memory.views(*runs_of(present[~zero]))
            except VmError:
                continue  # one more was given back between the lines
