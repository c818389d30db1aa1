"""The options of a migration."""

from dataclasses import dataclass
from enum import StrEnum

from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.units import format_size
from pageferry.engine.wire.channel import DEFAULT_TIMEOUT_S
from pageferry.engine.wire.credentials import Credentials
from pageferry.stream.ferry_frames import MAX_CONNECTIONS
from pageferry.stream.format import MAX_PAGES_PER_RECORD
from pageferry.stream.packing import Packing, packer

#: Below this the largest frame of digests would take a peer's whole patience.
MIN_BANDWIDTH_BYTES_PER_S = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class WireOptions:
    """How pages may travel.

    ``bandwidth_bytes_per_s``: a cap on all that is sent, from the first byte to the last, the stop-and-copy included;
    None: as fast as the wire is. ``connections``: how many to use, 1 to 16. ``compress``: how page data is packed.
    ``delta_cache_bytes``: how much memory for what was sent, so that of a page that is sent again only what changed is;
    0: none. A destination that cannot do what is asked for is not migrated to.

    Raises:
        UsageError: a value is not possible.
        UnsupportedError: the library that ``compress`` needs is not installed here.
    """

    bandwidth_bytes_per_s: int | None = None
    connections: int = 1
    compress: Packing = Packing.NONE
    delta_cache_bytes: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.connections <= MAX_CONNECTIONS:
            raise UsageError(f"{self.connections} connections are not possible", hint=f"1 to {MAX_CONNECTIONS}")
        if self.compress is not Packing.NONE:
            packer(self.compress)
        self._check_cache()
        self._check_bandwidth()

    def _check_cache(self) -> None:
        if self.delta_cache_bytes and self.compress is Packing.NONE:
            raise UsageError("a delta cache needs a packing", hint="add --compress lz4 or zstd")
        least = self.connections * MAX_PAGES_PER_RECORD * PAGE_SIZE
        if 0 < self.delta_cache_bytes < least:
            what = f"a delta cache of {self.delta_cache_bytes} bytes is too small"
            raise UsageError(what, hint=f"at least {format_size(least)}, or leave it out")

    def _check_bandwidth(self) -> None:
        bandwidth = self.bandwidth_bytes_per_s
        if bandwidth is not None and bandwidth < MIN_BANDWIDTH_BYTES_PER_S:
            hint = f"at least {format_size(MIN_BANDWIDTH_BYTES_PER_S)}/s, or 0 for no limit"
            raise UsageError(f"a bandwidth of {bandwidth} bytes a second is too little", hint=hint)


#: One connection, no cap, nothing encoded.
DEFAULT_WIRE = WireOptions()


class VerifyMode(StrEnum):
    """When memory is digested: ``full`` at the pause, ``audit`` mostly while the guest runs."""

    FULL = "full"
    AUDIT = "audit"


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationOptions:
    """How a guest is moved.

    ``name``: what the guest is called, for people. ``timeout_s``: how long a connection may stand still. ``verify``:
    None: ``full`` where that fits the downtime limit, ``audit`` otherwise. ``wire``: how pages may travel. ``hold``: do
    not pause the guest before it is told to go on, however ready all is; rounds go on meanwhile. ``credentials``: who
    we are and whom we accept, for an address with TLS and for no other. ``pause_limit_s``: how long a pause may take
    before it is given up and the guest runs on at the source; None: ten times the policy's downtime limit, at least
    2 s, and no bound where it has none.
    """

    name: str = "guest"
    timeout_s: float = DEFAULT_TIMEOUT_S
    verify: VerifyMode | None = None
    wire: WireOptions = DEFAULT_WIRE
    hold: bool = False
    credentials: Credentials | None = None
    pause_limit_s: float | None = None


DEFAULT_OPTIONS = MigrationOptions()
