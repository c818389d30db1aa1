"""Checks of which end owns a guest's disk, when it moves and when that fails."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from mutation.trips import Engine, arrive, trip_of
from mutation.virtio_checks import with_disk
from pageferry.backends.disk import DiskFile
from pageferry.core.errors import GuestAt, MigrationError, VmError
from pageferry.core.vm import VmStatus
from pageferry.testing.lab import Lab, Violation, require

_ASKS_WITHIN_S = 30.0


def _anybody_can_take(path: str) -> bool:
    disk = DiskFile(path, readonly=False)
    try:
        disk.claim()
    except VmError:
        return False
    finally:
        disk.close()
    return True


def a_disk_goes_with_its_guest(lab: Lab, engine: Engine) -> None:
    """After a move the destination has the disk, and the source has given it back."""
    with with_disk(lab) as (pcs, path), trip_of(pcs, engine) as (guest, trip):
        guest.vm.claim_backends()
        there = arrive(trip)
        require(not _anybody_can_take(str(path)), "the destination has not taken the disk")
        there.close()
        require(_anybody_can_take(str(path)), "the source has kept the disk")


def a_disk_comes_back(lab: Lab, engine: Engine) -> None:
    """A guest that its destination gives back in the last step has its disk again."""

    def refuse(vm: object) -> None:
        def claim() -> None:
            raise VmError("another process has the disk")

        vm.claim_backends = claim  # type: ignore[attr-defined]

    with with_disk(lab) as (pcs, path), trip_of(pcs, engine, on_made=refuse) as (guest, trip):
        guest.vm.claim_backends()
        try:
            trip.go()
        except MigrationError as error:
            require(error.guest_at is GuestAt.SOURCE, f"the guest is at {error.guest_at}")
            require(not _anybody_can_take(str(path)), "the guest is back, and its disk is not locked")
            return
        raise Violation("a guest went where its disk is not")


def a_disk_is_given_back_first(lab: Lab, engine: Engine) -> None:
    """A guest that cannot be started where it arrived has its disk again when its source hears of that."""
    asked_again = threading.Event()

    def refuse(vm: Any) -> None:
        def resume() -> None:
            raise VmError("it does not start")

        close = vm.close

        def close_afterwards() -> None:  # closing gives the disk back too: not before the source has asked for it
            asked_again.wait(_ASKS_WITHIN_S)
            close()

        vm.resume, vm.close = resume, close_afterwards

    with with_disk(lab) as (pcs, _), trip_of(pcs, engine, on_made=refuse) as (guest, trip):
        vm: Any = guest.vm
        vm.claim_backends()
        claim = vm.claim_backends

        def claim_again() -> None:
            try:
                claim()
            finally:
                asked_again.set()

        running = property(lambda _: VmStatus.RUNNING)  # though its program may stand at a sync point by now
        vm.claim_backends, vm.__class__ = claim_again, type("RunningVm", (type(vm),), {"status": running})
        try:
            trip.go()
        except MigrationError as error:
            require(error.guest_at is GuestAt.SOURCE, f"the guest is at {error.guest_at}")
            require(asked_again.is_set(), "the source has not asked for its disk again")
            require(trip.source is not None and trip.source.job.frozen is False, "the guest stands still at its source")
            return
        raise Violation("a guest went where it does not start")


FUNCTIONS: Sequence[tuple[int | None, Callable[..., None]]] = (
    (6, a_disk_goes_with_its_guest),
    (6, a_disk_comes_back),
    (6, a_disk_is_given_back_first),
)
