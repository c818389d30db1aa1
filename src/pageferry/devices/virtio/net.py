"""A network device over a :class:`~pageferry.backends.link.Link`.

Frames that the guest sends are put on the link by its port's thread, not while the guest notifies of them: the answer
to a frame would else be there before the guest can add to it, and a stream of small writes would become as many small
frames. One that the link does not take is dropped, as on a wire. Those that wait stay in the guest's queue, and move
with it. Frames for the guest wait in the link until the guest has room, one of them here: it is part of the state, so
that a frame that was taken from the link is not lost at a move.

Source: VIRTIO 1.2, section 5.1.
"""

import logging
from collections.abc import Callable
from struct import Struct

from pageferry.backends.link import CHECKSUM, HEADER_BYTES, MAX_FRAME_BYTES, TSO4, TSO6, Link
from pageferry.core.errors import VmError
from pageferry.core.memory import GuestMemory
from pageferry.devices.virtio.model import Driver
from pageferry.devices.virtio.queue import Chain, SplitQueue, scatter, size_of

_log = logging.getLogger(__name__)

_QUEUE_SIZE = 256
RECEIVE, TRANSMIT = 0, 1
#: Frames taken from the link before other threads may have the bus.
_BATCH = 64

_F_CSUM, _F_GUEST_CSUM, _F_MAC, _F_GUEST_TSO4, _F_GUEST_TSO6 = 0, 1, 5, 7, 8
_F_HOST_TSO4, _F_HOST_TSO6, _F_MRG_RXBUF, _F_STATUS = 11, 12, 15, 16
_PLAIN = (_F_MAC, _F_MRG_RXBUF, _F_STATUS)
_OFFLOADS = (_F_CSUM, _F_GUEST_CSUM, _F_GUEST_TSO4, _F_GUEST_TSO6, _F_HOST_TSO4, _F_HOST_TSO6)
_LEFT_TO_GUEST = ((_F_GUEST_CSUM, CHECKSUM), (_F_GUEST_TSO4, TSO4), (_F_GUEST_TSO6, TSO6))
_LINK_UP = 1
#: mac, status, max_virtqueue_pairs, mtu.
_CONFIG = Struct("<6sHHH")
#: num_buffers, the last field of the virtio_net_hdr.
_NUM_BUFFERS = Struct("<H")
_NUM_BUFFERS_AT = HEADER_BYTES - _NUM_BUFFERS.size
#: mac, length of the frame that waits.
_STATE = Struct("<6sI")


class VirtioNet:
    """The device; implements :class:`~pageferry.devices.virtio.model.VirtioModel`.

    Args:
        name: its own among the guest's devices.
        memory: the guest's.
        link: to the network.
        mac: the guest's address.
        wake: called when there is something to do for the port's thread: frames to send, or room again for those that
            come.
    """

    device_id = 1
    pci_class = 0x02_00_00
    queue_sizes = (_QUEUE_SIZE, _QUEUE_SIZE)

    def __init__(self, name: str, memory: GuestMemory, link: Link, *, mac: bytes, wake: Callable[[], None]) -> None:
        self.name = name
        self._memory = memory
        self._link = link
        self._mac = mac
        self._wake = wake
        self.has_room = False
        """Whether frames that come can be taken: the guest has buffers, as far as was seen."""
        self._broken = False
        self._heeded = -1  # the features that the link was told of
        self._buffer = bytearray(MAX_FRAME_BYTES)
        self._frame = memoryview(b"")
        self.features = sum(1 << bit for bit in (*_PLAIN, *(_OFFLOADS if link.offloads else ())))

    @property
    def config(self) -> bytes:
        """Section 5.1.4."""
        return _CONFIG.pack(self._mac, _LINK_UP, 1, 0)

    def serve(self, index: int, driver: Driver) -> None:
        """Have sent what the guest has for the network, or hand over what the network has for the guest."""
        if index == TRANSMIT:
            driver.queues[index].want_no_notification()
            self._wake()
            return
        if driver.features != self._heeded:
            self._link.leave(sum(offload for feature, offload in _LEFT_TO_GUEST if driver.has(feature)))
            self._heeded = driver.features
        had_room = self.has_room
        self.has_room = self._receive(driver.queues[index], mergeable=driver.has(_F_MRG_RXBUF))
        if self.has_room and not had_room:
            self._wake()

    # -- to the network: section 5.1.6.2 -----------------------------------------------------------------------------

    def transmit(self, queue: SplitQueue) -> None:
        """Send the frames that wait in the queue, and have the driver notify of the next.

        Raises:
            VmError: the driver broke the rules.
        """
        for chain in queue.drain():
            if HEADER_BYTES < size_of(chain.readable) <= MAX_FRAME_BYTES:
                self._send(chain)
            queue.push((chain.head, 0))

    def _send(self, chain: Chain) -> None:
        try:
            self._link.send(self._memory.reading(chain.readable))
        except OSError as error:
            if isinstance(error, VmError):
                raise
            self._break(error)

    # -- from the network: section 5.1.6.3 ---------------------------------------------------------------------------

    def _receive(self, queue: SplitQueue, *, mergeable: bool) -> bool:
        """Hand over frames; return whether the guest has room for more."""
        queue.want_no_notification()  # the pump looks by itself
        for _ in range(_BATCH):
            if not self._frame and not self._take_frame():
                break
            if not self._deliver(queue, mergeable=mergeable):
                return False
        return not self._broken

    def _take_frame(self) -> bool:
        if self._broken:
            return False
        try:
            size_bytes = self._link.receive(self._buffer)
        except OSError as error:
            self._break(error)
            return False
        self._frame = memoryview(self._buffer)[:size_bytes]
        return size_bytes > HEADER_BYTES

    def _break(self, error: OSError) -> None:
        if not self._broken:
            _log.warning("%s: the network is gone: %s", self.name, error.strerror)
        self._broken = True

    def _deliver(self, queue: SplitQueue, *, mergeable: bool) -> bool:
        """Put the frame that waits into buffers of the guest; return False, having used none, when it has too few."""
        chains, room = self._buffers(queue, len(self._frame), most=queue.size if mergeable else 1)
        if not chains:
            return False
        if room < len(self._frame):  # it will never fit: a driver that does not merge has buffers for all frames
            queue.put_back(len(chains))
            self._frame = memoryview(b"")
            return True
        _NUM_BUFFERS.pack_into(self._buffer, _NUM_BUFFERS_AT, len(chains))
        used, rest = [], self._frame
        for chain in chains:
            piece = rest[: size_of(chain.writable)]
            scatter(self._memory, chain.writable, piece)
            used.append((chain.head, len(piece)))
            rest = rest[len(piece) :]
        queue.push(*used)
        self._frame = memoryview(b"")
        return True

    def _buffers(self, queue: SplitQueue, wanted_bytes: int, *, most: int) -> tuple[list[Chain], int]:
        """Take chains for so many bytes, ``most`` at the most; if there are too few, none, and ask to be notified.

        Return them, and how many bytes they have room for.
        """
        chains: list[Chain] = []
        room = 0
        while room < wanted_bytes and len(chains) < most:
            chain = queue.pop()
            if chain is None:
                queue.ask_for_notification()
                chain = queue.pop()  # it may have come before the driver saw that
            if chain is None:
                queue.put_back(len(chains))
                return [], 0
            chains.append(chain)
            room += size_of(chain.writable)
        return chains, room

    # -- the host's side ---------------------------------------------------------------------------------------------

    def reconnected(self) -> None:
        """Take note that the link was claimed."""
        self._broken = False

    def reset(self) -> None:
        """Forget the driver, and the frame that waited for it."""
        self.has_room = False
        self._frame = memoryview(b"")

    # -- state ---------------------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """Return the address, and the frame that waits for room."""
        return _STATE.pack(self._mac, len(self._frame)) + bytes(self._frame)

    def load(self, data: bytes) -> None:
        """Replace the frame that waits.

        Raises:
            VmError: it is not a state of this device.
        """
        if len(data) < _STATE.size:
            raise VmError(f"the state of device {self.name} is cut")
        mac, size_bytes = _STATE.unpack_from(data)
        frame = data[_STATE.size :]
        if mac != self._mac:
            raise VmError(f"the guest's {self.name} has the address {mac.hex(':')}, not {self._mac.hex(':')}")
        if size_bytes != len(frame) or len(frame) > MAX_FRAME_BYTES or 0 < len(frame) <= HEADER_BYTES:
            raise VmError(f"the state of device {self.name} has a frame that it cannot have")
        self._buffer[: len(frame)] = frame
        self._frame = memoryview(self._buffer)[: len(frame)]
        self.has_room = False  # found out by the first look
