"""Law 7: memory is proven equal, while the guest runs and at the pause; what differs fails closed."""

import pytest
from altered import AlteredDestination, AlteredSource, alter, lacking
from at_work import runs_on
from tiers import sample
from trips import Rounds, expect_as_before, source_of

from mutation.audit_checks import InventsAudits
from mutation.fault import injected
from mutation.tracker_marks import MarksNothing
from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import MigrationError, PeerError, VerifyError
from pageferry.core.events import Phase, PhaseBegan, RoundBegan
from pageferry.core.frames import gpa_of
from pageferry.engine import features
from pageferry.engine.accounts import PageAccounts
from pageferry.engine.options import VerifyMode
from pageferry.engine.verify import prove
from pageferry.engine.verify.cost import ProofCost
from pageferry.engine.verify.digests import digest_runs
from pageferry.testing.operators import STRAY_GFN


def test_law_7_memory_is_equal_at_the_pause(running, inn):
    vm = running("random", working_set_bytes=8 << 20)
    taken = {}

    def before_run(there, name):
        populated = vm.memory.populated()
        taken["equal"] = all(
            bytes(a) == bytes(b)
            for a, b in zip(vm.memory.views(*populated), there.memory.views(*populated), strict=True)
        )
        taken["name"] = name

    source_of(vm, inn.open(before_run=before_run), name="rnd").run()
    assert inn.outcome() is not None
    assert taken == {"equal": True, "name": "rnd"}


def corrupting(inn, change):
    """The destination's machines change their memory by ``change(memory)`` after everything was received."""
    plain = inn.make_vm
    inn.make_vm = injected(
        plain, lambda vm: alter(vm, "load_state", lambda load: lambda state: (load(state), change(vm.memory)))
    )
    return plain


@pytest.mark.parametrize(
    "workload", sample(["kv", "random", "sweep", "idle"], "to the engine guests differ little", quick=["kv"])
)
def test_an_audit_proves_memory_while_the_guest_runs(running, inn, workload):
    vm = running(workload)
    equal = []

    def before_run(there, name):
        populated = vm.memory.populated()
        pairs = zip(vm.memory.views(*populated), there.memory.views(*populated), strict=True)
        equal.append(all(bytes(a) == bytes(b) for a, b in pairs))

    report = source_of(vm, inn.open(before_run=before_run), Rounds(3), verify=VerifyMode.AUDIT).run()
    there = inn.outcome()
    assert isinstance(there, type(vm)), there
    assert equal == [True]
    assert runs_on(there)
    # A page that the guest only read since the last look has storage, but is zero and was never sent.
    stored = expand_runs(*vm.memory.populated())
    zeros = sum(not any(view) for view in vm.memory.page_views(stored))
    assert stored.size - zeros <= report.verified_pages <= stored.size
    # Pages not written after they were sent are proven already, and without a limit not again.
    lay_still = report.verified_pages - report.rounds[-1].sent_pages
    assert max(1, lay_still - zeros) <= report.audited_pages <= lay_still


def test_audited_pages_are_proven_again_as_far_as_the_limit_allows(running, inn):
    vm = running("idle")
    fast = AlteredSource.having({"verify.cost.digest_pages_per_s": lambda *_: 1e9})
    report = source_of(vm, inn.open(), Rounds(2, limit_s=3600.0), verify=VerifyMode.AUDIT, kind=fast).run()
    assert isinstance(inn.outcome(), type(vm))
    assert (report.verified, report.audited_pages) == (True, 0)


def noting(calls, name):
    """Wrap a function: each call of it adds ``name``."""
    return lambda sound: lambda *args: (calls.append(name), sound(*args))[1]


@pytest.mark.parametrize(("gfn", "workings"), [(None, 1), ("proven", 2), ("never touched", 2)])
def test_what_the_pause_proves_is_worked_out_before_and_anew_if_something_was_written(guests, inn, gfn, workings):
    vm, calls = guests("idle"), []
    stored = expand_runs(*vm.memory.populated())
    at = {None: None, "proven": int(stored[-1]), "never touched": int(stored[-1]) + 9}[gfn]

    def on_event(event):
        if at is not None and isinstance(event, PhaseBegan) and event.phase is Phase.PAUSE:
            vm.memory.write(gpa_of(at), b"late")

    kind = AlteredSource.having({"verify.prove._merged": noting(calls, "merged")(prove._merged)})
    options = {"verify": VerifyMode.AUDIT, "on_event": on_event, "kind": kind}
    report = source_of(vm, inn.open(), Rounds(2), **options).run()
    there = inn.outcome()
    assert report.verified
    assert len(calls) == workings
    assert report.rounds[-1].sent_pages == (at is not None)
    if at is not None:
        assert there.memory.read(gpa_of(at), 4) == b"late"
    assert report.audited_pages == report.verified_pages - (at is not None)


def test_the_destination_finds_what_has_storage_while_the_source_does(running, inn):
    calls = []
    inn.make_vm = injected(inn.make_vm, lambda vm: alter(vm.memory, "populated", noting(calls, "look")))
    inn.kind = AlteredDestination.having({"verify.compare.digest_runs": noting(calls, "digest")(digest_runs)})
    vm = running("idle")
    source_of(vm, inn.open(), Rounds(2), verify=VerifyMode.FULL).run()
    assert isinstance(inn.outcome(), type(vm))
    assert calls[:2] == ["look", "digest"]
    assert calls.count("look") == 1


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("verify", VerifyMode)
def test_nothing_is_measured_between_a_round_and_the_pause(running, inn, verify, rounds):
    vm = running("idle")
    calls = []

    def on_event(event):
        if isinstance(event, RoundBegan):
            calls.append("round")

    alter(vm.memory, "populated", noting(calls, "populated"))  # measuring begins so
    alter(vm, "freeze", noting(calls, "freeze"))
    source_of(vm, inn.open(), Rounds(rounds), verify=verify, on_event=on_event).run()
    assert isinstance(inn.outcome(), type(vm))
    until_pause = calls[: len(calls) - calls[::-1].index("freeze")]
    assert until_pause.count("round") == rounds
    assert until_pause[-2:] == ["round", "freeze"]
    assert until_pause[until_pause.index("round") - 1] == "populated"


def test_measuring_takes_a_twentieth_of_the_time_at_most(guests):
    vm = guests("idle")
    now, looks, populated = [0.0], [], vm.memory.populated

    def look():
        now[0] += 0.02
        looks.append(now[0])
        return populated()

    alter(vm.memory, "populated", lambda _: look)

    def now_s():
        now[0] += 1e-6
        return now[0]

    cost = ProofCost(vm.memory, PageAccounts(vm.memory.gfn_limit), now_s)
    for step_s in (0.0, 0.39, 0.02, 0.39, 0.02):
        now[0] += step_s
        cost.measure()
    assert looks == pytest.approx([0.02, 0.45, 0.88], abs=0.001)


@pytest.mark.parametrize(("limit_s", "audits"), [(1e-6, True), (3600.0, False), (None, False)])
def test_by_itself_it_audits_where_the_limit_is_too_small_for_all(running, inn, limit_s, audits):
    vm = running("idle")
    report = source_of(vm, inn.open(), Rounds(2, limit_s=limit_s)).run()
    assert isinstance(inn.outcome(), type(vm))
    assert report.verified
    assert (report.audited_pages > 0) == audits


def test_an_audit_finds_a_lost_page_while_the_guest_runs(running, inn):
    vm = running("idle")
    sound = vm.log_dirty
    vm.replace_tracker(MarksNothing(vm))
    vm.memory.write(gpa_of(STRAY_GFN), b"sent in round 0")
    policy = Rounds(1000)

    def write_unmarked(event):
        if isinstance(event, RoundBegan) and event.index == 1:
            vm.memory.write(gpa_of(STRAY_GFN), b"never reported")
            policy.limit_s = 1e-6  # so it audits from the next round on

    source = source_of(vm, inn.open(), policy, on_event=write_unmarked)
    with pytest.raises(PeerError, match=r"memory is not ours, and .*MarksNothing reported no write") as failed:
        source.run()
    assert isinstance(failed.value.__cause__, VerifyError)
    assert failed.value.__cause__.gfn == STRAY_GFN
    assert isinstance(inn.outcome(), MigrationError)
    vm.replace_tracker(sound)
    expect_as_before(vm, inn, source)


def test_a_destination_believes_no_audit_that_it_has_not_seen(running, inn):
    vm = running("idle")
    source = source_of(vm, inn.open(), Rounds(1), verify=VerifyMode.AUDIT, kind=InventsAudits)
    with pytest.raises(PeerError, match="a page was never proven equal"):
        source.run()
    assert isinstance(inn.outcome(), MigrationError)
    expect_as_before(vm, inn, source)


def test_a_destination_that_cannot_audit_does_not_matter_unless_it_must(running, inn):
    vm = running("idle")
    inn.kind = lacking(features.AUDIT)
    source = source_of(vm, inn.open(), Rounds(1), verify=VerifyMode.AUDIT)
    with pytest.raises(PeerError, match="cannot audit"):
        source.run()
    assert source.job.report.rounds == ()
    assert isinstance(inn.outcome(), MigrationError)
    report = source_of(vm, inn.open(), Rounds(1, limit_s=1e-6)).run()
    assert isinstance(inn.outcome(), type(vm))
    assert (report.verified, report.audited_pages) == (True, 0)


def test_a_mismatch_names_the_first_gfn_and_fails_closed(running, inn):
    vm = running()

    def flip(memory):
        for gfn in (0x10, 0x101, 0x102):
            memory.write(gfn * 4096 + 77, bytes([memory.read(gfn * 4096 + 77, 1)[0] ^ 1]))

    plain = corrupting(inn, flip)
    source = source_of(vm, inn.open())
    with pytest.raises(PeerError, match="first difference at gfn 0x10 "):
        source.run()
    assert isinstance(inn.outcome(), PeerError)
    assert not source.job.report.verified
    inn.make_vm = plain
    expect_as_before(vm, inn, source)


def test_a_page_that_only_the_destination_has_fails_closed(running, inn):
    vm = running()
    last_gfn = vm.memory.gfn_limit - 1
    assert last_gfn not in expand_runs(*vm.memory.populated()).tolist()
    plain = corrupting(inn, lambda memory: memory.write(last_gfn * 4096 + 4095, b"\1"))
    source = source_of(vm, inn.open())
    with pytest.raises(
        PeerError, match=f"not zero here that is zero at the source: first difference at gfn {last_gfn:#x}"
    ):
        source.run()
    inn.outcome()
    inn.make_vm = plain
    expect_as_before(vm, inn, source)
