"""Populator: the destination's memory gets its storage ahead of the pages, on a thread of its own."""

import contextlib
from collections.abc import Callable, Sequence

from pageferry.core.bitmap import DirtyBitmap, split_runs
from pageferry.core.errors import VmError
from pageferry.core.frames import PAGES_PER_2M
from pageferry.core.memory import GuestMemory
from pageferry.engine.host import THIS_HOST, Host

#: So much gets its storage at once: 8 MiB.
_PIECE_PAGES = 4 * PAGES_PER_2M
#: What has storage and has not arrived: 64 MiB. How often to look, at a wire that is much faster than any.
_AHEAD_PAGES, _AHEAD_POLL_S = 16_384, 0.002


class Populator:
    """Gives storage to runs of memory ahead of their arrival, on a thread, for the length of a ``with`` block.

    On most hosts the first touch of memory costs more than the copy.

    It is never further ahead than 64 MiB and a piece, whatever the source says that it will send.

    Args:
        memory: the guest's.
        runs: ``(first gfn, pages)`` each; what is not RAM of them is left out.
        arrived_pages: returns how many pages have arrived.
        host: of the thread.
    """

    def __init__(
        self,
        memory: GuestMemory,
        runs: Sequence[tuple[int, int]],
        arrived_pages: Callable[[], int],
        host: Host = THIS_HOST,
    ) -> None:
        self._memory = memory
        self._arrived_pages = arrived_pages
        wanted = DirtyBitmap(memory.gfn_limit)
        for first_gfn, pages in runs:
            inside = range(memory.gfn_limit)[first_gfn : first_gfn + pages]
            wanted.set_range(inside.start, len(inside))
        wanted &= memory.all_ram()
        self._runs = wanted.runs()
        self._starts, self._lengths = split_runs(*self._runs, _PIECE_PAGES)
        self._host = host
        self._enough = host.event()

    def __enter__(self) -> "Populator":
        with contextlib.suppress(VmError):  # the host can advise on no more of it
            self._memory.advice.make_huge(*self._runs)  # all of it now: a page may come before its storage does
        self._thread = self._host.begin(self._populate, "populate")
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()

    def _populate(self) -> None:
        populated_pages = 0
        for index in range(self._starts.size):
            while populated_pages >= self._arrived_pages() + _AHEAD_PAGES and not self._enough.wait(_AHEAD_POLL_S):
                pass
            if self._enough.is_set():
                return
            populated_pages += int(self._lengths[index])
            try:
                self._memory.populate(self._starts[index : index + 1], self._lengths[index : index + 1])
            except VmError:
                return  # only a head start: the first touch of the page meets the same refusal
