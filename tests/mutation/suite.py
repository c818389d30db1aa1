"""All faults, and for each what has to find it."""

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

from mutation import (
    checks,
    cpu,
    cpu_checks,
    device_checks,
    devices,
    hypervisor_ranges,
    kvm_log,
    kvm_ring,
    moving,
    pagemap,
    proving,
    ring_ranges,
    tables,
    tracker_faults,
    tracker_ranges,
    tracking,
    travelling,
    uffd,
    virtio,
    virtio_checks,
    writers,
)
from mutation.fault import BEHIND_THE_HOLE, ODD, Fault, Faults, Room, injected
from mutation.migrations import migration_checks
from mutation.tracker_wrapper import mutated
from mutation.trips import Engine
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.paging import PAGING_MODES
from pageferry.kvm.trackers import DEFAULT_TRACKER, TRACKERS
from pageferry.kvm.vm import KvmVm
from pageferry.testing import conformance
from pageferry.testing.conformance import Check
from pageferry.testing.lab import Lab, MakeVm

_SEED = 1


def _wrapped_trackers() -> tuple[Fault, ...]:
    register = Faults(Room.TRACKER)
    for wrapper in tracker_faults.FAULTS:
        size = BEHIND_THE_HOLE if wrapper in (tracker_faults.IgnoresTheHole, tracker_ranges.RangeEndsAtTheHole) else ODD
        register("", law=None, found_by=(), memory_bytes=size)(wrapper)
    return register.all()


WRAPPED: tuple[Fault, ...] = _wrapped_trackers()
"""The faults of :mod:`mutation.tracker_faults`, which need no implementation to break."""

DECLARED: tuple[Fault, ...] = tuple(
    fault
    for room in (
        *(
            tracking,
            hypervisor_ranges,
            tables,
            writers,
            devices,
            cpu,
            virtio,
            kvm_log,
            kvm_ring,
            ring_ranges,
            uffd,
            pagemap,
        ),
        *(moving, proving, travelling),
    )
    for fault in room.fault.all()
)
"""All faults in the implementation, whatever it has of them."""

FAULTS: tuple[Fault, ...] = tuple(fault for fault in DECLARED if fault.possible)

#: What looks at the software hypervisor: more of the kit's kind, that knows it.
_ON_SOFT = (*conformance.CHECKS, *checks.CHECKS, *device_checks.CHECKS, *cpu_checks.CHECKS, *virtio_checks.CHECKS)


def checks_of(fault: Fault) -> tuple[Check, ...]:
    """Return the checks that a fault must fall to, in the order to try them: those of the law that it breaks first."""
    if fault.room is Room.TRACKER:
        return conformance.CHECKS
    if fault.room is Room.ENGINE:
        known = migration_checks(_engine_of(fault))
    else:
        known = conformance.CHECKS if fault.on_kvm else _ON_SOFT
    return tuple(sorted(known, key=lambda check: check.law != fault.law))


def _engine_of(fault: Fault) -> Engine:
    """Return the engine with one part broken: that which the fault's class is derived from."""
    sound = Engine()
    for part in fields(Engine):
        if issubclass(fault.inject, getattr(sound, part.name)):  # type: ignore[arg-type]  # the fault is a class
            broken: dict[str, Any] = {part.name: fault.inject}
            return replace(sound, **broken)
    raise AssertionError(f"{fault.name} breaks nothing of the engine's")


def lab_of(fault: Fault) -> Lab:
    """Return the lab whose machines have the fault (the engine's faults are in the checks instead)."""
    make_vm: MakeVm = partial(KvmVm, tracker=fault.tracker or DEFAULT_TRACKER) if fault.on_kvm else Domain
    if fault.room is Room.TRACKER:
        make_vm = mutated(make_vm, fault.inject)  # type: ignore[arg-type]  # the fault is the wrapper's class
    elif fault.room is not Room.ENGINE:
        make_vm = injected(make_vm, fault.inject)
    return Lab(make_vm=make_vm, memory_bytes=fault.memory_bytes, seed=_SEED, cpus=fault.cpus)


def sound_benches(*, kvm: bool) -> Iterator[tuple[Room, Lab, tuple[Check, ...]]]:
    """Yield every lab without a fault, and the checks that must pass there."""
    for memory_bytes in (ODD, BEHIND_THE_HOLE):
        for mode in PAGING_MODES:
            soft = Lab(make_vm=partial(Domain, paging_mode=mode), memory_bytes=memory_bytes, seed=_SEED)
            yield Room.HYPERVISOR, soft, _ON_SOFT
        if kvm:
            for name, tracker in TRACKERS.items():
                on_kvm = Lab(make_vm=partial(KvmVm, tracker=name), memory_bytes=memory_bytes, seed=_SEED)
                yield Room.UFFD if tracker.own_mapping else Room.KVM, on_kvm, conformance.CHECKS
    yield Room.ENGINE, Lab(make_vm=Domain, memory_bytes=ODD, seed=_SEED), migration_checks(Engine())
