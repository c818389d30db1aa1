"""Exactly one guest: every order in which a handoff can go, by the engine's code; and each fault of it is found."""

import pytest
from tiers import sample

from simulation.handoff_world import DESTINATION, LEASE_S, SOURCE, TICK_S, HandoffWorld
from simulation.interleave import Violated, explore

WORLDS = {
    # name: (what may happen, at least so many distinct states)
    "a delay": ({"ticks": 1, "person": True}, 100),
    "delays": ({"ticks": 3, "person": True}, 5000),
    "a cut at the source": ({"ticks": 2, "cuts": (SOURCE,), "person": True}, 5000),
    "a cut at the destination": ({"ticks": 2, "cuts": (DESTINATION,), "person": True}, 2000),
    "a cut at both ends": ({"ticks": 1, "cuts": (SOURCE, DESTINATION), "person": True}, 2000),
    "two cuts at the source": ({"ticks": 1, "cuts": (SOURCE, SOURCE), "person": True}, 2000),
    "a destination that is killed": ({"ticks": 2, "kills": (DESTINATION,), "person": True}, 500),
    "a source that is killed": ({"ticks": 1, "kills": (SOURCE,), "cuts": (DESTINATION,)}, 500),
}
QUICK = ["a delay"]


@pytest.mark.parametrize("name", sample(WORLDS, "a late commit, which a person does not wait for", quick=QUICK))
def test_law_6_holds_in_every_state(name, record_property):
    options, at_least = WORLDS[name]
    explored = explore(lambda: HandoffWorld(**options))
    record_property("explored", str(explored))
    print(f"{name}: {explored}")
    assert explored.states >= at_least


def test_where_nothing_goes_wrong_the_guest_moves_in_one_order():
    assert explore(HandoffWorld).schedules == 1


def accepts_for_ever(world):
    """The destination keeps no lease."""
    world.takeover.left_s = lambda now_s: LEASE_S


def accepts_a_little_longer(world):
    """The destination's time is longer than the source's."""
    world.takeover._accepts_for_s = LEASE_S + TICK_S


def looks_once(world):
    """The destination does not look at the clock again before the guest runs."""
    accept, takeover = world.takeover.accept, world.takeover

    def accept_and_forget_the_time(now_s):
        accepted = accept(now_s)
        takeover.left_s = lambda now_s: LEASE_S
        return accepted

    takeover.accept = accept_and_forget_the_time


def takes_back_at_once(world):
    """The source lets a person take the guest back while its commit is open."""
    world.handoff.open_for_s = lambda now_s: 0.0


def believes_silence(world):
    """The source takes a lost answer for a refusal."""
    world.handoff.lost = world.handoff.refused


def keeps_the_disks(world):
    """The destination says that the guest never runs there while it has its disks."""
    world._release = lambda: None


FAULTS = {
    accepts_for_ever: {"ticks": 3, "person": True},
    accepts_a_little_longer: {"ticks": 3, "person": True},
    looks_once: {"ticks": 3, "person": True},
    takes_back_at_once: {"ticks": 1, "cuts": (SOURCE,), "person": True},
    believes_silence: {"ticks": 1, "cuts": (SOURCE,)},
    keeps_the_disks: {"ticks": 3},
}


@pytest.mark.parametrize("fault", sample(FAULTS, "a late commit that is taken", quick=[believes_silence]))
def test_each_fault_of_the_handoff_is_found(fault):
    with pytest.raises(Violated, match=r"two guests|while the disks are kept") as caught:
        explore(lambda: HandoffWorld(fault, **FAULTS[fault]))
    assert caught.value.schedule
