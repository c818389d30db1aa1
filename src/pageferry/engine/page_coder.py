"""PageCoder: the contents of pages as records, straight from guest memory or packed.

What is packed is copied first. A page that the guest changes meanwhile is then of two moments at the worst, as one that
is sent straight from memory may be (and is dirty and sent again: law 3), but a packer never reads changing bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pageferry.core.bitmap import runs_of
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.page_words import WORDS_PER_PAGE, PageWords, page_words
from pageferry.stream.codec import Encoder
from pageferry.stream.format import MAX_PAGES_PER_RECORD
from pageferry.stream.packing import Packer
from pageferry.stream.records import PackedPages

#: Pages that packing makes smaller by less than an eighth go as they are: unpacking them would cost more than it saves.
_WORTH = 7 / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """The records of a batch of pages: what to send, in order; ``packed_pages`` of them took ``packed_bytes``."""

    buffers: Sequence[bytes | memoryview]
    packed_pages: int = 0
    packed_bytes: int = 0


class PageCoder(Protocol):
    """Makes records of pages."""

    def code(self, gfns: GfnArray) -> Coded:
        """Return the records.

        Args:
            gfns: uint64[n], strictly ascending, 1 to 1,024, RAM a moment ago.

        Raises:
            VmError: a frame is no RAM any more; nothing was written to the stream.
        """


class PlainCoder:
    """Pages as they lie in guest memory, without a copy.

    Args:
        memory: the guest's.
        encoder: of the stream.
    """

    def __init__(self, memory: GuestMemory, encoder: Encoder) -> None:
        self._memory = memory
        self._encoder = encoder

    def code(self, gfns: GfnArray) -> Coded:
        """Return one PAGE_DATA record; see :class:`PageCoder`."""
        views = self._memory.views(*runs_of(gfns))
        return Coded(buffers=[self._encoder.page_data(gfns), *views])


class PackingCoder:
    """Pages copied, then packed batch by batch; those that do not get smaller go as they are.

    Args:
        memory: the guest's.
        encoder: of the stream, where PACKED_PAGES was agreed on.
        packer: ours alone.
    """

    def __init__(self, memory: GuestMemory, encoder: Encoder, packer: Packer) -> None:
        self._words = page_words(memory)
        self._encoder = encoder
        self._packer = packer
        self._copies = np.empty((MAX_PAGES_PER_RECORD, WORDS_PER_PAGE), np.uint64)

    def code(self, gfns: GfnArray) -> Coded:
        """Return one PACKED_PAGES or PAGE_DATA record; see :class:`PageCoder`. Valid until the next call."""
        copies = self._copies[: gfns.size]
        np.take(self._words, gfns.astype(np.intp), axis=0, out=copies, mode="clip")
        return self._packed(gfns, copies)

    def _packed(self, gfns: GfnArray, copies: PageWords) -> Coded:
        raw = copies.data.cast("B")
        packed = self._packer.pack(raw)
        if len(packed) > _WORTH * raw.nbytes:
            return Coded(buffers=[self._encoder.page_data(gfns), raw])
        record = self._encoder.record(PackedPages(pfns=gfns, data=packed))
        return Coded(buffers=[record], packed_pages=gfns.size, packed_bytes=len(record))
