"""Checks of the ways that pages travel: packed, by their changes, by name, on several connections."""

import threading
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
from at_work import until

from mutation.trips import PAGES, Engine, arrive, collected, trip_of, write
from pageferry.core.events import Event, RoundBegan, RoundEnded
from pageferry.core.frames import PAGE_SIZE, PAGES_PER_2M, GfnArray, gpa_of
from pageferry.core.page_words import PageWords
from pageferry.engine.options import WireOptions
from pageferry.engine.pages.encode import PackingCoder
from pageferry.engine.pages.send import Lanes
from pageferry.stream.format import MAX_PAGES_PER_RECORD
from pageferry.stream.packing import available
from pageferry.testing.lab import Lab, require

#: On both sides of a border between pieces of 2 MiB: no guest of the kit touches them.
_AT_BORDER = np.arange(PAGES_PER_2M - 2, PAGES_PER_2M + 2, dtype=np.uint64)


def _by_changes() -> WireOptions:
    """Return what has pages packed, and of those that are sent again the changes; plain where no packer is there."""
    packings = available()
    if not packings:
        return WireOptions()
    return WireOptions(compress=packings[0], delta_cache_bytes=MAX_PAGES_PER_RECORD * PAGE_SIZE)


def written_while_it_is_encoded(lab: Lab, engine: Engine) -> None:
    """A page that changes between its copy and the end of its encoding, in every round, arrives as at the pause."""
    with trip_of(lab, engine) as (guest, trip), collected(PackingCoder) as coders:
        values = iter(range(2, 1_000))
        frozen = threading.Event()

        def change(gfns: GfnArray) -> None:
            if PAGES[8] in gfns and not frozen.is_set():
                write(guest, 8, next(values))

        def disturb(event: Event) -> None:
            if isinstance(event, RoundBegan) and event.index == 0:
                _call_first(coders[0]._cache if coders else None, "swap", change)
            elif isinstance(event, RoundBegan) and event.final:
                frozen.set()
            elif isinstance(event, RoundEnded) and not event.stats.final:
                write(guest, 8, next(values))

        write(guest, 8, 1)
        arrive(trip, wire=_by_changes(), on_event=disturb)


def _call_first(owner: Any, name: str, first: Callable[[GfnArray], None]) -> None:
    if owner is None:
        return
    sound = getattr(owner, name)

    def meddled(gfns: GfnArray, pages: PageWords) -> Any:
        first(gfns)
        return sound(gfns, pages)

    setattr(owner, name, meddled)


def zero_and_back_again(lab: Lab, engine: Engine) -> None:
    """A page that was sent twice, became zero, and then something else, arrives as that."""
    with trip_of(lab, engine) as (guest, trip):
        write(guest, 9, 1)

        def disturb(event: Event) -> None:
            if isinstance(event, RoundEnded) and not event.stats.final:
                write(guest, 9, (2, 0, 3, 4)[event.stats.index])

        arrive(trip, wire=_by_changes(), on_event=disturb)


def both_sides_of_a_border(lab: Lab, engine: Engine) -> None:
    """Pages at the border between two connections arrive, in the first round and in later ones."""
    with trip_of(lab, engine) as (guest, trip):

        def touch(value: int) -> None:
            for gfn in _AT_BORDER.tolist():
                guest.memory.write(gpa_of(gfn), value.to_bytes(8, "little"))

        def disturb(event: Event) -> None:
            if isinstance(event, RoundEnded) and event.stats.index == 1:
                touch(2)

        touch(1)
        arrive(trip, wire=WireOptions(connections=2), on_event=disturb)


def a_round_ends_when_all_is_sent(lab: Lab, engine: Engine) -> None:
    """A round is not over, and no later one begins, before every connection has sent its pages of it."""
    gone, over, awaited, early = threading.Event(), threading.Event(), threading.Event(), []
    drain = Lanes.drain

    def noted(lanes: Lanes) -> None:
        awaited.set()
        drain(lanes)

    with trip_of(lab, engine) as (guest, trip), patch.object(Lanes, "drain", noted):

        def hold(channel: Any) -> None:
            send = channel.send
            awaited.clear()

            def late(buffers: Sequence[bytes | memoryview]) -> None:
                until(lambda: over.is_set() or awaited.is_set(), "end of a round, or of its pages")
                send(buffers)
                gone.set()

            channel.send = late

        def disturb(event: Event) -> None:
            if isinstance(event, RoundEnded) and event.stats.index == 0:
                guest.memory.write(gpa_of(PAGES_PER_2M), b"of the second connection")
                assert trip.source is not None
                hold(trip.source.job._channels[1])
            elif isinstance(event, RoundEnded) and event.stats.index == 1:
                early.append(not gone.is_set())
                over.set()

        try:
            arrive(trip, wire=WireOptions(connections=2), on_event=disturb)
        finally:
            over.set()
            require(early != [True], "a round was over while a connection still had pages of it")


FUNCTIONS: Sequence[tuple[int | None, Callable[..., None]]] = (
    (3, written_while_it_is_encoded),
    (2, zero_and_back_again),
    (2, both_sides_of_a_border),
    (3, a_round_ends_when_all_is_sent),
)
