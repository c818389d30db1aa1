"""One move of a guest, measured: the same steps and the same clocks for every monitor."""

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pageferry.core.errors import VmError

from .image import Load
from .monitors import Monitor
from .process import Peer
from .warm import WarmMemory
from .watch import GuestWatch, read_count, wait_filled

_FILL_S = 60.0
_MOVE_S = 180.0
#: What a monitor may use besides the guest's memory.
_PROCESS_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What one migration cost, both ends together.

    ``total_s``: from the command until the source says that it is over and the guest works at the destination.
    ``gap_s``: how long the guest stood still, measured at the guest; ``downtime_s``: what the source reports of it, and
    ``verify_s`` the part of that which proves memory equal (None: nothing was proven).
    ``cpu_s``: processor seconds of all threads but those that run vCPUs; ``vcpu_s``: of those.
    ``peak_bytes``: the most that was resident, guest memory included.
    """

    total_s: float
    gap_s: float
    downtime_s: float
    verify_s: float | None
    sent_bytes: int
    cpu_s: float
    vcpu_s: float
    peak_bytes: int


def move(monitor: Monitor, load: Load, *, warm: WarmMemory | None) -> Move:
    """Start a guest, move it, measure, end both processes.

    ``warm``: holds what is free here, and gives back enough for the destination; None: memory is as the host has it.

    Raises:
        VmError: the guest did not start or did not move, or found an error in its memory.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vs-qemu-")))
        if warm is not None:
            warm.give_back(_needed_bytes(load))
        source = stack.enter_context(monitor.source(load, folder))
        source.start()
        wait_filled(source, time.monotonic() + _FILL_S)
        destination = stack.enter_context(monitor.destination(load, folder))
        destination.start()
        peers = (source, destination)
        uri = monitor.listen(destination)
        for peer in peers:
            peer.reset_peak()
        if warm is not None:
            warm.hold()
            warm.give_back(_needed_bytes(load))
        total_s, gap_s, cpu_s, vcpu_s = _measured(monitor, peers, uri)
        result = monitor.result(source)
        peak_bytes = sum(peer.peak_bytes() for peer in peers)
        _expect_whole(destination)
    return Move(
        total_s=total_s,
        gap_s=gap_s,
        downtime_s=result.downtime_s,
        verify_s=result.verify_s,
        sent_bytes=result.sent_bytes,
        cpu_s=cpu_s - vcpu_s,
        vcpu_s=vcpu_s,
        peak_bytes=peak_bytes,
    )


def _measured(monitor: Monitor, peers: tuple[Peer, Peer], uri: str) -> tuple[float, float, float, float]:
    source, destination = peers
    with GuestWatch(source, destination) as watch:
        cpu_s = source.cpu_s() + destination.cpu_s()
        vcpu_s = source.vcpu_s()
        began_s = time.monotonic()
        deadline_s = began_s + _MOVE_S
        monitor.migrate(source, uri)
        completed_s = source.wait_migrated(deadline_s)
        watch.wait_moved(deadline_s)
    cpu_s = source.cpu_s() + destination.cpu_s() - cpu_s
    vcpu_s = source.vcpu_s() + destination.vcpu_s() - vcpu_s
    return max(completed_s, watch.first_at_destination_s) - began_s, watch.gap_s, cpu_s, vcpu_s


def _needed_bytes(load: Load) -> int:
    """Return how much memory one end may take."""
    return load.filled_bytes * 5 // 4 + _PROCESS_BYTES


def _expect_whole(destination: Peer) -> None:
    """Let the guest go on for a while and check all of its memory that it can.

    Raises:
        VmError: it found a page that is not as it left it, or it stands still.
    """
    first = read_count(destination)
    deadline_s = time.monotonic() + _FILL_S
    while first is not None and time.monotonic() < deadline_s:
        count = read_count(destination)
        if count is None or count.error:
            break
        if count.work >= first.work + 100:
            return
        time.sleep(0.02)
    raise VmError(f"the guest is not whole at {destination.name}: {destination.last_words()}")
