"""What every policy promises, whatever it is told: of rounds of any size, and of a simulated guest on a wire."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from reports import stats

from pageferry.core.frames import PAGE_SIZE
from pageferry.core.policies import ConvergePolicy, DeadlinePolicy, DowntimePolicy, XenPolicy
from pageferry.core.policy import Action, Progress, RoundStats

MEMORY_PAGES = 1 << 18
limits_s = st.floats(1e-3, 10)
policies = st.one_of(
    st.builds(XenPolicy, max_rounds=st.integers(1, 20)),
    st.builds(DowntimePolicy, limit_s=limits_s, max_rounds=st.integers(1, 40)),
    st.builds(ConvergePolicy, limit_s=limits_s, max_rounds=st.integers(1, 40)),
    st.builds(DeadlinePolicy, deadline_s=st.floats(0.01, 1000)),
)
rounds = st.tuples(st.integers(0, MEMORY_PAGES), st.floats(1e-6, 100), st.integers(0, MEMORY_PAGES))


def made(index, sent, duration_s, remaining):
    return RoundStats(
        index=index,
        dirty_pages=sent,
        sent_pages=sent,
        sent_bytes=sent * (PAGE_SIZE + 8),
        duration_s=duration_s,
        remaining_pages=remaining,
    )


@st.composite
def progresses(draw):
    seen = tuple(made(index, *each) for index, each in enumerate(draw(st.lists(rounds, min_size=1, max_size=12))))
    elapsed_s = sum(each.duration_s for each in seen) * draw(st.floats(1, 2))
    return Progress(
        memory_pages=MEMORY_PAGES,
        rounds=seen,
        fixed_s=draw(st.floats(0, 5)),
        elapsed_s=elapsed_s,
        throttle=draw(st.floats(0, 0.95)),
    )


@given(policies, progresses())
def test_a_policy_is_pure_and_always_has_a_reason(policy, progress):
    decision = policy.decide(progress)
    assert decision == policy.decide(progress)
    assert decision.reason
    assert 0.0 <= decision.throttle <= 0.95
    assert not decision.throttle or isinstance(policy, ConvergePolicy)


@given(st.sampled_from([DowntimePolicy, ConvergePolicy]), limits_s, progresses())
def test_a_guest_is_paused_only_when_that_is_expected_to_fit_its_limit_and_nothing_else_ends_it_then(
    policy, limit_s, progress
):
    action = policy(limit_s=limit_s).decide(progress).action
    if progress.expected_downtime_s > limit_s:
        assert action is not Action.STOP_AND_COPY
    else:
        copying_s = progress.expected_downtime_s - progress.fixed_s
        put_off = copying_s >= progress.fixed_s and progress.last.remaining_pages >= 50
        assert action is Action.STOP_AND_COPY or (action is Action.NEXT_ROUND and put_off)


@pytest.mark.parametrize("policy", [DowntimePolicy, ConvergePolicy])
def test_a_pause_that_fits_by_a_rounding_is_decided_like_any_other(policy):
    rounds = tuple(stats(index, sent, 56) for index, sent in enumerate((1, 1, 558)))
    progress = Progress(memory_pages=1000, rounds=rounds, fixed_s=0.0)
    assert progress.expected_downtime_s == pytest.approx(0.3)
    assert policy(limit_s=progress.expected_downtime_s).decide(progress).action is Action.STOP_AND_COPY


@given(st.one_of(st.builds(XenPolicy), st.builds(DeadlinePolicy, deadline_s=st.floats(0.01, 1000))), progresses())
def test_those_without_a_limit_never_give_up(policy, progress):
    assert policy.decide(progress).action is not Action.ABORT


@given(progresses(), st.floats(0.1, 3))
def test_no_round_is_begun_that_would_pass_the_deadline_by_what_is_known(progress, rounds_left):
    round_s = progress.expected_downtime_s - progress.fixed_s
    deadline_s = progress.elapsed_s + rounds_left * (round_s + progress.expected_downtime_s)
    assume(round_s > 1e-9)  # a round that sent nothing tells nothing
    goes_on = DeadlinePolicy(deadline_s=deadline_s).decide(progress).action is Action.NEXT_ROUND
    assert not goes_on or rounds_left >= 1 - 1e-6


def simulated(policy, *, hot_pages, writes_per_s, wire_pages_per_s, pages):
    """Move a guest that writes ``hot_pages`` at random, as fast as it is let; return how it ended and each decision."""
    progress, seen, to_send, elapsed_s, decisions = None, (), pages, 0.0, []
    throttle = 0.0
    for index in range(200):
        duration_s = max(1e-6, to_send / wire_pages_per_s)
        written = writes_per_s * (1 - throttle) * duration_s
        left = round(hot_pages * (1 - (1 - 1 / hot_pages) ** written)) if hot_pages else 0
        seen = (*seen, made(index, to_send, duration_s, left))
        elapsed_s += duration_s
        progress = Progress(
            memory_pages=MEMORY_PAGES, rounds=seen, fixed_s=0.001, elapsed_s=elapsed_s, throttle=throttle
        )
        decisions.append(policy.decide(progress))
        throttle = decisions[-1].throttle
        if decisions[-1].action is not Action.NEXT_ROUND:
            return progress, decisions
        to_send = left
    raise AssertionError(f"{policy} went on for ever")


worlds = st.fixed_dictionaries(
    {
        "hot_pages": st.integers(0, 1 << 16),
        "writes_per_s": st.floats(0, 1e7),
        "wire_pages_per_s": st.floats(1e3, 1e6),
        "pages": st.integers(1, MEMORY_PAGES),
    }
)


@given(policies, worlds)
def test_every_migration_comes_to_an_end(policy, world):
    progress, decisions = simulated(policy, **world)
    assert decisions[-1].action is not Action.NEXT_ROUND
    assert len(progress.rounds) <= 100


@given(worlds)
def test_a_guest_that_the_wire_keeps_up_with_is_never_held_and_always_moves(world):
    assume(world["writes_per_s"] < 0.3 * world["wire_pages_per_s"])
    for policy in (DowntimePolicy(limit_s=0.3), ConvergePolicy(limit_s=0.3)):
        _, decisions = simulated(policy, **world)
        assert decisions[-1].action is Action.STOP_AND_COPY
        assert not any(decision.throttle for decision in decisions)


@given(st.floats(1e3, 1e5), st.floats(2.5, 8), st.integers(1 << 15, 1 << 16))
def test_a_guest_that_is_faster_than_the_wire_moves_when_it_is_held_enough(wire_pages_per_s, times, hot_pages):
    """With 95 % of its time taken it writes less than half of what the wire moves: then `converge` gets it across."""
    world = {"wire_pages_per_s": wire_pages_per_s, "writes_per_s": times * wire_pages_per_s, "hot_pages": hot_pages}
    _, decisions = simulated(ConvergePolicy(limit_s=0.3), pages=MEMORY_PAGES, **world)
    assert decisions[-1].action is Action.STOP_AND_COPY
