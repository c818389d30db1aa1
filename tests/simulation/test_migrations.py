"""Whole migrations, simulated: a few of them here; that a run is repeated by its seed; and that faults are found."""

import pytest
from altered import replaced
from tiers import sample

from pageferry.core.bitmap import DirtyBitmap
from pageferry.engine.guest import TrackedGuest
from pageferry.engine.handoff.custody import Handoff, Takeover
from pageferry.engine.handoff.give import Giver
from pageferry.engine.handoff.take import see_off, take
from pageferry.engine.pages.send import Lanes
from pageferry.engine.pause import PauseWatch
from pageferry.engine.postcopy.client import PostcopyClient
from pageferry.engine.postcopy.pager import DemandPager
from pageferry.engine.precopy import last_dirty
from pageferry.engine.source import DestinationSink
from pageferry.engine.wire.connections import NeverRan
from simulation.migrations import main, simulate, simulate_some
from simulation.simulated_run import Run
from simulation.troubles import Kind

#: So many runs find each fault; most of them a few dozen.
ENOUGH = 1500


@pytest.mark.parametrize("count", sample([6, 200], "`make simulate` does ten thousand", quick=[6]))
@pytest.mark.timeout(1200)
def test_every_guest_is_in_one_place_and_whole(dice, count):
    first = dice.getrandbits(32)
    for seed in range(first, first + count):
        print(f"make simulate SEED={seed} COUNT=1")
        simulate(seed)


def test_a_seed_repeats_its_run():
    runs = [Run(seed) for seed in (7, 7, 8)]
    for run in runs:
        run.run()
    first, again, other = ([*run.log, run.simulation.turns] for run in runs)
    assert first == again != other


def test_a_failure_tells_how_it_came():
    with replaced({"attempt.TrackedGuest": LeavesLogDirtyOn}):
        _, failed = simulate_some(range(20))
    assert failed
    assert all(what.startswith("Violated: ") and "source: connect" in what for what in failed.values())


@pytest.mark.exhaustive("starts a process for each CPU")
def test_the_command_says_its_seed(capsys):
    assert main(["--seed", "5", "--count", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], lines[-1]) == ("simulate: seed 5, 2 runs", "simulate: 2 runs from seed 5, 0 failed")


# -- faults ------------------------------------------------------------------------------------------------------------


class BelievesSilence(Handoff):
    """The source takes a lost answer for a refusal."""

    lost = Handoff.refused


class AcceptsForEver(Takeover):
    """The destination keeps no lease."""

    def left_s(self, now_s):
        return 10.0


class TakesBackAtOnce(Handoff):
    """The source lets a person take the guest back while its commit is open."""

    def open_for_s(self, now_s):
        return 0.0


class CancelsTooLate(Handoff):
    """A cancel after the commit is taken for one before it."""

    def cancel(self):
        self._cancelled = True
        return True


class PromisesNothing(NeverRan):
    """The destination forgets which guests never ran there."""

    def add(self, token):
        pass


def keeps_the_disk(peer, takeover, ready, word, claim, release, start, now_s):
    """A destination that cannot start the guest says so while it has the guest's disk."""
    take(peer, takeover, ready, word, claim, lambda: None, start, now_s)


class LeavesTheGuestFrozen(TrackedGuest):
    """A failure before the commit leaves the guest standing still."""

    def thaw(self):
        pass


class LeavesLogDirtyOn(TrackedGuest):
    """A failure before the commit leaves log-dirty on."""

    def release(self):
        pass


class LeavesAThread(PauseWatch):
    """What watches over the pause is not ended."""

    def end(self):
        pass


class LeavesConnections(Lanes):
    """The further connections stay open."""

    def close(self):
        pass


class AsksOnce(DemandPager):
    """After a cut the destination does not ask again for what was under way."""

    def start_over(self):
        pass


class ForgetsWhatHasCome(DemandPager):
    """After a cut the destination asks for pages again that have come, and the guest has written since."""

    def start_over(self):
        self._coming, self.coming_pages, self._next = DirtyBitmap(self._coming.nbits), 0, 0

    def _take(self, gfns, at_most):
        gfns = gfns[~self._coming.test_many(gfns)][:at_most]
        self._coming.set(gfns)
        self.coming_pages += gfns.size
        return gfns


class DoesNotListen(PostcopyClient):
    """The destination does not wait for its source after a cut."""

    def _source_that_returns(self, reason):
        return None


def says_it_once(peer, say, returned, within_s=None):
    """A destination that was not heard does not wait for its source to ask."""
    return see_off(peer, say, lambda: None, within_s)


class DoesNotAsk(Giver):
    """The source never asks again for an answer that was lost."""

    def ask(self, within_s=None):
        raise ConnectionResetError


def skips_the_last_round(attempt):
    """What is dirty at the pause is not sent."""
    return last_dirty(attempt)[:0]


class NeedsAPage(DestinationSink):
    """The first connection must have a page of the guest's."""

    def begin(self, gfns):
        pass


#: What stands where, and what the runs are about that find it.
FAULTS = {
    "BelievesSilence": ("job.Handoff", BelievesSilence, Kind.HANDOFF),
    "AcceptsForEver": ("destination.Takeover", AcceptsForEver, Kind.HANDOFF),
    "TakesBackAtOnce": ("job.Handoff", TakesBackAtOnce, Kind.HANDOFF),
    "CancelsTooLate": ("job.Handoff", CancelsTooLate, Kind.ANY),
    "PromisesNothing": ("wire.acceptor.NeverRan", PromisesNothing, Kind.HANDOFF),
    "keeps_the_disk": ("destination.take", keeps_the_disk, Kind.ANY),
    "LeavesTheGuestFrozen": ("attempt.TrackedGuest", LeavesTheGuestFrozen, Kind.ANY),
    "LeavesLogDirtyOn": ("attempt.TrackedGuest", LeavesLogDirtyOn, Kind.ANY),
    "LeavesAThread": ("attempt.PauseWatch", LeavesAThread, Kind.ANY),
    "LeavesConnections": ("source.Lanes", LeavesConnections, Kind.ANY),
    "AsksOnce": ("postcopy.client.DemandPager", AsksOnce, Kind.POSTCOPY),
    "ForgetsWhatHasCome": ("postcopy.client.DemandPager", ForgetsWhatHasCome, Kind.POSTCOPY),
    "DoesNotListen": ("destination.PostcopyClient", DoesNotListen, Kind.POSTCOPY),
    "says_it_once": ("destination.see_off", says_it_once, Kind.HANDOFF),
    "DoesNotAsk": ("source.Giver", DoesNotAsk, Kind.HANDOFF),
    "skips_the_last_round": ("source.last_dirty", skips_the_last_round, Kind.ANY),
    "NeedsAPage": ("source.DestinationSink", NeedsAPage, Kind.ANY),
    "falls silent while it is held": ("source._HELD_SHARE", 1000.0, Kind.ANY),
}


def found(fault):
    """Return what finds a fault, and after how many runs."""
    place, part, kind = FAULTS[fault]
    with replaced({place: part}):
        for seed in range(ENOUGH):
            try:
                simulate(seed, kind)
            except Exception as error:
                return f"{type(error).__name__}: {error}", seed + 1
    return None


@pytest.mark.parametrize(
    "fault", sample(FAULTS, "each needs up to some hundred runs to be found", quick=["DoesNotListen"])
)
@pytest.mark.timeout(1200)
def test_each_fault_of_the_engine_is_found(fault, record_property):
    what = found(fault)
    record_property("found", str(what))
    print(f"{fault}: {what}")
    assert what is not None
