"""What two ends can agree on beyond the stream as Xen has it; names as in docs/stream.md, part 2."""

from collections.abc import Iterable

from pageferry.core.errors import RemoteStreamError, UsageError
from pageferry.engine.wire import WireOptions
from pageferry.stream.format import RecordType

ZERO_PAGES = "zero-pages"
AUDIT = "audit"
CONNECTIONS = "connections"

#: feature -> the record that it allows in the stream.
_RECORDS = {ZERO_PAGES: RecordType.ZERO_PAGES, AUDIT: RecordType.AUDIT}


def offer(wire: WireOptions, *, audit: bool) -> tuple[str, ...]:
    """Return what a source offers."""
    return (ZERO_PAGES, *((AUDIT,) if audit else ()), *((CONNECTIONS,) if wire.connections > 1 else ()))


def check_answer(wire: WireOptions, offered: Iterable[str], used: Iterable[str]) -> None:
    """Check what the destination made of the offer.

    Raises:
        RemoteStreamError: it uses what was not offered.
        UsageError: it does not use what the user asked for.
    """
    if strange := set(used) - set(offered):
        raise RemoteStreamError(f"the destination uses {', '.join(sorted(strange))}, which was not offered")
    if wire.connections > 1 and CONNECTIONS not in used:
        raise UsageError("the destination takes one connection only", hint="leave out --connections")


def agree(offered: Iterable[str], *, several_connections: bool) -> tuple[str, ...]:
    """Return what a destination uses of a source's offer: all that it can."""
    can = _RECORDS.keys() | ({CONNECTIONS} if several_connections else set())
    return tuple(feature for feature in offered if feature in can)


def records_of(features: Iterable[str]) -> frozenset[RecordType]:
    """Return the records that the features agreed on allow."""
    return frozenset(_RECORDS[feature] for feature in features if feature in _RECORDS)
