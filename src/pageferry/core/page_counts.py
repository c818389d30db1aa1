"""PageCounts: pages that were sent and what they took, counted the same way from one connection to the report."""

from dataclasses import dataclass

from pageferry.core.frames import PAGE_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCounts:
    """Pages that were sent.

    ``sent_pages``: all of them, in ``sent_bytes``, headers included. Of these, ``zero_pages`` went by name only,
    ``packed_pages`` went packed, in ``packed_bytes``, and of ``delta_pages`` only what had changed went, in
    ``delta_bytes``.
    """

    sent_pages: int = 0
    sent_bytes: int = 0
    zero_pages: int = 0
    packed_pages: int = 0
    packed_bytes: int = 0
    delta_pages: int = 0
    delta_bytes: int = 0

    def __add__(self, other: "PageCounts") -> "PageCounts":
        return PageCounts(**{name: getattr(self, name) + getattr(other, name) for name in PageCounts.__slots__})

    def __sub__(self, other: "PageCounts") -> "PageCounts":
        return PageCounts(**{name: getattr(self, name) - getattr(other, name) for name in PageCounts.__slots__})

    @property
    def moved_bytes(self) -> int:
        """Memory with content that they moved, headers included; packing makes it more than went over the wire."""
        return max(self.sent_bytes, (self.sent_pages - self.zero_pages) * PAGE_SIZE)

    def as_dict(self) -> dict[str, int]:
        """Return the counts by name."""
        return {name: getattr(self, name) for name in PageCounts.__slots__}


NO_PAGES = PageCounts()
