"""Kinds of addresses and frame numbers, and the conversions between them.

A *gfn* is a guest frame number and a *gpa* a guest-physical address; an *mfn* is a machine frame number (only the
software hypervisor has one); a *gva* is a guest-virtual and an *hva* a host-virtual address. The types exist for the
type checker: at run time each is an ``int``.
"""

from typing import NewType

import numpy as np
from numpy.typing import NDArray

from pageferry.core.page_size import PAGE_SHIFT as PAGE_SHIFT
from pageferry.core.page_size import PAGE_SIZE as PAGE_SIZE

Gfn = NewType("Gfn", int)
Mfn = NewType("Mfn", int)
Gpa = NewType("Gpa", int)
Gva = NewType("Gva", int)
Hva = NewType("Hva", int)

PAGES_PER_2M = 512
PAGES_PER_1G = 512 * 512
SIZE_2M = PAGE_SIZE * PAGES_PER_2M
SIZE_1G = PAGE_SIZE * PAGES_PER_1G

#: RAM ends here and continues at ``PCI_HOLE_END``, as on a PC.
PCI_HOLE_START = Gpa(3 << 30)
PCI_HOLE_END = Gpa(4 << 30)

GfnArray = NDArray[np.uint64]
"""uint64[n] of guest frame numbers."""


def gfn_of(gpa: int) -> Gfn:
    """Return the frame that holds guest-physical address ``gpa``."""
    return Gfn(gpa >> PAGE_SHIFT)


def gpa_of(gfn: int) -> Gpa:
    """Return the first address of frame ``gfn``."""
    return Gpa(gfn << PAGE_SHIFT)


def gfns_touched(gpa: int, size_bytes: int) -> GfnArray:
    """Return every frame that the ``size_bytes`` bytes at ``gpa`` lie in, ascending; none when the size is 0."""
    if size_bytes <= 0:
        return np.empty(0, np.uint64)
    return np.arange(gpa >> PAGE_SHIFT, ((gpa + size_bytes - 1) >> PAGE_SHIFT) + 1, dtype=np.uint64)
