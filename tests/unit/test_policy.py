import pytest
from hypothesis import given
from hypothesis import strategies as st

from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.policy import Action, DowntimePolicy, Progress, RoundStats, XenPolicy, make_policy


def stats(index, *, sent, remaining, duration_s=1.0):
    return RoundStats(
        index=index,
        dirty_pages=sent,
        sent_pages=sent,
        sent_bytes=sent * PAGE_SIZE,
        duration_s=duration_s,
        remaining_pages=remaining,
    )


def progress(*rounds, fixed_s=0.0, memory_pages=100_000):
    return Progress(memory_pages=memory_pages, rounds=rounds, fixed_s=fixed_s)


def test_xen_stops_under_50_dirty_pages():
    policy = XenPolicy()
    assert policy.decide(progress(stats(0, sent=1000, remaining=50))).action is Action.NEXT_ROUND
    assert policy.decide(progress(stats(0, sent=1000, remaining=49))).action is Action.STOP_AND_COPY


def test_xen_stops_at_five_rounds():
    rounds = [stats(i, sent=1000, remaining=900) for i in range(5)]
    assert XenPolicy().decide(progress(*rounds[:4])).action is Action.NEXT_ROUND
    assert XenPolicy().decide(progress(*rounds)).action is Action.STOP_AND_COPY


def test_xen_stops_when_three_times_the_memory_was_sent():
    policy = XenPolicy(max_rounds=99)
    rounds = [stats(i, sent=1000, remaining=900) for i in range(4)]
    assert policy.decide(progress(*rounds[:3], memory_pages=1000)).action is Action.NEXT_ROUND
    assert policy.decide(progress(*rounds, memory_pages=1000)).action is Action.STOP_AND_COPY


def test_downtime_counts_what_is_left_and_the_fixed_part():
    policy = DowntimePolicy(limit_s=0.3)
    # 100,000 pages a second: 20,000 pages are 0.2 s
    fits = progress(stats(0, sent=100_000, remaining=20_000), fixed_s=0.09)
    assert fits.expected_downtime_s == pytest.approx(0.29)
    assert policy.decide(fits).action is Action.STOP_AND_COPY
    assert policy.decide(progress(stats(0, sent=100_000, remaining=20_000), fixed_s=0.11)).action is Action.NEXT_ROUND


def test_downtime_gives_up_with_the_reason_when_it_cannot_converge():
    rounds = [stats(i, sent=100_000, remaining=90_000) for i in range(30)]
    decision = DowntimePolicy().decide(progress(*rounds))
    assert decision.action is Action.ABORT
    assert "no convergence in 30 rounds" in decision.reason
    assert DowntimePolicy().decide(progress(*rounds[:29])).action is Action.NEXT_ROUND


def test_downtime_gives_up_soon_when_the_fixed_part_alone_is_too_long():
    rounds = [stats(i, sent=100, remaining=1) for i in range(3)]
    policy = DowntimePolicy(limit_s=0.3)
    assert policy.decide(progress(*rounds[:2], fixed_s=0.4)).action is Action.NEXT_ROUND
    decision = policy.decide(progress(*rounds, fixed_s=0.4))
    assert decision.action is Action.ABORT
    assert "verification alone" in decision.reason


@given(
    st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 10**7), st.floats(0, 100)), min_size=1, max_size=40),
    st.sampled_from([XenPolicy(), DowntimePolicy()]),
)
def test_every_policy_ends(rounds, policy):
    history = [stats(i, sent=s, remaining=r, duration_s=d) for i, (s, r, d) in enumerate(rounds)]
    decision = policy.decide(progress(*history))
    assert decision == policy.decide(progress(*history))
    assert decision.reason
    if len(history) >= 30:
        assert decision.action is not Action.NEXT_ROUND


def test_policies_by_name():
    assert make_policy("xen", max_rounds=3) == XenPolicy(max_rounds=3)
    assert make_policy("downtime", downtime_limit_s=0.1) == DowntimePolicy(limit_s=0.1)
    for bad in (
        {"name": "fast"},
        {"name": "xen", "downtime_limit_s": 0.1},
        {"name": "downtime", "downtime_limit_s": 0.0},
        {"name": "downtime", "downtime_limit_s": float("nan")},
        {"name": "xen", "max_rounds": 0},
    ):
        with pytest.raises(UsageError):
            make_policy(**bad)
