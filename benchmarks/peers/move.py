"""One move of a guest, measured: the same steps and the same clocks for every monitor."""

import mmap
import multiprocessing
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pageferry.core.errors import VmError
from pageferry.core.hostmem import MADV_POPULATE_WRITE
from pageferry.core.memory import GuestMemory

from .image import Load
from .monitors import Monitor
from .process import Peer
from .watch import GuestWatch, read_count, wait_filled

_FILL_S = 60.0
_MOVE_S = 180.0


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


def move(monitor: Monitor, load: Load, *, warm: bool = True) -> Move:
    """Start a guest, move it, measure, end both processes.

    ``warm``: memory for the destination was in use a moment before (:func:`warm_up`).

    Raises:
        VmError: the guest did not start or did not move, or found an error in its memory.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vs-qemu-")))
        source = stack.enter_context(monitor.source(load, folder))
        source.start()
        wait_filled(source, time.monotonic() + _FILL_S)
        destination = stack.enter_context(monitor.destination(load, folder))
        destination.start()
        peers = (source, destination)
        uri = monitor.listen(destination)
        for peer in peers:
            peer.reset_peak()
        if warm:
            warm_up(load.filled_bytes)
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


def warm_up(size_bytes: int) -> None:
    """Have a process touch so much memory, in huge pages and in small ones, and give it back.

    A virtual machine may give free memory back to its host, mostly where 2 MiB and more are free together; getting it
    again can take seconds per GiB, on hosts of today most of all for huge pages. Hardware has no such thing.
    """
    process = multiprocessing.get_context("spawn").Process(target=_warm_up_here, args=(size_bytes,), daemon=True)
    process.start()
    process.join()


def _warm_up_here(size_bytes: int) -> None:
    with mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as huge:
        huge.madvise(mmap.MADV_HUGEPAGE)
        huge.madvise(MADV_POPULATE_WRITE)
    memory = GuestMemory.linear(size_bytes)
    starts = np.array([region.first_gfn for region in memory.regions], np.uint64)
    memory.populate(starts, np.array([region.pages for region in memory.regions], np.uint64))
