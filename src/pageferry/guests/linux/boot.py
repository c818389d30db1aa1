"""Boots a Linux kernel: what the kernel finds in memory, and how its first vCPU enters it.

Below 1 MiB, where the kernel reserves what it needs before it uses the rest::

    0x06000  GDT with flat segments                0x20000  command line
    0x07000  boot_params, the "zero page"          0x9fc00  end of low RAM
    0x08000  identity page tables of 4 GiB         0xe0000  ACPI tables

The kernel lies where it was linked to, from 16 MiB on; the initrd as high as the kernel can reach.

Source: the kernel's ``Documentation/arch/x86/boot.rst`` and ``zero-page.rst``.
"""

import struct
from collections.abc import Iterator

from pageferry.core.errors import UsageError
from pageferry.core.memory import GuestMemory
from pageferry.core.state import MachineState
from pageferry.core.vm import MachineModel, Vm
from pageferry.guests.entry import CODE_SELECTOR, flat_gdt, long_mode_state, waiting_state
from pageferry.guests.linux.image import HEADER_AT, LinuxKernel
from pageferry.guests.page_tables import identity_map
from pageferry.guests.placement import Placement

assert CODE_SELECTOR == 0x10, "the protocol's __BOOT_CS"

GDT_GPA = 0x6000
BOOT_PARAMS_GPA = 0x7000
PAGE_TABLES_GPA = 0x8000
COMMAND_LINE_GPA = 0x20000
_MAPPED_GIB = 4

LOW_RAM_END = 0x9FC00
HIGH_RAM_START = 0x10_0000
E820_RAM, E820_RESERVED = 1, 2
_E820_ENTRY = struct.Struct("<QQI")
_E820_COUNT_AT, _E820_TABLE_AT = 0x1E8, 0x2D0
_BOOT_PARAMS_BYTES = 0x1000
_UNKNOWN_LOADER = 0xFF
_LOADED_HIGH = 1 << 0
_NORMAL_VIDEO = 0xFFFF


def boot_linux(vm: Vm, kernel: LinuxKernel, *, initrd: bytes = b"", command_line: str = "") -> None:
    """Load a kernel and the entry state into a PC that has not run yet.

    Memory is all zeros before (so what is zero is not written) and the machine is paused before and after. All vCPUs
    but the first wait to be started by it.

    Args:
        vm: a machine of the model PC.
        kernel: what to boot.
        initrd: its first root file system, packed or not; empty: none.
        command_line: for the kernel and its first process.

    Raises:
        UsageError: it is another machine, or something does not fit; nothing was written.
        VmError: the machine refused the entry state.
    """
    if vm.config.machine is not MachineModel.PC:
        raise UsageError(f"{kernel.name} needs a PC, not a machine {vm.config.machine}", hint="--machine pc")
    placement = Placement(vm.memory)
    for part in kernel.parts:
        placement.put(f"the kernel {kernel.name}", part.gpa, part.data, size_bytes=part.size_bytes)
    placement.put("the GDT", GDT_GPA, flat_gdt(long_mode=True))
    tables = identity_map(PAGE_TABLES_GPA, _MAPPED_GIB, user=False)
    placement.put("the page tables", PAGE_TABLES_GPA, tables)
    placement.put("the command line", COMMAND_LINE_GPA, _command_line(kernel, command_line))
    reachable = range(HIGH_RAM_START, kernel.initrd_max_gpa + 1)
    initrd_gpa = placement.put_high("the initrd", initrd, reachable) if initrd else 0
    boot_params = _boot_params(kernel, vm.memory, initrd_gpa, len(initrd))
    placement.put("boot_params", BOOT_PARAMS_GPA, boot_params)
    placement.write()
    first = long_mode_state(rip=kernel.entry, rsi=BOOT_PARAMS_GPA, cr3=PAGE_TABLES_GPA, gdt_gpa=GDT_GPA)
    others = (waiting_state() for _ in range(1, vm.config.cpus))
    vm.load_state(MachineState(vcpus=(first, *others), devices=vm.save_state().devices))


def e820(memory: GuestMemory) -> Iterator[tuple[int, int, int]]:
    """Yield (gpa, size in bytes, type) of what the kernel may use, and of a PC's reserved range below 1 MiB."""
    yield 0, LOW_RAM_END, E820_RAM
    yield LOW_RAM_END, HIGH_RAM_START - LOW_RAM_END, E820_RESERVED
    for region in memory.regions:
        gpa = max(region.gpa, HIGH_RAM_START)
        yield gpa, region.gpa + region.size_bytes - gpa, E820_RAM


def _command_line(kernel: LinuxKernel, text: str) -> bytes:
    data = text.encode()
    if len(data) > kernel.command_line_max_bytes:
        raise UsageError(
            f"the command line has {len(data)} bytes, the kernel takes {kernel.command_line_max_bytes}",
            hint="shorten --append",
        )
    if b"\0" in data:
        raise UsageError("the command line has a NUL in it")
    return data + b"\0"


def _boot_params(kernel: LinuxKernel, memory: GuestMemory, initrd_gpa: int, initrd_bytes: int) -> bytes:
    params = bytearray(_BOOT_PARAMS_BYTES)
    params[HEADER_AT : HEADER_AT + len(kernel.header)] = kernel.header
    struct.pack_into("<H", params, 0x1FA, _NORMAL_VIDEO)
    params[0x210] = _UNKNOWN_LOADER
    params[0x211] |= _LOADED_HIGH
    struct.pack_into("<II", params, 0x218, initrd_gpa, initrd_bytes)
    struct.pack_into("<I", params, 0x228, COMMAND_LINE_GPA)
    ranges = list(e820(memory))
    params[_E820_COUNT_AT] = len(ranges)
    for number, entry in enumerate(ranges):
        _E820_ENTRY.pack_into(params, _E820_TABLE_AT + number * _E820_ENTRY.size, *entry)
    return bytes(params)
