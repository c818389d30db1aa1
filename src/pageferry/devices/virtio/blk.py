"""A block device over a :class:`Disk`: read, write, flush, discard, write zeroes, get the identity.

Requests are taken, done and given back one at a time, by a :class:`~pageferry.devices.virtio.disk_port.DiskPort`. The
size of one is bounded by what the device offers (``SEG_MAX`` times ``SIZE_MAX``): what is larger fails.

Source: VIRTIO 1.2, section 5.2.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import Protocol

from pageferry.core.errors import VmError
from pageferry.core.memory import GuestMemory
from pageferry.devices.virtio.model import Driver
from pageferry.devices.virtio.queue import Chain, Ranges, RingError, SplitQueue, gather, part_of, scatter, size_of

_log = logging.getLogger(__name__)

_SECTOR_BYTES = 512
_QUEUE_SIZE = 256
#: The queue's index.
REQUESTS = 0
SEG_MAX, SIZE_MAX = 126, 64 << 10
_MAX_REQUEST_BYTES = SEG_MAX * SIZE_MAX
_BLOCK_BYTES = 512
_MAX_DISCARD_SECTORS, _MAX_RANGES = 1 << 22, 16
#: Where the file system cannot, zeros are written: no more than a request may write.
_MAX_ZEROES_SECTORS = _MAX_REQUEST_BYTES // _SECTOR_BYTES

_F_SIZE_MAX, _F_SEG_MAX, _F_RO, _F_BLK_SIZE, _F_FLUSH, _F_DISCARD, _F_WRITE_ZEROES = 1, 2, 5, 6, 9, 13, 14
_OK, _IOERR, _UNSUPP = 0, 1, 2

#: capacity in sectors, size_max, seg_max, geometry, blk_size, topology, writeback and num_queues, then for discard and
#: write zeroes the most sectors and ranges, the discard alignment between them, write_zeroes_may_unmap.
_CONFIG = Struct("<QII4xI8x4xIIIIIB3x")
#: type, reserved, sector.
_HEADER = Struct("<IIQ")
#: sector, num_sectors, flags: bit 0 unmap.
_RANGE = Struct("<QII")
_UNMAP = 1
_ID_BYTES = 20
_STATE = Struct("<QB")


class Disk(Protocol):
    """The storage of a disk; offsets and sizes are in bytes, of whole sectors, inside ``size_bytes``.

    Each method raises OSError when it cannot.
    """

    size_bytes: int
    readonly: bool

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill ``views``, one after another."""

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write ``views``, one after another."""

    def flush(self) -> None:
        """Have all that was written survive a crash."""

    def discard(self, offset: int, size_bytes: int) -> None:
        """Forget a range: what it holds afterwards is not told."""

    def write_zeroes(self, offset: int, size_bytes: int, *, unmap: bool) -> None:
        """Have zeros in a range, without storage if ``unmap``."""


class _Request(IntEnum):
    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


_WRITES = (_Request.OUT, _Request.DISCARD, _Request.WRITE_ZEROES)


class _Refused(Exception):  # an answer to the driver, no error of ours
    """A request that ends with another status than OK."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@dataclass(slots=True)
class BlkRequest:
    """A request; ``written`` bytes of its writable part and ``status`` once it was done, or why it could not be.

    ``data_bytes``: how much of the writable part comes before the status.
    """

    chain: Chain
    data_bytes: int
    written: int = 0
    status: int = _OK
    failure: VmError | None = None


def _all_but_status(chain: Chain) -> Ranges:
    """Return where data may be written: all but the last byte, which drivers have a range of its own for."""
    *data, (gpa, size_bytes) = chain.writable
    return (*data, (gpa, size_bytes - 1)) if size_bytes > 1 else tuple(data)


class VirtioBlk:
    """The device; implements :class:`~pageferry.devices.virtio.model.VirtioModel`.

    Args:
        name: the disk's among the guest's devices, which is also its identity for the driver.
        memory: the guest's.
        disk: the content.
        on_requests: has requests looked for, on another thread.
        on_reset: returns when no request is being done; the driver does not wait for it any more.
    """

    device_id = 2
    pci_class = 0x01_00_00
    queue_sizes = (_QUEUE_SIZE,)

    def __init__(
        self,
        name: str,
        memory: GuestMemory,
        disk: Disk,
        *,
        on_requests: Callable[[], None],
        on_reset: Callable[[], None],
    ) -> None:
        self.name = name
        self._memory = memory
        self._disk = disk
        self._on_requests = on_requests
        self._on_reset = on_reset
        features = [_F_SIZE_MAX, _F_SEG_MAX, _F_BLK_SIZE, _F_FLUSH]
        features += [_F_RO] if disk.readonly else [_F_DISCARD, _F_WRITE_ZEROES]
        self.features = sum(1 << feature for feature in features)

    @property
    def config(self) -> bytes:
        """Section 5.2.4."""
        return _CONFIG.pack(
            self._disk.size_bytes // _SECTOR_BYTES,
            SIZE_MAX,
            SEG_MAX,
            _BLOCK_BYTES,
            _MAX_DISCARD_SECTORS,
            _MAX_RANGES,
            1,
            _MAX_ZEROES_SECTORS,
            1,
            1,
        )

    def reset(self) -> None:
        """Touch no memory of the driver's any more."""
        self._on_reset()

    def serve(self, index: int, driver: Driver) -> None:
        """Have every request done that waits (section 5.2.6)."""
        self._on_requests()

    def take(self, queue: SplitQueue) -> BlkRequest | None:
        """Take the next request; None: none waits, and the driver will tell of the next one.

        Raises:
            RingError: the driver broke the rules.
        """
        chain = queue.pop()
        if chain is None:
            queue.ask_for_notification()
            chain = queue.pop()  # it may have come before the driver saw that
        if chain is None:
            return None
        data_bytes = size_of(chain.writable) - 1
        if data_bytes < 0:
            raise RingError("a request has no place for its status")
        if not chain.writable[-1][1]:  # the status is the last byte of all that follows
            chain = chain._replace(writable=tuple(place for place in chain.writable if place[1]))
        return BlkRequest(chain, data_bytes)

    def perform(self, request: BlkRequest) -> None:
        """Do a request that was taken; nothing is locked."""
        try:
            request.written = self._perform(request)
        except _Refused as refusal:
            request.status = refusal.status
        except VmError as error:
            request.failure = error
        except OSError as error:
            _log.warning("%s: %s", self.name, error)
            request.status = _IOERR

    def give_back(self, queue: SplitQueue, request: BlkRequest) -> None:
        """Give a request that was done back to the driver.

        Raises:
            VmError: it could not be done, for the driver broke the rules.
        """
        if request.failure is not None:
            raise request.failure
        gpa, size_bytes = request.chain.writable[-1]
        self._memory.write(gpa + size_bytes - 1, bytes((request.status,)))
        # What was written is told from the first byte on: the status is among it where all before it was.
        written = request.written + 1 if request.written == request.data_bytes else request.written
        queue.push((request.chain.head, written))

    def _perform(self, request: BlkRequest) -> int:
        """Do what the header says; return how much was written to the chain."""
        chain, target, target_bytes = request.chain, _all_but_status(request.chain), request.data_bytes
        source_bytes = size_of(chain.readable) - _HEADER.size
        if source_bytes < 0:
            raise _Refused(_IOERR)
        kind, _, sector = _HEADER.unpack(gather(self._memory, part_of(chain.readable, 0, _HEADER.size)))
        source = part_of(chain.readable, _HEADER.size, source_bytes)
        if self._disk.readonly and kind in _WRITES:
            raise _Refused(_IOERR)
        match kind:
            case _Request.IN:
                offset = self._offset(sector, target_bytes)
                with self._memory.writing(target) as views:
                    self._disk.read(views, offset)
                return target_bytes
            case _Request.OUT:
                self._disk.write(self._memory.reading(source), self._offset(sector, source_bytes))
            case _Request.FLUSH:
                self._disk.flush()
            case _Request.GET_ID:
                identity = self.name.encode()[:_ID_BYTES].ljust(_ID_BYTES, b"\0")[:target_bytes]
                scatter(self._memory, target, identity)
                return len(identity)
            case _Request.DISCARD:
                for offset, size_bytes, _ in self._ranges(source, _MAX_RANGES, _MAX_DISCARD_SECTORS, flags=0):
                    self._disk.discard(offset, size_bytes)
            case _Request.WRITE_ZEROES:
                for offset, size_bytes, flags in self._ranges(source, 1, _MAX_ZEROES_SECTORS, flags=_UNMAP):
                    self._disk.write_zeroes(offset, size_bytes, unmap=bool(flags & _UNMAP))
            case _:
                raise _Refused(_UNSUPP)
        return 0

    def _offset(self, sector: int, size_bytes: int) -> int:
        """Return where in the disk a transfer begins, which is possible."""
        offset = sector * _SECTOR_BYTES
        if not 0 < size_bytes <= _MAX_REQUEST_BYTES or size_bytes % _SECTOR_BYTES:
            raise _Refused(_IOERR)
        if offset + size_bytes > self._disk.size_bytes:
            raise _Refused(_IOERR)
        return offset

    def _ranges(self, source: Ranges, most: int, most_sectors: int, *, flags: int) -> list[tuple[int, int, int]]:
        """Return offset, size and flags of each range of a request (section 5.2.6.2), all of which are possible."""
        size_bytes = size_of(source)
        if not 0 < size_bytes <= most * _RANGE.size or size_bytes % _RANGE.size:
            raise _Refused(_IOERR)
        ranges = list(_RANGE.iter_unpack(gather(self._memory, source)))
        for sector, sectors, given in ranges:
            if given & ~flags:
                raise _Refused(_UNSUPP)
            if not 0 < sectors <= most_sectors or (sector + sectors) * _SECTOR_BYTES > self._disk.size_bytes:
                raise _Refused(_IOERR)
        return [(sector * _SECTOR_BYTES, sectors * _SECTOR_BYTES, given) for sector, sectors, given in ranges]

    def save(self) -> bytes:
        """Return what the guest knows of the disk."""
        return _STATE.pack(self._disk.size_bytes, self._disk.readonly)

    def load(self, data: bytes) -> None:
        """Check that this is the disk that the guest knows.

        Raises:
            VmError: it is not.
        """
        if data != self.save():
            raise VmError(f"the guest's {self.name} is not this disk of {self._disk.size_bytes} bytes")
