"""A Linux kernel's file: a bzImage or a vmlinux becomes a :class:`LinuxKernel`, or one clear :class:`UsageError`.

A bzImage's payload is unpacked here, so that the guest begins in the kernel proper. Where that cannot be done (it is
packed by LZ4 or zstd, and the ``compress`` extra is not installed) the guest begins in the part that unpacks it.

Source: the kernel's ``Documentation/arch/x86/boot.rst``, "The real-mode kernel header" and "64-bit boot protocol".
"""

import struct
from dataclasses import dataclass
from os import PathLike

from pageferry.core.errors import UsageError
from pageferry.guests.elf_file import EM_X86_64, ET_EXEC, MAGIC, read_elf
from pageferry.guests.files import MAX_FILE_BYTES, read_file
from pageferry.guests.linux.payload import PayloadError, unpack
from pageferry.guests.placement import LoadedPart

#: Where the setup header lies, in the file and in ``boot_params``.
HEADER_AT = 0x1F1
_HEADER_MAGIC, _MAGIC_AT = b"HdrS", 0x202
_BOOT_FLAG, _BOOT_FLAG_AT = 0xAA55, 0x1FE
_FIRST_SECTORS_BYTES = 0x268
_SECTOR_BYTES, _PARAGRAPH_BYTES = 512, 16
#: The first version that says whether there is a 64-bit entry: Linux 3.8.
_VERSION_NEEDED = 0x20C
_HAS_64_BIT_ENTRY = 1 << 0
_64_BIT_ENTRY = 0x200
_AGAIN = "copy the file again"
_INITRD_MAX_GPA, _COMMAND_LINE_MAX_BYTES = 0x7FFF_FFFF, 2047
#: The header of a kernel that came without one: as much of it as the kernel proper reads.
_VMLINUX_VERSION = 0x20F
_VMLINUX_HEADER_BYTES = 0x26C - HEADER_AT


@dataclass(frozen=True, slots=True, kw_only=True)
class LinuxKernel:
    """A kernel, ready to be put into memory.

    ``entry`` is its 64-bit entry point. ``header`` is its setup header, from ``HEADER_AT`` on. An initrd may not reach
    beyond ``initrd_max_gpa``; ``command_line_max_bytes`` does not count the NUL at the end. ``unpacks_itself``: what is
    entered is the part of a bzImage that unpacks the kernel proper.
    """

    name: str
    entry: int
    parts: tuple[LoadedPart, ...]
    header: bytes
    initrd_max_gpa: int
    command_line_max_bytes: int
    unpacks_itself: bool = False


def load_kernel(path: str | PathLike[str]) -> LinuxKernel:
    """Read a kernel's file.

    Raises:
        UsageError: it cannot be read, or is not a kernel that a 64-bit guest can run.
    """
    return parse_kernel(read_file(path), name=str(path))


def parse_kernel(data: bytes, *, name: str) -> LinuxKernel:
    """Make a kernel from the bytes of its file.

    Args:
        data: the whole file.
        name: how messages and the kernel call it.

    Raises:
        UsageError: it is not a kernel that a 64-bit guest can run.
    """
    if data[:4] == MAGIC:
        entry, parts = _vmlinux(data, name)
        return LinuxKernel(
            name=name,
            entry=entry,
            parts=parts,
            header=_made_header(),
            initrd_max_gpa=_INITRD_MAX_GPA,
            command_line_max_bytes=_COMMAND_LINE_MAX_BYTES,
        )
    if is_bzimage(data):
        return _bzimage(data, name)
    raise UsageError(
        f"{name} is not a Linux kernel", hint="give a bzImage, as /boot/vmlinuz of a distribution, or a vmlinux"
    )


def is_bzimage(data: bytes) -> bool:
    """Tell whether a file says that it is one."""
    return data[_MAGIC_AT : _MAGIC_AT + 4] == _HEADER_MAGIC and _u16(data, _BOOT_FLAG_AT) == _BOOT_FLAG


def _bzimage(data: bytes, name: str) -> LinuxKernel:
    if len(data) < _FIRST_SECTORS_BYTES:
        raise UsageError(f"{name} is truncated: it ends inside the setup header", hint=_AGAIN)
    version = _u16(data, 0x206)
    if version < _VERSION_NEEDED:
        raise UsageError(
            f"{name} is too old: it speaks boot protocol {version >> 8}.{version & 0xFF:02}",
            hint="a kernel from Linux 3.8 on speaks 2.12",
        )
    if not _u16(data, 0x236) & _HAS_64_BIT_ENTRY:
        raise UsageError(f"{name} is a 32-bit kernel", hint="a guest here needs a 64-bit one (amd64)")
    setup_end = ((data[HEADER_AT] or 4) + 1) * _SECTOR_BYTES
    kernel_end = setup_end + _PARAGRAPH_BYTES * _u32(data, 0x1F4)
    if kernel_end >= len(data) + _PARAGRAPH_BYTES:  # the last paragraph need not be whole
        raise UsageError(
            f"{name} is truncated: it has {len(data):,} bytes, its header says {kernel_end:,}", hint=_AGAIN
        )
    header = data[HEADER_AT : _MAGIC_AT + data[0x201]]
    kernel = memoryview(data)[setup_end:kernel_end]
    payload_at, payload_bytes = _u32(data, 0x248), _u32(data, 0x24C)
    if payload_at + payload_bytes > len(kernel):
        raise UsageError(f"{name} is damaged: its payload reaches beyond its end", hint=_AGAIN)
    try:
        unpacked = unpack(kernel[payload_at : payload_at + payload_bytes], limit_bytes=MAX_FILE_BYTES)
    except PayloadError as error:
        raise UsageError(f"{name} is damaged: {error}", hint=_AGAIN) from error
    if unpacked is not None:
        entry, parts = _vmlinux(unpacked, name)
    else:
        preferred = LoadedPart(gpa=_u64(data, 0x258), data=kernel, size_bytes=_u32(data, 0x260))
        entry, parts = preferred.gpa + _64_BIT_ENTRY, (preferred,)
    return LinuxKernel(
        name=name,
        entry=entry,
        parts=parts,
        header=header,
        initrd_max_gpa=_u32(data, 0x22C),
        command_line_max_bytes=_u32(data, 0x238),
        unpacks_itself=unpacked is None,
    )


def _vmlinux(data: bytes | memoryview, name: str) -> tuple[int, tuple[LoadedPart, ...]]:
    # The 64-bit entry point, and what is loaded. A kernel has its physical addresses in its program headers.
    elf = read_elf(data, name=name)
    if elf.bits != 64 or elf.machine != EM_X86_64:
        raise UsageError(
            f"{name} is not a kernel for x86-64 ({elf.bits} bits, machine {elf.machine})",
            hint="a guest here needs a 64-bit one (amd64)",
        )
    parts = elf.physical()
    if elf.kind != ET_EXEC or not any(part.gpa <= elf.entry < part.gpa + part.size_bytes for part in parts):
        raise UsageError(
            f"{name} is not a Linux kernel: it has no physical entry point",
            hint="another kind of kernel is given as it is: pageferry run FILE",
        )
    return elf.entry, parts


def _made_header() -> bytes:
    header = bytearray(_VMLINUX_HEADER_BYTES)
    struct.pack_into("<H", header, _BOOT_FLAG_AT - HEADER_AT, _BOOT_FLAG)
    struct.pack_into("<4sH", header, _MAGIC_AT - HEADER_AT, _HEADER_MAGIC, _VMLINUX_VERSION)
    return bytes(header)


def _u16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "little")


def _u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def _u64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")
