"""Machines whose RAM has guards: whatever is written beside it is seen.

Most of the address space around a guest's RAM is set aside and not mapped: who writes there is killed, and so is the
fuzzer's process, which tells of it. Where that leaves room for doubt canaries lie: before RAM begins, where it ends,
and at both ends of the hole.
"""

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

from altered import alter

from pageferry.core.frames import PCI_HOLE_END, PCI_HOLE_START, SIZE_2M
from pageferry.core.libc import libc
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import VmConfig

_CANARY_BYTES = 16 << 12
_MAP_FIXED, _MAP_FIXED_NOREPLACE = 0x10, 0x100000
_SONG = bytes(range(1, 252))
_CANARY = (_SONG * (_CANARY_BYTES // len(_SONG) + 1))[:_CANARY_BYTES]


class Canaries:
    """Known bytes around the RAM of one machine."""

    def __init__(self, memory: GuestMemory) -> None:
        begin, end = memory.mapping.hva, memory.mapping.hva + memory.mapping.size_bytes
        self._laid: list[int] = []
        self._before = self._lay(begin - _CANARY_BYTES, _MAP_FIXED_NOREPLACE)
        if -end % SIZE_2M >= _CANARY_BYTES:  # the reservation goes on to there
            self._lay(end, _MAP_FIXED)
        if memory.mapping.size_bytes > PCI_HOLE_END:
            for at in (PCI_HOLE_START, PCI_HOLE_END - _CANARY_BYTES):
                self._lay(begin + at, _MAP_FIXED)

    def _lay(self, hva: int, how: int) -> int | None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | how
        # SAFETY: where something is replaced it is a part of the reservation in which no RAM is.
        found = libc.mmap(hva, _CANARY_BYTES, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        if found != hva:
            return None  # somebody else's, before RAM
        ctypes.memmove(hva, _CANARY, _CANARY_BYTES)
        self._laid.append(hva)
        return hva

    def dead(self) -> list[int]:
        """Return the addresses of those that were written to; they end here."""
        laid, self._laid = self._laid, []
        dead = [hva for hva in laid if ctypes.string_at(hva, _CANARY_BYTES) != _CANARY]
        if self._before is not None and laid:
            libc.munmap(self._before, _CANARY_BYTES)
        return dead


class Guarded:
    """Makes machines with canaries, which are looked at when the machine is closed.

    Args:
        make_vm: makes a machine.

    Attributes:
        made: the machines that are not closed.
    """

    def __init__(self, make_vm: Callable[[VmConfig], Any]) -> None:
        self._make_vm = make_vm
        self._dead: list[str] = []
        self.made: list[Any] = []

    def __call__(self, config: VmConfig) -> Any:
        """Make one."""
        vm = self._make_vm(config)
        canaries = Canaries(vm.memory)
        self.made.append(vm)

        def look_first(close: Callable[[], None]) -> Callable[[], None]:
            def closed() -> None:
                self._dead += [f"{hva - vm.memory.mapping.hva:#x}" for hva in canaries.dead()]
                if vm in self.made:
                    self.made.remove(vm)
                close()

            return closed

        alter(vm, "close", look_first)
        return vm

    def dead(self) -> list[str]:
        """Return where, as gpas, something was written beside the RAM of a machine that was closed; ask once."""
        dead, self._dead = self._dead, []
        return dead
