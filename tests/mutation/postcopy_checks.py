"""Checks of post-copy: pages that are touched at the destination while their content is at the source."""

import threading
from collections.abc import Callable, Sequence

from at_work import until

from mutation.trips import PAGES, Engine, collected, different, trip_of, write
from pageferry.core.errors import MigrationError
from pageferry.core.events import Event, Phase, PhaseBegan
from pageferry.core.frames import gpa_of
from pageferry.core.policy import Action, Decision, Progress
from pageferry.engine.postcopy.pager import DemandPager
from pageferry.testing.lab import Guest, Lab, Violation, listed, require


class _Switch:
    """A policy: one round, in which two pages change; then post-copy."""

    name = "switch"
    switches = True

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def decide(self, progress: Progress) -> Decision:
        """Change pages, and switch."""
        for page in (3, 4):
            write(self._guest, page, 2)
        return Decision(action=Action.POST_COPY, reason="now")


def written_before_it_came(lab: Lab, engine: Engine) -> None:
    """A page that is written at the destination while it is missing has the source's content, and what was written."""
    with trip_of(lab, engine) as (guest, trip), collected(DemandPager) as pagers:
        for page in (3, 4):
            write(guest, page, 1)
        where = gpa_of(int(PAGES[3]))
        writer = threading.Thread(target=lambda: trip.made[0].memory.write(where, b"new"), name="writer")

        def touch(event: Event) -> None:
            if isinstance(event, PhaseBegan) and event.phase is Phase.POSTCOPY:
                writer.start()
                # No page comes before this returns.
                until(lambda: not writer.is_alive() or pagers[0]._needs, "write, done or waiting for its page")

        try:
            trip.go(policy=_Switch(guest), there_on_event=touch)
        except MigrationError as error:
            raise Violation(f"the migration failed: {error.reason}") from error
        writer.join()
        require(trip.there is not None, "no guest arrived")
        assert trip.there is not None
        found = trip.there.memory.read(where, 3)
        require(found == b"new", f"a write was lost to the page that came: {found!r}")
        trip.there.memory.write(where, guest.memory.read(where, 3))
        wrong = different(guest.memory, trip.there.memory)
        require(not wrong.size, f"the guest that arrived has other memory: {listed(wrong)}")


FUNCTIONS: Sequence[tuple[int | None, Callable[..., None]]] = ((2, written_before_it_came),)
