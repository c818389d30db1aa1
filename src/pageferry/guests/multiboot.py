"""Boots a file with a multiboot header (version 1), in 32-bit protected mode, as kvm-unit-tests and many others are.

A file that is given no module gets one that tells it about the machine, in lines as kvm-unit-tests read them.

Source: the Multiboot Specification, version 0.6.96.
"""

import struct

from pageferry.core.errors import UsageError
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import Vm, VmConfig
from pageferry.guests.elf_file import MAGIC as ELF_MAGIC
from pageferry.guests.elf_file import read_elf
from pageferry.guests.entry import protected_mode_state
from pageferry.guests.firmware import (
    BOOT_INFO_GPA,
    COMMAND_LINE_GPA,
    GDT_GPA,
    HIGH_RAM_START,
    LOW_RAM_END,
    Kernel,
    command_line_bytes,
    memory_map,
    pc_placement,
    start_first,
)
from pageferry.guests.placement import LoadedPart

_SEARCHED_BYTES = 8192
_HEADER_MAGIC, _LOADER_MAGIC = 0x1BAD_B002, 0x2BAD_B002
_HEADER = struct.Struct("<III")
_ADDRESSES = struct.Struct("<IIIII")
_U32_MAX = 0xFFFF_FFFF
#: What a file may insist on: that modules lie on page boundaries, that it is told of memory. More is refused.
_REQUIRED, _PAGE_ALIGNED, _MEMORY_INFO = 0xFFFF, 1 << 0, 1 << 1
_HAS_ADDRESSES = 1 << 16

_HAS_MEMORY, _HAS_COMMAND_LINE, _HAS_MODULES, _HAS_MAP = 1 << 0, 1 << 2, 1 << 3, 1 << 6
#: flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms, mmap_length, mmap_addr
_INFO = struct.Struct("<7I16x2I")
_INFO_BYTES = 120
_MODULE = struct.Struct("<IIII")
_MAP_ENTRY = struct.Struct("<IQQI")
_COMMAND_LINE_MAX_BYTES = 4095
_REACHABLE = range(HIGH_RAM_START, 1 << 32)


def find_multiboot(data: bytes, *, name: str) -> Kernel | None:
    """Return the kernel in a file, or None if it has no multiboot header.

    Args:
        data: the whole file.
        name: how messages call it.

    Raises:
        UsageError: it has one, and is malformed or wants what there is not.
    """
    for at in range(0, min(len(data), _SEARCHED_BYTES) - _HEADER.size + 1, 4):
        magic, flags, checksum = _HEADER.unpack_from(data, at)
        if magic == _HEADER_MAGIC and (magic + flags + checksum) & _U32_MAX == 0:
            break
    else:
        return None
    if unknown := flags & _REQUIRED & ~(_PAGE_ALIGNED | _MEMORY_INFO):
        raise UsageError(
            f"{name} wants of its multiboot loader what there is not (flags {unknown:#x}; 0x4 is a video mode)",
            hint="a guest here has a serial console only",
        )
    if flags & _HAS_ADDRESSES:
        entry, parts = _by_addresses(data, at, name)
    elif data[:4] == ELF_MAGIC:
        elf = read_elf(data, name=name)
        entry, parts = elf.entry, elf.physical()
    else:
        what = f"{name} has a multiboot header without addresses, and is not an ELF file"
        raise UsageError(what, hint="link it again")
    return Kernel(name=name, entry=entry, parts=parts)


def _by_addresses(data: bytes, header_at: int, name: str) -> tuple[int, tuple[LoadedPart, ...]]:
    # The header itself says where the file goes: its own address tells which byte of the file is the first one.
    if header_at + _HEADER.size + _ADDRESSES.size > len(data):
        raise UsageError(f"{name} is truncated: it ends inside its multiboot header", hint="copy the file again")
    header_gpa, load_gpa, load_end_gpa, bss_end_gpa, entry = _ADDRESSES.unpack_from(data, header_at + _HEADER.size)
    first = header_at - (header_gpa - load_gpa)
    end = first + (load_end_gpa - load_gpa) if load_end_gpa else len(data)
    if not 0 <= first <= header_at or not first < end <= len(data):
        raise UsageError(f"{name} has a multiboot header with addresses outside the file", hint="link it again")
    size_bytes = max(end - first, bss_end_gpa - load_gpa)
    return entry, (LoadedPart(gpa=load_gpa, data=data[first:end], size_bytes=size_bytes),)


def boot_multiboot(vm: Vm, kernel: Kernel, *, initrd: bytes = b"", command_line: str = "") -> None:
    """Load a kernel and the entry state into a PC that has not run yet; the machine is paused before and after.

    Args:
        vm: a machine of the model PC, its memory all zeros.
        kernel: what to boot.
        initrd: becomes its one module; empty: lines that tell about the machine.
        command_line: what it is told after the file's name.

    Raises:
        UsageError: it is another machine, or something does not fit; nothing was written.
        VmError: the machine refused the entry state.
    """
    placement = pc_placement(vm, kernel.name, kernel.parts, long_mode=False)
    text = command_line_bytes(f"{kernel.name} {command_line}".rstrip(), max_bytes=_COMMAND_LINE_MAX_BYTES)
    placement.put("the command line", COMMAND_LINE_GPA, text)
    content = initrd or _environment(vm.config)
    module_gpa = placement.put_high("the module", content, _REACHABLE)
    placement.put("the boot information", BOOT_INFO_GPA, _boot_info(vm.memory, module_gpa, len(content)))
    placement.write()
    start_first(vm, protected_mode_state(rip=kernel.entry, rax=_LOADER_MAGIC, rbx=BOOT_INFO_GPA, gdt_gpa=GDT_GPA))


def _environment(config: VmConfig) -> bytes:
    lines = (f"NR_CPUS={config.cpus}", f"MEMSIZE={config.memory_bytes >> 20}", "TEST_DEVICE=0")
    return "".join(f"{line}\n" for line in lines).encode()


def _boot_info(memory: GuestMemory, module_gpa: int, module_bytes: int) -> bytes:
    module_at = BOOT_INFO_GPA + _INFO_BYTES
    # An entry's size does not count the field that has it.
    ranges = b"".join(_MAP_ENTRY.pack(_MAP_ENTRY.size - 4, *each) for each in memory_map(memory))
    info = _INFO.pack(
        _HAS_MEMORY | _HAS_COMMAND_LINE | _HAS_MODULES | _HAS_MAP,
        LOW_RAM_END >> 10,
        (memory.regions[0].size_bytes - HIGH_RAM_START) >> 10,
        0,
        COMMAND_LINE_GPA,
        1,
        module_at,
        len(ranges),
        module_at + _MODULE.size,
    )
    module = _MODULE.pack(module_gpa, module_gpa + module_bytes, COMMAND_LINE_GPA, 0)
    return info.ljust(_INFO_BYTES, b"\0") + module + ranges
