"""Kernels of other kinds than Linux: they find what their boot protocol promises, and say so by their exit code."""

import struct

import pytest
from kernels import elf, note

PVH_GPA, MULTIBOOT_GPA = 0x20_0000, 0x40_0000
PASSED, FAILED = 42, 1


def checks(*code):
    """Code that ends with PASSED, or with FAILED as soon as a comparison in it fails.

    A part is 32-bit code whose last instruction compares; after each comes a jump (JNE) to the end for failures.
    """
    passed = bytes([0xB0, PASSED, 0xE6, 0xF4, 0xF4])  # mov al, PASSED; out 0xf4, al; hlt
    failed = bytes([0xB0, FAILED, 0xE6, 0xF4, 0xF4])
    body = b""
    for part in reversed([bytes.fromhex(part) for part in code]):
        body = part + b"\x0f\x85" + struct.pack("<i", len(body) + len(passed)) + body
    return body + passed + failed


#: Its registers, paging, the start info's magic and version, the root pointer of ACPI, the command line.
PVH = checks(
    "0f20c0 25 01000080 83f8 01",  # mov eax, cr0; and eax, PG|PE; cmp eax, PE
    "813b 78c56e33",  # cmp dword [ebx], magic
    "837b04 01",  # cmp dword [ebx + 4], 1
    "8b4320 8138 52534420",  # mov eax, [ebx + 32]; cmp dword [eax], "RSD "
    "8b4318 8138 68656c6c",  # mov eax, [ebx + 24]; cmp dword [eax], "hell"
)
#: The loader's magic, paging, upper memory, one module that tells of the CPUs.
MULTIBOOT = checks(
    "3d 02b0ad2b",  # cmp eax, magic
    "0f20c0 25 01000080 83f8 01",
    "817b08 003c0000",  # cmp dword [ebx + 8], 15 MiB in KiB
    "837b14 01",  # cmp dword [ebx + 20], 1
    "8b4318 8b00 8138 4e525f43",  # mov eax, [ebx + 24]; mov eax, [eax]; cmp dword [eax], "NR_C"
)
_MULTIBOOT_HEADER = struct.pack("<III", 0x1BADB002, 3, -(0x1BADB002 + 3) & 0xFFFFFFFF)
KERNELS = {
    "pvh": elf((PVH_GPA, PVH, 4096), bits=32, entry=PVH_GPA, notes=note(b"Xen", 18, struct.pack("<I", PVH_GPA))),
    "multiboot": elf((MULTIBOOT_GPA, _MULTIBOOT_HEADER + MULTIBOOT, 4096), bits=32, entry=MULTIBOOT_GPA + 12),
}


@pytest.mark.parametrize("kind", KERNELS)
def test_a_kernel_finds_what_it_is_promised(here, tmp_path, accel, kind):
    file = tmp_path / kind
    file.write_bytes(KERNELS[kind])
    result = here("run", file, "--memory", "16M", "--append", "hello", "--accel", accel)
    assert result.returncode == PASSED, result.stderr
