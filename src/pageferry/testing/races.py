"""Conformance checks against a guest that runs on while its memory is tracked.

None of them depends on timing to be right: what they conclude holds for every interleaving. Timing only decides how
many interleavings a run sees.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import gpa_of
from pageferry.core.threads import begin
from pageferry.testing.lab import GIVE_UP_S, STATUS_GFN, Copy, Guest, Lab, Violation, listed, require

_ROUNDS = 12
#: What a free-running guest does in each round at least: enough to come by every part of a small working set.
_ROUND_WORK = 100
#: The same of guests whose steps are larger: a tick of an idle one's timer, a transfer of a device.
_LARGE_STEPS = {"idle": 1, "dma": 20}
_CHANGES = 16
_BREATH_S = 0.0005
#: Operations per second of a guest that takes about 10 ms to come by a page again.
_SLOW = 20_000
#: RAM between program and working set in every guest of the kit (4 MiB or more), which no guest touches.
_DEVICE_GFNS = range(0x120, 0x320)


def free_running(lab: Lab, workload: str) -> None:
    """A copy made only of reported pages, each read after the CLEAN that reported it, ends up equal to memory."""
    # Slow guests leave a page alone for a while: a write that was lost is not hidden by the next one to the same page.
    rate = _SLOW if workload in ("random", "hotset") else 0
    with lab.guest(workload, pages=200, rate=rate) as guest:
        copy = _start_copy(guest)
        for _ in range(_ROUNDS):
            copy.take(guest.log_dirty.clean())
            guest.progress(_LARGE_STEPS.get(workload, _ROUND_WORK))
        _finish_copy(guest, copy)


def cleaned_by_range(lab: Lab, workload: str) -> None:
    """A copy made range by range, each read after its CLEAN, with a PEEK before, ends up equal to memory."""
    with lab.guest(workload, pages=200, rate=_SLOW if workload == "random" else 0) as guest:
        copy = _start_copy(guest)

        def clean_and_copy() -> None:
            for part in guest.parts():
                guest.log_dirty.peek()
                copy.take(guest.log_dirty.clean_range(part))

        for _ in range(_ROUNDS):
            clean_and_copy()
            guest.progress(_LARGE_STEPS.get(workload, _ROUND_WORK))
        guest.require_running()
        guest.vm.pause()
        clean_and_copy()
        copy.require_equal()


def changed_between_cleans(lab: Lab) -> None:
    """A page that changes after one CLEAN returned and before the next one is called is in that next one.

    And one that changes at any time from before a CLEAN until the next is in one of the two::

        read all (1)   clean()   read all (2)   ... guest runs ...   read all (3)   clean()
                                 `------------ differ: in the second -----------'
        `------------------ differ: in the first or in the second --------------'
    """
    for rate in (0, _SLOW):
        with lab.guest("sweep", pages=200, rate=rate) as guest:
            gfns = np.append(guest.oracle.gfns, np.uint64(STATUS_GFN))
            guest.vm.resume()
            guest.progress()
            guest.log_dirty.enable()
            before = after = _contents(guest, gfns)
            reported, seen = guest.log_dirty.peek(), 0
            for _ in range(_CHANGES):
                guest.progress()
                now = _contents(guest, gfns)
                last, reported = reported, guest.log_dirty.clean()
                changed = DirtyBitmap.of(guest.memory.gfn_limit, gfns[now != after])
                lost = (changed - reported).gfns()
                require(not lost.size, f"changed between two CLEANs and not reported: {listed(lost)}")
                changed = DirtyBitmap.of(guest.memory.gfn_limit, gfns[now != before])
                lost = (changed - last - reported).gfns()
                require(not lost.size, f"changed during a CLEAN and not reported: {listed(lost)}")
                before, after = now, _contents(guest, gfns)
                seen += changed.count()
            require(seen > 0, "the guest changed nothing")


def peek_grows(lab: Lab) -> None:
    """While the guest runs, a bit that PEEK has shown stays until CLEAN, which returns it."""
    with lab.guest("random", pages=400, rate=_SLOW) as guest:  # slow: a bit that is gone does not come back at once
        guest.vm.resume()
        guest.log_dirty.enable()
        _write_once(guest, 0)
        shown = guest.log_dirty.peek()
        for _ in range(_ROUNDS):
            guest.progress()
            next_shown = guest.log_dirty.peek()
            require(not (shown - next_shown).any(), "a bit that PEEK had shown is gone without a CLEAN")
            shown = next_shown
        require(not (shown - guest.log_dirty.clean()).any(), "a bit that PEEK had shown is not in CLEAN's bitmap")


def peeking_thread(lab: Lab) -> None:
    """PEEK and stats from another thread disturb nothing."""
    with lab.guest("random", pages=400, rate=_SLOW) as guest:
        copy = _start_copy(guest)

        def look() -> None:
            guest.log_dirty.peek()
            guest.log_dirty.stats()

        with _repeated(look) as looks:
            for number in range(_ROUNDS):
                copy.take(guest.log_dirty.clean())
                _write_once(guest, number)
                for _ in looks.rounds(1, more=2):  # of which the second began after the write
                    guest.progress()
        _finish_copy(guest, copy)


def writing_thread(lab: Lab) -> None:
    """A device's writes that race with CLEAN are in this bitmap or the next one."""
    with lab.guest("hotset") as guest:
        copy = _start_copy(guest)
        written = 0

        def write() -> None:
            # Each page once, as long as there are others: a mark that was lost is not made good by the next.
            nonlocal written
            gfn = _DEVICE_GFNS[written % len(_DEVICE_GFNS)]
            written += 1
            guest.memory.write(gpa_of(gfn), written.to_bytes(8, "little"))

        with _repeated(write) as writes:
            for _ in writes.rounds(2 * _ROUNDS):
                copy.take(guest.log_dirty.clean())
        _finish_copy(guest, copy)


def two_cleaners(lab: Lab) -> None:
    """Two threads that call CLEAN at once lose nothing between them."""
    with lab.guest("sweep", pages=120) as guest:
        copy = _start_copy(guest)
        lock = threading.Lock()

        def clean_and_copy() -> None:
            reported = guest.log_dirty.clean()
            with lock:
                copy.take(reported)

        with _repeated(clean_and_copy) as others:
            for _ in others.rounds(_ROUNDS):
                clean_and_copy()
                guest.progress()
        _finish_copy(guest, copy)


def on_and_off_while_running(lab: Lab) -> None:
    """A second attempt after OFF, with the guest running all the time, is as good as the first."""
    with lab.guest("hotset", pages=120) as guest:
        for _ in range(3):
            copy = _start_copy(guest)
            copy.take(guest.log_dirty.clean())
            guest.progress()
            guest.log_dirty.off()
            guest.progress()
        copy = _start_copy(guest)
        guest.progress()
        _finish_copy(guest, copy)


def _start_copy(guest: Guest) -> Copy:
    guest.vm.resume()
    guest.progress()
    guest.log_dirty.enable()
    copy = Copy(guest.memory)
    copy.take_all()
    return copy


def _finish_copy(guest: Guest, copy: Copy) -> None:
    guest.require_running()
    guest.vm.pause()
    copy.take(guest.log_dirty.clean())
    copy.require_equal()


def _write_once(guest: Guest, number: int) -> None:
    # A page that is not written again: if its bit is lost, no later write brings it back, however long the guest runs.
    guest.memory.write(gpa_of(_DEVICE_GFNS[number]), b"once")


def _contents(guest: Guest, gfns: np.typing.NDArray[np.uint64]) -> np.typing.NDArray[np.uint64]:
    # What `sweep` changes: the first word of each page, a pass number or a count that never repeats.
    return np.array([int.from_bytes(view[:8], "little") for view in guest.memory.page_views(gfns)], np.uint64)


@dataclass(slots=True)
class _Repeated:
    """What another thread does over and over: how often it has, and why it stopped if it failed."""

    times: int = 0
    error: Exception | None = None

    def rounds(self, least: int, *, more: int | None = None) -> Iterator[int]:
        """Count rounds from 0, at least so many, until the other thread has done as many (``more``) or has failed.

        Gives up when it has done nothing for a long time.
        """
        wanted = self.times + (least if more is None else more)
        seen, deadline_s, number = self.times, time.monotonic() + GIVE_UP_S, 0
        while self.error is None and (number < least or self.times < wanted):
            if self.times > seen:
                seen, deadline_s = self.times, time.monotonic() + GIVE_UP_S
            require(seen >= wanted or time.monotonic() < deadline_s, "what another thread does gets nowhere")
            yield number
            number += 1


@contextmanager
def _repeated(action: Callable[[], None]) -> Iterator[_Repeated]:
    """Call ``action`` over and over on another thread during the block; its error, if any, is raised here.

    There is a breath between two calls: an operator may stop the vCPUs, and these must get somewhere meanwhile.
    """
    stop = threading.Event()
    repeated = _Repeated()

    def loop() -> None:
        try:
            while not stop.wait(_BREATH_S):
                action()
                repeated.times += 1
        except Exception as error:
            repeated.error = error

    thread = begin(loop, "conformance")
    try:
        yield repeated
    finally:
        stop.set()
        thread.join()
    if repeated.error is not None:
        raise Violation(f"an operator failed on another thread: {repeated.error!r}") from repeated.error
