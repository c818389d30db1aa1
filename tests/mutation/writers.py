"""Faults of the writers that are not a guest's own stores: devices, the VMM, the page walker, the balloon driver."""

from collections.abc import Callable
from typing import Any

from altered import alter

from mutation.fault import Faults, Room
from pageferry.core.frames import GfnArray, gfns_touched
from pageferry.core.memory import GuestMemory
from pageferry.hypervisor.domain import Domain

fault = Faults(Room.HYPERVISOR)


def _same_memory(memory: GuestMemory) -> GuestMemory:
    """Return another view of the same RAM, which marks nothing."""
    return GuestMemory(memory.regions, memory.mapping, memory.populated)


@fault(
    "Cloud Hypervisor: what the VMM itself wrote was not tracked",
    law=4,
    found_by=("host-writes-are-marked", "marked-after-the-write"),
)
def vmm_writes_untracked(domain: Domain) -> None:
    """Guest memory written from outside is not marked."""
    alter(domain.memory, "on_write", lambda sound: lambda mark: sound(None))
    domain.memory.on_write(None)


@fault(
    "Cloud Hypervisor: writes of virtio devices were not tracked, device DMA was invisible",
    law=4,
    found_by=("free-running-dma", "device-marks-after-the-write", "marks-are-seen-at-once"),
)
def dma_not_marked(domain: Domain) -> None:
    """The DMA engine writes to memory and marks nothing."""
    domain.platform.dma._memory = _same_memory(domain.memory)


@fault(
    "no bug on record: the order of a write and its mark, which only a CLEAN between the two can see",
    law=4,
    found_by=("marked-after-the-write", "device-marks-after-the-write"),
)
def mark_before_write(domain: Domain) -> None:
    """Guest memory is marked first and written then."""
    memory, unmarked = domain.memory, _same_memory(domain.memory)

    def write(gpa: int, data: bytes) -> None:
        memory._check(gpa, len(data))
        memory.wrote(gfns_touched(gpa, len(data)))
        unmarked.write(gpa, data)

    alter(memory, "write", lambda _: write)


@fault(
    "no bug on record: the same in one device, which has its own way to memory",
    law=4,
    found_by=("device-marks-after-the-write",),
)
def dma_marks_first(domain: Domain) -> None:
    """The DMA engine marks its target before a transfer, not after."""
    memory, unmarked = domain.memory, _same_memory(domain.memory)
    device = domain.platform.dma
    device._memory = unmarked

    def wrap(sound: Any) -> Any:
        def perform(command: int) -> None:
            target, length = device._get(0x08), device._get(0x10)
            if unmarked.is_ram(target, length):
                memory.wrote(gfns_touched(target, length))
            sound(command)
            if flag := device._get(0x18):
                memory.wrote(gfns_touched(flag, 8))

        return perform

    alter(device, "_perform", wrap)


@fault(
    "Cloud Hypervisor: the last log of a vhost-user device was lost",
    law=4,
    found_by=("marks-are-seen-at-once",),
)
def last_device_log_lost(domain: Domain) -> None:
    """Devices keep a log of their own, which CLEAN collects; the final round's PEEK does not."""
    paging = domain.paging
    mark, logs = paging.mark, list[GfnArray]()

    def collect(sound: Any) -> Any:
        def clean_range(gfns: range) -> Any:
            while logs:
                mark(logs.pop())
            return sound(gfns)

        return clean_range

    def log(gfns: GfnArray) -> None:
        if paging.enabled:
            logs.append(gfns)

    alter(paging, "clean_range", collect)
    domain.memory.on_write(log)


@fault(
    "KVM dirty ring: writes with no running vCPU (the save of device state) missed the ring",
    law=4,
    found_by=("host-writes-are-marked", "marks-and-writes-mix"),
)
def marks_need_a_vcpu(domain: Domain) -> None:
    """A mark counts only while the guest runs."""
    paging = domain.paging

    def wrap(sound: Any) -> Any:
        def mark(gfns: GfnArray) -> None:
            if not domain.run_control.held:
                sound(gfns)

        return mark

    alter(paging, "mark", wrap)
    domain.memory.on_write(paging.mark)


@fault(
    "no bug on record: what a buffer across a page boundary invites",
    law=4,
    found_by=("host-writes-are-marked", "marked-after-the-write"),
)
def first_page_marked(domain: Domain) -> None:
    """A write over two pages marks the first."""

    def wrap(sound: Any) -> Any:
        def on_write(mark: Callable[[GfnArray], None]) -> None:
            sound(lambda gfns: mark(gfns[:1]))

        return on_write

    alter(domain.memory, "on_write", wrap)
    domain.memory.on_write(domain.paging.mark)


@fault(
    "no bug on record: accessed and dirty bits are written by the page walk, not by a store of the guest's",
    law=4,
    found_by=("stamped-copy",),
)
def walker_writes_unmarked(domain: Domain) -> None:
    """Page tables that the walker updates are neither checked for permission nor marked."""

    def access(gfn: int) -> int:
        return domain.p2m.lookup(gfn)[0]

    for vcpu in domain.vcpus:
        alter(vcpu._walker, "nested_access", lambda _: access)


@fault(
    "Propolis: pages were missing from the bitmap when it was opened",
    law=3,
    found_by=("stamped-copy", "free-running-idle"),
)
def populated_misses_pages(domain: Domain) -> None:
    """The first round does not learn of the first stretch of memory that has storage."""

    def wrap(sound: Any) -> Any:
        def populated() -> tuple[GfnArray, GfnArray]:
            starts, lengths = sound()
            return starts[1:], lengths[1:]

        return populated

    alter(domain.memory, "_populated", wrap)


@fault(
    "Xen: pages added to the P2M during migration were never marked",
    law=4,
    found_by=("added-pages-are-dirty",),
    needs="pageferry.hypervisor.physmap",
)
def added_pages_unmarked(domain: Domain) -> None:
    """A page that the balloon driver gets back while log-dirty is on is protected as all RAM is, and not marked."""
    paging = domain.paging
    physmap: Any = domain.physmap  # type: ignore[attr-defined,unused-ignore]

    def wrap(sound: Any) -> Any:
        def populate(gfns: Any) -> None:
            mark = paging.mark
            alter(paging, "mark", lambda _: lambda gfns: None)
            try:
                sound(gfns)
            finally:
                alter(paging, "mark", lambda _: mark)

        return populate

    alter(physmap, "populate_physmap", wrap)
