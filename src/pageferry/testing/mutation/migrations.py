"""Checks of the engine: migrations between two machines in one process, disturbed at the worst possible moment.

The guest stands still at a sync point of ``stamp``, and everything that writes meanwhile does so inside an event of the
engine, so each run is the same. Whatever the engine's own verification says, the two memories are compared here.
"""

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import GuestAt, MigrationError, VmError
from pageferry.core.events import Event, Phase, PhaseBegan, RoundEnded, RoundProgress
from pageferry.core.frames import gpa_of
from pageferry.core.memory import GuestMemory
from pageferry.core.policy import Action, Decision, Progress
from pageferry.core.vm import Vm, VmConfig
from pageferry.engine.destination import Destination
from pageferry.engine.source import Source
from pageferry.engine.transport import Channel, Endpoint
from pageferry.testing.conformance import Check, check_of
from pageferry.testing.lab import Guest, Lab, Violation, listed, require
from pageferry.testing.mutant import Faithful, mutated

_TIMEOUT_S = 30.0
_PAGES = np.arange(0x130, 0x140, dtype=np.uint64)  # RAM that no guest of the kit touches


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """The two sides under test."""

    source: type[Source] = Source
    destination: type[Destination] = Destination


class _Rounds:
    """A policy: so many rounds of pre-copy, then the pause."""

    name = "rounds"

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds

    def decide(self, progress: Progress) -> Decision:
        """Count."""
        action = Action.NEXT_ROUND if len(progress.rounds) < self._rounds else Action.STOP_AND_COPY
        return Decision(action=action, reason="counted")


def _nothing(_: Event) -> None:
    """Look on."""


class _Trip:
    """One migration of a guest; ``there`` is the machine at the other end, or None."""

    def __init__(self, lab: Lab, engine: Engine, guest: Guest, *, tracked: bool = False) -> None:
        self._lab = lab
        self._engine = engine
        self._guest = guest
        self._tracked = tracked
        self._made: list[Vm] = []
        self.there: Vm | None = None
        self.source: Source | None = None

    def _make(self, config: VmConfig) -> Vm:
        vm = self._lab.make_vm(config)
        self._made.append(vm)
        if self._tracked:
            vm.log_dirty.enable()
        return vm

    def _serve(self, listener: socket.socket, on_event: Callable[[Event], None]) -> None:
        try:
            channel = Channel(listener.accept()[0], _TIMEOUT_S)
            accel = self._guest.vm.accel
            self.there = self._engine.destination(channel, self._make, accel=accel, on_event=on_event).run()
        except (MigrationError, OSError):
            self.there = None

    def go(
        self,
        *,
        rounds: int = 4,
        on_event: Callable[[Event], None] = _nothing,
        there_on_event: Callable[[Event], None] = _nothing,
    ) -> None:
        """Migrate.

        Raises:
            MigrationError: it failed.
        """
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(_TIMEOUT_S)
            server = threading.Thread(target=self._serve, args=(listener, there_on_event), name="destination")
            server.start()
            try:
                endpoint = Endpoint(host="127.0.0.1", port=listener.getsockname()[1])
                self.source = self._engine.source(
                    self._guest.vm, endpoint, _Rounds(rounds), timeout_s=_TIMEOUT_S, on_event=on_event
                )
                self.source.run()
            finally:
                server.join()

    def require_arrived(self) -> Vm:
        """Check that the guest's memory arrived, byte for byte."""
        require(self.there is not None, "no guest arrived")
        assert self.there is not None
        wrong = _different(self._guest.memory, self.there.memory)
        require(not wrong.size, f"the guest that arrived has other memory: {listed(wrong)}")
        return self.there

    def close(self) -> None:
        """Free the machines at the other end."""
        for vm in self._made:
            vm.close()


def _different(ours: GuestMemory, theirs: GuestMemory) -> np.typing.NDArray[np.uint64]:
    wrong = []
    for region in ours.regions:
        where = np.array([region.first_gfn], np.uint64), np.array([region.pages], np.uint64)
        (a,), (b,) = ours.views(*where), theirs.views(*where)
        differs = (np.frombuffer(a, np.uint64) != np.frombuffer(b, np.uint64)).reshape(region.pages, -1).any(axis=1)
        wrong.append(np.flatnonzero(differs).astype(np.uint64) + np.uint64(region.first_gfn))
    return np.concatenate(wrong)


@contextmanager
def _trip(lab: Lab, engine: Engine, *, tracked: bool = False) -> Iterator[tuple[Guest, _Trip]]:
    with lab.stamping() as guest:
        guest.play(3)
        trip = _Trip(lab, engine, guest, tracked=tracked)
        try:
            yield guest, trip
        finally:
            trip.close()


def _write(guest: Guest, page: int, value: int) -> None:
    guest.memory.write(gpa_of(int(_PAGES[page])) + 8 * page, value.to_bytes(8, "little"))


def _arrive(trip: _Trip, *, on_event: Callable[[Event], None] = _nothing) -> Vm:
    try:
        trip.go(on_event=on_event)
    except MigrationError as error:
        raise Violation(f"the migration failed: {error.reason}") from error
    return trip.require_arrived()


def written_right_after_a_read(lab: Lab, engine: Engine) -> None:
    """A page that changes right after a round has read it, in every round, arrives as it was at the pause."""
    with _trip(lab, engine) as (guest, trip):
        rounds = []

        def disturb(event: Event) -> None:
            if isinstance(event, RoundProgress) and event.index < 4:
                rounds.append(event.index)
                for page in (0, 1 + event.index):  # one in every round, one in this round only
                    _write(guest, page, 100 + event.index)

        _write(guest, 0, 99)
        _arrive(trip, on_event=disturb)
        require(rounds == [0, 1, 2, 3], f"rounds with pages: {rounds}")


def written_after_the_last_count(lab: Lab, engine: Engine) -> None:
    """A page that changes after the last round was counted, and found to leave nothing, still arrives."""
    with _trip(lab, engine) as (guest, trip):

        def disturb(event: Event) -> None:
            if isinstance(event, RoundEnded) and not event.stats.final and event.stats.index == 3:
                require(event.stats.remaining_pages == 0, "a guest that stands still dirties pages")
                _write(guest, 2, 7)

        _arrive(trip, on_event=disturb)


def a_page_becomes_zero(lab: Lab, engine: Engine) -> None:
    """A page that was sent and then becomes all zeros arrives as zeros."""
    with _trip(lab, engine) as (guest, trip):
        _write(guest, 3, 1)

        def disturb(event: Event) -> None:
            if isinstance(event, RoundProgress) and event.index == 0:
                _write(guest, 3, 0)

        _arrive(trip, on_event=disturb)


class _WritesBeforeEnable(Faithful):
    """Somebody writes a page that had no storage, just before ENABLE takes effect."""

    def enable(self) -> None:
        """Write, then ENABLE."""
        self._vm.memory.write(gpa_of(int(_PAGES[5])), b"late")
        self._sound.enable()


def touched_just_before_enable(lab: Lab, engine: Engine) -> None:
    """A page that gets its storage just before ENABLE, and never changes again, arrives."""
    meddled = Lab(
        make_vm=mutated(lab.make_vm, _WritesBeforeEnable), memory_bytes=lab.memory_bytes, seed=lab.seed, cpus=lab.cpus
    )
    with _trip(meddled, engine) as (_, trip):
        _arrive(trip)


def a_failed_attempt_leaves_no_trace(lab: Lab, engine: Engine) -> None:
    """An attempt that fails leaves the guest running as before, log-dirty off, and the next attempt complete."""
    with _trip(lab, engine) as (guest, trip):

        def cancel(event: Event) -> None:
            _write(guest, 6, 1)
            if isinstance(event, RoundProgress) and event.index == 1:
                assert trip.source is not None
                trip.source.cancel()

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
        _arrive(trip)


def what_arrives_is_marked(lab: Lab, engine: Engine) -> None:
    """At a destination that tracks from the start every page that arrives is dirty: a restore is a writer too."""
    with _trip(lab, engine, tracked=True) as (guest, trip):
        sent = expand_runs(*guest.memory.populated())
        there = _arrive(trip)
        missing = sent[~there.log_dirty.peek().test_many(sent)]
        require(not missing.size, f"received and not marked: {listed(missing)}")


def verification_tells(lab: Lab, engine: Engine) -> None:
    """One wrong bit at the destination, and the guest stays at the source."""
    with _trip(lab, engine) as (guest, trip):
        gfn = int(guest.oracle.written(3)[-1])

        def corrupt(event: Event) -> None:
            if isinstance(event, PhaseBegan) and event.phase is Phase.VERIFY:
                (page,) = trip._made[0].memory.page_views(np.array([gfn], np.uint64))
                page[4095] ^= 0x10

        try:
            trip.go(there_on_event=corrupt)
        except MigrationError as error:
            require(error.guest_at is GuestAt.SOURCE, f"the guest is said to be at {error.guest_at}")
            require(f"{gfn:#x}" in error.reason, f"the message does not name gfn {gfn:#x}: {error.reason}")
            return
        raise Violation("a guest with a wrong bit was taken for the right one")


_FUNCTIONS: Sequence[tuple[int, Callable[..., None]]] = (
    (3, written_right_after_a_read),
    (2, written_after_the_last_count),
    (2, a_page_becomes_zero),
    (3, touched_just_before_enable),
    (5, a_failed_attempt_leaves_no_trace),
    (4, what_arrives_is_marked),
    (7, verification_tells),
)


def migration_checks(engine: Engine) -> tuple[Check, ...]:
    """Return the checks for these two sides."""
    return tuple(replace(check_of(law, function), run=partial(function, engine=engine)) for law, function in _FUNCTIONS)
