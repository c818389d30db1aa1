"""Boots a kernel that asks for it by a PVH note: in 32-bit protected mode, with one structure that tells all.

Source: Xen's ``docs/misc/pvh.pandoc`` and ``xen/include/public/arch-x86/hvm/start_info.h``.
"""

import struct

from pageferry.core.vm import Vm
from pageferry.devices.pc.acpi import RSDP_GPA
from pageferry.guests.elf_file import ElfFile
from pageferry.guests.entry import protected_mode_state
from pageferry.guests.firmware import (
    BOOT_INFO_GPA,
    COMMAND_LINE_GPA,
    GDT_GPA,
    HIGH_RAM_START,
    Kernel,
    command_line_bytes,
    memory_map,
    pc_placement,
    start_first,
)

_NOTE_OWNER, _PHYS32_ENTRY = b"Xen", 18
_MAGIC, _VERSION = 0x336E_C578, 1
_START_INFO = struct.Struct("<IIIIQQQQII")
_MODULE = struct.Struct("<QQQQ")
_MEMORY_RANGE = struct.Struct("<QQII")
_COMMAND_LINE_MAX_BYTES = 4095
_REACHABLE = range(HIGH_RAM_START, 1 << 32)


def find_pvh(elf: ElfFile) -> Kernel | None:
    """Return the kernel in an ELF file, or None if it has no PVH note.

    Raises:
        UsageError: it has one, and is malformed.
    """
    note = elf.note(_NOTE_OWNER, _PHYS32_ENTRY)
    if note is None:
        return None
    return Kernel(name=elf.name, entry=int.from_bytes(note, "little"), parts=elf.physical())


def boot_pvh(vm: Vm, kernel: Kernel, *, initrd: bytes = b"", command_line: str = "") -> None:
    """Load a kernel and the entry state into a PC that has not run yet; the machine is paused before and after.

    Args:
        vm: a machine of the model PC, its memory all zeros.
        kernel: what to boot.
        initrd: becomes its one module; empty: there is none.
        command_line: what it is told.

    Raises:
        UsageError: it is another machine, or something does not fit; nothing was written.
        VmError: the machine refused the entry state.
    """
    placement = pc_placement(vm, kernel.name, kernel.parts, long_mode=False)
    placement.put(
        "the command line", COMMAND_LINE_GPA, command_line_bytes(command_line, max_bytes=_COMMAND_LINE_MAX_BYTES)
    )
    modules = b""
    if initrd:
        modules = _MODULE.pack(placement.put_high("the initrd", initrd, _REACHABLE), len(initrd), 0, 0)
    ranges = [_MEMORY_RANGE.pack(*each, 0) for each in memory_map(vm.memory)]
    modules_gpa = BOOT_INFO_GPA + _START_INFO.size
    ranges_gpa = modules_gpa + len(modules)
    start_info = _START_INFO.pack(
        _MAGIC,
        _VERSION,
        0,
        len(modules) // _MODULE.size,
        modules_gpa if modules else 0,
        COMMAND_LINE_GPA,
        RSDP_GPA,
        ranges_gpa,
        len(ranges),
        0,
    )
    placement.put("the start info", BOOT_INFO_GPA, start_info + modules + b"".join(ranges))
    placement.write()
    start_first(vm, protected_mode_state(rip=kernel.entry, rbx=BOOT_INFO_GPA, gdt_gpa=GDT_GPA))
