"""Arrivals: pages from one connection into guest memory."""

import numpy as np

from pageferry.core.bitmap import DirtyBitmap, runs_of
from pageferry.core.errors import RecordError
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.page_words import page_words
from pageferry.engine.shares import connection_of
from pageferry.engine.transport import Channel
from pageferry.stream.format import PageType, carries_data
from pageferry.stream.records import PageDataHeader, ZeroPages


class Arrivals:
    """Puts pages where they belong; page data is received straight into place.

    Args:
        memory: the guest's; it began as zeros.
        channel: where page data comes from.
        index: which connection that is, from 0.
        connections: how many there are.

    Attributes:
        removed: the frames of RAM that the source has none for, as far as it was told.
    """

    def __init__(self, memory: GuestMemory, channel: Channel, index: int = 0, connections: int = 1) -> None:
        self._memory = memory
        self._words = page_words(memory)
        self._channel = channel
        self._index = index
        self._connections = connections
        self.removed = DirtyBitmap(memory.gfn_limit)

    def page_data(self, header: PageDataHeader) -> None:
        """Take one PAGE_DATA record: receive its page data.

        Raises:
            RecordError: a page is outside the guest, or another connection's.
            OSError: cut or stalled.
        """
        gone = header.pfns[header.types == PageType.XTAB]
        self.removed.set(gone[self._memory.are_ram(gone)])  # what was never RAM here is not worth a word
        allocated = header.pfns[header.types == PageType.XALLOC]  # zeros, as they are from the beginning
        gfns = header.pfns[carries_data(header.types)]
        self._check(np.concatenate([gfns, allocated]), "PAGE_DATA", header.offset)
        ascending = gfns.size < 2 or bool((gfns[1:] > gfns[:-1]).all())
        self._channel.receive_into(self._memory.views(*runs_of(gfns)) if ascending else self._memory.page_views(gfns))
        self._memory.wrote(gfns)
        self.removed.clear(gfns)
        self.removed.clear(allocated)

    def zero_pages(self, record: ZeroPages) -> None:
        """Make pages zero.

        Raises:
            RecordError: a page is outside the guest, or another connection's.
        """
        self._check(record.pfns, "ZERO_PAGES", None)
        self._words[record.pfns] = 0
        self._memory.wrote(record.pfns)
        self.removed.clear(record.pfns)

    def _check(self, gfns: GfnArray, record: str, offset: int | None) -> None:
        inside = self._memory.are_ram(gfns)
        if not inside.all():
            raise RecordError(f"gfn {int(gfns[~inside][0]):#x} is outside the guest", record=record, offset=offset)
        ours = connection_of(gfns, self._connections) == self._index
        if not ours.all():
            strange = int(gfns[~ours][0])
            raise RecordError(f"gfn {strange:#x} belongs on another connection", record=record, offset=offset)
