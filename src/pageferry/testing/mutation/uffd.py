"""Faults of the trackers by the host's page tables: ``uffd/``; the kernel's own steps stay."""

import ctypes
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PAGE_SHIFT, PCI_HOLE_END, PCI_HOLE_START, GfnArray, gfn_of
from pageferry.kvm import KvmVm
from pageferry.testing.mutation.fault import BEHIND_THE_HOLE, Faults, Room, replace
from pageferry.uffd import PagemapScanLog, VcpuView, WriteProtectLog, uapi
from pageferry.uffd.fds import UffdFd
from pageferry.uffd.log import UffdLog
from pageferry.uffd.view import spans_of

fault = Faults(Room.UFFD)
_WP, _SCAN = "uffd-wp", "pagemap-scan"

_libc = ctypes.CDLL(None)  # releases the interpreter lock: the handler may need it while we wait for a page
_libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def store_from_a_vcpu(log: UffdLog, gfn: int, *, change: int = 0) -> None:
    """Store to the first byte of a frame as a vCPU does; ``change`` is added to what is there."""
    hva = log._view.hva(gfn)
    _libc.memset(hva, ctypes.c_uint8.from_address(hva).value + change, 1)


def _log(vm: KvmVm) -> Any:  # noqa: ANN401 (one of two classes, whose private steps are replaced)
    log = vm.log_dirty
    assert isinstance(log, WriteProtectLog | PagemapScanLog)
    return log


@fault(
    "no bug on record: the order that a fault handler invites, as the vCPU waits for the grant",
    law=1,
    found_by=("rounds-are-exact", "clean-protects-again"),
    tracker=_WP,
)
def uffd_granted_before_marked(vm: KvmVm) -> None:
    """The handler makes a page writable, and marks it when the next operator has been by."""
    log = _log(vm)
    late: list[NDArray[np.void]] = []

    def resolve(uffd: UffdFd, faults: NDArray[np.void]) -> None:
        late.append(faults)
        for gfn in log._view.gfns(faults["address"]).tolist():
            uffd.unprotect(log._view.hva(gfn), 1 << PAGE_SHIFT)

    def wrap(sound: Any) -> Any:  # noqa: ANN401
        def operate(*arguments: object) -> object:
            result = sound(*arguments)
            for faults in late:
                log._granted.set(log._view.gfns(faults["address"]))
            late.clear()
            return result

        return operate

    replace(log, "_resolve", lambda _: resolve)
    replace(log, "_take", wrap)


@fault(
    "KVM: the log was protected before the bitmaps were swapped, so that a page was both writable and clean",
    law=1,
    found_by=("rounds-are-exact", "clean-protects-again"),
    tracker=_WP,
)
def uffd_protected_before_taken(vm: KvmVm) -> None:
    """CLEAN protects a span and takes its bits in two steps; a vCPU writes a page of it in between."""
    log = _log(vm)

    def take(part: range, taken: DirtyBitmap) -> None:
        for span in list(spans_of(log._granted, part)):
            where = taken.words_of(span)
            gfns = log._granted.gfns()
            log._uffd.protect(log._view.hva(span.start), len(span) << PAGE_SHIFT)
            store_from_a_vcpu(log, int(gfns[np.searchsorted(gfns, span.start)]))
            taken.words[where] |= log._granted.words[where]
            log._granted.words[where] = 0

    replace(log, "_take", lambda _: take)


@fault(
    "no bug on record: to read the bitmap is not to protect again",
    law=1,
    found_by=("clean-protects-again", "rounds-are-exact"),
    tracker=_WP,
)
def uffd_not_protected_again(vm: KvmVm) -> None:
    """CLEAN takes the bits and leaves the pages writable."""
    log = _log(vm)

    def take(part: range, taken: DirtyBitmap) -> None:
        taken |= log._granted.take(part)

    replace(log, "_take", lambda _: take)


@fault(
    "Linux before 6.4, where asked to be: write protection passed over what had no page table entry",
    law=1,
    found_by=("rounds-are-exact", "stamped-copy"),
    tracker=_WP,
)
def uffd_untouched_not_protected(vm: KvmVm) -> None:
    """ENABLE protects only pages that have storage: the first write to any other goes unseen."""
    log = _log(vm)

    def wrap(sound: Any) -> Any:  # noqa: ANN401
        def begin(uffd: UffdFd) -> None:
            sound(uffd)
            protect = uffd.protect

            def protect_populated(hva: int, size_bytes: int) -> None:
                first = int(log._view.gfns(np.uint64(hva)))
                for start, length in zip(*(runs.tolist() for runs in vm.memory.populated()), strict=True):
                    if first <= start < first + (size_bytes >> PAGE_SHIFT):
                        protect(log._view.hva(start), length << PAGE_SHIFT)

            cast(Any, uffd).protect = protect_populated

        return begin

    replace(log, "_begin", wrap)


class _OneRegion(VcpuView):
    def regions(self) -> Iterator[tuple[int, int]]:
        yield next(super().regions())


@fault(
    "Firecracker: a guest of more than 3 GiB, whose second slot was forgotten",
    law=2,
    found_by=("rounds-are-exact", "stamped-copy"),
    memory_bytes=BEHIND_THE_HOLE,
    tracker=_WP,
)
def uffd_second_region_not_registered(vm: KvmVm) -> None:
    """ENABLE registers and protects the RAM below the PCI hole only."""
    log = _log(vm)
    log._view = _OneRegion(memory=log._view.memory, mapping=log._view.mapping)


@fault(
    "KVM dirty ring: writes with no running vCPU (the save of device state) missed the ring",
    law=4,
    found_by=("host-writes-are-marked", "marked-after-the-write"),
    tracker=_WP,
)
def uffd_only_the_vcpus_bits(vm: KvmVm) -> None:
    """Marks are taken for writes of vCPUs, which have had their fault, and dropped."""
    log = _log(vm)
    replace(log, "mark", lambda _: lambda gfns: None)
    vm.memory.on_write(log.mark)


@fault(
    "Propolis, Firecracker: the dirty bits of a failed attempt were lost",
    law=5,
    found_by=("given-back-bits-return",),
    tracker=_WP,
)
def uffd_bits_not_given_back(vm: KvmVm) -> None:
    """``give_back`` drops the bits of the failed round."""
    log = _log(vm)
    replace(log, "give_back", lambda _: lambda bitmap: log._expect_on())


@fault(
    "no bug on record: one flag between the scan that looks and the scan that protects",
    law=None,
    found_by=("peek-changes-nothing", "pausing-is-no-write"),
    tracker=_SCAN,
)
def pagemap_peek_protects(vm: KvmVm) -> None:
    """PEEK scans with PM_SCAN_WP_MATCHING."""
    log = _log(vm)

    def look() -> DirtyBitmap:
        bitmap = DirtyBitmap(vm.memory.gfn_limit)
        for part in log._view.parts(range(bitmap.nbits)):
            log._scan(part, bitmap, protect=True)
        return bitmap

    replace(log, "_look", lambda _: look)


@fault(
    "no bug on record: a scan ends where its buffer is full, and says so in walk_end",
    law=2,
    found_by=("rounds-are-exact", "stamped-copy"),
    tracker=_SCAN,
)
def pagemap_first_buffer_only(vm: KvmVm) -> None:
    """A scan does not go on where the first full buffer ended; the buffer has room for four regions."""
    pagemap = _log(vm)._pagemap
    pagemap._regions = np.zeros(4, uapi.PAGE_REGION)

    def wrap(sound: Any) -> Any:  # noqa: ANN401
        def written(hva: int, size_bytes: int, *, protect: bool) -> Iterator[NDArray[np.void]]:
            for found in sound(hva, size_bytes, protect=protect):
                yield found
                return

        return written

    replace(pagemap, "written", wrap)


@fault(
    "KVM: dirty state was lost while a page was being synchronised",
    law=2,
    found_by=("stamped-copy",),
    tracker=_SCAN,
)
def pagemap_looked_then_protected(vm: KvmVm) -> None:
    """CLEAN returns what it saw before it protected; a vCPU writes a page in between."""
    log = _log(vm)
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

    replace(log, "_take", lambda _: take)


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
    log = _log(vm)
    log._view = _NoHole(memory=log._view.memory, mapping=log._view.mapping)
