"""Populator: storage for pages ahead of their arrival."""

import threading

from pageferry.core.bitmap import DirtyBitmap, split_runs
from pageferry.core.errors import VmError
from pageferry.core.frames import PAGES_PER_2M
from pageferry.core.memory import GuestMemory


class Populator:
    """Gives storage to runs of memory on a thread of its own, for the length of a ``with`` block."""

    def __init__(self, memory: GuestMemory, runs: tuple[tuple[int, int], ...]) -> None:
        self._memory = memory
        wanted = DirtyBitmap(memory.gfn_limit)
        for first_gfn, pages in runs:
            wanted.set_range(
                first_gfn, min(pages, memory.gfn_limit - first_gfn)
            ) if first_gfn < memory.gfn_limit else None
        wanted &= memory.all_ram()
        self._runs = split_runs(*wanted.runs(), PAGES_PER_2M)
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._populate, name="populate", daemon=True)

    def _populate(self) -> None:
        for index in range(self._runs[0].size):
            if self._enough.is_set():
                return
            try:
                self._memory.populate(self._runs[0][index : index + 1], self._runs[1][index : index + 1])
            except VmError:
                return  # only a head start: whoever touches the page first meets the same refusal

    def __enter__(self) -> "Populator":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        self._thread.join()
