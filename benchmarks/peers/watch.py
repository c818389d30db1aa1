"""What the guest itself sees of a move: its own counter, read out of both processes' memory.

The guest counts what it does at a fixed place (docs/reference/guest-abi.md, status page). It stands still from the last
change of the counter at the source to the first count at the destination that the source never reached. So every VMM
is measured in the same way, and none by what it says of itself.
"""

import os
import struct
import threading
import time
from dataclasses import dataclass
from typing import Self

from pageferry.core.errors import VmError
from pageferry.guests.abi import STATUS_GPA, STATUS_SLOT_BYTES

from .process import Peer

_SAMPLE_S = 0.0005
_LOOK_FOR_MEMORY_S = 0.01
_SLOT = struct.Struct("<16Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """vCPU 0's slot of the status page: operations, the program's error code, how often it began to rewrite."""

    work: int
    error: int
    passes: int


def read_count(peer: Peer) -> Count | None:
    """Return what the guest says of itself in a process; None while it has no guest memory."""
    hva = peer.hva(STATUS_GPA)
    if hva is None:
        return None
    with peer.memory_file().open("rb", buffering=0) as file:
        slot = _SLOT.unpack(os.pread(file.fileno(), STATUS_SLOT_BYTES, hva))
    return Count(work=slot[0], error=slot[3], passes=slot[8])


def wait_filled(peer: Peer, deadline_s: float) -> None:
    """Wait until the guest has filled its memory.

    Raises:
        VmError: it did not in time.
    """
    while (count := read_count(peer)) is None or not count.passes:
        if time.monotonic() > deadline_s:
            raise VmError(f"the guest of {peer.name} did not fill its memory in time: {peer.last_words()}")
        time.sleep(0.05)


class GuestWatch:
    """Samples both counters on a thread of its own, for the length of a ``with`` block.

    Args:
        source: where the guest is.
        destination: where it will be.
    """

    def __init__(self, source: Peer, destination: Peer) -> None:
        self._peers = (source, destination)
        self._moved = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.last_at_source_s = 0.0
        self.first_at_destination_s = 0.0

    def __enter__(self) -> Self:
        # Looked up here: only a process that need not be asked may have none yet, and QMP is this thread's.
        self._hvas = [peer.hva(STATUS_GPA) for peer in self._peers]
        self._files = [peer.memory_file().open("rb", buffering=0) for peer in self._peers]
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for file in self._files:
            file.close()

    def wait_moved(self, deadline_s: float) -> None:
        """Wait until the guest works at the destination.

        Raises:
            VmError: it does not in time.
        """
        if not self._moved.wait(max(0.0, deadline_s - time.monotonic())):
            raise VmError(f"the guest does not work at {self._peers[1].name}")

    @property
    def gap_s(self) -> float:
        """How long the guest stood still, to within two samples; after :meth:`wait_moved`."""
        return self.first_at_destination_s - self.last_at_source_s

    def _run(self) -> None:
        source, destination = (file.fileno() for file in self._files)
        source_hva, destination_hva = self._hvas[0], self._hvas[1] or self._find_destination()
        if source_hva is None or destination_hva is None:
            return
        last = 0
        while not self._stop.wait(_SAMPLE_S):
            # The destination first: a page that is only copied holds a count that the source has passed by then.
            there, here, now_s = _work(destination, destination_hva), _work(source, source_hva), time.monotonic()
            if here != last:
                last, self.last_at_source_s = here, now_s
            if there > here:
                self.first_at_destination_s = now_s
                self._moved.set()
                return

    def _find_destination(self) -> int | None:
        while (hva := self._peers[1].hva(STATUS_GPA)) is None:
            if self._stop.wait(_LOOK_FOR_MEMORY_S):
                break
        return hva


def _work(file: int, hva: int) -> int:
    return int.from_bytes(os.pread(file, 8, hva), "little")
