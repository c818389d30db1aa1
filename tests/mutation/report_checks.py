"""Checks of the report: what it says of time is what others see of it."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from mutation.trips import Engine, Trip, trip_of
from pageferry.core.events import DOWNTIME_PHASES, Event, Phase, PhaseBegan, PhaseEnded, RoundEnded
from pageferry.core.guest_time import WorkSample
from pageferry.testing.lab import Lab, require


def the_downtime_is_all_of_it(lab: Lab, engine: Engine) -> None:
    """The downtime is from the pause to the handoff, the proof in it, and its parts leave nothing out."""
    with trip_of(lab, engine) as (_, trip):
        began_s: dict[Phase, float] = {}
        spans_s: dict[str, float] = {}

        def look(event: Event) -> None:
            if isinstance(event, PhaseBegan):
                began_s[event.phase] = time.monotonic()
            elif isinstance(event, PhaseEnded):
                spans_s[str(event.phase)] = time.monotonic() - began_s[event.phase]

        report = trip.go(on_event=look)
        parts_s = report.downtime_parts_s or {}
        require(list(parts_s) == [str(phase) for phase in DOWNTIME_PHASES], f"the parts are {list(parts_s)}")
        total_s = sum(parts_s.values())
        require(
            math.isclose(total_s, report.downtime_s or 0.0), f"{report.downtime_s} s, and its parts are {total_s} s"
        )
        for phase in DOWNTIME_PHASES[:-1]:  # the last part ends with the answer, its phase a little later
            name = str(phase)
            require(parts_s[name] >= spans_s[name], f"{name} took {spans_s[name]} s, and is said to: {parts_s[name]} s")


def lost_time_counts_once(lab: Lab, engine: Engine) -> None:
    """The guest time that was lost is that of the work that was not done, whatever it was lost to."""
    with lab.guest("kv") as guest:
        trip = Trip(lab, engine, guest)
        try:
            guest.vm.resume()
            guest.progress()
            before = WorkSample(at_s=time.monotonic() - 10, work=guest.work() - 10_000_000)
            report = trip.go(
                on_event=lambda event: guest.progress() if _between_rounds(event) else None, work_before=before
            )
            spent: Any = report.guest_time
            require(spent is not None and spent.lost_s is not None, f"nothing is said of the guest's time: {spent}")
            missing_s = spent.precopy_s * (1.0 - spent.work_during_per_s / spent.work_before_per_s)
            said = f"{missing_s} s of work are missing, and {spent.lost_s} s are said to be lost"
            require(math.isclose(spent.lost_s, missing_s), said)
        finally:
            trip.close()


def _between_rounds(event: Event) -> bool:
    return isinstance(event, RoundEnded) and event.stats.index < 2


FUNCTIONS: Sequence[tuple[int | None, Callable[..., None]]] = (
    (None, the_downtime_is_all_of_it),
    (None, lost_time_counts_once),
)
