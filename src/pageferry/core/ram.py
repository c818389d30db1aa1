"""Where RAM lies in a guest's physical address space: from 0 on, and from 4 GiB on what is beyond 3 GiB.

Between the two is the PCI hole, which is not mapped. A file with all of RAM has it at offset gpa, the hole included.
"""

from dataclasses import dataclass

from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE, PCI_HOLE_END, PCI_HOLE_START, Gfn, GfnArray, Gpa

#: Below this nothing fits: the guest ABI keeps the first mebibyte for itself.
MIN_MEMORY_BYTES = 2 << 20
#: The identity map of the guest ABI ends here.
MAX_MEMORY_BYTES = 127 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class RamRegion:
    """RAM at ``[gpa, gpa + size_bytes)``; both are multiples of the page size."""

    gpa: Gpa
    size_bytes: int

    @property
    def first_gfn(self) -> Gfn:
        """The region's first frame."""
        return Gfn(self.gpa >> PAGE_SHIFT)

    @property
    def pages(self) -> int:
        """The region's size in frames."""
        return self.size_bytes >> PAGE_SHIFT


def ram_layout(memory_bytes: int) -> tuple[RamRegion, ...]:
    """Return the regions of a guest with ``memory_bytes`` of RAM.

    Raises:
        UsageError: too small, too large, or not a multiple of the page size.
    """
    if memory_bytes % PAGE_SIZE:
        raise UsageError(f"guest memory must be a multiple of {PAGE_SIZE} bytes, not {memory_bytes}")
    if not MIN_MEMORY_BYTES <= memory_bytes <= MAX_MEMORY_BYTES:
        raise UsageError(
            f"guest memory of {memory_bytes} bytes is not possible",
            hint=f"between {MIN_MEMORY_BYTES >> 20}M and {MAX_MEMORY_BYTES >> 30}G",
        )
    low = RamRegion(gpa=Gpa(0), size_bytes=min(memory_bytes, PCI_HOLE_START))
    if memory_bytes <= PCI_HOLE_START:
        return (low,)
    return (low, RamRegion(gpa=PCI_HOLE_END, size_bytes=memory_bytes - PCI_HOLE_START))


def byte_ranges(starts: GfnArray, lengths: GfnArray) -> tuple[tuple[int, int], ...]:
    """Return runs of frames as ranges ``(gpa, size_bytes)``."""
    return tuple(
        (start << PAGE_SHIFT, length << PAGE_SHIFT)
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
    )


def storage_bytes(memory_bytes: int) -> int:
    """Return the size of a file that has RAM at offset gpa, holes included.

    Raises:
        UsageError: as :func:`ram_layout`.
    """
    last = ram_layout(memory_bytes)[-1]
    return last.gpa + last.size_bytes
