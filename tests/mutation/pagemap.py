"""Faults of the tracker that reads the host's page tables: uffd/pagemap_log.py; the kernel's own steps stay."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from altered import alter
from numpy.typing import NDArray

from mutation.fault import BEHIND_THE_HOLE, Faults, Room
from mutation.uffd import log_of, store_from_a_vcpu
from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PCI_HOLE_END, PCI_HOLE_START, GfnArray, gfn_of
from pageferry.core.pagemap import PAGE_REGION
from pageferry.kvm.vm import KvmVm
from pageferry.uffd.view import VcpuView, spans_of

fault = Faults(Room.UFFD)
_SCAN = "pagemap-scan"


@fault(
    "no bug on record: one flag between the scan that looks and the scan that protects",
    law=None,
    found_by=("peek-changes-nothing", "pausing-is-no-write"),
    tracker=_SCAN,
)
def pagemap_peek_protects(vm: KvmVm) -> None:
    """PEEK scans with PM_SCAN_WP_MATCHING."""
    log = log_of(vm)

    def look() -> DirtyBitmap:
        bitmap = DirtyBitmap(vm.memory.gfn_limit)
        for part in log._view.parts(range(bitmap.nbits)):
            log._scan(part, bitmap, protect=True)
        return bitmap

    alter(log, "_look", lambda _: look)


@fault(
    "no bug on record: a scan ends where its buffer is full, and says so in walk_end",
    law=2,
    found_by=("rounds-are-exact", "stamped-copy"),
    tracker=_SCAN,
)
def pagemap_first_buffer_only(vm: KvmVm) -> None:
    """A scan does not go on where the first full buffer ended; the buffer has room for four regions."""
    pagemap = log_of(vm)._pagemap
    pagemap._regions = np.zeros(4, PAGE_REGION)

    def wrap(sound: Any) -> Any:
        def written(hva: int, size_bytes: int, *, protect: bool) -> Iterator[NDArray[np.void]]:
            for found in sound(hva, size_bytes, protect=protect):
                yield found
                return

        return written

    alter(pagemap, "written", wrap)


@fault(
    "KVM: dirty state was lost while a page was being synchronised",
    law=2,
    found_by=("stamped-copy",),
    tracker=_SCAN,
)
def pagemap_looked_then_protected(vm: KvmVm) -> None:
    """CLEAN returns what it saw before it protected; a vCPU writes a page in between."""
    log = log_of(vm)
    ours = vm.memory.gfn_limit - 64  # of the working set, in every guest of the kit

    def take(part: range, taken: DirtyBitmap) -> None:
        seen = DirtyBitmap(taken.nbits)
        log._scan(part, seen, protect=False)
        for span in list(spans_of(seen, part)):
            unseen = [gfn for gfn in span if gfn >= ours and not seen.test(gfn)]
            if unseen:
                store_from_a_vcpu(log, unseen[0], change=1)
            log._scan(span, DirtyBitmap(taken.nbits), protect=True)
        taken |= seen

    alter(log, "_take", lambda _: take)


@fault(
    "QEMU: cleared bits that it had not read",
    law=2,
    found_by=("range-returns-its-own", "range-leaves-the-others", "stamped-copy-by-range"),
    tracker=_SCAN,
)
def pagemap_range_protects_all(vm: KvmVm) -> None:
    """CLEAN of a range protects every page of the region, and reports those of the range."""
    log = log_of(vm)

    def take(part: range, taken: DirtyBitmap) -> None:
        found = DirtyBitmap(taken.nbits)
        for region in log._view.parts(range(taken.nbits)):
            log._scan(region, found, protect=True)
        taken |= found.take(part)

    alter(log, "_take", lambda _: take)


class _NoHole(VcpuView):
    def gfns(self, hvas: GfnArray) -> GfnArray:
        gfns = super().gfns(hvas)
        above = (gfns >= np.uint64(gfn_of(PCI_HOLE_END))).astype(np.uint64)
        return gfns - above * np.uint64(gfn_of(PCI_HOLE_END) - gfn_of(PCI_HOLE_START))


@fault(
    "Firecracker: in a guest of more than 3 GiB the pages of the second slot were at wrong offsets",
    law=2,
    found_by=("rounds-are-exact", "stamped-copy"),
    memory_bytes=BEHIND_THE_HOLE,
    tracker=_SCAN,
)
def pagemap_addresses_of_the_wrong_slot(vm: KvmVm) -> None:
    """Addresses behind the PCI hole are turned into frames as if there were none."""
    log = log_of(vm)
    log._view = _NoHole(memory=log._view.memory, mapping=log._view.mapping)
