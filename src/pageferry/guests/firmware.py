"""The data that a kernel finds in a PC's memory, however it is booted.

Below 1 MiB, where a kernel reserves what it needs before it uses the rest::

    0x00400  BIOS data: COM1, where low RAM ends   0x20000  command line
    0x06000  GDT with flat segments                0x9fc00  end of low RAM
    0x07000  what the boot protocol tells          0xe0000  ACPI tables
    0x08000  identity page tables of 4 GiB
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pageferry.core.errors import UsageError
from pageferry.core.memory import GuestMemory
from pageferry.core.state import MachineState, VcpuState
from pageferry.core.vm import MachineModel, Vm
from pageferry.devices.pc.acpi import acpi_tables
from pageferry.guests.entry import flat_gdt, waiting_state
from pageferry.guests.placement import LoadedPart, Placement

BIOS_DATA_GPA = 0x400
GDT_GPA = 0x6000
BOOT_INFO_GPA = 0x7000
PAGE_TABLES_GPA = 0x8000
COMMAND_LINE_GPA = 0x20000

LOW_RAM_END = 0x9FC00
HIGH_RAM_START = 0x10_0000
#: COM1's port; the segment where low RAM ends and a BIOS has its extended data, of which there is none; low RAM in KiB.
_BIOS_DATA = struct.pack("<H12xH3xH", 0x3F8, LOW_RAM_END >> 4, LOW_RAM_END >> 10)
#: Types of ranges, the same numbers in every boot protocol.
RAM, RESERVED = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel that is entered in protected mode, ready to be put into memory; ``entry`` is a gpa.

    Raises:
        UsageError: its entry lies outside of it.
    """

    name: str
    entry: int
    parts: tuple[LoadedPart, ...]

    def __post_init__(self) -> None:
        if not any(part.gpa <= self.entry < part.gpa + part.size_bytes for part in self.parts):
            raise UsageError(
                f"{self.name} has its entry point {self.entry:#x} outside what is loaded", hint="link it again"
            )


class MemoryRange(NamedTuple):
    """An entry of a PC's memory map: ``kind`` is RAM or RESERVED."""

    gpa: int
    size_bytes: int
    kind: int


def memory_map(memory: GuestMemory) -> Iterator[MemoryRange]:
    """Yield what a kernel may use, and the range below 1 MiB that a PC reserves; ascending and disjoint."""
    yield MemoryRange(0, LOW_RAM_END, RAM)
    yield MemoryRange(LOW_RAM_END, HIGH_RAM_START - LOW_RAM_END, RESERVED)
    for region in memory.regions:
        gpa = max(region.gpa, HIGH_RAM_START)
        yield MemoryRange(gpa, region.gpa + region.size_bytes - gpa, RAM)


def pc_placement(vm: Vm, name: str, parts: Iterable[LoadedPart], *, long_mode: bool) -> Placement:
    """Begin to place a kernel in the memory of a PC: it, a GDT for its first vCPU, BIOS data, and the ACPI tables.

    Raises:
        UsageError: kernels are not made for this machine model, or the kernel does not fit.
    """
    if vm.config.machine is not MachineModel.PC:
        raise UsageError(f"{name} needs a PC, and the machine is {vm.config.machine}", hint="--machine pc")
    placement = Placement(vm.memory)
    for part in parts:
        placement.put(f"the kernel {name}", part.gpa, part.data, size_bytes=part.size_bytes)
    placement.put("the BIOS data", BIOS_DATA_GPA, _BIOS_DATA)
    placement.put("the GDT", GDT_GPA, flat_gdt(long_mode=long_mode))
    for gpa, data in acpi_tables(vm.config.cpus):
        placement.put("the ACPI tables", gpa, data)
    return placement


def command_line_bytes(text: str, *, max_bytes: int) -> bytes:
    """Return a command line as kernels find it, with a NUL at its end.

    Raises:
        UsageError: it is longer than ``max_bytes`` without that, or has a NUL in it.
    """
    data = text.encode()
    if len(data) > max_bytes:
        raise UsageError(f"the command line has {len(data)} bytes, the kernel takes {max_bytes}", hint="shorten it")
    if b"\0" in data:
        raise UsageError("the command line has a NUL in it", hint="a kernel would see only what is before it")
    return data + b"\0"


def start_first(vm: Vm, state: VcpuState) -> None:
    """Load the state of the first vCPU; the others wait to be started by it.

    Raises:
        VmError: the machine refused.
    """
    others = (waiting_state() for _ in range(1, vm.config.cpus))
    vm.load_state(MachineState(vcpus=(state, *others), devices=vm.save_state().devices))
