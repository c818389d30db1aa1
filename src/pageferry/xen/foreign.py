"""Foreign memory: a domain's pages, mapped into this process in gfn order.

A mapping holds on to the pages that it was made of: where the domain exchanges a page meanwhile (it gives one back and
gets another at the same gfn), the mapping still shows the old one. So what is sent is proven at the pause against a
mapping that is made then (:mod:`pageferry.xen.missed`).

Source: Linux ``include/uapi/xen/privcmd.h``, IOCTL_PRIVCMD_MMAPBATCH_V2.
"""

from collections.abc import Sequence

import numpy as np

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import VmError, XenError
from pageferry.core.frames import PAGE_SHIFT, GfnArray, Gpa
from pageferry.core.hostmem import HostMapping
from pageferry.core.memory import GuestMemory
from pageferry.core.ram import RamRegion
from pageferry.xen import uapi
from pageferry.xen.domctl import Control

#: How much is mapped by one call: 64 MiB.
_PIECE_PAGES = 1 << 14
#: Between two pieces of RAM a hole of at least so many frames makes two regions; smaller ones are removed frames.
_HOLE_PAGES = 16


class ForeignMemory(GuestMemory):
    """A domain's RAM; its storage is Xen's, and cannot be given back through a mapping."""

    def release(self, ranges: Sequence[tuple[int, int]]) -> bool:
        """Return False: it cannot be done."""
        return False


def map_foreign(control: Control, domid: int, present: DirtyBitmap, *, writable: bool = False) -> GuestMemory:
    """Map the pages of a domain; return them as its RAM.

    Args:
        control: Xen.
        domid: whose.
        present: the frames that have a page, at least one.
        writable: whether this process may write there too; Xen does not log such writes.

    Raises:
        VmError: the kernel refused.
    """
    regions = _regions(present)
    gfn_limit = regions[-1].first_gfn + regions[-1].pages
    mapping = HostMapping(gfn_limit << PAGE_SHIFT)
    gone: list[GfnArray] = []
    for region in regions:
        for first in range(region.first_gfn, region.first_gfn + region.pages, _PIECE_PAGES):
            count = min(_PIECE_PAGES, region.first_gfn + region.pages - first)
            gone.append(_map_piece(control, domid, mapping, first, count, writable=writable))
    missing = np.concatenate(gone)

    def populated() -> tuple[GfnArray, GfnArray]:
        return memory.all_ram().runs()

    memory = ForeignMemory(regions, mapping, populated)
    if missing.size:
        memory.remove(missing)
    return memory


def _regions(present: DirtyBitmap) -> tuple[RamRegion, ...]:
    starts, lengths = present.runs()
    if not starts.size:
        raise VmError("the domain has no memory")
    ends = starts + lengths
    far = np.flatnonzero(starts[1:] - ends[:-1] >= _HOLE_PAGES)
    firsts = np.concatenate((starts[:1], starts[1:][far])).tolist()
    lasts = np.concatenate((ends[:-1][far], ends[-1:])).tolist()
    return tuple(
        RamRegion(gpa=Gpa(first << PAGE_SHIFT), size_bytes=(last - first) << PAGE_SHIFT)
        for first, last in zip(firsts, lasts, strict=True)
    )


def _map_piece(
    control: Control, domid: int, mapping: HostMapping, first: int, count: int, *, writable: bool
) -> GfnArray:
    """Map frames ``first .. first+count-1`` where they belong; return those that have no page (uint64[n])."""
    at = first << PAGE_SHIFT
    mapping.map_device(control.privcmd.fileno(), at, count << PAGE_SHIFT, writable=writable)
    gfns = np.arange(first, first + count, dtype=np.uint64)
    errors = np.zeros(count, np.int32)
    request = uapi.PrivcmdMmapbatchV2(
        num=count,
        dom=domid,
        addr=mapping.hva + at,
        arr=int(gfns.__array_interface__["data"][0]),
        err=int(errors.__array_interface__["data"][0]),
    )
    try:
        # SAFETY: the kernel reads `gfns` and writes `errors` during the call; this frame holds both. The addresses
        # are the reservation's own, where the device was mapped just now.
        control.privcmd.ioctl(uapi.IOCTL_PRIVCMD_MMAPBATCH_V2, request)
    except XenError:
        if not errors.any():
            raise  # else it says that some of the frames have none
    wrong = errors != 0
    if wrong.any():
        for begin, size in zip(
            *(part.tolist() for part in DirtyBitmap.of(count, np.flatnonzero(wrong)).runs()), strict=True
        ):
            mapping.map_private(at + (begin << PAGE_SHIFT), size << PAGE_SHIFT)
    missing: GfnArray = gfns[wrong]
    return missing
