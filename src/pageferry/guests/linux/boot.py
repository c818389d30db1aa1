"""Boots a Linux kernel by its 64-bit boot protocol.

The kernel proper lies where it was linked to, from 16 MiB on; the initrd as high as the kernel can reach;
:mod:`pageferry.guests.firmware` draws the rest.

Source: the kernel's ``Documentation/arch/x86/boot.rst`` and ``zero-page.rst``.
"""

import struct

from pageferry.core.memory import GuestMemory
from pageferry.core.vm import Vm
from pageferry.devices.pc.acpi import RSDP_GPA
from pageferry.guests.entry import CODE_SELECTOR, long_mode_state
from pageferry.guests.firmware import (
    BOOT_INFO_GPA,
    COMMAND_LINE_GPA,
    GDT_GPA,
    HIGH_RAM_START,
    PAGE_TABLES_GPA,
    command_line_bytes,
    memory_map,
    pc_placement,
    start_first,
)
from pageferry.guests.linux.image import HEADER_AT, LinuxKernel
from pageferry.guests.page_tables import identity_map

assert CODE_SELECTOR == 0x10, "the protocol's __BOOT_CS"

_MAPPED_GIB = 4
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
    placement = pc_placement(vm, kernel.name, kernel.parts, long_mode=True)
    placement.put("the page tables", PAGE_TABLES_GPA, identity_map(PAGE_TABLES_GPA, _MAPPED_GIB, user=False))
    text = command_line_bytes(command_line, max_bytes=kernel.command_line_max_bytes)
    placement.put("the command line", COMMAND_LINE_GPA, text)
    reachable = range(HIGH_RAM_START, kernel.initrd_max_gpa + 1)
    initrd_gpa = placement.put_high("the initrd", initrd, reachable) if initrd else 0
    placement.put("boot_params", BOOT_INFO_GPA, _boot_params(kernel, vm.memory, initrd_gpa, len(initrd)))
    placement.write()
    start_first(vm, long_mode_state(rip=kernel.entry, rsi=BOOT_INFO_GPA, cr3=PAGE_TABLES_GPA, gdt_gpa=GDT_GPA))


def _boot_params(kernel: LinuxKernel, memory: GuestMemory, initrd_gpa: int, initrd_bytes: int) -> bytes:
    params = bytearray(_BOOT_PARAMS_BYTES)
    params[HEADER_AT : HEADER_AT + len(kernel.header)] = kernel.header
    struct.pack_into("<Q", params, 0x70, RSDP_GPA)
    struct.pack_into("<H", params, 0x1FA, _NORMAL_VIDEO)
    params[0x210] = _UNKNOWN_LOADER
    params[0x211] |= _LOADED_HIGH
    struct.pack_into("<II", params, 0x218, initrd_gpa, initrd_bytes)
    struct.pack_into("<I", params, 0x228, COMMAND_LINE_GPA)
    ranges = list(memory_map(memory))
    params[_E820_COUNT_AT] = len(ranges)
    for number, entry in enumerate(ranges):
        _E820_ENTRY.pack_into(params, _E820_TABLE_AT + number * _E820_ENTRY.size, *entry)
    return bytes(params)
