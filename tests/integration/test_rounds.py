"""Rounds of pre-copy: what is seen and changed of them, and guests that are throttled meanwhile."""

import threading
from functools import partial

import pytest
from altered import AlteredSource, alter
from at_work import runs_on
from trips import TIMEOUT_S, Rounds, Running, expect_as_before, source_of

from pageferry.core.errors import GuestAt, MigrationError, PolicyAbort, UsageError, VmError
from pageferry.core.events import RoundEnded
from pageferry.core.policies import DowntimePolicy, XenPolicy
from pageferry.core.policy import Action, Decision
from pageferry.engine.options import WireOptions
from pageferry.engine.precopy import Precopy


def test_a_round_cleans_part_by_part_and_reports_what_it_found(running, inn):
    vm = running("hotset")
    cleaned = []

    def watched(clean_range):
        return lambda gfns: (cleaned.append((gfns, clean_range(gfns))), cleaned[-1][1])[1]

    alter(vm.log_dirty, "clean_range", watched)
    small = AlteredSource.having({"source.Precopy": partial(Precopy, chunk_pages=1024)})
    report = source_of(vm, inn.open(), XenPolicy(max_rounds=3, min_dirty_pages=0), kind=small).run()
    assert report.verified
    assert runs_on(inn.outcome())
    limit = vm.memory.gfn_limit
    assert [gfns for gfns, _ in cleaned] == 2 * [range(first, first + 1024) for first in range(0, limit, 1024)]
    found = [bitmap.count() for _, bitmap in cleaned]
    per_round = limit // 1024
    assert [stats.dirty_pages for stats in report.rounds[1:3]] == [sum(found[:per_round]), sum(found[per_round:])]


class Holds:
    """Holds the guest for nine tenths of its time, and ends as told."""

    name = "holds"

    def __init__(self, action, vm):
        self._action = action
        self._held = threading.Event()
        freeze = vm.freeze

        def watched():
            freeze()
            if threading.current_thread().name == "throttle":
                self._held.set()

        alter(vm, "freeze", lambda _: watched)

    def decide(self, progress):
        if progress.last.index == 3:
            assert progress.throttle == 0.9
            assert self._held.wait(TIMEOUT_S)
            return Decision(action=self._action, reason="enough")
        return Decision(action=Action.NEXT_ROUND, reason="on", throttle=0.9)


def test_a_guest_that_was_held_back_arrives_and_is_free(running, inn):
    vm = running("hotset")
    report = source_of(vm, inn.open(), Holds(Action.STOP_AND_COPY, vm)).run()
    assert report.verified
    assert report.throttled_s > 0
    assert runs_on(inn.outcome())


def test_a_guest_that_was_held_back_is_let_go_when_the_policy_gives_up(running, inn):
    vm = running("hotset")
    source = source_of(vm, inn.open(), Holds(Action.ABORT, vm))
    with pytest.raises(PolicyAbort, match="enough"):
        source.run()
    assert runs_on(vm)
    with pytest.raises(VmError, match="not frozen"):
        vm.thaw()
    assert source.job.report.throttled_s > 0


def test_a_guest_that_was_held_back_is_let_go_when_the_policy_fails(running, inn):
    class Breaks:
        name = "breaks"

        def decide(self, progress):
            if progress.last.index == 2:
                raise UsageError("policy breaks failed: KeyError()", hint="mend it")
            return Decision(action=Action.NEXT_ROUND, reason="on", throttle=0.9)

    vm = running("hotset")
    with pytest.raises(MigrationError, match=r"^.*policy breaks failed") as caught:
        source_of(vm, inn.open(), Breaks()).run()
    assert (caught.value.guest_at, caught.value.hint) == (GuestAt.SOURCE, "mend it")
    assert runs_on(vm)
    with pytest.raises(VmError, match="not frozen"):
        vm.thaw()


def test_an_attempt_that_is_held_is_ready_and_waits(running, inn):
    vm = running("kv")
    policy = DowntimePolicy(limit_s=3600, max_rounds=4)  # rounds of an attempt that is held do not count
    eager = AlteredSource.having({"source.HELD_ROUND_S": 0.001})
    source = source_of(vm, inn.open(), policy, hold=True, kind=eager)
    moving = Running(source)
    moving.status("pre-switchover")
    moving.rounds(12)
    assert (source.job.status, source.job.frozen, source.job.guest_at) == ("pre-switchover", False, GuestAt.SOURCE)
    assert runs_on(vm)
    outlook = source.job.outlook()
    assert (outlook.eta_s, outlook.eta_reason) == (None, "it is ready, and held until it is told to go on")
    source.job.go_on()
    report = moving.end()
    assert (report.status, report.guest_at, report.verified) == ("completed", GuestAt.DESTINATION, True)
    assert runs_on(inn.outcome())


def test_an_attempt_that_is_held_can_be_cancelled(running, inn):
    vm = running("kv")
    source = source_of(vm, inn.open(), DowntimePolicy(limit_s=3600), hold=True)
    moving = Running(source)
    moving.status("pre-switchover")
    assert source.job.cancel()
    assert moving.end().status == "cancelled"
    assert isinstance(inn.outcome(), MigrationError)
    expect_as_before(vm, inn, source)


def test_limits_change_while_it_runs(running, inn):
    vm = running("kv")
    endless = DowntimePolicy(limit_s=1e-9, max_rounds=1_000_000)
    endpoint = inn.open()
    source = source_of(vm, endpoint, endless, on_event=lambda event: changes(event))

    def changes(event):
        if isinstance(event, RoundEnded) and event.stats.index == 1:
            with pytest.raises(UsageError, match="the downtime policy has no deadline"):
                source.job.change_limits({"deadline_s": 3})
            with pytest.raises(UsageError, match="positive limit"):
                source.job.change_limits({"downtime_limit_s": -1.0}, WireOptions(bandwidth_bytes_per_s=1 << 20))
            assert source.job.pacer.rate_bytes_per_s is None  # all or nothing
            source.job.change_limits({"downtime_limit_s": 3600.0}, WireOptions(bandwidth_bytes_per_s=1 << 30))

    report = source.run()
    assert (report.status, len(report.rounds)) == ("completed", 4)
    assert report.bandwidth_bytes_per_s == 1 << 30
    assert isinstance(inn.outcome(), type(vm))


def test_the_outlook_is_of_what_was_measured(running, inn):
    vm = running("idle")
    seen = []
    source = source_of(
        vm,
        inn.open(),
        Rounds(2),
        on_event=lambda e: seen.append(source.job.outlook()) if isinstance(e, RoundEnded) else None,
    )
    assert source.job.outlook().eta_reason == "nothing was sent yet"
    report = source.run()
    first = report.rounds[0]
    assert seen[0].wire_bytes_per_s == pytest.approx(first.sent_bytes / first.duration_s)
    assert seen[0].dirty_bytes_per_s == pytest.approx(first.remaining_pages * 4096 / first.duration_s)
    assert seen[0].expected_downtime_s > 0
    assert isinstance(inn.outcome(), type(vm))
