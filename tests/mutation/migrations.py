"""Checks of the engine: migrations between two machines in one process, disturbed at the worst possible moment.

Whatever the engine's own verification says, the two memories are compared here. Those of audits, of the ways that pages
travel, of files and of the report are in modules of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from altered import alter

from mutation import audit_checks, disk_checks, file_checks, postcopy_checks, report_checks, wire_checks
from mutation.tracker_wrapper import Faithful, mutated
from mutation.trips import PAGES, Engine, Trip, arrive, trip_of, write
from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import GuestAt, MigrationError, VmError
from pageferry.core.events import Event, Phase, PhaseBegan, RoundEnded, RoundProgress
from pageferry.core.frames import gpa_of
from pageferry.core.vm import Vm
from pageferry.testing.conformance import Check, check_of
from pageferry.testing.lab import Lab, Violation, listed, require


def written_right_after_a_read(lab: Lab, engine: Engine) -> None:
    """A page that changes right after a round has read it, in every round, arrives as it was at the pause."""
    with trip_of(lab, engine) as (guest, trip):
        rounds = []

        def disturb(event: Event) -> None:
            if isinstance(event, RoundProgress) and event.index < 4:
                rounds.append(event.index)
                for page in (0, 1 + event.index):  # one in every round, one in this round only
                    write(guest, page, 100 + event.index)

        write(guest, 0, 99)
        arrive(trip, on_event=disturb)
        require(rounds == [0, 1, 2, 3], f"rounds with pages: {rounds}")


def written_after_the_last_count(lab: Lab, engine: Engine) -> None:
    """A page that changes after the last round was counted, and found to leave nothing, still arrives."""
    with trip_of(lab, engine) as (guest, trip):

        def disturb(event: Event) -> None:
            if isinstance(event, RoundEnded) and not event.stats.final and event.stats.index == 3:
                require(event.stats.remaining_pages == 0, "a guest that stands still dirties pages")
                write(guest, 2, 7)

        arrive(trip, on_event=disturb)


def a_page_becomes_zero(lab: Lab, engine: Engine) -> None:
    """A page that was sent and then becomes all zeros arrives as zeros."""
    with trip_of(lab, engine) as (guest, trip):
        write(guest, 3, 1)

        def disturb(event: Event) -> None:
            if isinstance(event, RoundProgress) and event.index == 0:
                write(guest, 3, 0)

        arrive(trip, on_event=disturb)


class _WritesBeforeEnable(Faithful):
    """A page that had no storage is written just before ENABLE takes effect."""

    def enable(self) -> None:
        """Write, then ENABLE."""
        self._vm.memory.write(gpa_of(int(PAGES[5])), b"late")
        self._sound.enable()


def touched_just_before_enable(lab: Lab, engine: Engine) -> None:
    """A page that gets its storage just before ENABLE, and never changes again, arrives."""
    meddled = Lab(
        make_vm=mutated(lab.make_vm, _WritesBeforeEnable), memory_bytes=lab.memory_bytes, seed=lab.seed, cpus=lab.cpus
    )
    with trip_of(meddled, engine) as (_, trip):
        arrive(trip)


def a_failed_attempt_leaves_no_trace(lab: Lab, engine: Engine) -> None:
    """An attempt that fails leaves the guest running as before, log-dirty off, and the next attempt complete."""
    with trip_of(lab, engine) as (guest, trip):

        def cancel(event: Event) -> None:
            write(guest, 6, 1)
            if isinstance(event, RoundProgress) and event.index == 1:
                assert trip.source is not None
                trip.source.job.cancel()

        try:
            trip.go(on_event=cancel)
            raise Violation("a cancelled migration went on")
        except MigrationError as error:
            require(error.guest_at is GuestAt.SOURCE, f"after a failure the guest is said to be at {error.guest_at}")
        require(not guest.log_dirty.enabled, "log-dirty is still on after a failed attempt")
        try:
            guest.vm.thaw()
        except VmError:
            pass
        else:
            raise Violation("the guest is still frozen after a failed attempt")
        guest.play(5)
        arrive(trip)


def a_pause_that_is_given_up_leaves_the_guest_here(lab: Lab, engine: Engine) -> None:
    """After a pause that took too long the guest is here as it was, the report says why, and it may move later."""
    with trip_of(lab, engine) as (guest, trip):

        def give_up(event: Event) -> None:
            if isinstance(event, PhaseBegan) and event.phase is Phase.VERIFY:
                assert trip.source is not None
                trip.source.job.give_pause_up()

        try:
            trip.go(there_on_event=give_up)
            raise Violation("a migration went on although its pause was given up")
        except MigrationError as error:
            require(error.guest_at is GuestAt.SOURCE, f"after a failure the guest is said to be at {error.guest_at}")
            require("the pause was given up" in error.reason, f"nothing tells of the pause: {error.reason}")
        require(not guest.log_dirty.enabled, "log-dirty is still on after a failed attempt")
        require(trip.there is None, "the guest is at the destination too")
        guest.play(5)
        arrive(trip)


def a_pause_is_not_given_up_after_the_commit(lab: Lab, engine: Engine) -> None:
    """Once the destination was told that the guest is its own, no budget brings it back."""
    trips: list[Trip] = []

    def give_up_late(there: Vm) -> None:
        def claim(sound: Callable[[], None]) -> Callable[[], None]:
            def give_up_first() -> None:
                source = trips[0].source
                assert source is not None
                source.job.give_pause_up()
                sound()

            return give_up_first

        alter(there, "claim_backends", claim)  # the destination has heard COMMIT, and has not answered

    with trip_of(lab, engine, on_made=give_up_late) as (_, trip):
        trips.append(trip)
        arrive(trip)


def what_arrives_is_marked(lab: Lab, engine: Engine) -> None:
    """At a destination that tracks from the start every page that arrives is dirty: a restore is a writer too."""
    with trip_of(lab, engine, on_made=lambda vm: vm.log_dirty.enable()) as (guest, trip):
        sent = expand_runs(*guest.memory.populated())
        there = arrive(trip)
        missing = sent[~there.log_dirty.peek().test_many(sent)]
        require(not missing.size, f"received and not marked: {listed(missing)}")


def verification_tells(lab: Lab, engine: Engine) -> None:
    """One wrong bit at the destination, and the guest stays at the source."""
    with trip_of(lab, engine) as (guest, trip):
        gfn = int(guest.oracle.written(3)[-1])

        def corrupt(event: Event) -> None:
            if isinstance(event, PhaseBegan) and event.phase is Phase.VERIFY:
                (page,) = trip.made[0].memory.page_views(np.array([gfn], np.uint64))
                page[4095] ^= 0x10

        try:
            trip.go(there_on_event=corrupt)
        except MigrationError as error:
            require(error.guest_at is GuestAt.SOURCE, f"the guest is said to be at {error.guest_at}")
            require(f"{gfn:#x}" in error.reason, f"the message does not name gfn {gfn:#x}: {error.reason}")
            return
        raise Violation("a guest with a wrong bit was taken for the right one")


_FUNCTIONS: Sequence[tuple[int | None, Callable[..., None]]] = (
    (3, written_right_after_a_read),
    (2, written_after_the_last_count),
    (2, a_page_becomes_zero),
    (3, touched_just_before_enable),
    (5, a_failed_attempt_leaves_no_trace),
    (6, a_pause_that_is_given_up_leaves_the_guest_here),
    (6, a_pause_is_not_given_up_after_the_commit),
    (4, what_arrives_is_marked),
    (7, verification_tells),
    *audit_checks.FUNCTIONS,
    *wire_checks.FUNCTIONS,
    *file_checks.FUNCTIONS,
    *report_checks.FUNCTIONS,
    *postcopy_checks.FUNCTIONS,
    *disk_checks.FUNCTIONS,
)


def migration_checks(engine: Engine) -> tuple[Check, ...]:
    """Return the checks of this engine."""
    return tuple(replace(check_of(law, function), run=partial(function, engine=engine)) for law, function in _FUNCTIONS)
