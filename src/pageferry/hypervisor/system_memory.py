"""Guest memory as the processor itself uses it: descriptor tables, task state, stacks of handlers, code.

Accesses go through the guest's page tables and the P2M with a supervisor's rights, whatever the privilege level is, and
so set accessed and dirty bits and take nested faults like any other. What lies in a page that has a shadow is written
through the table window like any other such store: a page that was a table is one to the shadows for a while, and may
be a handler's stack by now.

Source: AMD APM volume 2, 4.12 (implicit supervisor accesses, SMAP).
"""

from collections.abc import Callable, Iterator

from pageferry.core.errors import GuestCrash
from pageferry.core.frames import PAGE_SIZE
from pageferry.hypervisor.guest_walk import GuestPageFault, GuestWalker
from pageferry.hypervisor.machine_memory import MachineMemory
from pageferry.hypervisor.shadow_mmu import TABLE_WINDOW

Translate = Callable[[int, bool, bool], tuple[int, int]]


class SystemMemory:
    """One vCPU's view.

    ``translate`` is the MMU in use: (gva, write, fetch) -> (maddr, permissions). ``written`` is told the machine
    address of each page that was written; ``write_table`` writes to one that has a shadow: (gpa, size, value).

    Args:
        machine: machine memory.
        walker: the vCPU's; ``follow`` has it walk the live tables, as a supervisor.
        translate: see above.
        follow: see above.
    """

    def __init__(
        self, machine: MachineMemory, walker: GuestWalker, translate: Translate, follow: Callable[[], None]
    ) -> None:
        self._view = machine.mapping.view
        self._size_bytes = machine.size_bytes
        self._walker = walker
        self.translate = translate
        self._follow = follow
        self.written: Callable[[int], None] = lambda _maddr: None
        self.write_table: Callable[[int, int, int], None] = lambda _gpa, _size, _value: None

    def read(self, gva: int, size: int) -> int:
        """Return a little-endian number.

        Raises:
            GuestPageFault: the guest's tables refuse; its ``gva`` is exact.
            GuestCrash: no memory is there.
        """
        data = b"".join(bytes(self._view[start:end]) for start, end in self._pieces(gva, size, write=False))
        return int.from_bytes(data, "little")

    def write(self, gva: int, size: int, value: int) -> None:
        """Store a little-endian number; raises as :meth:`read`."""
        data = value.to_bytes(size, "little")
        for start, end in tuple(self._pieces(gva, size, write=True)):
            piece, data = data[: end - start], data[end - start :]
            if start >= TABLE_WINDOW:
                self.write_table(start - TABLE_WINDOW, len(piece), int.from_bytes(piece, "little"))
                continue
            self._view[start:end] = piece
            self.written(start & -PAGE_SIZE)

    def code(self, gva: int, size: int) -> bytes:
        """Return the bytes at ``gva``, fewer where they cannot be read."""
        data = b""
        try:
            for start, end in self._pieces(gva, size, write=False):
                data += bytes(self._view[start:end])
        except (GuestPageFault, GuestCrash):
            pass  # what is there is enough to tell the instruction
        return data

    def pages(self, gva: int, size: int) -> set[int]:
        """Return the machine addresses of the pages that hold a range, except those that cannot be read."""
        found = set()
        try:
            for start, _ in self._pieces(gva, size, write=False):
                found.add(start & -PAGE_SIZE)
        except (GuestPageFault, GuestCrash):
            pass  # the rest is not needed: what is there is where the instruction lies
        return found

    def _pieces(self, gva: int, size: int, *, write: bool) -> Iterator[tuple[int, int]]:
        """Yield the ranges of machine addresses of a range of gvas, one for each page."""
        self._follow()
        while size:
            piece = min(size, PAGE_SIZE - (gva & PAGE_SIZE - 1))
            maddr = self.translate(gva, write, False)[0] + (gva & PAGE_SIZE - 1)
            if maddr + piece > self._size_bytes and maddr < TABLE_WINDOW:
                raise GuestCrash(f"system structure at gva {gva:#x}, which is not plain memory")
            yield maddr, maddr + piece
            gva, size = gva + piece & (1 << 64) - 1, size - piece
