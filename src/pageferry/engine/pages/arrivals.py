"""Arrivals: pages from one connection into guest memory."""

import numpy as np

from pageferry.core.bitmap import DirtyBitmap, runs_of
from pageferry.core.errors import RecordError
from pageferry.core.frames import PAGE_SIZE, GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.page_words import WORDS_PER_PAGE, PageWords, page_words
from pageferry.engine.pages.stripes import connection_of
from pageferry.engine.verify.compare import AuditedPages, AuditMismatchError
from pageferry.engine.wire.channel import Channel
from pageferry.stream.format import BodyError, PageType, carries_data
from pageferry.stream.packing import Packing, packer
from pageferry.stream.records import Audit, DeltaPages, PackedPages, PageDataHeader, ZeroPages


class Arrivals:
    """Puts pages where they belong; page data is received straight into place.

    Args:
        memory: the guest's; it began as zeros.
        channel: where page data comes from.
        audited: what is proven, to be told of what arrives anew; None where nothing is audited.
        index: which connection that is, from 0.
        connections: how many there are.
        packing: what was agreed on.

    Attributes:
        removed: the frames of RAM that the source has none for, as far as it was told.
    """

    def __init__(
        self,
        memory: GuestMemory,
        channel: Channel,
        audited: AuditedPages | None = None,
        *,
        index: int = 0,
        connections: int = 1,
        packing: Packing = Packing.NONE,
    ) -> None:
        self._memory = memory
        self._words = page_words(memory)
        self._channel = channel
        self._audited = audited
        self._index = index
        self._connections = connections
        self._packer = None if packing is Packing.NONE else packer(packing)
        self.removed = DirtyBitmap(memory.gfn_limit)
        self._any_removed = False

    def page_data(self, header: PageDataHeader) -> None:
        """Take one PAGE_DATA record: receive its page data.

        Raises:
            RecordError: a page is outside the guest, or another connection's.
            OSError: cut or stalled.
        """
        gone = header.pfns[header.types == PageType.XTAB]
        if gone.size:
            self.removed.set(gone[self._memory.are_ram(gone)])  # what was never RAM here is not worth a word
            self._any_removed = True
        allocated = header.pfns[header.types == PageType.XALLOC]  # zeros, as they are from the beginning
        gfns = header.pfns[carries_data(header.types)]
        self._check(np.concatenate([gfns, allocated]), "PAGE_DATA", header.offset)
        ascending = gfns.size < 2 or bool((gfns[1:] > gfns[:-1]).all())
        self._channel.receive_into(self._memory.views(*runs_of(gfns)) if ascending else self._memory.page_views(gfns))
        self._arrived(gfns)
        self._arrived(allocated)

    def zero_pages(self, record: ZeroPages) -> None:
        """Make pages zero.

        Raises:
            RecordError: a page is outside the guest, or another connection's.
        """
        self._check(record.pfns, "ZERO_PAGES", None)
        self._words[record.pfns] = 0
        self._arrived(record.pfns)

    def audit(self, record: Audit) -> None:
        """Compare what was digested while the guest ran.

        Raises:
            AuditMismatchError: a run differs.
            RecordError: nothing of the kind was agreed on, or a run is another connection's.
        """
        if self._audited is None:  # the decoder knows what was agreed
            raise RecordError("audits were not agreed upon", record="AUDIT")
        pages = record.pages.astype(np.uint64)
        self._check(np.concatenate([record.first_gfns, record.first_gfns + pages - np.uint64(1)]), "AUDIT", None)
        index = self._audited.compare(record.first_gfns, pages, record.digests)
        if index is not None:
            raise AuditMismatchError(int(record.first_gfns[index]), int(pages[index]))

    def _arrived(self, gfns: GfnArray) -> None:
        if not gfns.size:
            return
        self._memory.wrote(gfns)
        if self._any_removed:
            self.removed.clear(gfns)
        if self._audited is not None:
            self._audited.arrived(gfns)

    def packed_pages(self, record: PackedPages) -> None:
        """Unpack pages into place.

        Raises:
            RecordError: a page is outside the guest, or another connection's, or the data is not what it should be.
        """
        self._check(record.pfns, "PACKED_PAGES", None)
        self._words[record.pfns] = self._unpacked(record.data, record.pfns.size, "PACKED_PAGES")
        self._arrived(record.pfns)

    def delta_pages(self, record: DeltaPages) -> None:
        """Change pages by what is unpacked.

        Raises:
            RecordError: as :meth:`packed_pages`.
        """
        self._check(record.pfns, "DELTA_PAGES", None)
        self._words[record.pfns] ^= self._unpacked(record.data, record.pfns.size, "DELTA_PAGES")  # each page once
        self._arrived(record.pfns)

    def _unpacked(self, data: bytes, pages: int, record: str) -> PageWords:
        if self._packer is None:
            raise RecordError("nothing was agreed on how pages are packed", record=record)
        try:
            unpacked = self._packer.unpack(data, pages * PAGE_SIZE)
        except BodyError as error:
            raise RecordError(str(error), record=record) from error
        return np.frombuffer(unpacked, np.uint64).reshape(-1, WORDS_PER_PAGE)

    def _check(self, gfns: GfnArray, record: str, offset: int | None) -> None:
        inside = self._memory.are_ram(gfns)
        if not inside.all():
            raise RecordError(f"gfn {int(gfns[~inside][0]):#x} is outside the guest", record=record, offset=offset)
        ours = connection_of(gfns, self._connections) == self._index if self._connections > 1 else inside
        if not ours.all():
            strange = int(gfns[~ours][0])
            raise RecordError(f"gfn {strange:#x} belongs on another connection", record=record, offset=offset)
