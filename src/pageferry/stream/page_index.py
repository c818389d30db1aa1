"""PageIndex: where in a stream each page's final content is.

Source: docs/reference/stream.md, part 1, PAGE_DATA: the last one of a pfn counts.
"""

from collections.abc import Iterator

import numpy as np

from pageferry.core.frames import PAGE_SIZE, GfnArray
from pageferry.stream.format import BodyError, PageType, carries_data
from pageferry.stream.records import PageDataHeader

#: What ``places`` holds in place of an offset (no page data is at 0: a stream begins with headers).
UNNAMED = 0
ZERO = -1
GONE = -2


def without_repeats(pfns: GfnArray) -> Iterator[slice]:
    """Yield parts of ``pfns`` (uint64[n]), in order, in which no page is named twice; for known writers it is one."""
    if np.unique(pfns).size == pfns.size:
        yield slice(None)
        return
    for at in range(pfns.size):
        yield slice(at, at + 1)


class PageIndex:
    """Follows the PAGE_DATA of one stream.

    ``places`` is int64[gfn_limit]: for each frame the offset of its 4,096 bytes, or ``UNNAMED`` (not in the stream),
    ``ZERO`` (memory without content) or ``GONE`` (no page is there).

    Args:
        gfn_limit: frames at or past it are not followed; the stream's reader refuses them where they have memory.
    """

    def __init__(self, gfn_limit: int) -> None:
        self.places = np.zeros(gfn_limit, np.int64)
        self.named_limit = 0
        """One more than the last frame that was named."""

    def note(self, header: PageDataHeader, payload_offset: int) -> None:
        """Follow one record.

        Args:
            header: the record.
            payload_offset: of the first byte of its page data in the stream.

        Raises:
            BodyError: a page is broken: its content is lost.
        """
        if (broken := header.types == PageType.BROKEN).any():
            raise BodyError(f"gfn {int(header.pfns[np.argmax(broken)]):#x} is broken memory, which cannot be restored")
        data = carries_data(header.types)
        places = np.where(header.types == PageType.XTAB, GONE, ZERO).astype(np.int64)
        places[data] = payload_offset + PAGE_SIZE * np.arange(np.count_nonzero(data))
        inside = header.pfns < self.places.size
        pfns, places = header.pfns[inside], places[inside]
        if not pfns.size:
            return
        self.named_limit = max(self.named_limit, int(pfns.max()) + 1)
        for part in without_repeats(pfns):
            self._put(pfns[part], places[part])

    def _put(self, pfns: GfnArray, places: np.typing.NDArray[np.int64]) -> None:
        # To allocate a page that has content already changes nothing.
        known = (places == ZERO) & (self.places[pfns] > 0)
        self.places[pfns[~known]] = places[~known]

    def with_data(self) -> GfnArray:
        """Return the frames that have content, in the order in which it lies in the stream."""
        gfns = np.flatnonzero(self.places[: self.named_limit] > 0)
        return gfns[np.argsort(self.places[gfns])].astype(np.uint64)
