"""Kernels made up for tests: files of the right form with nothing to run in them."""

import gzip
import struct

PREFERRED_GPA = 0x100_0000
INIT_SIZE = 0x40_0000


def elf(*segments, bits=64, kind=2, machine=None, entry=PREFERRED_GPA, notes=b""):
    """An ELF file; a segment is (paddr, content, bytes in memory), ``notes`` the content of a note segment."""
    headers, body, at = [], b"", 0x1000
    loads = [(1, *segment) for segment in segments] + ([(4, 0, notes, len(notes))] if notes else [])
    for segment_kind, paddr, content, in_memory in loads:
        vaddr = paddr + (0xFFFF_FFFF_8000_0000 if bits == 64 else 0xC000_0000)
        if bits == 64:
            fields = struct.pack("<IIQQQQQQ", segment_kind, 7, at, vaddr, paddr, len(content), in_memory, 0x1000)
        else:
            vaddr &= 0xFFFF_FFFF
            fields = struct.pack("<8I", segment_kind, at, vaddr, paddr, len(content), in_memory, 7, 0x1000)
        headers.append(fields)
        body += content
        at += len(content)
    ident = b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9)
    machine = machine or (62 if bits == 64 else 3)
    if bits == 64:
        head = struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, entry, 64, 0, 0, 64, 56, len(loads), 64, 0, 0)
    else:
        head = struct.pack("<HHIIIIIHHHHHH", kind, machine, 1, entry, 52, 0, 0, 52, 32, len(loads), 40, 0, 0)
    return (ident + head + b"".join(headers)).ljust(0x1000, b"\0") + body


def note(owner, kind, content):
    """One ELF note."""
    return b"".join(
        (
            struct.pack("<III", len(owner) + 1, len(content), kind),
            (owner + b"\0").ljust((len(owner) + 4) // 4 * 4, b"\0"),
            content.ljust((len(content) + 3) // 4 * 4, b"\0"),
        )
    )


def vmlinux():
    """A kernel proper: code, and data with a page of zeros after it."""
    return elf((PREFERRED_GPA, b"code" * 1024, 0x1000), (PREFERRED_GPA + 0x1000, b"data", 0x2000))


def bzimage(payload=None, *, version=0x20F, flags=1, kernel_bytes=None, payload_at=0x40, initrd_max=0x7FFF_FFFF):
    """A bzImage of one sector of setup, with gzip's ``vmlinux()`` in it unless told otherwise."""
    payload = gzip.compress(vmlinux()) if payload is None else payload
    kernel = bytes(payload_at) + payload
    kernel += bytes(-len(kernel) % 16)
    setup = bytearray(1024)
    setup[0x1F1] = 1
    struct.pack_into("<I", setup, 0x1F4, (kernel_bytes or len(kernel)) // 16)
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    setup[0x200:0x202] = b"\xeb\x6a"
    struct.pack_into("<4sH", setup, 0x202, b"HdrS", version)
    struct.pack_into("<I", setup, 0x22C, initrd_max)
    struct.pack_into("<H", setup, 0x236, flags)
    struct.pack_into("<I", setup, 0x238, 2047)
    struct.pack_into("<II", setup, 0x248, payload_at, len(payload))
    struct.pack_into("<QI", setup, 0x258, PREFERRED_GPA, INIT_SIZE)
    return bytes(setup) + kernel


def with_size(packed, unpacked):
    """A payload that does not end with its unpacked size by itself, as the kernel's build makes it."""
    return packed + struct.pack("<I", len(unpacked))
