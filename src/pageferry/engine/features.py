"""What two ends can agree on beyond the stream as Xen has it; names as in docs/stream.md, part 2."""

from collections.abc import Iterable

from pageferry.stream.format import RecordType

ZERO_PAGES = "zero-pages"
AUDIT = "audit"

#: feature -> the record that it allows in the stream.
_RECORDS = {ZERO_PAGES: RecordType.ZERO_PAGES, AUDIT: RecordType.AUDIT}


def agree(offered: Iterable[str]) -> tuple[str, ...]:
    """Return what a destination uses of a source's offer: all that it knows."""
    return tuple(feature for feature in offered if feature in _RECORDS)


def records_of(features: Iterable[str]) -> frozenset[RecordType]:
    """Return the records that the features agreed on allow."""
    return frozenset(_RECORDS[feature] for feature in features)
