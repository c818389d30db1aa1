"""Identity page tables of 2 MiB pages, as a guest finds them that begins in long mode.

Source: AMD APM volume 2, "Long-mode page translation".
"""

import struct

from pageferry.core.frames import PAGE_SIZE, SIZE_1G, SIZE_2M

_PRESENT_WRITABLE, _USER, _LARGE = 0x03, 0x04, 0x80


def identity_map_bytes(gib: int) -> int:
    """Return the size of the tables that map ``gib`` GiB."""
    return (2 + gib) * PAGE_SIZE


def identity_map(gpa: int, gib: int, *, user: bool) -> bytes:
    """Return tables, to be written at ``gpa``, that map the first ``gib`` GiB of addresses to themselves, writable.

    They are a PML4, a page directory pointer table and a page directory per GiB; CR3 is ``gpa``.

    Args:
        gpa: their place, a page boundary.
        gib: how much they map, 512 at the most.
        user: whether ring 3 may use it.
    """
    flags = _PRESENT_WRITABLE | (_USER if user else 0)
    pdpt, first_pd = gpa + PAGE_SIZE, gpa + 2 * PAGE_SIZE
    pml4 = struct.pack("<Q", pdpt | flags).ljust(PAGE_SIZE, b"\0")
    directories = struct.pack(f"<{gib}Q", *(first_pd + i * PAGE_SIZE | flags for i in range(gib)))
    leaves = struct.pack(f"<{gib * 512}Q", *(at | flags | _LARGE for at in range(0, gib * SIZE_1G, SIZE_2M)))
    return pml4 + directories.ljust(PAGE_SIZE, b"\0") + leaves
