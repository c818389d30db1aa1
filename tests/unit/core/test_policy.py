import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import stats

from pageferry.core.errors import UsageError
from pageferry.core.policies import ConvergePolicy, DeadlinePolicy, DowntimePolicy, PostcopyPolicy, XenPolicy
from pageferry.core.policy import Action, Decision, Progress, may_switch
from pageferry.core.policy_names import load_policies, make_policy, with_limits


def progress(*rounds, fixed_s=0.0, memory_pages=100_000, throttle=0.0):
    return Progress(memory_pages=memory_pages, rounds=rounds, fixed_s=fixed_s, throttle=throttle)


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
    fits = progress(stats(0, sent=100_000, remaining=14_000), fixed_s=0.15)
    assert fits.expected_downtime_s == pytest.approx(0.29)
    assert policy.decide(fits).action is Action.STOP_AND_COPY
    assert policy.decide(progress(stats(0, sent=100_000, remaining=14_000), fixed_s=0.17)).action is Action.NEXT_ROUND


def test_downtime_gives_up_with_the_reason_when_it_cannot_converge():
    rounds = [stats(i, sent=100_000, remaining=90_000 - 1_500 * i) for i in range(30)]
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
    assert "verification alone take 400 ms, and 300 ms are allowed" in decision.reason


# -- a pause that fits and shrinks -------------------------------------------------------------------------------------


def remaining_after(*left):
    """Rounds of 100,000 pages a second that leave so many pages."""
    sent = (100_000, *left)
    return [stats(i, sent=sent[i], remaining=left[i], duration_s=sent[i] / 100_000) for i in range(len(left))]


@pytest.mark.parametrize("policy", [DowntimePolicy(limit_s=0.3), ConvergePolicy(limit_s=0.3)])
@pytest.mark.parametrize(
    ("left", "fixed_s", "goes_on"),
    [
        ((20_000,), 0.01, True),
        ((18_000,), 0.1, True),
        ((10_000,), 0.101, False),  # copying is the smaller part of the pause
        ((49,), 0.0, False),
        ((18_000, 9_000), 0.01, True),
        ((20_000, 10_001), 0.01, False),
        ((20_000, 10_000, 5_001), 0.01, False),
        ((90_000, 80_000, 20_000), 0.01, True),  # only rounds since it fits count
        ((20_000, 90_000, 20_000), 0.01, False),  # it did once, and then the guest wrote more: never again
    ],
)
def test_a_pause_that_fits_is_put_off_while_each_round_halves_it(policy, left, fixed_s, goes_on):
    decision = policy.decide(progress(*remaining_after(*left), fixed_s=fixed_s, throttle=0.25))
    assert decision.action is (Action.NEXT_ROUND if goes_on else Action.STOP_AND_COPY)
    if goes_on:
        assert "fits and shrinks" in decision.reason
        assert decision.throttle == (0.25 if policy.name == "converge" else 0.0)


def test_the_last_round_allowed_is_not_put_off():
    rounds = remaining_after(20_000)
    assert DowntimePolicy(max_rounds=1).decide(progress(*rounds)).action is Action.STOP_AND_COPY
    assert ConvergePolicy(max_rounds=1).decide(progress(*rounds)).action is Action.STOP_AND_COPY


@given(dirty=st.floats(0, 400_000), hot=st.integers(0, 29_000), fixed_s=st.floats(0, 0.01))
def test_putting_off_sends_less_than_twice_what_remained_and_never_lengthens_the_pause(dirty, hot, fixed_s):
    """The guest's hot set fits the limit from the beginning."""
    policy = DowntimePolicy(limit_s=0.3)
    decision, rounds, _ = guest(wire=100_000, dirty=dirty, hot=hot, policy=policy, fixed_s=fixed_s)
    assert decision.action is Action.STOP_AND_COPY
    assert sum(each.sent_pages for each in rounds[1:]) <= 2 * rounds[0].remaining_pages
    assert rounds[-1].remaining_pages <= rounds[0].remaining_pages


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


# -- the low-water mark ------------------------------------------------------------------------------------------------


def test_the_low_water_mark_is_the_first_round_as_good_as_the_best():
    rounds = [stats(i, sent=1000, remaining=left) for i, left in enumerate((900, 505, 700, 500, 600))]
    seen = progress(*rounds)
    assert (seen.low_water.index, seen.rounds_since_low_water) == (1, 3)


@pytest.mark.parametrize("policy", [DowntimePolicy(), ConvergePolicy(max_throttle=0.5)])
def test_no_policy_runs_on_past_its_low_water_mark(policy):
    """2 MB are left once, a little too much for the limit, and never so few again."""
    first = [stats(0, sent=100_000, remaining=50_000), stats(1, sent=50_000, remaining=40_000)]
    later = [stats(i, sent=60_000, remaining=60_000) for i in range(2, 20)]
    made = next(
        n for n in range(1, 20) if policy.decide(progress(*(first + later)[:n], throttle=0.5)).action is Action.ABORT
    )
    assert made == 10
    assert "156.2 MiB remained, after round 1" in policy.decide(progress(*(first + later)[:made], throttle=0.5)).reason


# -- deadline ----------------------------------------------------------------------------------------------------------


def guest(*, wire, dirty, hot, policy, memory=200_000, fixed_s=0.02):
    """Simulate a guest: pages a second on the wire and dirtied, distinct pages of its hot set; return its rounds."""
    rounds, elapsed_s, to_send, throttle = [], 0.0, memory, 0.0
    while True:
        duration_s = to_send / wire
        elapsed_s += duration_s
        remaining = int(min(hot, dirty * (1 - throttle) * duration_s))
        rounds.append(stats(len(rounds), sent=to_send, remaining=remaining, duration_s=max(duration_s, 1e-6)))
        seen = Progress(
            memory_pages=memory, rounds=tuple(rounds), fixed_s=fixed_s, elapsed_s=elapsed_s, throttle=throttle
        )
        decision = policy.decide(seen)
        if decision.action is not Action.NEXT_ROUND:
            return decision, rounds, elapsed_s + remaining / wire + fixed_s
        throttle, to_send = decision.throttle, remaining


@given(
    dirty=st.floats(0, 400_000),
    hot=st.integers(0, 200_000),
    deadline_s=st.floats(2.5, 60),
)
def test_a_deadline_that_can_be_kept_is_kept(dirty, hot, deadline_s):
    """Round 0 takes 2 s, and the pages that are dirty then at most 2 s more."""
    decision, rounds, total_s = guest(wire=100_000, dirty=dirty, hot=hot, policy=DeadlinePolicy(deadline_s=deadline_s))
    assert decision.action is Action.STOP_AND_COPY
    floor_s = 2.0 + rounds[0].remaining_pages / 100_000 + 0.02
    assert total_s <= max(deadline_s, floor_s) + 0.005  # pages are whole


def test_a_deadline_uses_its_time_to_shorten_the_downtime():
    _, rounds, _ = guest(wire=100_000, dirty=70_000, hot=10**6, policy=DeadlinePolicy(deadline_s=60))
    assert rounds[-1].remaining_pages < 50
    _, rounds, total_s = guest(wire=100_000, dirty=70_000, hot=10**6, policy=DeadlinePolicy(deadline_s=5))
    assert rounds[-1].remaining_pages > 50
    assert total_s <= 5


def test_a_deadline_that_has_passed_is_told_as_that():
    decision, rounds, _ = guest(wire=100_000, dirty=70_000, hot=10**6, policy=DeadlinePolicy(deadline_s=0.5))
    assert len(rounds) == 1
    assert decision.reason.startswith("the deadline passed 1.50 s ago, another round and what follows would take ")


def test_a_deadline_does_not_repeat_rounds_that_bring_nothing():
    decision, rounds, _ = guest(wire=100_000, dirty=10**6, hot=50_000, policy=DeadlinePolicy(deadline_s=600))
    assert len(rounds) <= 3
    assert "brings nothing" in decision.reason


# -- converge ----------------------------------------------------------------------------------------------------------


@given(dirty=st.floats(0, 5_000_000), hot=st.integers(0, 200_000))
def test_converge_ends_within_the_limit_whatever_the_guest_writes(dirty, hot):
    policy = ConvergePolicy(max_throttle=0.999)
    decision, rounds, _ = guest(wire=100_000, dirty=dirty, hot=hot, policy=policy)
    assert decision.action is Action.STOP_AND_COPY, decision
    assert rounds[-1].remaining_pages / 100_000 + 0.02 <= 0.3 + 1e-9


def test_a_guest_that_converges_by_itself_is_never_held():
    policy, throttles = ConvergePolicy(), []

    class Watched:
        def decide(self, seen):
            decision = policy.decide(seen)
            throttles.append(decision.throttle)
            return decision

    decision, rounds, _ = guest(wire=100_000, dirty=45_000, hot=10**6, policy=Watched())
    assert decision.action is Action.STOP_AND_COPY
    assert len(rounds) > 1
    assert set(throttles) == {0.0}


def test_a_guest_is_held_by_what_the_last_round_showed():
    # It dirtied as many pages as were sent: half of its time would have left half of them.
    full = stats(0, sent=100_000, remaining=100_000)
    assert ConvergePolicy().decide(progress(full)).throttle == pytest.approx(0.5)
    # It still did, throttled for half of its time: the other half of what it has left goes too.
    assert ConvergePolicy().decide(progress(full, throttle=0.5)).throttle == pytest.approx(0.75)
    assert ConvergePolicy().decide(progress(full, throttle=0.94)).throttle == pytest.approx(0.95)
    # It shrinks well, perhaps because it is throttled.
    shrinking = stats(0, sent=100_000, remaining=40_000)
    assert ConvergePolicy().decide(progress(shrinking, throttle=0.5)).throttle == pytest.approx(0.5)


# -- a user's own ------------------------------------------------------------------------------------------------------


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    text = (Path(__file__).parents[3] / "docs" / "guide" / "policies.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    (tmp_path / "users_policy.py").write_text(code + "\n\nclass Silent:\n    def decide(self, progress): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "users_policy", raising=False)


@pytest.fixture
def edit(tmp_path):
    return (tmp_path / "users_policy.py").write_text


def test_the_documented_example_decides(users_module):
    name = "users_policy:OneMebibyte"
    policy = make_policy(name, users_own=load_policies([name]), max_rounds=2)
    assert policy.name == "users_policy:OneMebibyte"
    assert policy.decide(progress(stats(0, sent=900, remaining=255))).action is Action.STOP_AND_COPY
    assert policy.decide(progress(stats(0, sent=900, remaining=256))).action is Action.NEXT_ROUND
    rounds = [stats(i, sent=900, remaining=256) for i in range(2)]
    assert policy.decide(progress(*rounds)).action is Action.STOP_AND_COPY


@pytest.mark.parametrize(
    "name", ["users_policy:Nobody", "no_such_module:X", "users_policy:Action", ":X", "users_policy:"]
)
def test_what_is_not_a_policy_is_told_before_anything_moves(users_module, name):
    with pytest.raises(UsageError, match=r"cannot be loaded|has no method decide"):
        load_policies([name])


@pytest.mark.parametrize(("name", "said"), [("Silent", "answered None"), ("OneMebibyte", "failed: AttributeError")])
def test_a_users_mistake_is_told_as_such(users_module, name, said):
    policies = load_policies([f"users_policy:{name}"])
    with pytest.raises(UsageError, match=said):
        make_policy(f"users_policy:{name}", users_own=policies).decide(None)


def test_an_option_that_a_users_policy_does_not_take_is_told_before_anything_moves(users_module):
    name = "users_policy:Silent"
    with pytest.raises(UsageError, match=r"users_policy:Silent takes no --max-rounds and no --deadline$") as told:
        make_policy(name, users_own=load_policies([name]), max_rounds=2, deadline_s=3.0)
    assert told.value.hint == "it takes no options"
    name = "users_policy:OneMebibyte"
    with pytest.raises(UsageError, match=r"takes no --deadline$") as told:
        make_policy(name, users_own=load_policies([name]), deadline_s=3.0)
    assert told.value.hint == "it takes --max-rounds"


def test_an_option_that_a_users_policy_needs_is_asked_for(users_module, edit):
    edit("class Late:\n    def __init__(self, deadline_s, colour): pass\n    def decide(self, progress): pass\n")
    with pytest.raises(UsageError, match="policy users_policy:Late needs --deadline and an argument colour"):
        make_policy("users_policy:Late", users_own=load_policies(["users_policy:Late"]))


def test_a_users_policy_that_takes_whatever_it_is_given_is_given_it(users_module, edit):
    edit("class Any:\n    def __init__(self, **given): self.given = given\n    def decide(self, progress): pass\n")
    policy = make_policy("users_policy:Any", users_own=load_policies(["users_policy:Any"]), max_rounds=2)
    assert policy.policy.given == {"max_rounds": 2}


def test_an_edited_policy_is_loaded_anew_for_each_attempt(users_module, edit):
    text = "from pageferry.core.policy import Action, Decision\nclass Now:\n    def decide(self, _):\n"
    text += "        return Decision(action=Action.ABORT, reason='A')\n"
    edit(text)
    policies = load_policies(["users_policy:Now"])
    first = make_policy("users_policy:Now", users_own=policies)
    edit(text.replace("'A'", "'B'"))  # as long, and in the same second
    assert make_policy("users_policy:Now", users_own=policies).decide(None).reason == "B"
    assert first.decide(None).reason == "A"
    edit("class Now(:")
    with pytest.raises(UsageError, match="cannot be loaded: SyntaxError"):
        make_policy("users_policy:Now", users_own=policies)
    edit(text)
    assert make_policy("users_policy:Now", users_own=policies).decide(None).reason == "A"


def test_a_policy_whose_file_is_as_it_was_is_not_loaded_anew(users_module):
    policies = load_policies(["users_policy:OneMebibyte"])
    kinds = {type(make_policy("users_policy:OneMebibyte", users_own=policies).policy) for _ in range(2)}
    assert len(kinds) == 1


def test_asking_for_a_policy_loads_nothing(users_module):
    allowed = load_policies(["users_policy:Silent"])
    before = set(sys.modules)
    for name in ("users_policy:OneMebibyte", "os:abort", "antigravity:Silent"):
        with pytest.raises(UsageError, match="was not named when the guest's process was started"):
            make_policy(name, users_own=allowed)
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("xen", {"downtime_limit_s": 1.0}, "the xen policy has no downtime limit"),
        ("deadline", {}, "needs a deadline"),
        ("deadline", {"deadline_s": 5.0, "max_rounds": 3}, "the deadline policy has no max rounds"),
        ("converge", {"deadline_s": 5.0}, "the converge policy has no deadline"),
        ("nope", {}, "unknown policy"),
    ],
)
def test_an_option_belongs_to_its_policy(name, options, said):
    with pytest.raises(UsageError, match=said):
        make_policy(name, **options)


@pytest.mark.parametrize("throttle", [-0.1, 1.0, float("nan")])
def test_a_guest_is_not_throttled_for_ever(throttle):
    with pytest.raises(UsageError, match="cannot be throttled"):
        Decision(action=Action.NEXT_ROUND, reason="", throttle=throttle)


def test_limits_are_changed_by_name():
    changed = with_limits(DowntimePolicy(limit_s=0.1, max_rounds=7), {"downtime_limit_s": 0.5})
    assert changed == DowntimePolicy(limit_s=0.5, max_rounds=7)
    assert with_limits(changed, {}) is changed
    with pytest.raises(UsageError, match="the xen policy has no downtime limit"):
        with_limits(XenPolicy(), {"downtime_limit_s": 0.5})
    with pytest.raises(UsageError, match="positive limit"):
        with_limits(changed, {"downtime_limit_s": -1.0})


def test_a_users_own_policy_keeps_its_limits():
    class Own:
        name = "own:Policy"

        def decide(self, progress):
            raise AssertionError

    with pytest.raises(UsageError, match="limits of policy own:Policy are its own"):
        with_limits(Own(), {"max_rounds": 3})


def test_postcopy_stops_where_the_pause_fits():
    policy = PostcopyPolicy(limit_s=0.3)
    fits = progress(stats(0, sent=100_000, remaining=20_000), fixed_s=0.09)
    assert policy.decide(fits).action is Action.STOP_AND_COPY
    assert policy.decide(progress(stats(0, sent=100_000, remaining=20_000), fixed_s=0.11)).action is Action.NEXT_ROUND


def test_postcopy_switches_after_its_rounds_and_says_what_is_left():
    rounds = [stats(i, sent=100_000, remaining=90_000 - 1_500 * i) for i in range(3)]
    assert [PostcopyPolicy().decide(progress(*rounds[:n])).action for n in (1, 2)] == [Action.NEXT_ROUND] * 2
    decision = PostcopyPolicy().decide(progress(*rounds))
    assert decision.action is Action.POST_COPY
    assert "339.8 MiB are left to come after the switch" in decision.reason
    assert PostcopyPolicy(max_rounds=1).decide(progress(rounds[0])).action is Action.POST_COPY


def test_postcopy_makes_no_round_that_brings_it_no_nearer():
    rounds = [stats(0, sent=100_000, remaining=50_000), stats(1, sent=50_000, remaining=60_000)]
    assert PostcopyPolicy(max_rounds=9).decide(progress(*rounds)).action is Action.POST_COPY


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=12))
def test_postcopy_always_ends(remaining):
    rounds = [stats(i, sent=100_000, remaining=pages) for i, pages in enumerate(remaining)]
    decision = PostcopyPolicy(max_rounds=len(rounds)).decide(progress(*rounds, fixed_s=1.0))
    assert decision.action is Action.POST_COPY


def test_only_a_policy_that_says_so_may_switch():
    class Own:
        switches = True

        def decide(self, progress):
            return Decision(action=Action.POST_COPY, reason="its own")

    assert [may_switch(policy) for policy in (PostcopyPolicy(), Own(), XenPolicy(), DowntimePolicy())] == [
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(UsageError, match="positive limit"):
        PostcopyPolicy(limit_s=0)
    with pytest.raises(UsageError, match="the postcopy policy has no deadline"):
        make_policy("postcopy", deadline_s=1.0)
