"""A small DMA engine: writes guest memory behind the vCPUs' backs, as real devices do.

Registers (MMIO, little-endian; an 8-byte register may be accessed in 4-byte halves):

======  ====  =========  =====================================================================
offset  size  name       meaning
======  ====  =========  =====================================================================
0x00    8     source     gpa to copy from (COPY)
0x08    8     target     gpa to write to
0x10    8     length     bytes, at most 16 MiB
0x18    8     flag       gpa of a u64 that is incremented on completion; 0: none
0x20    8     pattern    the u64 that FILL repeats
0x28    4     command    write 1: FILL, 2: COPY; the transfer is done when the store completes
0x2C    4     status     0: idle, 1: done, 2: error (a range is not RAM, too long, command unknown)
0x30    8     completed  transfers completed so far (read only)
======  ====  =========  =====================================================================
"""

import struct

from pageferry.core.errors import VmError
from pageferry.core.memory import GuestMemory
from pageferry.core.run import Effect
from pageferry.devices.bus import expect_size

DMA_MMIO = 0xFEB0_0000
COMMAND_FILL = 1
COMMAND_COPY = 2
STATUS_DONE = 1
STATUS_ERROR = 2
MAX_LENGTH_BYTES = 16 << 20

_REGISTERS = struct.Struct("<QQQQQIIQ")
_SOURCE, _TARGET, _LENGTH, _FLAG, _PATTERN = 0x00, 0x08, 0x10, 0x18, 0x20
_COMMAND, _STATUS, _COMPLETED = 0x28, 0x2C, 0x30
_PIECE_BYTES = 1 << 20


class DmaDevice:
    """The engine; see the module's text.

    Args:
        memory: where it reads and writes; its writes mark dirty through it.
    """

    name = "dma"
    ports = range(0)
    mmio = range(DMA_MMIO, DMA_MMIO + 0x1000)

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._registers = bytearray(_REGISTERS.size)

    def _get(self, offset: int, size: int = 8) -> int:
        return int.from_bytes(self._registers[offset : offset + size], "little")

    def _put(self, offset: int, size: int, value: int) -> None:
        self._registers[offset : offset + size] = (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little")

    def read(self, offset: int, size: int) -> int:
        """Return a register or a part of one."""
        return self._get(offset, size) if offset + size <= len(self._registers) else 0

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Set a register or a part of one; a command is performed at once."""
        if offset + size > _COMMAND:
            if offset == _COMMAND:
                self._perform(value)
            return None
        self._put(offset, size, value)
        return None

    def _perform(self, command: int) -> None:
        try:
            if self._get(_LENGTH) > MAX_LENGTH_BYTES:  # a transfer is one instruction: a pause waits for it
                raise VmError("a DMA transfer is too long")
            if command == COMMAND_FILL:
                self._fill()
            elif command == COMMAND_COPY:
                self._memory.copy_within(self._get(_SOURCE), self._get(_TARGET), self._get(_LENGTH))
            else:
                raise VmError("unknown DMA command")
            if flag := self._get(_FLAG):
                self._memory.write(flag, ((self._memory.read_u64(flag) + 1) % (1 << 64)).to_bytes(8, "little"))
        except VmError:  # the guest's mistake: it reads it in the status register
            self._put(_STATUS, 4, STATUS_ERROR)
            return
        self._put(_STATUS, 4, STATUS_DONE)
        self._put(_COMPLETED, 8, self._get(_COMPLETED) + 1)

    def _fill(self) -> None:
        target, length = self._get(_TARGET), self._get(_LENGTH)
        if not self._memory.is_ram(target, length):
            raise VmError("DMA outside RAM")
        piece = self._get(_PATTERN).to_bytes(8, "little") * (min(length, _PIECE_BYTES) // 8 + 1)
        for at in range(0, length, _PIECE_BYTES):
            self._memory.write(target + at, piece[: min(_PIECE_BYTES, length - at)])

    def save(self) -> bytes:
        """Return the registers."""
        return bytes(self._registers)

    def load(self, data: bytes) -> None:
        """Replace the registers."""
        expect_size(self.name, data, _REGISTERS.size)
        self._registers[:] = data
