"""WireOptions: what a user asks of the way from source to destination."""

from dataclasses import dataclass

from pageferry.core.errors import UsageError
from pageferry.core.units import format_size
from pageferry.stream.ferry_frames import MAX_CONNECTIONS
from pageferry.stream.packing import Packing, packer

#: Below this the largest frame of digests would take a peer's whole patience.
MIN_BANDWIDTH_BYTES_PER_S = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class WireOptions:
    """How pages may travel.

    ``bandwidth_bytes_per_s``: a cap on all that is sent, from the first byte to the last, the stop-and-copy included;
    None: as fast as the wire is. ``connections``: how many to use, 1 to 16; a destination that takes one only is not
    migrated to. ``compress``: how page data is packed; a destination that cannot unpack it is not migrated to.

    Raises:
        UsageError: a value is not possible.
        UnsupportedError: the library that ``compress`` needs is not installed here.
    """

    bandwidth_bytes_per_s: int | None = None
    connections: int = 1
    compress: Packing = Packing.NONE

    def __post_init__(self) -> None:
        if not 1 <= self.connections <= MAX_CONNECTIONS:
            raise UsageError(f"{self.connections} connections are not possible", hint=f"1 to {MAX_CONNECTIONS}")
        if self.compress is not Packing.NONE:
            packer(self.compress)
        bandwidth = self.bandwidth_bytes_per_s
        if bandwidth is not None and bandwidth < MIN_BANDWIDTH_BYTES_PER_S:
            hint = f"at least {format_size(MIN_BANDWIDTH_BYTES_PER_S)}/s, or 0 for no limit"
            raise UsageError(f"a bandwidth of {bandwidth} bytes a second is too little", hint=hint)


#: One connection, no cap, nothing encoded.
DEFAULT_WIRE = WireOptions()
