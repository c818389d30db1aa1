"""Faults of the tracker with our own fault handler: uffd/write_protect_log.py; the kernel's own steps stay."""

import ctypes
import os
import threading
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from altered import alter
from numpy.typing import NDArray

from mutation.fault import BEHIND_THE_HOLE, Faults, Room
from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import PAGE_SHIFT
from pageferry.kvm.vm import KvmVm
from pageferry.uffd.fds import UffdFd
from pageferry.uffd.log import UffdLog
from pageferry.uffd.pagemap_log import PagemapScanLog
from pageferry.uffd.view import VcpuView, spans_of
from pageferry.uffd.write_protect_log import WriteProtectLog

fault = Faults(Room.UFFD)
_WP = "uffd-wp"

_libc = ctypes.CDLL(None)  # releases the interpreter lock: the handler may need it while we wait for a page
_libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def store_from_a_vcpu(log: UffdLog, gfn: int, *, change: int = 0) -> None:
    """Store to the first byte of a frame as a vCPU does; ``change`` is added to what is there."""
    hva = log._view.hva(gfn)
    _libc.memset(hva, ctypes.c_uint8.from_address(hva).value + change, 1)


def store_beside_the_first_fault(vm: KvmVm) -> None:
    """While the first fault is being resolved, let two more vCPUs write a page each: they are read as one batch.

    The next CLEAN waits until they have written.
    """
    log = log_of(vm)
    pages = (vm.memory.gfn_limit - 1, vm.memory.gfn_limit - 3)  # of the working set, in every guest of the kit
    vcpus = [threading.Thread(target=store_from_a_vcpu, args=(log, gfn), kwargs={"change": 1}) for gfn in pages]

    def wrap_resolve(sound: Any) -> Any:
        def resolve(uffd: UffdFd, faults: NDArray[np.void]) -> None:
            if vcpus[0].ident is None:
                for vcpu in vcpus:
                    vcpu.start()
                while _waiting(uffd) < len(faults) + len(vcpus):
                    os.sched_yield()
            sound(uffd, faults)

        return resolve

    def wrap_take(sound: Any) -> Any:
        def take(part: range, taken: DirtyBitmap) -> None:
            for vcpu in vcpus:
                if vcpu.ident is not None:
                    vcpu.join()
            sound(part, taken)

        return take

    alter(log, "_resolve", wrap_resolve)
    alter(log, "_take", wrap_take)


def _waiting(uffd: UffdFd) -> int:
    """Return how many faults wait to be resolved, read or not."""
    with open(f"/proc/self/fdinfo/{uffd.fileno()}", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["total"])


def log_of(vm: KvmVm) -> Any:
    """Return the machine's tracker, one by the host's page tables."""
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
    log = log_of(vm)
    late: list[NDArray[np.void]] = []

    def resolve(uffd: UffdFd, faults: NDArray[np.void]) -> None:
        late.append(faults)
        for gfn in log._view.gfns(faults["address"]).tolist():
            uffd.unprotect(log._view.hva(gfn), 1 << PAGE_SHIFT)

    def wrap(sound: Any) -> Any:
        def operate(*arguments: object) -> object:
            result = sound(*arguments)
            for faults in late:
                log._granted.set(log._view.gfns(faults["address"]))
            late.clear()
            return result

        return operate

    alter(log, "_resolve", lambda _: resolve)
    alter(log, "_take", wrap)


@fault(
    "KVM: the log was protected before the bitmaps were swapped, so that a page was both writable and clean",
    law=1,
    found_by=("rounds-are-exact", "clean-protects-again"),
    tracker=_WP,
)
def uffd_protected_before_taken(vm: KvmVm) -> None:
    """CLEAN protects a span and takes its bits in two steps; a vCPU writes a page of it in between."""
    log = log_of(vm)

    def take(part: range, taken: DirtyBitmap) -> None:
        for span in list(spans_of(log._granted, part)):
            where = taken.words_of(span)
            gfns = log._granted.gfns()
            log._uffd.protect(log._view.hva(span.start), len(span) << PAGE_SHIFT)
            store_from_a_vcpu(log, int(gfns[np.searchsorted(gfns, span.start)]))
            taken.words[where] |= log._granted.words[where]
            log._granted.words[where] = 0

    alter(log, "_take", lambda _: take)


@fault(
    "no bug on record: what becomes of a handler of one message when it reads many",
    law=1,
    found_by=("stamped-copy",),
    tracker=_WP,
)
def uffd_first_of_a_batch_marked(vm: KvmVm) -> None:
    """Of the faults that are read together only the first is marked; all are granted."""
    log = log_of(vm)

    def wrap(sound: Any) -> Any:
        def resolve(uffd: UffdFd, faults: NDArray[np.void]) -> None:
            sound(uffd, faults[:1])
            for gfn in log._view.gfns(faults["address"][1:]).tolist():
                uffd.unprotect(log._view.hva(gfn), 1 << PAGE_SHIFT)

        return resolve

    alter(log, "_resolve", wrap)
    store_beside_the_first_fault(vm)


@fault(
    "no bug on record: to read the bitmap is not to protect again",
    law=1,
    found_by=("clean-protects-again", "rounds-are-exact"),
    tracker=_WP,
)
def uffd_not_protected_again(vm: KvmVm) -> None:
    """CLEAN takes the bits and leaves the pages writable."""
    log = log_of(vm)

    def take(part: range, taken: DirtyBitmap) -> None:
        taken |= log._granted.take(part)

    alter(log, "_take", lambda _: take)


@fault(
    "no bug on record: what a range that begins elsewhere invites",
    law=1,
    found_by=("range-leaves-the-others", "stamped-copy-by-range"),
    tracker=_WP,
)
def uffd_range_protected_from_the_start_of_ram(vm: KvmVm) -> None:
    """CLEAN of a range protects as many pages, from the first of RAM on, and takes the bits of the range."""
    log = log_of(vm)

    def take(part: range, taken: DirtyBitmap) -> None:
        for region in log._view.parts(range(len(part))):
            log._uffd.protect(log._view.hva(region.start), len(region) << PAGE_SHIFT)
        taken |= log._granted.take(part)

    alter(log, "_take", lambda _: take)


@fault(
    "Linux before 6.4, where asked to be: write protection passed over what had no page table entry",
    law=1,
    found_by=("rounds-are-exact", "stamped-copy"),
    tracker=_WP,
)
def uffd_untouched_not_protected(vm: KvmVm) -> None:
    """ENABLE protects only pages that have storage: the first write to any other goes unseen."""
    log = log_of(vm)

    def wrap(sound: Any) -> Any:
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

    alter(log, "_begin", wrap)


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
    log = log_of(vm)
    log._view = _OneRegion(memory=log._view.memory, mapping=log._view.mapping)


@fault(
    "KVM dirty ring: writes with no running vCPU (the save of device state) missed the ring",
    law=4,
    found_by=("host-writes-are-marked", "marked-after-the-write"),
    tracker=_WP,
)
def uffd_only_the_vcpus_bits(vm: KvmVm) -> None:
    """Marks are taken for writes of vCPUs, which have had their fault, and dropped."""
    log = log_of(vm)
    alter(log, "mark", lambda _: lambda gfns: None)
    vm.memory.on_write(log.mark)
