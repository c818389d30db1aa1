"""Checks of audits: pages written just when they are digested, and ends of a migration that do not tell the truth."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from altered import AlteredSource

from mutation.trips import PAGES, Engine, arrive, trip_of, write
from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import MigrationError
from pageferry.core.events import Event, RoundEnded
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import Vm
from pageferry.engine.options import VerifyMode
from pageferry.engine.verify.audit import Auditor
from pageferry.engine.verify.digests import RunDigests
from pageferry.testing.lab import Lab, Violation, require


def written_while_it_is_digested(lab: Lab, engine: Engine) -> None:
    """A page that is written between the choice to audit it and its digest is not taken for proven, and arrives."""
    with trip_of(lab, engine) as (guest, trip):
        write(guest, 7, 1)
        views, wrote = guest.memory.views, threading.Event()

        def write_first(starts: GfnArray, lengths: GfnArray) -> list[memoryview]:
            if threading.current_thread().name == "audit" and not wrote.is_set():
                wrote.set()
                write(guest, 7, 2)
            return views(starts, lengths)

        meddled: Any = guest.memory
        meddled.views = write_first
        arrive(trip, verify=VerifyMode.AUDIT)
        require(wrote.is_set(), "nothing was audited")


def written_after_it_was_proven(lab: Lab, engine: Engine) -> None:
    """A page that was proven, and is written and sent again, is proven again; so is one that is never written, once."""
    with trip_of(lab, engine) as (guest, trip):
        write(guest, 7, 1)

        def disturb(event: Event) -> None:
            if isinstance(event, RoundEnded) and event.stats.index < 2:
                write(guest, 7, 2 + event.stats.index)

        arrive(trip, verify=VerifyMode.AUDIT, on_event=disturb)
        report = trip.source.job.report if trip.source is not None else None
        require(report is not None and report.audited_pages > 0, "nothing was audited")


def an_audit_tells(lab: Lab, engine: Engine) -> None:
    """One wrong bit at the destination, in a page that is audited, and the guest stays at the source."""
    gfn = int(PAGES[7])

    def spoil_on_arrival(vm: Vm) -> None:
        memory: Any = vm.memory
        wrote: Callable[[GfnArray], None] = memory.wrote

        def spoil(gfns: GfnArray) -> None:
            wrote(gfns)
            if gfn in gfns:
                _flip(vm.memory, gfn)

        memory.wrote = spoil

    with trip_of(lab, engine, on_made=spoil_on_arrival) as (guest, trip):
        write(guest, 7, 1)
        try:
            trip.go(verify=VerifyMode.AUDIT)
        except MigrationError as error:
            require(f"{gfn:#x}" in error.reason, f"the message does not name gfn {gfn:#x}: {error.reason}")
            return
        raise Violation("a guest with a wrong bit was taken for the right one")


def an_invented_audit_is_refused(lab: Lab, engine: Engine) -> None:
    """A source that says that all was audited, when nothing was, moves no guest."""
    lying = Engine(source=InventsAudits, destination=engine.destination)
    with trip_of(lab, lying) as (guest, trip):
        write(guest, 7, 1)
        try:
            trip.go(verify=VerifyMode.AUDIT)
        except MigrationError as error:
            require("never proven" in error.reason, f"it failed for another reason: {error.reason}")
            return
        raise Violation("the destination believed in an audit that there was not")


class _InventsAll(Auditor):
    """Says that all is proven, and proves nothing."""

    def due(self) -> RunDigests | None:
        return None

    def idle(self) -> bool:
        return True

    def proven(self) -> DirtyBitmap:
        return self._memory.all_ram()


class InventsAudits(AlteredSource, parts={"verify.prove.Auditor": _InventsAll}):
    """The report, and the destination, are told of pages as proven that were not audited."""


def _flip(memory: GuestMemory, gfn: int) -> None:
    (page,) = memory.page_views(np.array([gfn], np.uint64))
    page[4095] ^= 0x10


FUNCTIONS: Sequence[tuple[int | None, Callable[..., None]]] = (
    (7, written_while_it_is_digested),
    (7, written_after_it_was_proven),
    (7, an_audit_tells),
    (7, an_invented_audit_is_refused),
)
