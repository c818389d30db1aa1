"""Faults of virtio devices, in a PC that has some: what is carried to another host, and when a transfer is marked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from altered import alter

from mutation.fault import Faults, Room
from pageferry.core.frames import gfns_touched
from pageferry.hypervisor.domain import Domain

fault = Faults(Room.HYPERVISOR)


def _load_then_forget(domain: Domain, name: str) -> None:
    """Have each virtio device loaded as it should be, and a field of its queues 0 then."""
    for function in domain.virtio._functions:

        def wrap(sound: Any, function: Any = function) -> Any:
            def load(data: bytes) -> None:
                sound(data)
                for queue in function.driver.queues:
                    setattr(queue, name, 0)

            return load

        alter(function, "load", wrap)


@fault(
    "no bug on record: rings are in memory, how far a device has come in them is its own",
    law=None,
    found_by=("disk-moves",),
)
def ring_index_not_carried(domain: Domain) -> None:
    """A virtio device that is loaded begins at the first entry of its available rings."""
    _load_then_forget(domain, "next_available")


@fault(
    "no bug on record: the same of what was given back: the driver sees an index that stands still, or jumps",
    law=None,
    found_by=("disk-moves",),
)
def used_index_not_carried(domain: Domain) -> None:
    """A virtio device that is loaded gives back chains from the first entry of its used rings on."""
    _load_then_forget(domain, "next_used")


@fault(
    "no bug on record: what a device has taken from its ring and not given back yet is in no state",
    law=None,
    found_by=("disk-finishes-before-a-freeze-holds",),
)
def request_in_flight_not_awaited(domain: Domain) -> None:
    """A freeze holds while a disk's request is in flight: it is given back to memory that was copied."""
    alter(domain.virtio, "finish", lambda _: lambda patience_s: None)


@fault(
    "Cloud Hypervisor: writes of virtio devices were not tracked; here they are, but before they are made",
    law=4,
    found_by=("disk-marks-after-the-write",),
)
def virtio_marks_first(domain: Domain) -> None:
    """A virtio device marks the pages of a transfer when it begins."""
    memory = domain.memory

    def wrap(_: Any) -> Any:
        @contextmanager
        def writing(ranges: Any) -> Iterator[list[memoryview]]:
            for gpa, size_bytes in ranges:
                memory.wrote(gfns_touched(gpa, size_bytes))
            yield memory._byte_views(ranges)

        return writing

    alter(memory, "writing", wrap)
