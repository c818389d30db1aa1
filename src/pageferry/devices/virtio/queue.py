"""A split virtqueue as its device sees it, and chains of buffers in guest memory.

Nothing that a driver writes is believed: ring indices, descriptors and lengths are checked before they are used, a
chain has at most as many buffers as the queue has entries, and a range that is not RAM ends in an error. What a driver
must not do raises :class:`RingError` or, of memory, another VmError; the transport ends the device then.

Each write goes through :class:`GuestMemory`, which marks it dirty after it is done (law 4).

Source: Virtual I/O Device (VIRTIO) Version 1.2, section 2.7.
"""

from collections.abc import Callable, Iterator
from struct import Struct
from typing import NamedTuple

from pageferry.core.errors import VmError
from pageferry.core.memory import GuestMemory

Ranges = tuple[tuple[int, int], ...]
"""Ranges of guest memory, ``(gpa, size_bytes)`` each, as one row of bytes."""

#: Section 2.7.5: address u64, length u32, flags u16, next u16.
_DESCRIPTOR = Struct("<QIHH")
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
#: Section 2.7.8: head u32, length u32.
_USED = Struct("<II")
_U16 = Struct("<H")
_FLAGS_NO_NOTIFICATION = 1
#: Gives a descriptor's address, length, flags and next by its index.
_Table = Callable[[int], tuple[int, int, int, int]]
_RING = 4  # flags u16 and idx u16 come before the ring, in either area
_IDX = 2


class RingError(VmError):
    """A driver broke the rules of a virtqueue."""


def size_of(ranges: Ranges) -> int:
    """Return how many bytes the ranges have."""
    total = 0
    for _, size_bytes in ranges:  # no sum() of a generator here: every request asks several times
        total += size_bytes
    return total


def part_of(ranges: Ranges, start: int, size_bytes: int) -> Ranges:
    """Return ``size_bytes`` bytes of the ranges from byte ``start`` on, or what there is of them."""
    part = []
    for gpa, length in ranges:
        if start >= length:
            start -= length
            continue
        taken = length - start if length - start < size_bytes else size_bytes
        if not taken:
            break
        part.append((gpa + start, taken))
        size_bytes -= taken
        start = 0
    return tuple(part)


class Chain(NamedTuple):
    """A chain of buffers that the driver has made available: what the device may read, then what it may write."""

    head: int
    readable: Ranges
    writable: Ranges


class SplitQueue:
    """One virtqueue. The fields up to ``signalled`` are its state; the transport sets, saves and loads them.

    Args:
        memory: where rings and buffers are.
        max_size: most entries that a driver may choose.
    """

    def __init__(self, memory: GuestMemory, max_size: int) -> None:
        self.memory = memory
        self.max_size = max_size
        self.reset()

    def reset(self) -> None:
        """Be as new."""
        self.size = self.max_size
        self.enabled = False
        self.descriptors = 0
        """Where the descriptor table is."""
        self.driver = 0
        """Where the driver area is: the available ring."""
        self.device = 0
        """Where the device area is: the used ring."""
        self.next_available = 0
        self.next_used = 0
        self.signalled = 0
        """``next_used`` when it was last looked whether the driver wants an interrupt."""
        self.event_idx = False
        """Whether VIRTIO_F_EVENT_IDX was negotiated."""
        self.indirect = False
        """Whether VIRTIO_F_INDIRECT_DESC was negotiated."""

    # -- the available ring: section 2.7.6 ---------------------------------------------------------------------------

    def waiting(self) -> int:
        """Return how many chains wait.

        Raises:
            RingError: more than the queue has entries.
        """
        waiting = (self._u16(self.driver + _IDX) - self.next_available) & 0xFFFF
        if waiting > self.size:
            raise RingError(f"{waiting} chains are available in a queue of {self.size}")
        return waiting

    def pop(self) -> Chain | None:
        """Take the next chain; None: none waits.

        Raises:
            RingError: the chain breaks the rules.
            VmError: a part of it is not RAM.
        """
        if not self.waiting():
            return None
        head = self._u16(self.driver + _RING + 2 * (self.next_available % self.size))
        chain = self._walk(head)
        self.next_available = (self.next_available + 1) & 0xFFFF
        return chain

    def put_back(self, chains: int) -> None:
        """Undo the last ``chains`` calls of :meth:`pop`, none of whose chains was used."""
        self.next_available = (self.next_available - chains) & 0xFFFF

    def drain(self) -> Iterator[Chain]:
        """Yield every chain that waits now; the driver notifies of those that come later.

        There are at most as many as the queue has entries, even where the driver lets the device's own writes, or
        another vCPU, make more of them available all the time.

        Raises:
            RingError, VmError: as :meth:`pop`.
        """
        end = self._end()
        while self.next_available != end and (chain := self.pop()) is not None:
            yield chain

    def _end(self) -> int:
        # The driver notifies of the chain at the end; one that has come before it was told so is within the end.
        while True:
            end = (self.next_available + self.waiting()) & 0xFFFF
            self._ask_for_notification_at(end)
            if (self.next_available + self.waiting()) & 0xFFFF == end:
                return end

    # -- the used ring: section 2.7.8 --------------------------------------------------------------------------------

    def push(self, *used: tuple[int, int]) -> None:
        """Give chains back: ``(head, bytes written)`` each, seen by the driver all at once.

        Raises:
            VmError: the used ring is not RAM.
        """
        write, ring = self.memory.write, self.device + _RING
        for head, written in used:
            write(ring + _USED.size * (self.next_used % self.size), _USED.pack(head, written))
            self.next_used = (self.next_used + 1) & 0xFFFF
        write(self.device + _IDX, _U16.pack(self.next_used))

    # -- notifications: sections 2.7.7 and 2.7.10 --------------------------------------------------------------------

    def ask_for_notification(self) -> None:
        """Have the driver tell when it makes the next chain available."""
        self._ask_for_notification_at(self.next_available)

    def _ask_for_notification_at(self, index: int) -> None:
        if self.event_idx:
            self.memory.write(self.device + _RING + _USED.size * self.size, _U16.pack(index))
        else:
            self.memory.write(self.device, _U16.pack(0))

    def want_no_notification(self) -> None:
        """Tell the driver not to notify, for the device looks by itself; it may do so all the same."""
        if not self.event_idx:  # else the index that it was to notify at is passed already
            self.memory.write(self.device, _U16.pack(_FLAGS_NO_NOTIFICATION))

    def wants_interrupt(self) -> bool:
        """Tell whether the driver wants an interrupt for what was used since the last call."""
        before, now = self.signalled, self.next_used
        self.signalled = now
        if before == now:
            return False
        if self.event_idx:
            event = self._u16(self.driver + _RING + 2 * self.size)
            return (now - event - 1) & 0xFFFF < (now - before) & 0xFFFF
        return not self._u16(self.driver) & _FLAGS_NO_NOTIFICATION

    # -- descriptors: section 2.7.5 ----------------------------------------------------------------------------------

    def _u16(self, gpa: int) -> int:
        return int.from_bytes(self.memory.read(gpa, 2), "little")

    def _walk(self, head: int) -> Chain:
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        for gpa, size_bytes, flags, _ in self._buffers(head):
            if not self.memory.is_ram(gpa, size_bytes):
                raise RingError(f"a buffer of {size_bytes} bytes at gpa {gpa:#x} is not RAM")
            if flags & _WRITE:
                writable.append((gpa, size_bytes))
            elif writable:
                raise RingError("a buffer to read follows one to write")
            else:
                readable.append((gpa, size_bytes))
        return Chain(head, tuple(readable), tuple(writable))

    def _table(self, gpa: int) -> _Table:
        """Return what reads descriptors where they lie."""
        return lambda index: _DESCRIPTOR.unpack(self.memory.read(gpa + _DESCRIPTOR.size * index, _DESCRIPTOR.size))

    def _copied(self, gpa: int, size_bytes: int) -> _Table:
        """Return what gives descriptors of a copy, which is made at once: for a table that is used whole."""
        return list(_DESCRIPTOR.iter_unpack(self.memory.read(gpa, size_bytes))).__getitem__

    def _buffers(self, head: int) -> list[tuple[int, int, int, int]]:
        """Return the descriptors of a chain with buffers: at most as many as the queue has entries."""
        table, entries, index = self._table(self.descriptors), self.size, head
        in_table = False
        left = self.size
        buffers = []
        while True:
            if index >= entries:
                raise RingError(f"descriptor {index} is outside a table of {entries}")
            if not left:
                raise RingError("a chain is longer than its queue")
            descriptor = table(index)
            gpa, size_bytes, flags, following = descriptor
            if flags & _INDIRECT:
                if in_table or not self.indirect or flags & _NEXT or size_bytes % _DESCRIPTOR.size or not size_bytes:
                    raise RingError(f"an indirect table of {size_bytes} bytes with flags {flags:#x}")
                entries, index, in_table = size_bytes // _DESCRIPTOR.size, 0, True
                table = self._table(gpa) if entries > self.size else self._copied(gpa, size_bytes)
                continue
            buffers.append(descriptor)
            if not flags & _NEXT:
                return buffers
            index = following
            left -= 1


def gather(memory: GuestMemory, ranges: Ranges) -> bytes:
    """Return a copy of what the ranges hold; the caller has bounded their size.

    Raises:
        VmError: a range is not RAM.
    """
    if len(ranges) == 1:
        return memory.read(*ranges[0])
    return b"".join(memory.reading(ranges))


def scatter(memory: GuestMemory, ranges: Ranges, data: bytes | memoryview) -> None:
    """Write ``data``, which fits, to the ranges from their first byte on.

    Raises:
        VmError: a range is not RAM; nothing was written.
    """
    if len(ranges) == 1 and len(data) <= ranges[0][1]:
        memory.write(ranges[0][0], data)
        return
    at = 0
    with memory.writing(part_of(ranges, 0, len(data))) as views:
        for view in views:
            view[:] = data[at : at + len(view)]
            at += len(view)
