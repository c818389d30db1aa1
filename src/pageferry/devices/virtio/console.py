"""A console with one port, for a guest that wants a faster one than a UART.

Output goes to a sink as it comes. Input waits here, up to ``LINE_BYTES``, until the driver has buffers for it, and is
part of the state.

Source: VIRTIO 1.2, section 5.3.
"""

from collections.abc import Callable
from struct import Struct

from pageferry.core.errors import VmError
from pageferry.core.memory import GuestMemory
from pageferry.devices.virtio.model import Driver
from pageferry.devices.virtio.queue import RingError, gather, scatter, size_of

_QUEUE_SIZE = 64
RECEIVE, _TRANSMIT = 0, 1
LINE_BYTES = 4096
_MOST_BYTES = 1 << 20
#: cols, rows, max_nr_ports, emerg_wr: of features that are not offered.
_CONFIG = Struct("<HHII")


class VirtioConsole:
    """The device; implements :class:`~pageferry.devices.virtio.model.VirtioModel`.

    ``sink`` sees what the guest writes, as it is written.

    Args:
        name: its own among the guest's devices.
        memory: the guest's.
    """

    device_id = 3
    pci_class = 0x07_80_00
    features = 0
    queue_sizes = (_QUEUE_SIZE, _QUEUE_SIZE)
    config = _CONFIG.pack(0, 0, 0, 0)

    def __init__(self, name: str, memory: GuestMemory) -> None:
        self.name = name
        self.sink: Callable[[bytes], None] | None = None
        self._memory = memory
        self._line = b""

    def type(self, data: bytes) -> int:
        """Put input on the line; return how many of its bytes found room, the first ones. Then serve RECEIVE."""
        taken = data[: LINE_BYTES - len(self._line)]
        self._line += taken
        return len(taken)

    def serve(self, index: int, driver: Driver) -> None:
        """Take output, or hand over input."""
        queue = driver.queues[index]
        if index == _TRANSMIT:
            for chain in queue.drain():
                if size_of(chain.readable) > _MOST_BYTES:
                    raise RingError(f"{size_of(chain.readable)} bytes of output at once")
                if self.sink is not None:
                    self.sink(gather(self._memory, chain.readable))
                queue.push((chain.head, 0))
            return
        queue.ask_for_notification()
        while self._line and (room := queue.pop()) is not None:
            piece = self._line[: size_of(room.writable)]
            scatter(self._memory, room.writable, piece)
            queue.push((room.head, len(piece)))
            self._line = self._line[len(piece) :]

    def reset(self) -> None:
        """Do nothing: input waits for the next driver."""

    def save(self) -> bytes:
        """Return what waits on the line."""
        return self._line

    def load(self, data: bytes) -> None:
        """Replace what waits on the line.

        Raises:
            VmError: there is more than can.
        """
        if len(data) > LINE_BYTES:
            raise VmError(f"the state of device {self.name} has {len(data)} bytes on the line")
        self._line = data
