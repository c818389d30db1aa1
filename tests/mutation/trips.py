"""Trips: one guest's migration between two machines in one process, disturbed as a check likes it.

The guest stands still at a sync point of ``stamp``, and everything that writes meanwhile does so inside an event of the
engine, so each run is the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
from trips import Inn, Rounds, source_of

from pageferry.core.errors import MigrationError
from pageferry.core.events import Event, MigrationReport
from pageferry.core.frames import GfnArray, gpa_of
from pageferry.core.memory import GuestMemory
from pageferry.core.policy import Policy
from pageferry.core.vm import Vm, VmConfig
from pageferry.engine.destination import Destination
from pageferry.engine.image.lazy import LazyRestore
from pageferry.engine.image.save import Save
from pageferry.engine.source import Source
from pageferry.testing.lab import Guest, Lab, Violation, listed, require

PAGES = np.arange(0x130, 0x140, dtype=np.uint64)  # RAM that no guest of the kit touches


def ignore(_: object) -> None:
    """Look on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What is under test."""

    source: type[Source] = Source
    destination: type[Destination] = Destination
    save: type[Save] = Save
    lazy: type[LazyRestore] = LazyRestore


class Trip:
    """One migration of a guest; ``there`` is the machine at the other end, or None."""

    def __init__(self, lab: Lab, engine: Engine, guest: Guest, *, on_made: Callable[[Vm], None] = ignore) -> None:
        self._lab = lab
        self._engine = engine
        self._guest = guest
        self._on_made = on_made
        self._inn = Inn(self._make, kind=engine.destination)
        self.there: Vm | None = None
        self.source: Source | None = None

    def _make(self, config: VmConfig) -> Vm:
        vm = self._lab.make_vm(config)
        self._on_made(vm)
        return vm

    @property
    def made(self) -> list[Vm]:
        """The machines at the other end."""
        return self._inn.made

    def go(
        self,
        *,
        rounds: int = 4,
        policy: Policy | None = None,
        on_event: Callable[[Event], None] = ignore,
        there_on_event: Callable[[Event], None] = ignore,
        **options: Any,
    ) -> MigrationReport:
        """Migrate; return the report.

        Raises:
            MigrationError: it failed.
        """
        endpoint, policy = self._inn.open(on_event=there_on_event), policy or Rounds(rounds)
        try:
            self.source = source_of(
                self._guest.vm, endpoint, policy, on_event=on_event, kind=self._engine.source, **options
            )
            return self.source.run()
        finally:
            self._inn.outcome()
            self.there = self._inn.vm

    def require_arrived(self) -> Vm:
        """Check that the guest's memory arrived, byte for byte."""
        require(self.there is not None, "no guest arrived")
        assert self.there is not None
        wrong = different(self._guest.memory, self.there.memory)
        require(not wrong.size, f"the guest that arrived has other memory: {listed(wrong)}")
        return self.there

    def close(self) -> None:
        """Free the machines at the other end."""
        self._inn.close()


def different(ours: GuestMemory, theirs: GuestMemory) -> GfnArray:
    """Return the frames whose content differs, uint64[n]."""
    wrong = []
    for region in ours.regions:
        where = np.array([region.first_gfn], np.uint64), np.array([region.pages], np.uint64)
        (a,), (b,) = ours.views(*where), theirs.views(*where)
        differs = (np.frombuffer(a, np.uint64) != np.frombuffer(b, np.uint64)).reshape(region.pages, -1).any(axis=1)
        wrong.append(np.flatnonzero(differs).astype(np.uint64) + np.uint64(region.first_gfn))
    return np.concatenate(wrong)


@contextmanager
def trip_of(lab: Lab, engine: Engine, *, on_made: Callable[[Vm], None] = ignore) -> Iterator[tuple[Guest, Trip]]:
    """Prepare a trip of a guest that stands still; ``on_made`` sees each machine at the other end before all else."""
    with lab.stamping() as guest:
        guest.play(3)
        trip = Trip(lab, engine, guest, on_made=on_made)
        try:
            yield guest, trip
        finally:
            trip.close()


@contextmanager
def collected(kind: type) -> Iterator[list[Any]]:
    """Collect the objects of a class, or of one derived from it, that are made meanwhile."""
    made: list[Any] = []
    init: Callable[..., None] = kind.__init__

    def note(one: Any, *args: Any, **options: Any) -> None:
        init(one, *args, **options)
        made.append(one)

    with patch.object(kind, "__init__", note):
        yield made


def write(guest: Guest, page: int, value: int) -> None:
    """Write to number ``page`` of ``PAGES``, from outside the guest."""
    guest.memory.write(gpa_of(int(PAGES[page])) + 8 * page, value.to_bytes(8, "little"))


def arrive(trip: Trip, **options: Any) -> Vm:
    """Migrate, and check that the guest's memory arrived.

    Raises:
        Violation: it did not.
    """
    try:
        trip.go(**options)
    except MigrationError as error:
        raise Violation(f"the migration failed: {error.reason}") from error
    return trip.require_arrived()
