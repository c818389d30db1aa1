"""The engine over real machines and real sockets: success, and every way to fail before and after the commit."""

import contextlib
import functools
import socket
import struct
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from at_work import runs_on, work
from tiers import sample
from trips import TIMEOUT_S, Rounds, Running, source_of

from mutation.mark_faults import MarksNothing
from pageferry import __version__
from pageferry.core.bitmap import expand_runs
from pageferry.core.cpuid import SOFT_CPU
from pageferry.core.errors import (
    GuestAt,
    LostPageError,
    MigrationError,
    PeerError,
    PolicyAbort,
    TransportError,
    UsageError,
    VerifyError,
    VmError,
)
from pageferry.core.events import (
    DOWNTIME_PHASES,
    MigrationEnded,
    Phase,
    PhaseBegan,
    RoundBegan,
    RoundEnded,
    RoundProgress,
)
from pageferry.core.frames import gpa_of
from pageferry.core.memory import GuestMemory
from pageferry.core.policies import DowntimePolicy, XenPolicy
from pageferry.core.policy import Action, Decision
from pageferry.core.vm import MachineModel, VmConfig, VmStatus
from pageferry.engine import features as features_module
from pageferry.engine import precopy
from pageferry.engine import report as report_module
from pageferry.engine import source as source_module
from pageferry.engine.accounts import PageAccounts
from pageferry.engine.options import VerifyMode, WireOptions
from pageferry.engine.precopy import Precopy
from pageferry.engine.verify import audit as audit_module
from pageferry.engine.verify import cost as cost_module
from pageferry.engine.verify import digests as verify_module
from pageferry.engine.verify.cost import ProofCost
from pageferry.engine.wire.channel import Endpoint
from pageferry.engine.wire.peer import Peer, PeerFailedError
from pageferry.guests.boot import boot
from pageferry.guests.workloads import load_workload
from pageferry.hypervisor import audit
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.vm import KvmVm
from pageferry.stream.encoder import Encoder
from pageferry.stream.ferry import PROTOCOL_VERSION
from pageferry.stream.ferry_frames import FrameType, SourceHello
from pageferry.stream.ferry_order import Side
from pageferry.stream.records import CpuidPolicy, StaticDataEnd
from pageferry.testing.operators import STRAY_GFN
from pageferry.witness.cross_check import CrossCheck


def marker(frame_type):
    return struct.pack("<I", frame_type)


@contextlib.contextmanager
def cut_when_held(wire):
    """Cut the wire as soon as it holds what it was told to hold; what is held is lost."""
    cutter = threading.Thread(target=lambda: (wire.held.wait(TIMEOUT_S), wire.cut()))
    cutter.start()
    yield
    cutter.join()


def attempt(vm, uri, policy=None, **options):
    endpoint = uri if isinstance(uri, Endpoint) else Endpoint.parse(uri)
    return source_of(vm, endpoint, policy or XenPolicy(), **options)


def expect_as_before(vm, inn, source):
    """Law 5: the source as it was, log-dirty off, nobody at the destination, and the next attempt works."""
    assert source.job.report.status in ("failed", "cancelled")
    assert source.job.report.guest_at is GuestAt.SOURCE
    assert not vm.log_dirty.enabled
    assert vm.status is VmStatus.RUNNING
    assert runs_on(vm)
    second = attempt(vm, inn.open())
    assert second.run().status == "completed"
    assert runs_on(inn.outcome())


@pytest.mark.parametrize(
    "workload",
    sample(
        ["kv", "hotset", "sweep", "idle", "dma", "timers"], "to the engine guests differ little", quick=["kv", "dma"]
    ),
)
def test_a_running_guest_moves_and_runs_on(guests, inn, accel, workload):
    vm = guests(workload)
    events = []
    vm.resume()
    assert runs_on(vm)
    source = attempt(vm, inn.open(), on_event=events.append)
    report = source.run()
    there = inn.outcome()
    assert isinstance(there, type(vm)), there
    assert there.status is VmStatus.RUNNING
    assert work(there) >= work(vm)
    assert runs_on(there)
    assert not vm.log_dirty.enabled
    frozen_work = work(vm)
    vm.resume()  # a guest that has left does not come back by a mere resume
    assert work(vm) == frozen_work

    assert (report.status, report.guest_at) == ("completed", GuestAt.DESTINATION)
    assert (report.source_accel, report.destination_accel) == (accel, accel)
    assert report.verified
    assert report.verified_pages == expand_runs(*vm.memory.populated()).size
    assert report.downtime_s == pytest.approx(sum(report.downtime_parts_s.values()))
    assert set(report.downtime_parts_s) == {str(phase) for phase in DOWNTIME_PHASES}
    assert [(each.name, each.size_bytes) for each in report.devices] == [
        (device.name, len(device.save())) for device in vm.platform.bus.devices
    ]
    assert all(each.save_ns > 0 for each in report.devices)
    assert report.state_bytes > sum(each.size_bytes for each in report.devices)
    assert [r.index for r in report.rounds] == list(range(len(report.rounds)))
    assert [r.final for r in report.rounds] == [False] * (len(report.rounds) - 1) + [True]
    assert all(r.sent_bytes > (r.sent_pages - r.zero_pages) * 4096 for r in report.rounds if r.sent_pages)
    assert events[-1] == MigrationEnded(report=report)
    assert [e.phase for e in events if isinstance(e, PhaseBegan)] == [
        phase for phase in Phase if phase is not Phase.POSTCOPY
    ]
    assert [e.stats for e in events if isinstance(e, RoundEnded)] == list(report.rounds)
    for stats in report.rounds:
        sent = [e.sent_pages for e in events if isinstance(e, RoundProgress) and e.index == stats.index]
        assert sent == sorted(sent)
        assert not sent or sent[-1] == stats.sent_pages
    if accel == "soft" and workload != "dma":  # one fault for each page that a vCPU made dirty, no more and no less
        assert report.fault_count == sum(r.dirty_pages for r in report.rounds[1:])


def test_a_failure_to_find_words_changes_no_outcome(running, inn, monkeypatch):
    def fail(report):
        raise ZeroDivisionError

    monkeypatch.setattr(report_module, "explain", fail)
    vm = running()
    report = attempt(vm, inn.open()).run()
    assert (report.status, report.explanation) == ("completed", None)
    assert runs_on(inn.outcome())


def test_a_page_that_the_tracker_lost_ends_the_migration_and_the_guest_stays(running, inn):
    vm = running("kv")
    vm.replace_tracker(CrossCheck(MarksNothing(vm), None, vm.memory, still=lambda: vm.run_control.still))

    def write_unmarked(event):
        if isinstance(event, RoundBegan) and event.index == 0:
            vm.memory.write(gpa_of(STRAY_GFN), b"lost")

    source = attempt(vm, inn.open(), on_event=write_unmarked)
    with pytest.raises(
        MigrationError, match=f"gfn {STRAY_GFN:#x} changed in round 0; .*MarksNothing lost it"
    ) as failed:
        source.run()
    assert failed.value.guest_at is GuestAt.SOURCE
    assert isinstance(failed.value.__cause__, LostPageError)
    assert isinstance(inn.outcome(), MigrationError)
    expect_as_before(vm, inn, source)


@pytest.mark.parametrize(
    ("cpus", "workload"),
    sample(
        [(2, "smp"), (4, "smp"), (8, "kv"), (3, "hotset")], "to the engine guests differ little", quick=[(2, "smp")]
    ),
)
def test_a_guest_with_several_vcpus_moves_and_each_runs_on(guests, inn, accel, cpus, workload):
    vm = guests(workload, cpus=cpus)
    vm.resume()
    assert runs_on(vm)
    source = attempt(vm, inn.open())
    report = source.run()
    there = inn.outcome()
    assert isinstance(there, type(vm)), there
    assert (report.status, report.verified) == ("completed", True)
    assert there.config.cpus == cpus
    assert all(new >= old for new, old in zip(work(there), work(vm), strict=True))
    assert runs_on(there)
    if accel == "soft":  # one counted fault for each page that vCPUs made dirty, however many of them at a time
        assert report.fault_count == sum(r.dirty_pages for r in report.rounds[1:])


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

    attempt(vm, inn.open(before_run=before_run), name="rnd").run()
    assert inn.outcome() is not None
    assert taken == {"equal": True, "name": "rnd"}


def test_a_paused_guest_stays_paused(running, inn):
    vm = running()
    vm.pause()
    before = work(vm)
    report = attempt(vm, inn.open(), DowntimePolicy()).run()
    there = inn.outcome()
    assert report.status == "completed"
    assert there.status is VmStatus.PAUSED
    assert work(there) == before
    there.resume()
    assert runs_on(there)


def test_there_and_back_again(guests, inn):
    vm = guests("kv")
    vm.resume()
    for _ in range(3):
        attempt(vm, inn.open()).run()
        vm, old = inn.outcome(), vm
        old.close()
        assert runs_on(vm)


@pytest.mark.parametrize("workload", ["kv", "timers"])
def test_from_machine_to_machine_and_from_mode_to_mode(running, inns, kvm_support, workload):
    """The same running guest on real hardware, on nested paging in software and on shadow paging, one after another."""
    vm = running(workload)
    shadow = functools.partial(Domain, paging_mode="shadow")
    for make_there, name in ((KvmVm, "kvm"), (shadow, "soft"), (Domain, "soft"), (shadow, "soft"), (KvmVm, "kvm")):
        inn = inns(make_there, name)
        report = attempt(vm, inn.open()).run()
        vm, old = inn.outcome(), vm
        old.close()
        assert (report.source_accel, report.destination_accel) == (old.accel, name)
        assert report.verified
        assert runs_on(vm)


def corrupting(inn, change):
    """The destination's machines change their memory by ``change(memory)`` after everything was received."""
    plain = inn.make_vm

    def make(config):
        vm = plain(config)
        load = vm.load_state

        def load_state(state):
            load(state)
            change(vm.memory)

        vm.load_state = load_state
        return vm

    inn.make_vm = make
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

    report = attempt(vm, inn.open(before_run=before_run), Rounds(3), verify=VerifyMode.AUDIT).run()
    there = inn.outcome()
    assert isinstance(there, type(vm)), there
    assert equal == [True]
    assert runs_on(there)
    # A page that the guest only read since the last look has storage, but is zero and was never sent.
    stored = expand_runs(*vm.memory.populated())
    zeros = sum(not any(view) for view in vm.memory.page_views(stored))
    assert stored.size - zeros <= report.verified_pages <= stored.size
    # What nobody wrote after it was sent is proven already, and without a limit not again.
    lay_still = report.verified_pages - report.rounds[-1].sent_pages
    assert max(1, lay_still - zeros) <= report.audited_pages <= lay_still


def test_audited_pages_are_proven_again_as_far_as_the_limit_allows(running, inn, monkeypatch):
    monkeypatch.setattr(cost_module, "digest_pages_per_s", lambda *_: 1e6)
    vm = running("idle")
    report = attempt(vm, inn.open(), Rounds(2, limit_s=3600.0), verify=VerifyMode.AUDIT).run()
    assert isinstance(inn.outcome(), type(vm))
    assert (report.verified, report.audited_pages) == (True, 0)


def test_the_destination_finds_what_has_storage_while_the_source_does(running, inn, monkeypatch):
    calls = []

    def noted(owner, name):
        real = getattr(owner, name)

        def call(*args):
            if threading.current_thread() is not threading.main_thread():
                calls.append(name)
            return real(*args)

        monkeypatch.setattr(owner, name, call)

    noted(verify_module, "digest_runs")
    noted(GuestMemory, "populated")
    vm = running("idle")
    attempt(vm, inn.open(), Rounds(2), verify=VerifyMode.FULL).run()
    assert isinstance(inn.outcome(), type(vm))
    assert calls[:2] == ["populated", "digest_runs"]
    assert calls.count("populated") == 1


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("verify", VerifyMode)
def test_nothing_is_measured_between_a_round_and_the_pause(running, inn, monkeypatch, verify, rounds):
    vm = running("idle")
    calls = []

    def noted(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (calls.append(name), real(*args))[1])

    def on_event(event):
        if isinstance(event, RoundBegan):
            calls.append("round")

    noted(vm.memory, "populated")  # measuring begins so
    noted(vm, "freeze")
    attempt(vm, inn.open(), Rounds(rounds), verify=verify, on_event=on_event).run()
    assert isinstance(inn.outcome(), type(vm))
    until_pause = calls[: len(calls) - calls[::-1].index("freeze")]
    assert until_pause.count("round") == rounds
    assert until_pause[-2:] == ["round", "freeze"]
    assert until_pause[until_pause.index("round") - 1] == "populated"


def test_measuring_takes_a_twentieth_of_the_time_at_most(guests, monkeypatch):
    vm = guests("idle")
    now, looks, populated = [0.0], [], vm.memory.populated

    def look():
        now[0] += 0.02
        looks.append(now[0])
        return populated()

    monkeypatch.setattr(vm.memory, "populated", look)

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
    report = attempt(vm, inn.open(), Rounds(2, limit_s=limit_s)).run()
    assert isinstance(inn.outcome(), type(vm))
    assert report.verified
    assert (report.audited_pages > 0) == audits


def test_an_audit_finds_a_lost_page_while_the_guest_runs(running, inn, monkeypatch):
    vm = running("idle")
    sound = vm.log_dirty
    vm.replace_tracker(MarksNothing(vm))
    vm.memory.write(gpa_of(STRAY_GFN), b"sent in round 0")
    start, idle = audit_module.Auditor.start, audit_module.Auditor.idle
    monkeypatch.setattr(audit_module.Auditor, "start", lambda auditor: None)  # not yet: first the write below
    monkeypatch.setattr(audit_module.Auditor, "idle", lambda auditor: True)

    def write_unmarked(event):
        if isinstance(event, RoundBegan) and event.index == 1:
            vm.memory.write(gpa_of(STRAY_GFN), b"never reported")
            start(source._proof._auditor)
            monkeypatch.setattr(audit_module.Auditor, "idle", idle)

    source = attempt(vm, inn.open(), Rounds(1000), verify=VerifyMode.AUDIT, on_event=write_unmarked)
    with pytest.raises(PeerError, match=r"memory is not ours, and .*MarksNothing reported no write") as failed:
        source.run()
    assert isinstance(failed.value.__cause__, VerifyError)
    assert failed.value.__cause__.gfn == STRAY_GFN
    assert isinstance(inn.outcome(), MigrationError)
    monkeypatch.undo()
    vm.replace_tracker(sound)
    expect_as_before(vm, inn, source)


def test_a_destination_believes_no_audit_that_it_has_not_seen(running, inn, monkeypatch):
    vm = running("idle")
    everything = vm.memory.all_ram()
    monkeypatch.setattr(audit_module.Auditor, "proven", lambda self: everything.copy())
    monkeypatch.setattr(audit_module.Auditor, "due", lambda self: None)
    monkeypatch.setattr(audit_module.Auditor, "idle", lambda self: True)
    source = attempt(vm, inn.open(), Rounds(1), verify=VerifyMode.AUDIT)
    with pytest.raises(PeerError, match="a page was never proven equal"):
        source.run()
    assert isinstance(inn.outcome(), MigrationError)
    monkeypatch.undo()
    expect_as_before(vm, inn, source)


def test_a_destination_that_cannot_audit_is_no_obstacle_unless_it_must(running, inn, monkeypatch):
    vm = running("idle")
    monkeypatch.setattr(features_module, "agree", lambda offered, **_: ())
    source = attempt(vm, inn.open(), Rounds(1), verify=VerifyMode.AUDIT)
    with pytest.raises(PeerError, match="cannot audit"):
        source.run()
    assert source.job.report.rounds == ()
    assert isinstance(inn.outcome(), MigrationError)
    report = attempt(vm, inn.open(), Rounds(1, limit_s=1e-6)).run()
    assert isinstance(inn.outcome(), type(vm))
    assert (report.verified, report.audited_pages) == (True, 0)


def test_a_mismatch_names_the_first_gfn_and_fails_closed(running, inn):
    vm = running()

    def flip(memory):
        for gfn in (0x10, 0x101, 0x102):
            memory.write(gfn * 4096 + 77, bytes([memory.read(gfn * 4096 + 77, 1)[0] ^ 1]))

    plain = corrupting(inn, flip)
    source = attempt(vm, inn.open())
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
    source = attempt(vm, inn.open())
    with pytest.raises(
        PeerError, match=f"not zero here that is zero at the source: first difference at gfn {last_gfn:#x}"
    ):
        source.run()
    inn.outcome()
    inn.make_vm = plain
    expect_as_before(vm, inn, source)


CUTS = [0, 10, 16, 100, 300, 500, 5_000, 150_000]


@pytest.mark.parametrize(
    "cut_after_bytes", sample(CUTS, "a cut before, in and after the hello", quick=[0, 300, 150_000])
)
def test_a_cut_leaves_the_guest_here(running, inn, wires, cut_after_bytes):
    vm = running()
    wire = wires(inn.open(), cut_after_bytes=cut_after_bytes or 1)
    source = attempt(vm, wire.uri)
    with pytest.raises(MigrationError) as caught:
        source.run()
    assert caught.value.guest_at is GuestAt.SOURCE
    assert isinstance(inn.outcome(), MigrationError)
    expect_as_before(vm, inn, source)


@pytest.mark.parametrize(
    "frame", [FrameType.DESTINATION_HELLO, FrameType.DIGESTS, FrameType.READY], ids=lambda f: f.name
)
def test_a_cut_before_the_commit_leaves_the_guest_here(running, inn, wires, frame):
    vm = running()
    wire = wires(inn.open(), hold_at=marker(frame))
    source = attempt(vm, wire.uri)
    with cut_when_held(wire), pytest.raises(TransportError, match="cut"):
        source.run()
    wire.release()
    assert isinstance(inn.outcome(), MigrationError)
    expect_as_before(vm, inn, source)


def test_a_stall_is_noticed(running, inn, wires):
    vm = running()
    wire = wires(inn.open(), hold_at=marker(FrameType.READY))
    source = attempt(vm, wire.uri, timeout_s=0.5)
    with pytest.raises(TransportError, match=r"stood still for 0\.5 s"):
        source.run()
    wire.cut()
    wire.release()
    inn.outcome()
    expect_as_before(vm, inn, source)


def test_law_6_an_unanswered_commit_ends_unknown_and_paused(running, inn, wires):
    vm = running()
    wire = wires(inn.open(), hold_at=marker(FrameType.RUNNING))
    source = attempt(vm, wire.uri)
    with cut_when_held(wire), pytest.raises(TransportError) as caught:
        source.run()
    assert caught.value.guest_at is source.job.report.guest_at is GuestAt.UNKNOWN
    there = inn.outcome()
    assert runs_on(there)  # it did arrive; only the answer was lost
    before = work(vm)
    vm.resume()
    assert work(vm) == before
    assert not source.job.cancel()
    there.close()
    source.job.take_back()
    assert runs_on(vm)
    with pytest.raises(VmError, match="no guest to take back"):
        source.job.take_back()


def test_law_6_a_lost_commit_ends_unknown_and_the_destination_never_runs(running, inn, wires):
    vm = running()
    wire = wires(inn.open(), hold_at=marker(FrameType.COMMIT))
    source = attempt(vm, wire.uri)
    with cut_when_held(wire), pytest.raises(TransportError) as caught:
        source.run()
    assert caught.value.guest_at is GuestAt.UNKNOWN
    assert isinstance(inn.outcome(), MigrationError)
    source.job.take_back()
    assert not vm.log_dirty.enabled
    assert runs_on(vm)
    expect_as_before_next = attempt(vm, inn.open())
    assert expect_as_before_next.run().status == "completed"
    assert runs_on(inn.outcome())


def test_a_destination_that_fails_after_the_commit_gives_the_guest_back(running, inn):
    vm = running()

    def refuse(there, name):
        raise VmError("no room at the inn after all")

    source = attempt(vm, inn.open(before_run=refuse))
    with pytest.raises(PeerError, match="no room at the inn after all"):
        source.run()
    inn.outcome()
    expect_as_before(vm, inn, source)


def test_a_refusal_carries_its_reason_and_hint(guests, inn):
    vm = guests()
    vm.resume()
    plain = inn.make_vm

    def refuse(config):
        raise UsageError("guests have one vCPU here", hint="ask elsewhere")

    inn.make_vm = refuse
    source = attempt(vm, inn.open())
    with pytest.raises(PeerError, match="guests have one vCPU here") as caught:
        source.run()
    assert caught.value.hint == "ask elsewhere"
    inn.outcome()
    inn.make_vm = plain
    expect_as_before(vm, inn, source)


def test_a_host_without_room_refuses_before_the_first_page(running, inn, monkeypatch):
    vm = running()
    monkeypatch.setattr("pageferry.engine.room.available_bytes", lambda: 40_000)
    source = attempt(vm, inn.open())
    with pytest.raises(PeerError, match=r"this host has 39\.06 KiB available") as caught:
        source.run()
    assert caught.value.phase == "hello"
    inn.outcome()
    monkeypatch.undo()
    expect_as_before(vm, inn, source)


def test_a_tracker_that_fails_while_the_guest_is_frozen_cannot_keep_it_so(running, inn, monkeypatch):
    vm = running()
    tracker = type(vm.log_dirty)
    broken = {"peek": tracker.peek, "stats": tracker.stats}

    def fail(self):
        raise VmError("the log cannot be read")

    source = attempt(vm, inn.open(), XenPolicy(max_rounds=1))
    freeze = vm.freeze

    def freeze_and_break():
        freeze()
        if vm.log_dirty.enabled:
            for name in broken:
                monkeypatch.setattr(tracker, name, fail)

    monkeypatch.setattr(vm, "freeze", freeze_and_break)
    with pytest.raises(MigrationError, match="cannot be read"):
        source.run()
    monkeypatch.undo()
    inn.outcome()
    expect_as_before(vm, inn, source)


def test_observers_cannot_end_a_migration(running, inn):
    def look(event):
        raise RuntimeError("I saw nothing")

    vm = running()
    report = attempt(vm, inn.open(on_event=look), on_event=look).run()
    assert report.status == "completed"
    assert runs_on(inn.outcome())


def test_a_guest_that_runs_there_is_there_whatever_fails_here(running, inn, monkeypatch):
    vm = running()

    def fail(self):
        raise VmError("cannot be turned off")

    monkeypatch.setattr(type(vm.log_dirty), "off", fail)
    source = attempt(vm, inn.open())
    assert source.run().guest_at is GuestAt.DESTINATION
    monkeypatch.undo()
    with pytest.raises(VmError, match="no guest to take back"):
        source.job.take_back()
    assert runs_on(inn.outcome())


def test_a_peer_that_trickles_is_a_stalled_one(guests, inn):
    vm = guests()
    vm.resume()
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle():
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):
                sock.sendall(
                    b"\x89PGFERRY" + struct.pack("<IIII", PROTOCOL_VERSION, 0, FrameType.DESTINATION_HELLO, 30_000)
                )
                while not stop.wait(0.05):
                    sock.sendall(b" ")

        thread = threading.Thread(target=trickle)
        thread.start()
        source = attempt(vm, f"tcp://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.5)
        with pytest.raises(TransportError, match="stood still"):
            source.run()
        stop.set()
        thread.join()
    expect_as_before(vm, inn, source)


def test_a_cancel_ends_a_connect_that_nobody_answers(guests, inn):
    vm = guests()
    vm.resume()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        full = [socket.socket() for _ in range(3)]
        for sock in full:
            sock.setblocking(False)
            sock.connect_ex(silent.getsockname())
        source = attempt(vm, f"tcp://127.0.0.1:{silent.getsockname()[1]}", timeout_s=600)
        failures = []

        def run():
            try:
                source.run()
            except PolicyAbort as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        assert source.job.cancel()
        thread.join(60)
        assert "cancelled" in str(failures[0])
        for sock in full:
            sock.close()
    expect_as_before(vm, inn, source)


class Never:
    """A policy that never stops: somebody else must."""

    name = "never"

    def __init__(self, after_round=lambda index: None):
        self._after_round = after_round

    def decide(self, progress):
        self._after_round(progress.last.index)
        return Decision(action=Action.NEXT_ROUND, reason="on and on")


def test_a_cancel_leaves_the_guest_here(running, inn):
    vm = running("hotset")
    source = attempt(vm, inn.open(), Never(lambda index: source.job.cancel() if index == 2 else None))
    with pytest.raises(PolicyAbort, match="cancelled"):
        source.run()
    inn.outcome()
    assert source.job.report.status == "cancelled"
    expect_as_before(vm, inn, source)


def test_a_policy_that_gives_up_leaves_the_guest_here(running, inn):
    vm = running("hotset")
    source = attempt(vm, inn.open(), DowntimePolicy(limit_s=1e-9))
    with pytest.raises(PolicyAbort, match="verification alone"):
        source.run()
    inn.outcome()
    expect_as_before(vm, inn, source)


def test_a_guest_that_ends_during_the_migration_stays_ended(running, inn):
    vm = running("stamp")

    def crash(index):
        vm.freeze()
        state = vm.save_state()
        vm.thaw()
        vm.pause()
        vm.load_state(replace(state, vcpus=(replace(state.vcpus[0], rip=0x7FFF_0000_0000),)))
        vm.resume()
        assert vm.wait(60) is VmStatus.CRASHED

    with pytest.raises(PolicyAbort, match="the guest ended meanwhile"):
        attempt(vm, inn.open(), Never(crash)).run()
    inn.outcome()
    assert vm.status is VmStatus.CRASHED


@pytest.mark.parametrize("accel", ["soft"], indirect=True)
def test_pages_that_come_and_go_during_the_migration(guests, inn):
    """A balloon: pages removed before and between rounds, some of them given back; the destination is the same."""
    vm = guests("hotset")
    free = np.arange(6000, 6100, dtype=np.uint64)
    for gfn in free.tolist():
        vm.memory.write(gfn << 12, bytes([gfn & 0xFF]) * 4096)
    vm.physmap.decrease_reservation(free[:10])
    vm.resume()
    assert runs_on(vm)

    def breathe(index):
        if index == 0:
            vm.physmap.decrease_reservation(free[10:60])
        if index == 1:
            vm.physmap.populate_physmap(free[30:50])
            vm.memory.write(6040 << 12, b"again")

    policy = Never(breathe)
    policy.decide = lambda progress: (
        Never.decide(policy, progress) if progress.last.index < 3 else XenPolicy(max_rounds=1).decide(progress)
    )
    report = attempt(vm, inn.open(), policy).run()
    there = inn.outcome()
    gone = [*range(6000, 6030), *range(6050, 6060)]
    assert vm.memory.removed().tolist() == there.memory.removed().tolist() == gone
    assert there.memory.read(6040 << 12, 6) == b"again\0"
    assert there.memory.read(6030 << 12, 4096) == bytes(4096)
    assert there.memory.read(6099 << 12, 4096) == bytes([6099 & 0xFF]) * 4096
    assert report.verified
    assert runs_on(there)
    audit.check(there)


def test_a_machine_without_a_balloon_refuses_what_it_cannot_hold(make_vm, inn, kvm_support):
    source = Domain(VmConfig(memory_bytes=32 << 20))
    boot(source, load_workload("idle"))
    source.physmap.decrease_reservation(np.arange(6000, 6100, dtype=np.uint64))
    source.resume()
    inn.make_vm = KvmVm
    with pytest.raises(PeerError, match="gave 100 pages back cannot live on kvm") as caught:
        attempt(source, inn.open()).run()
    assert caught.value.hint == "receive it with --accel soft"
    inn.outcome()
    assert runs_on(source)
    source.close()


@pytest.mark.parametrize(
    ("says", "match"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not pageferry.*HTTP"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not pageferry.*SSH"),
        (b"", "cut|closed"),
        (b"\x89PGFERRY" + struct.pack("<II", 99, 0), "version 99"),
        (b"\x89PGFERRY" + struct.pack("<IIII", PROTOCOL_VERSION, 0, FrameType.READY, 0), "may not"),
        (
            b"\x89PGFERRY" + struct.pack("<IIII", PROTOCOL_VERSION, 0, FrameType.DESTINATION_HELLO, 0xFFFF_FFFF),
            "longer than",
        ),
    ],
    ids=["http", "ssh", "silent", "future", "order", "length"],
)
def test_a_listener_that_is_not_pageferry(guests, inn, says, match):
    vm = guests()
    vm.resume()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            sock, _ = listener.accept()
            with sock, contextlib.suppress(OSError):
                sock.sendall(says)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65536):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        source = attempt(vm, f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        with pytest.raises(MigrationError, match=match):
            source.run()
        thread.join()
    expect_as_before(vm, inn, source)


def test_nobody_listens(guests, inn):
    vm = guests()
    vm.resume()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    source = attempt(vm, f"tcp://127.0.0.1:{port}")
    with pytest.raises(TransportError, match="cannot connect"):
        source.run()
    expect_as_before(vm, inn, source)


def test_a_source_that_lies_about_pages_is_refused(inn, make_vm):
    """A record that names a gfn outside the guest, sent by a peer that is otherwise correct."""
    channel = inn.open().connect(10)
    peer = Peer(channel, Side.SOURCE)
    peer.greet()
    peer.send(
        SourceHello(version=__version__, memory_bytes=32 << 20, cpus=1, accel="soft", cpuid=SOFT_CPU, migration_id="x")
    )
    peer.receive()
    encoder = Encoder()
    static = encoder.header(), encoder.record(CpuidPolicy(leaves=SOFT_CPU)), encoder.record(StaticDataEnd())
    channel.send([*static, encoder.page_data(np.array([(32 << 20) >> 12]))])
    with pytest.raises(PeerFailedError, match="gfn 0x2000"):
        peer.receive()
    channel.close()
    error = inn.outcome()
    assert isinstance(error, PeerError)
    assert error.guest_at is GuestAt.SOURCE


# -- machine models ----------------------------------------------------------------------------------------------------


@pytest.fixture
def irqchip(kvm_support):
    if not kvm_support.capabilities["KVM_CAP_IRQCHIP"]:
        pytest.skip("this KVM has no KVM_CAP_IRQCHIP")


@pytest.mark.kvm
@pytest.mark.parametrize("accel", ["kvm"])
def test_a_guest_with_interrupt_controllers_moves_there_and_back(guests, inn, irqchip):
    vm = guests("smp", cpus=2, machine=MachineModel.IRQCHIP)
    vm.resume()
    assert runs_on(vm)
    for _ in range(2):
        assert attempt(vm, inn.open()).run().verified
        vm = inn.outcome()
        assert vm.config.machine is MachineModel.IRQCHIP
        assert runs_on(vm)


@pytest.mark.kvm
@pytest.mark.parametrize("accel", ["kvm"])
def test_a_machine_without_interrupt_controllers_refuses_such_a_guest_before_the_first_page(running, inn, irqchip):
    vm = running("kv", machine=MachineModel.IRQCHIP)
    make_vm, inn.make_vm = inn.make_vm, Domain
    source = attempt(vm, inn.open())
    with pytest.raises(PeerError, match="the software machine has no interrupt controllers") as caught:
        source.run()
    assert (caught.value.phase, caught.value.hint) == ("hello", "use --machine plain, or --accel kvm")
    assert source.job.report.rounds == ()
    inn.make_vm = make_vm
    assert isinstance(inn.outcome(), MigrationError)
    expect_as_before(vm, inn, source)


def test_a_machine_model_that_nobody_knows_is_refused_by_name(inn):
    channel = inn.open().connect(10)
    peer = Peer(channel, Side.SOURCE)
    peer.greet()
    hello = SourceHello(
        version=__version__, memory_bytes=32 << 20, cpus=1, accel="soft", cpuid=SOFT_CPU, migration_id="x"
    )
    peer.send(replace(hello, machine="q35"))
    with pytest.raises(PeerFailedError, match="there is no machine model 'q35' here"):
        peer.receive()
    channel.close()
    assert isinstance(inn.outcome(), MigrationError)


# -- rounds in chunks, and a guest that is held back -------------------------------------------------------------------


def test_a_round_cleans_part_by_part_and_reports_what_it_found(running, inn, monkeypatch):
    monkeypatch.setattr(source_module, "Precopy", partial(Precopy, chunk_pages=1024))
    vm = running("hotset")
    cleaned, clean_range = [], vm.log_dirty.clean_range

    def watched(gfns):
        cleaned.append((gfns, clean_range(gfns)))
        return cleaned[-1][1]

    monkeypatch.setattr(vm.log_dirty, "clean_range", watched)
    report = attempt(vm, inn.open(), XenPolicy(max_rounds=3, min_dirty_pages=0)).run()
    assert report.verified
    assert runs_on(inn.outcome())
    limit = vm.memory.gfn_limit
    assert [gfns for gfns, _ in cleaned] == 2 * [range(first, first + 1024) for first in range(0, limit, 1024)]
    found = [bitmap.count() for _, bitmap in cleaned]
    per_round = limit // 1024
    assert [stats.dirty_pages for stats in report.rounds[1:3]] == [sum(found[:per_round]), sum(found[per_round:])]


class Holds(Never):
    """Holds the guest for nine tenths of its time, and ends as told."""

    def __init__(self, action, vm, monkeypatch):
        self._action = action
        self._held = threading.Event()
        freeze = vm.freeze

        def watched():
            freeze()
            if threading.current_thread().name == "throttle":
                self._held.set()

        monkeypatch.setattr(vm, "freeze", watched)

    def decide(self, progress):
        if progress.last.index == 3:
            assert progress.throttle == 0.9
            assert self._held.wait(TIMEOUT_S)
            return Decision(action=self._action, reason="enough")
        return Decision(action=Action.NEXT_ROUND, reason="on", throttle=0.9)


def test_a_guest_that_was_held_back_arrives_and_is_free(running, inn, monkeypatch):
    vm = running("hotset")
    report = attempt(vm, inn.open(), Holds(Action.STOP_AND_COPY, vm, monkeypatch)).run()
    assert report.verified
    assert report.throttled_s > 0
    assert runs_on(inn.outcome())


def test_a_guest_that_was_held_back_is_let_go_when_the_policy_gives_up(running, inn, monkeypatch):
    vm = running("hotset")
    source = attempt(vm, inn.open(), Holds(Action.ABORT, vm, monkeypatch))
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
        attempt(vm, inn.open(), Breaks()).run()
    assert (caught.value.guest_at, caught.value.hint) == (GuestAt.SOURCE, "mend it")
    assert runs_on(vm)
    with pytest.raises(VmError, match="not frozen"):
        vm.thaw()


def test_an_attempt_that_is_held_is_ready_and_waits(running, inn, monkeypatch):
    monkeypatch.setattr(precopy, "HELD_ROUND_S", 0.001)
    vm = running("kv")
    policy = DowntimePolicy(limit_s=3600, max_rounds=4)  # rounds of an attempt that is held do not count
    source = attempt(vm, inn.open(), policy, hold=True)
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
    source = attempt(vm, inn.open(), DowntimePolicy(limit_s=3600), hold=True)
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
    source = attempt(vm, endpoint, endless, on_event=lambda event: changes(event))

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
    source = attempt(
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
