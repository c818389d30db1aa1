"""An entropy device: fills the driver's buffers with random bytes of the host.

Source: VIRTIO 1.2, section 5.4.
"""

from collections.abc import Callable

from pageferry.core.memory import GuestMemory
from pageferry.devices.bus import expect_size
from pageferry.devices.virtio.model import Driver
from pageferry.devices.virtio.queue import scatter, size_of

_QUEUE_SIZE = 8
#: A driver that asks for more gets so much, and may ask again.
_MOST_BYTES = 64 << 10


class VirtioRng:
    """The device; implements :class:`~pageferry.devices.virtio.model.VirtioModel`.

    Args:
        name: its own among the guest's devices.
        memory: the guest's.
        random: returns so many random bytes.
    """

    device_id = 4
    pci_class = 0xFF_00_00
    features = 0
    queue_sizes = (_QUEUE_SIZE,)
    config = b""

    def __init__(self, name: str, memory: GuestMemory, random: Callable[[int], bytes]) -> None:
        self.name = name
        self._memory = memory
        self._random = random

    def serve(self, index: int, driver: Driver) -> None:
        """Fill every buffer that waits."""
        queue = driver.queues[index]
        for chain in queue.drain():
            data = self._random(min(size_of(chain.writable), _MOST_BYTES))
            scatter(self._memory, chain.writable, data)
            queue.push((chain.head, len(data)))

    def reset(self) -> None:
        """Do nothing: no request outlives its notification."""

    def save(self) -> bytes:
        """No state."""
        return b""

    def load(self, data: bytes) -> None:
        """Accept the empty state."""
        expect_size(self.name, data, 0)
