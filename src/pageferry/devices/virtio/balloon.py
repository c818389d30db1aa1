"""A balloon: takes memory that the guest does not need, above all by free page reporting.

What the guest reports or puts into the balloon is given back to the host at once, and reads as zeros afterwards. It
stays RAM: so a page that comes back needs no asking, and while it is away it is neither kept nor sent. The device asks
for nothing itself (``num_pages`` is 0), and does not heed what the driver writes to ``actual``.

Source: VIRTIO 1.2, section 5.5; free page reporting, section 5.5.6.7.
"""

from struct import Struct

import numpy as np

from pageferry.core.bitmap import runs_of
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.memory import GuestMemory
from pageferry.core.ram import byte_ranges
from pageferry.devices.bus import expect_size
from pageferry.devices.virtio.model import Driver
from pageferry.devices.virtio.queue import Chain, Ranges, RingError, gather, size_of

_QUEUE_SIZE = 128
_F_REPORTING = 5
_INFLATE, _DEFLATE = 0, 1
#: num_pages, actual, free_page_hint_cmd_id, poison_val.
_CONFIG = Struct("<4I")
_MOST_PFNS = 4096


class VirtioBalloon:
    """The device; implements :class:`~pageferry.devices.virtio.model.VirtioModel`.

    Drivers number the queue of reports with or without those of features that were not offered: queues 2 to 4 are all
    it.

    Args:
        name: its own among the guest's devices.
        memory: the guest's.
    """

    device_id = 5
    pci_class = 0xFF_00_00
    features = 1 << _F_REPORTING
    queue_sizes = (_QUEUE_SIZE,) * 5
    config = _CONFIG.pack(0, 0, 0, 0)

    def __init__(self, name: str, memory: GuestMemory) -> None:
        self.name = name
        self._memory = memory

    def serve(self, index: int, driver: Driver) -> None:
        """Give back what the guest does not need."""
        queue = driver.queues[index]
        for chain in queue.drain():
            if index == _INFLATE:
                self._memory.release(self._named(chain))
            elif index != _DEFLATE:
                self._memory.release(_whole_pages(chain.writable))
            queue.push((chain.head, 0))

    def _named(self, chain: Chain) -> Ranges:
        """Return the ranges of the frames whose numbers, u32 each, are in a chain (section 5.5.6.1)."""
        size_bytes = size_of(chain.readable)
        if size_bytes % 4 or size_bytes > 4 * _MOST_PFNS:
            raise RingError(f"{size_bytes} bytes of frame numbers")
        gfns = np.unique(np.frombuffer(gather(self._memory, chain.readable), "<u4").astype(np.uint64))
        return byte_ranges(*runs_of(gfns))

    def reset(self) -> None:
        """Do nothing: what was given back stays so until it is touched."""

    def save(self) -> bytes:
        """No state: what was given back is in the memory."""
        return b""

    def load(self, data: bytes) -> None:
        """Accept the empty state."""
        expect_size(self.name, data, 0)


def _whole_pages(ranges: Ranges) -> Ranges:
    """Return the whole pages of ranges."""
    pages = []
    for gpa, size_bytes in ranges:
        begin, end = gpa + PAGE_SIZE - 1 & -PAGE_SIZE, gpa + size_bytes & -PAGE_SIZE
        if begin < end:
            pages.append((begin, end - begin))
    return tuple(pages)
