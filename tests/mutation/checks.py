"""Checks that know the software hypervisor: its invariants, and what only its own levers can bring about."""

import numpy as np

from pageferry.core.errors import LogDirtyError
from pageferry.core.frames import gpa_of
from pageferry.hypervisor import invariants
from pageferry.hypervisor.domain import Domain
from pageferry.testing.conformance import Check, check_of
from pageferry.testing.lab import Guest, Lab, Violation, require

#: RAM that no guest of the kit touches: ballooned out and in again.
_BALLOONED = np.array([0x130, 0x131, 0x155], np.uint64)


def _audit(guest: Guest) -> None:
    assert isinstance(guest.vm, Domain)
    try:
        invariants.check(guest.vm)
    except invariants.InvariantError as error:
        raise Violation(f"invariants: {error}") from error


def audit_each_round(lab: Lab) -> None:
    """P2M, reverse map, pool and bitmap agree after every round and every CLEAN, and after OFF and ENABLE."""
    with lab.tracked() as guest:
        for _ in range(2):
            for number in (1, 3, 4):
                guest.play(number)
                _audit(guest)
                guest.log_dirty.clean()
                _audit(guest)
            guest.log_dirty.off()
            _audit(guest)
            guest.log_dirty.enable()
            _audit(guest)


def audit_while_running(lab: Lab) -> None:
    """No page is both writable and clean after a CLEAN, while the guest writes on."""
    with lab.guest("sweep", pages=200) as guest:
        guest.vm.resume()
        guest.progress()
        guest.log_dirty.enable()
        for _ in range(4):
            guest.progress()
            guest.log_dirty.clean()
            _audit(guest)


def exhausted_pool(lab: Lab) -> None:
    """When no frame is left to split a superpage with, no write is lost silently: all are reported, or CLEAN fails."""
    with lab.tracked() as guest:
        assert isinstance(guest.vm, Domain)
        pool = guest.vm.machine.pool
        pool.set_allocation(pool.needed)
        guest.play(3)
        _audit(guest)
        try:
            guest.require_exact(guest.log_dirty.clean())
        except LogDirtyError:
            require(guest.log_dirty.stats().failed_allocations > 0, "CLEAN failed, and no failure was counted")
            tracked = guest.oracle.gfns
            require(guest.log_dirty.stats().dirty_count >= tracked.size, "CLEAN failed, and bits were lost")
        guest.log_dirty.off()
        pool.set_allocation(len(pool.tables))
        guest.log_dirty.enable()
        guest.played.clear()
        guest.play(3)
        guest.require_exact(guest.log_dirty.clean())


def added_pages_are_dirty(lab: Lab) -> None:
    """A page taken from the guest and given back while log-dirty is on is dirty at once, and protected afterwards."""
    with lab.tracked() as guest:
        assert isinstance(guest.vm, Domain)
        physmap = guest.vm.physmap
        guest.log_dirty.clean()
        physmap.decrease_reservation(_BALLOONED)
        _audit(guest)
        require(not guest.log_dirty.peek().test_many(_BALLOONED).any(), "a page that was taken away is dirty")
        physmap.populate_physmap(_BALLOONED)
        _audit(guest)
        guest.require_exact(guest.log_dirty.clean(), also=_BALLOONED.tolist())
        guest.memory.write(gpa_of(int(_BALLOONED[0])), b"new")
        guest.play(3)
        guest.require_exact(guest.log_dirty.clean(), also=_BALLOONED[:1].tolist())
        _audit(guest)


CHECKS: tuple[Check, ...] = (
    check_of(1, audit_each_round),
    check_of(1, audit_while_running),
    check_of(2, exhausted_pool),
    check_of(4, added_pages_are_dirty),
)
