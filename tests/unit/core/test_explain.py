"""The sentences of a report, case by case; their numbers against the policies and against sums made here."""

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from reports import NOTHING_SENT, PARTS, failed, report, stats

from pageferry.core.errors import GuestAt
from pageferry.core.events import PostcopyStats
from pageferry.core.explain import explain
from pageferry.core.guest_time import GuestTime
from pageferry.core.policies import ConvergePolicy, DowntimePolicy
from pageferry.core.policy import Action, Progress
from pageferry.core.sent_pages import HotRange

MiB = 1 << 20


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (
            report((1000, 100), fixed_s=0.02),
            "It stopped the guest after 1 round of pre-copy: it fits. The pause took 10.0 ms where 120.0 ms were "
            "expected; 40% of it was stop-and-copy.",
        ),
        (
            failed((1000, 900), (900, 800)),
            "It did not move the guest, after 2 rounds of pre-copy: no convergence.",
        ),
        (failed(reason="refused"), "It did not move the guest, after 0 rounds of pre-copy: refused."),
        (
            failed((1000, 900), status="cancelled", action=Action.NEXT_ROUND),
            "It was cancelled after 1 round of pre-copy; the guest is at the source.",
        ),
        (
            failed((1000, 9), guest_at=GuestAt.UNKNOWN, action=Action.STOP_AND_COPY, reason="cut after the commit"),
            "Whether the guest moved is not known: cut after the commit.",
        ),
    ],
)
def test_the_outcome_says_why_it_ended(made, says):
    assert explain(made).outcome == says


def test_the_wires_rate_is_set_against_the_guests():
    sent = replace(NOTHING_SENT, rewritten_pages=24 * 256)
    made = report((512 * 256, 256 * 256), (256 * 256, 128 * 256), sent=sent)
    made = replace(made, rounds=(*made.rounds, stats(2, 77, 0, final=True)))
    assert explain(made).rates == (
        "The wire moved 384 MiB/s, the guest dirtied 192 MiB/s or more, in 24 MiB that were sent more than once.",
    )
    assert explain(report((256, 0))).rates == ("The wire moved 1 MiB/s, the guest dirtied 0 B/s or more.",)
    assert explain(report((256, 0), bandwidth_bytes_per_s=2 * MiB)).rates == (
        "The wire moved 1 MiB/s (50% of the 2 MiB/s that --bandwidth allowed), the guest dirtied 0 B/s or more.",
    )
    assert explain(report((0, 0))).rates == ()
    assert explain(failed()).rates == ()


def guest_time(**changes):
    nothing = {"work_before_per_s": None, "work_during_per_s": None, "work_after_per_s": None, "lost_s": None}
    return GuestTime(**{"precopy_s": 4.0, "rehearsal_s": 0.0, "enable_s": 0.0, "clean_s": 0.0, **nothing, **changes})


@pytest.mark.parametrize(
    ("time", "changes", "lines"),
    [
        (None, {}, ()),
        (guest_time(), {}, ()),
        (
            guest_time(work_before_per_s=1000.0, work_during_per_s=250.0, lost_s=3.0),
            {},
            (
                "In 4.00 s of pre-copy the guest did 75% less work than before it (1,000 operations a second before, "
                "250 during): 3.00 s of its time lost.",
            ),
        ),
        (
            guest_time(work_before_per_s=1000.0, work_during_per_s=1100.0, lost_s=-0.4),
            {},
            (
                "In 4.00 s of pre-copy the guest did 10% more work than before it (1,000 operations a second before, "
                "1,100 during).",
            ),
        ),
        (
            guest_time(rehearsal_s=0.002, enable_s=0.001, clean_s=0.25),
            {"throttled_s": 1.5},
            (
                "Known stalls: throttled by the policy for 1.50 s, frozen for 2.0 ms to rehearse saving its state, "
                "ENABLE 1.0 ms, CLEAN 250.0 ms.",
            ),
        ),
        (guest_time(), {"fault_count": 1234}, ("It took 1,234 write faults to find its dirty pages.",)),
        (guest_time(), {"fault_count": 0}, ()),
        (
            guest_time(lost_s=3.0, rehearsal_s=0.5),
            {"fault_count": 1000, "throttled_s": 1.5},
            (
                "Known stalls: throttled by the policy for 1.50 s, frozen for 500.0 ms to rehearse saving its state.",
                "It took 1,000 write faults to find its dirty pages: at most 1.0 ms of its time each.",
            ),
        ),
        (
            guest_time(lost_s=1.0),
            {"fault_count": 1000, "throttled_s": 1.5},
            (
                "Known stalls: throttled by the policy for 1.50 s.",
                "It took 1,000 write faults to find its dirty pages.",
            ),
        ),
    ],
)
def test_where_the_guests_time_went(time, changes, lines):
    assert explain(report((1000, 0), guest_time=time, **changes)).guest_time == lines


def test_faults_that_were_not_counted_are_at_least_the_pages_that_cleans_reported():
    made = report((1000, 70), (70, 30), (30, 0), guest_time=guest_time())
    assert explain(made).guest_time == (
        "Its first writes to 100 protected pages took a fault each, or were marked by a device.",
    )
    assert explain(report((1000, 1), (1, 0), guest_time=guest_time())).guest_time == (
        "Its first write to 1 protected page took a fault, or was marked by a device.",
    )


def test_hot_ranges_are_told_with_their_share():
    ranges = tuple(
        HotRange(first_gfn=first, pages=256, sent_pages=again + 256, again_pages=again)
        for first, again in ((0x1000, 600), (0x400, 300), (0x9000, 49), (0xA000, 48))
    )
    made = report((1000, 0), sent=replace(NOTHING_SENT, again_pages=1000, rewritten_pages=1000, hot=ranges))
    assert explain(made).hot == (
        "gfn 0x1000 to 0x10ff (1 MiB): 60% of the 1,000 pages that were sent again.",
        "gfn 0x400 to 0x4ff (1 MiB): 30% of the 1,000 pages that were sent again.",
    )
    assert explain(report((1000, 0))).hot == ()
    one = HotRange(first_gfn=2, pages=1, sent_pages=2, again_pages=1)
    made = report((1000, 0), sent=replace(NOTHING_SENT, again_pages=1, rewritten_pages=1, hot=(one,)))
    assert explain(made).hot == ("gfn 0x2 (4 KiB): 100% of the 1 page that was sent again.",)


@given(
    st.lists(st.tuples(st.integers(1, 50_000), st.integers(0, 50_000)), min_size=1, max_size=12),
    st.floats(0.0, 2.0),
)
def test_the_limit_that_is_proposed_is_one_that_the_policy_meets_after_that_round(rounds, fixed_s):
    made = failed(*rounds, fixed_s=fixed_s)
    says = re.match(r"A downtime limit of (\d+) ms would have been met after round (\d+):", explain(made).advice[0])
    assume(int(says[1]))
    policy = DowntimePolicy(limit_s=int(says[1]) / 1e3, max_rounds=1000)
    met = [
        index
        for index in range(len(rounds))
        if policy.decide(Progress(memory_pages=1, rounds=made.rounds[: index + 1], fixed_s=fixed_s)).reason.startswith(
            "the downtime fits"
        )
    ]
    assert met[0] == int(says[2])
    assume(int(says[1]) > 10)
    smaller = DowntimePolicy(limit_s=(int(says[1]) - 10) / 1e3, max_rounds=1000)
    for index in range(len(rounds)):
        progress = Progress(memory_pages=1, rounds=made.rounds[: index + 1], fixed_s=fixed_s)
        assert not smaller.decide(progress).reason.startswith("the downtime fits")


@given(st.integers(1, 50_000), st.integers(0, 50_000))
def test_the_throttle_that_is_proposed_is_converges(sent, remaining):
    made = failed((sent, remaining), fixed_s=0.0)
    throttle = ConvergePolicy().throttle_for(Progress(memory_pages=1, rounds=made.rounds, fixed_s=0.0))
    says = [line for line in explain(made).advice if line.startswith("--policy converge")]
    assert bool(says) == bool(throttle)
    assert not says or f"for {throttle:.0%} of its time" in says[0]


def test_no_throttle_is_proposed_where_state_and_verification_are_most_of_the_pause():
    assert len(explain(failed((1000, 1000), fixed_s=0.99)).advice) == 2
    assert len(explain(failed((1000, 1000), fixed_s=1.01)).advice) == 1


def test_what_converge_could_not_do_is_not_proposed_to_it():
    advice = explain(failed((1000, 1000), policy="converge")).advice
    assert [line.split(" would")[0] for line in advice] == ["A downtime limit of 1010 ms"]


def test_a_policy_of_ones_own_and_a_cut_wire_get_no_advice():
    assert explain(failed((1000, 1000), policy="mine:Own")).advice == ()
    assert explain(failed((1000, 1000), action=Action.NEXT_ROUND)).advice == ()
    assert explain(failed()).advice == ()


def test_an_earlier_pause_that_was_cheaper_is_told():
    advice = explain(report((1000, 100), (1000, 50), (1000, 400), policy="xen", fixed_s=0.0)).advice
    assert advice == ("A pause after round 1 would have cost less: 50.0 ms were expected then, 400.0 ms at the end.",)
    assert explain(report((1000, 100), (1000, 50), (1000, 60), policy="xen", fixed_s=0.0)).advice == ()


def test_a_pause_that_was_mostly_verification_is_told():
    parts = {**PARTS, "verify": 0.02}
    made = report((1000, 10), downtime_s=sum(parts.values()), downtime_parts_s=parts)
    begin = "Another round would not have made the pause much shorter: to prove"
    assert explain(made).advice == (
        f"{begin} 64 MiB equal was most of it; --verify audit proves most while the guest runs.",
    )
    audited = replace(made, audited_pages=8192)
    assert explain(audited).advice == (f"{begin} 32 MiB equal was most of it.",)
    assert explain(replace(made, file="guest.bin")).advice == (f"{begin} 64 MiB equal was most of it.",)


LATE = PostcopyStats(
    missing_pages=5000,
    sent_pages=5000,
    zero_pages=10,
    urgent_pages=40,
    duration_s=2.5,
    cuts=0,
    cut_s=0.0,
    waits=50,
    waited_s=0.2,
    median_wait_s=0.004,
    p99_wait_s=0.02,
    longest_wait_s=0.03,
)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {},
            "; it waited 50 times for some of them, 200.0 ms in all "
            "(half of them no longer than 4.0 ms, none than 30.0 ms).",
        ),
        ({"waits": None, "waited_s": None}, "."),
        ({"waits": 0, "waited_s": 0.0}, "."),
        (
            {"waits": 0, "waited_s": 0.0, "cuts": 1, "cut_s": 1.5},
            ". The connection was cut once, and it stood still for 1.50 s.",
        ),
        ({"waits": 0, "cuts": 2, "cut_s": 1.5}, ". The connection was cut 2 times, and it stood still for 1.50 s."),
    ],
)
def test_what_came_after_the_switch_and_what_it_cost(changes, words):
    made = report((100_000, 50_000), action=Action.POST_COPY, postcopy=replace(LATE, **changes))
    outcome = "It switched the guest after 1 round of pre-copy: it fits. 5,000 pages came in the 2.50 s after that"
    assert explain(made).outcome == outcome + words
