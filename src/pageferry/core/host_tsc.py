"""How fast the host's time stamp counter counts, and whether a guest can live with that.

An operating system measures its TSC's rate once, or reads it in CPUID, and tells the time by it. So the rate travels
with it (``MachineState.tsc_khz``), and a machine that cannot provide it refuses the guest.

Source: Intel SDM volume 3, 18.17 (Time-Stamp Counter).
"""

import ctypes
import time
from functools import cache

from pageferry.core.errors import UnsupportedError
from pageferry.core.machine_code import executable

#: Rates that differ by less count as the same: half of what NTP can correct in a guest, and KVM's own bound.
TOLERANCE_PPM = 250
_SPAN_S = 0.02
_READINGS = 20
_CLOCK = time.CLOCK_MONOTONIC_RAW
_NS_PER_MS = 1_000_000

# rdtsc; shl rdx, 32; or rax, rdx; ret
_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")


@cache
def host_tsc_khz() -> int | None:
    """Measure the rate, to some 20 ppm; None: this host does not let us."""
    code = executable(_RDTSC)
    if code is None:
        return None
    # SAFETY: `code` keeps the mapping until the last call has returned.
    read_tsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(code.ctypes.data)

    def reading() -> tuple[int, int, int]:
        # How long it took, and the two clocks at one instant. A reading that was interrupted takes longer.
        before_ns, ticks, after_ns = time.clock_gettime_ns(_CLOCK), read_tsc(), time.clock_gettime_ns(_CLOCK)
        return after_ns - before_ns, (before_ns + after_ns) // 2, ticks

    _, first_ns, first = min(reading() for _ in range(_READINGS))
    time.sleep(_SPAN_S)
    _, last_ns, last = min(reading() for _ in range(_READINGS))
    return (last - first) * _NS_PER_MS // (last_ns - first_ns) or None


def expect_rate(guest_khz: int, own_khz: int | None) -> None:
    """Check that a guest can go on at another rate than its own, on a machine that does not scale the TSC.

    Args:
        guest_khz: what the guest knows.
        own_khz: the machine's; None: not known.

    Raises:
        UnsupportedError: the rates differ too much, or this one is not known.
    """
    if own_khz is None or abs(own_khz - guest_khz) * 1_000_000 > own_khz * TOLERANCE_PPM:
        raise UnsupportedError(
            "tsc-rate",
            f"the guest's TSC counts at {guest_khz} kHz, this machine's at {own_khz or 'an unknown number of'} kHz",
            hint="choose a host whose TSC counts as fast, or one whose KVM can scale it",
        )
