"""Features that two ends can agree on beyond Xen's stream; names as in docs/reference/stream.md, part 2."""

from collections.abc import Collection

from pageferry.core.errors import RemoteStreamError, UsageError
from pageferry.engine.options import WireOptions
from pageferry.stream.format import RecordType
from pageferry.stream.packing import Packing, available

ZERO_PAGES = "zero-pages"
AUDIT = "audit"
FENCE = "fence"
CONNECTIONS = "connections"
SHARED_MEMORY = "shared-memory"
#: Page data packed by the library of that name; at most one of these is offered.
PACK = {Packing.LZ4: "pack-lz4", Packing.ZSTD: "pack-zstd"}
#: What changed in a page that is sent again, packed as agreed: goes with one of the above.
DELTA = "delta"
POSTCOPY = "postcopy"

#: feature -> the record that it allows in the stream.
_RECORDS = {
    ZERO_PAGES: RecordType.ZERO_PAGES,
    AUDIT: RecordType.AUDIT,
    FENCE: RecordType.FENCE,
    **dict.fromkeys(PACK.values(), RecordType.PACKED_PAGES),
    DELTA: RecordType.DELTA_PAGES,
}


def offer(wire: WireOptions, *, audit: bool, shared: bool, postcopy: bool = False) -> tuple[str, ...]:
    """Return what a source offers."""
    audits = (AUDIT,) if audit else ()
    several = (CONNECTIONS,) if wire.connections > 1 else ()
    packed = (PACK[wire.compress],) if wire.compress in PACK else ()
    deltas = (DELTA,) if wire.delta_cache_bytes else ()
    shares = (SHARED_MEMORY,) if shared else ()
    switches = (POSTCOPY,) if postcopy else ()
    return (ZERO_PAGES, FENCE, *audits, *several, *packed, *deltas, *shares, *switches)


def check_answer(wire: WireOptions, offered: Collection[str], used: Collection[str]) -> None:
    """Check what the destination made of the offer.

    Raises:
        RemoteStreamError: it uses what was not offered.
        UsageError: it does not use what the user asked for.
    """
    if strange := set(used) - set(offered):
        raise RemoteStreamError(f"the destination uses {', '.join(sorted(strange))}, which was not offered")
    if wire.connections > 1 and CONNECTIONS not in used:
        raise UsageError("the destination takes one connection only", hint="leave out --connections")
    if packing_of(used) is not wire.compress:
        hint = "there: pip install 'pageferry[compress]'; or leave out --compress"
        raise UsageError(f"the destination cannot unpack {wire.compress}", hint=hint)
    if wire.delta_cache_bytes and DELTA not in used:
        raise UsageError("the destination takes no deltas", hint="leave out --delta-cache")
    if POSTCOPY in offered and not {POSTCOPY, SHARED_MEMORY} & set(used):
        hint = "pageferry doctor there tells why; or another policy"
        raise UsageError("the destination cannot let a guest wait for its pages", hint=hint)


def agree(offered: Collection[str], *, shared: bool, postcopy: bool = False) -> tuple[str, ...]:
    """Return what a destination uses of a source's offer: all that it can, and of the packings the first."""
    packings = available(packing for packing, feature in PACK.items() if feature in offered)
    can = {ZERO_PAGES, FENCE, AUDIT, CONNECTIONS, DELTA, *(PACK[packing] for packing in packings)}
    if shared:
        can.add(SHARED_MEMORY)
    if postcopy:
        can.add(POSTCOPY)
    used = [feature for feature in offered if feature in can]
    spare = [feature for feature in used if feature in PACK.values()][1:]
    return tuple(feature for feature in used if feature not in spare)


def records_of(features: Collection[str]) -> frozenset[RecordType]:
    """Return the records that the features agreed on allow."""
    return frozenset(_RECORDS[feature] for feature in features if feature in _RECORDS)


def packing_of(features: Collection[str]) -> Packing:
    """Return how page data is packed where these features were agreed on."""
    return next((packing for packing, feature in PACK.items() if feature in features), Packing.NONE)
