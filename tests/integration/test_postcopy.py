"""Post-copy over real machines and real sockets: nothing is lost, nothing late overwrites, whatever is cut and when."""

import socket
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import trips
from altered import AlteredDestination, AlteredSource, ShortLeased, alter, lacking
from at_work import runs_on, slots, until
from descriptors import open_descriptors
from proxy import Recorder, played_again
from shears import Cut, Shears, Way
from tiers import sample
from trips import out_of_lease, source_of

from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import GuestAt, MigrationError, VmError
from pageferry.core.events import MigrationEnded, PhaseEnded, PostcopyPaused, PostcopyProgress, PostcopyRecovered
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.policies import XenPolicy
from pageferry.core.policy import Action, Decision
from pageferry.core.vm import VmConfig, VmStatus
from pageferry.engine import features
from pageferry.engine.options import VerifyMode, WireOptions
from pageferry.engine.postcopy.pager import DemandPager
from pageferry.engine.verify.prove import MemoryProof
from pageferry.engine.wire.channel import Endpoint
from pageferry.engine.wire.connections import NeverRan, admit
from pageferry.engine.wire.peer import Peer, PeerRefusedError
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.workloads import load_workload
from pageferry.stream.ferry_frames import FrameType, Join, Recover
from pageferry.stream.ferry_order import Side
from pageferry.testing import StampOracle

MiB = 1 << 20
#: How long to wait for what is sure to come, however busy the host is.
GIVE_UP_S = 150


#: Memory that no guest here uses: 4 MiB, written by the host just before the switch, so it is missing then.
LATE_GPA, LATE_PAGES = 24 * MiB, 1024
LATE = np.arange(LATE_PAGES, dtype=np.uint64).repeat(PAGE_SIZE // 8).tobytes()


class Switch:
    """One round, in which ``LATE`` is written, then post-copy."""

    name = "switch"
    switches = True

    def __init__(self, vm):
        self.vm = vm

    def decide(self, progress):
        self.vm.memory.write(LATE_GPA, LATE)
        return Decision(action=Action.POST_COPY, reason="so")


#: So long that a busy host makes no peer look like a stranger.
Patient = AlteredDestination.having({"wire.connections._PATIENCE_S": GIVE_UP_S})


class Inn(trips.Inn):
    """A destination that tells what happens to the guest: ``arrived`` when it is ours, and all ``events``.

    ``shears`` cut the connections to it.
    """

    def __init__(self, make_vm):
        super().__init__(make_vm, kind=Patient)
        self.events = []
        self.arrived = threading.Event()
        self.never_ran = NeverRan()
        self.shears = Shears()
        self.endpoint = Way(self.endpoint, self.shears)

    def _heard(self, channel):
        return self.shears.watch(super()._heard(channel), Side.DESTINATION)

    def _watched(self, channel):
        return self.shears.watch(channel, Side.DESTINATION)

    def ask_ahead_only_while(self, may):
        """Ask for pages that no thread waits for only while ``may()``."""

        class Reserved(DemandPager):
            def ahead(self, at_most):
                return super().ahead(at_most) if may() else np.empty(0, np.uint64)

        self.kind = self.kind.having({"postcopy.client.DemandPager": Reserved})

    def _arrive(self, vm, name):
        self.vm = vm
        self.arrived.set()

    def open(self):
        return super().open(never_ran=self.never_ran, on_event=self.events.append, before_run=self._arrive)

    def done(self):
        self.outcome()
        assert self.error is None, self.error
        return self.vm

    def expect_no_guest(self):
        """The attempt has failed, and no guest is here."""
        assert self.outcome() is self.error
        assert self.error.guest_at is GuestAt.SOURCE
        assert self.vm is None

    def expect_lost(self):
        """The attempt has failed when the guest was here."""
        self.outcome()
        assert self.error.guest_at is GuestAt.DESTINATION
        assert "the guest is lost" in self.error.reason


@pytest.fixture
def inn(make_vm):
    made = Inn(make_vm)
    yield made
    made.close()


@pytest.fixture
def leave():
    """Moves guests on threads of their own; gives up what is left of it."""
    made = []

    def go(vm, endpoint, policy=None, **options):
        source = source_of(vm, endpoint, policy or Switch(vm), timeout_s=GIVE_UP_S, **options)

        def run():
            try:
                source.run()
            except MigrationError:
                assert source.job.error is not None

        thread = threading.Thread(target=run)
        made.append((source, thread))
        thread.start()
        return source

    yield go
    for source, thread in made:
        source.job.abandon()
        thread.join(GIVE_UP_S)
        assert not thread.is_alive()


@pytest.fixture
def held(inn):
    """The destination asks for nothing but what is touched, until this is set."""
    gate = threading.Event()
    inn.ask_ahead_only_while(gate.is_set)
    yield gate
    gate.set()


def running(guests, *arguments, **options):
    vm = guests(*arguments, **options)
    vm.resume()
    assert runs_on(vm)
    return vm


def report_of(source):
    return until(lambda: source.job.report, "end of the migration")


def pause_of(source):
    """Why the migration waits to be recovered, when it does."""

    def paused():
        assert source.job.report is None, source.job.report.reason
        return source.job.postcopy_paused

    return until(paused, "pause")


@pytest.mark.parametrize(
    ("workload", "cpus"),
    sample(
        [("kv", 1), ("hotset", 1), ("dma", 1), ("smp", 2), ("timers", 1)],
        "a vCPU waits for pages, or two, or a device",
        quick=[("dma", 1), ("smp", 2)],
    ),
)
def test_a_running_guest_switches_and_runs_on(guests, inn, leave, workload, cpus):
    vm = running(guests, workload, cpus=cpus)
    events = []
    source = leave(vm, inn.open(), on_event=events.append)
    report = report_of(source)
    there = inn.done()
    assert runs_on(there)
    assert (report.status, report.guest_at) == ("completed", GuestAt.DESTINATION)
    assert there.memory.read(LATE_GPA, len(LATE)) == LATE
    late = report.postcopy
    assert late.missing_pages == late.sent_pages >= LATE_PAGES
    assert late.missing_pages >= late.urgent_pages
    assert sum(report.sent.heat.rows[-1]) == late.missing_pages
    assert (late.cuts, late.cut_s) == (0, 0.0)
    assert late.waited_s >= late.longest_wait_s >= 0.0
    progress = [event for event in events if isinstance(event, PostcopyProgress)]
    assert [event.sent_pages for event in progress] == sorted({event.sent_pages for event in progress})
    assert (progress[-1].sent_pages, progress[-1].missing_pages) == (late.sent_pages, late.missing_pages)
    assert report.verified_pages == expand_runs(*vm.memory.populated()).size
    assert report.downtime_s == pytest.approx(sum(report.downtime_parts_s.values()))
    assert report.total_s == pytest.approx(report.paused_at_s + report.downtime_s + report.postcopy.duration_s)
    assert events[-1] == MigrationEnded(report=report)
    frozen_work = slots(vm)
    vm.resume()
    assert slots(vm) == frozen_work


def pages_there(inn):
    return LATE_PAGES - int(inn.destination._postcopy._pager._missing.test_many(late_gfns()).sum())


def late_gfns():
    return np.arange(LATE_GPA // PAGE_SIZE, LATE_GPA // PAGE_SIZE + LATE_PAGES, dtype=np.uint64)


def test_only_what_is_touched_comes_while_the_rest_waits(guests, inn, leave, held):
    vm = running(guests, "kv")
    source = leave(vm, inn.open())
    assert inn.arrived.wait(GIVE_UP_S)
    assert runs_on(inn.vm)
    assert pages_there(inn) == 0
    at = 700
    assert inn.vm.memory.read_u64(LATE_GPA + at * PAGE_SIZE) == at
    assert pages_there(inn) == 1
    assert source.job.status == "postcopy-active"
    assert source.job.report is None
    left_bytes = source.job.traffic().remaining_pages * PAGE_SIZE
    outlook = source.job.outlook()
    assert outlook.eta_s == pytest.approx(left_bytes / outlook.wire_bytes_per_s, rel=0.5)
    assert outlook.eta_reason == "the guest runs there already, and the rest follows"
    assert (outlook.expected_downtime_s, outlook.dirty_bytes_per_s) == (None, 0.0)
    held.set()
    inn.vm.memory.read(LATE_GPA, PAGE_SIZE)  # whatever comes lets it go on
    assert report_of(source).postcopy.urgent_pages >= 2
    assert inn.done() is inn.vm


def test_what_is_written_here_before_a_page_has_come_stays(guests, inn, leave, held):
    """A host's write, a copy of a part, and one through a view: all before the page came, none is overwritten."""
    vm = running(guests, "kv")
    source = leave(vm, inn.open())
    assert inn.arrived.wait(GIVE_UP_S)
    memory = inn.vm.memory
    memory.write(LATE_GPA + 8, b"written!")
    memory.copy_within(LATE_GPA + 5 * PAGE_SIZE, LATE_GPA + PAGE_SIZE + 16, 8)
    memory.views(np.array([LATE_GPA // PAGE_SIZE + 2], np.uint64), np.array([1], np.uint64))[0][8:16] = b"viewed!!"
    memory.write(LATE_GPA - 4, b"straddle")  # the page before has no storage anywhere
    held.set()
    memory.read(LATE_GPA + 9 * PAGE_SIZE, 1)
    report_of(source)
    inn.done()
    expected = bytearray(LATE)
    expected[8:16], expected[PAGE_SIZE + 16 : PAGE_SIZE + 24] = b"written!", (5).to_bytes(8, "little")
    expected[2 * PAGE_SIZE + 8 : 2 * PAGE_SIZE + 16] = b"viewed!!"
    expected[:4] = b"ddle"
    assert memory.read(LATE_GPA, len(LATE)) == expected
    assert memory.read(LATE_GPA - 8, 8) == b"\0\0\0\0stra"
    assert runs_on(inn.vm)


@pytest.mark.parametrize("attempt", sample(range(4), "more of the same", quick=[0]))
@pytest.mark.parametrize(("workload", "cpus"), [("kv", 1), ("smp", 2)])
def test_a_cut_connection_pauses_the_guest_and_a_new_one_goes_on(guests, inn, leave, dice, attempt, workload, cpus):
    inn.shears.cuts = cuts = [Cut(Side.SOURCE, dice.randrange(LATE_PAGES * PAGE_SIZE // 4)) for _ in range(3)]
    vm = running(guests, workload, cpus=cpus)
    events = []
    source = leave(vm, inn.open(), on_event=events.append)
    for number in range(1, len(cuts) + 1):
        pause_of(source)
        assert (source.job.outlook().eta_s, "migrate --recover" in source.job.outlook().eta_reason) == (None, True)
        assert source.job.status == "postcopy-paused"
        until(lambda n=number: sum(isinstance(event, PostcopyPaused) for event in events) == n, "word of it")
        assert source.job.guest_at is GuestAt.DESTINATION
        until(lambda n=number: sum(isinstance(event, PostcopyPaused) for event in inn.events) == n, "pause there")
        assert inn.vm.status is VmStatus.RUNNING  # the user's pause is his own
        until(lambda: inn.vm.run_control.held, "stop: it is asked for by a thread")
        assert source.job.recover(inn.endpoint)
    report = report_of(source)
    there = inn.done()
    assert not source.job.recover(inn.endpoint)
    assert there.memory.read(LATE_GPA, len(LATE)) == LATE
    assert runs_on(there)
    assert (report.status, report.postcopy.cuts) == ("completed", len(cuts))
    assert report.verified_pages == expand_runs(*vm.memory.populated()).size
    assert sum(isinstance(event, PostcopyRecovered) for event in inn.events) == len(cuts)


class SwitchWithAll:
    """Switches after a round in which the guest was busy; all that it works on is to come then."""

    name = "switch"
    switches = True

    def __init__(self, vm, gfns):
        self.vm = vm
        self.gfns = gfns

    def decide(self, progress):
        before = slots(self.vm)[0].work
        until(lambda: slots(self.vm)[0].work > before + 2, "rounds")
        self.vm.memory.wrote(self.gfns)
        return Decision(action=Action.POST_COPY, reason="so")


@pytest.mark.parametrize("attempt", sample(range(20), "more of the same", quick=range(2)))
def test_whatever_is_cut_wherever_the_guest_has_the_memory_that_it_wrote(make_vm, inn, leave, dice, attempt):
    """What it should have is played through on the host, round by round (docs/reference/guest-abi.md, ``stamp``)."""
    pages, cuts = 2048, inn.shears.cuts
    inn.ask_ahead_only_while(lambda: not inn.shears.quiet)
    for _ in range(dice.randrange(3)):  # these while there is surely much left that is waited for
        by, most = dice.choice([(Side.SOURCE, 30 * PAGE_SIZE), (Side.DESTINATION, 600)])
        cuts.append(Cut(by, dice.randrange(most), quiet=True))
    cuts.append(Cut(Side.SOURCE, dice.randrange(pages * PAGE_SIZE // 4)))  # so much comes for certain
    for _ in range(dice.randrange(4)):
        by, most = dice.choice([(Side.SOURCE, pages * PAGE_SIZE), (Side.DESTINATION, pages * 10)])
        cuts.append(Cut(by, int(most ** dice.random())))
    vm = make_vm(VmConfig(memory_bytes=32 * MiB))
    try:
        params = GuestParams(working_set_bytes=pages * PAGE_SIZE, rate=300, seed=dice.getrandbits(64))
        oracle = StampOracle(boot(vm, load_workload("stamp"), params=params))
        vm.resume()
        runs_on(vm)
        source = leave(vm, inn.open(), SwitchWithAll(vm, oracle.gfns))
        while until(lambda: source.job.report or source.job.postcopy_paused, "end or pause") != source.job.report:
            assert source.job.recover(inn.endpoint)
        there = inn.done()
        left_at = slots(vm)[0].work
    finally:
        vm.close()
    report = source.job.report
    assert (report.status, report.guest_at) == ("completed", GuestAt.DESTINATION), report.reason
    assert report.postcopy.missing_pages >= pages
    assert 1 <= report.postcopy.cuts <= len(cuts)
    there.attach_sync(True)
    assert there.wait(GIVE_UP_S) is VmStatus.PAUSED, there.end
    rounds = there.sync_value()
    repeated = slots(there)[0].work - rounds  # the one under way, if we came between its sync point and its answer
    assert repeated in (0, 1)
    assert rounds >= left_at
    for number in range(1, rounds + 1):
        oracle.played(number)
    assert oracle.wrong_gfns(there.memory).size == 0


def test_only_the_source_itself_comes_back(guests, inn, leave):
    inn.shears.cuts = [Cut(Side.SOURCE, 0)]
    vm = running(guests, "kv")
    source = leave(vm, inn.open())
    pause_of(source)
    for token in ("", "0" * 32):
        stranger = Peer(inn.endpoint.connect(GIVE_UP_S), Side.SOURCE)
        stranger.greet()
        stranger.send(Recover(proof=stranger.proof(Recover, token)))
        with pytest.raises(PeerRefusedError, match="belongs to another source"):
            stranger.receive()
        stranger.close()
    stranger = Peer(inn.endpoint.connect(GIVE_UP_S), Side.SOURCE)
    stranger.greet()
    stranger.send(Join(proof="x", index=1))
    with pytest.raises(PeerRefusedError, match="belongs to another source"):
        stranger.receive()
    stranger.close()
    assert source.job.recover(inn.endpoint)
    assert report_of(source).status == "completed"
    assert runs_on(inn.done())


def test_a_return_that_is_played_again_is_refused(guests, inn, leave):
    inn.shears.cuts = [Cut(Side.SOURCE, 0), Cut(Side.DESTINATION, 0)]
    vm = running(guests, "kv")
    source = leave(vm, inn.open())
    pause_of(source)
    recorder = Recorder(inn.endpoint)
    try:
        assert source.job.recover(recorder.endpoint)
        until(lambda: recorder.tapes and source.job.postcopy_paused, "second cut")
        answer = played_again(recorder.tapes[0], inn.endpoint)
    finally:
        recorder.close()
    assert b"belongs to another source" in answer
    assert source.job.recover(inn.endpoint)
    assert report_of(source).postcopy.cuts == 2
    assert runs_on(inn.done())


def test_a_recovery_that_finds_no_destination_can_be_tried_again(guests, inn, leave):
    inn.shears.cuts = [Cut(Side.SOURCE, 0)]
    vm = running(guests, "kv")
    events = []
    source = leave(vm, inn.open(), on_event=events.append)
    pause_of(source)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        gone_away = Endpoint(host="127.0.0.1", port=gone.getsockname()[1])
    assert source.job.recover(gone_away)
    until(lambda: sum(isinstance(event, PostcopyPaused) for event in events) == 2, "second pause")
    assert source.job.postcopy_paused == f"cannot connect to {gone_away}: Connection refused"
    assert source.job.recover(inn.endpoint)
    report = report_of(source)
    assert (report.status, report.postcopy.cuts) == ("completed", 1)
    assert runs_on(inn.done())


def test_a_defect_at_the_destination_costs_the_connection_and_no_page(guests, inn, leave):
    defects = [ZeroDivisionError("a defect")]

    class Defective(DemandPager):
        def install(self, gfns, content):
            if defects:
                raise defects.pop()
            super().install(gfns, content)

    inn.kind = inn.kind.having({"postcopy.client.DemandPager": Defective})
    vm = running(guests, "kv")
    source = leave(vm, inn.open())
    pause_of(source)
    assert source.job.recover(inn.endpoint)
    assert report_of(source).status == "completed"
    there = inn.done()
    assert there.memory.read(LATE_GPA, len(LATE)) == LATE
    assert runs_on(there)


def test_a_destination_that_gives_up_while_its_source_comes_back_takes_no_more_pages(guests, inn, leave):
    def admit_too_late(*request, **words):
        admitted = admit(*request, **words)
        inn.destination.abort()
        return admitted

    inn.shears.cuts = [Cut(Side.SOURCE, 0)]
    inn.kind = inn.kind.having({"wire.connections.admit": admit_too_late})
    vm = running(guests, "kv")
    source = leave(vm, inn.open())
    pause_of(source)
    assert source.job.recover(inn.endpoint)
    inn.expect_lost()


def test_law_6_a_destination_that_ends_its_attempt_after_the_switch_never_runs_the_guest(guests, inn, leave):
    make_vm = inn.make_vm

    def claim_too_late(sound):
        def claim():
            sound()
            inn.destination.abort()

        return claim

    def make(config):
        there = make_vm(config)
        alter(there, "claim_backends", claim_too_late)
        return there

    inn.make_vm = make
    source = leave(running(guests, "kv"), inn.open())
    pause_of(source)
    inn.expect_no_guest()
    assert source.job.guest_at is GuestAt.UNKNOWN
    assert len([*inn.never_ran]) == 1


def test_law_6_a_source_that_gives_up_after_the_switch_never_runs_the_guest(guests, inn, leave, held):
    vm = running(guests, "kv")
    source = leave(vm, inn.open())
    assert inn.arrived.wait(GIVE_UP_S)
    until(lambda: source.job.keeps_pages, "switch")
    assert not source.job.cancel()
    source.job.abandon()
    report = report_of(source)
    assert (report.status, report.guest_at) == ("failed", GuestAt.DESTINATION)
    assert "the guest is lost" in report.reason
    with pytest.raises(VmError):
        source.job.take_back()
    frozen_work = slots(vm)
    vm.resume()
    assert slots(vm) == frozen_work
    until(lambda: inn.destination.waits_for_source, "pause there")
    assert inn.destination.missing_pages >= LATE_PAGES - 1
    inn.destination.abort()
    inn.expect_lost()


def test_a_guest_that_ends_there_needs_no_more_pages(guests, inn, leave, held):
    vm = running(guests, "kv")
    source = leave(vm, inn.open())
    assert inn.arrived.wait(GIVE_UP_S)
    until(lambda: source.job.keeps_pages, "switch")
    inn.destination.release()
    assert report_of(source).status == "completed"
    assert inn.done() is inn.vm
    until(lambda: inn.vm.memory._fetch is None, "end of the waiting")


@pytest.mark.parametrize("frame", [FrameType.MISSING, FrameType.READY])
def test_a_cut_before_the_switch_leaves_the_guest_here(guests, inn, leave, wires, frame):
    vm = running(guests, "kv")
    wire = wires(inn.open(), hold_at=int(frame).to_bytes(4, "little"))
    source = leave(vm, wire.uri)
    assert wire.held.wait(GIVE_UP_S)
    wire.cut()
    wire.release()
    report = report_of(source)
    assert (report.status, report.guest_at, report.postcopy) == ("failed", GuestAt.SOURCE, None)
    assert not vm.log_dirty.enabled
    assert runs_on(vm)
    inn.expect_no_guest()
    source = leave(vm, inn.open())
    assert report_of(source).status == "completed"
    assert runs_on(inn.done())


def cut_at(guests, inn, leave, wires, frame):
    """A guest whose connection is cut as this frame is under way, and its source, which does not know where it is."""
    vm = running(guests, "kv")
    wire = wires(inn.open(), hold_at=int(frame).to_bytes(4, "little"))
    source = leave(vm, wire.uri, kind=ShortLeased)
    assert wire.held.wait(GIVE_UP_S)
    wire.cut()
    wire.release()
    pause_of(source)
    assert (source.job.guest_at, source.job.report) == (GuestAt.UNKNOWN, None)
    frozen_work = slots(vm)
    vm.resume()
    assert slots(vm) == frozen_work
    return vm, source


def test_law_6_a_guest_whose_switch_was_not_heard_of_is_taken_back_by_hand(guests, inn, leave, wires):
    vm, source = cut_at(guests, inn, leave, wires, FrameType.SWITCH)
    inn.expect_no_guest()
    with pytest.raises(VmError, match="may start the guest for another"):
        source.job.take_back()
    out_of_lease(source)
    source.job.take_back()
    assert (report_of(source).status, source.job.guest_at) == ("failed", GuestAt.SOURCE)
    assert runs_on(vm)


def test_law_6_a_switch_that_was_not_heard_of_leaves_the_guest_here(guests, inn, leave, wires):
    """The destination knows that it dropped the guest, and promises it."""
    vm, source = cut_at(guests, inn, leave, wires, FrameType.SWITCH)
    inn.expect_no_guest()
    inn.open()
    assert source.job.recover(inn.endpoint)
    report = report_of(source)
    assert (report.status, report.guest_at, report.postcopy) == ("failed", GuestAt.SOURCE, None)
    assert "never ran there" in report.reason
    assert source.job.guest_at is GuestAt.SOURCE
    assert not vm.log_dirty.enabled
    assert runs_on(vm)
    inn.expect_no_guest()
    assert report_of(leave(vm, inn.open())).status == "completed"
    assert runs_on(inn.done())


def test_law_6_a_switch_that_was_heard_of_is_recovered(guests, inn, leave, wires):
    _, source = cut_at(guests, inn, leave, wires, FrameType.RUNNING)
    assert inn.arrived.wait(GIVE_UP_S)
    assert source.job.recover(inn.endpoint)
    report = report_of(source)
    there = inn.done()
    assert (report.status, report.guest_at, report.postcopy.cuts) == ("completed", GuestAt.DESTINATION, 1)
    assert there.memory.read(LATE_GPA, len(LATE)) == LATE
    assert runs_on(there)
    with pytest.raises(VmError):
        source.job.take_back()


def test_law_6_a_destination_that_knows_of_no_such_guest_decides_nothing(guests, inn, leave, wires, make_vm):
    _, source = cut_at(guests, inn, leave, wires, FrameType.RUNNING)
    other = Inn(make_vm)
    before = len(open_descriptors())
    try:
        for answers in range(1, 3):
            assert source.job.recover(other.open())
            other.expect_no_guest()
            pause_of(source)
            assert "no guest of that migration is here" in source.job.postcopy_paused, answers
            assert (source.job.guest_at, source.job.report) == (GuestAt.UNKNOWN, None)
            until(lambda: len(open_descriptors()) == before, "end of the connection")
    finally:
        other.close()
    assert source.job.recover(inn.endpoint)
    assert report_of(source).status == "completed"
    assert runs_on(inn.done())


def test_a_guest_that_is_just_being_asked_for_cannot_be_taken_back(guests, inn, leave, wires):
    _, source = cut_at(guests, inn, leave, wires, FrameType.RUNNING)
    asking, go_on = threading.Event(), threading.Event()

    def connect_slowly(timeout_s, given_up):
        asking.set()
        assert go_on.wait(GIVE_UP_S)
        return inn.endpoint.connect(timeout_s, given_up=given_up)

    try:
        assert source.job.recover(SimpleNamespace(connect=connect_slowly, expect_suits=inn.endpoint.expect_suits))
        assert asking.wait(GIVE_UP_S)
        out_of_lease(source)
        with pytest.raises(VmError, match="the destination is being asked now"):
            source.job.take_back()
    finally:
        go_on.set()
    assert report_of(source).status == "completed"
    assert runs_on(inn.done())


@pytest.mark.parametrize("frame", [FrameType.COMPLETE, FrameType.DROPPED])
def test_a_last_word_that_was_lost_is_said_again(guests, inn, leave, wires, frame):
    vm = running(guests, "kv")
    wire = wires(inn.open(), hold_at=int(frame).to_bytes(4, "little"))
    source = leave(vm, wire.uri)
    until(lambda: "post-copy" in {event.phase for event in inn.events if isinstance(event, PhaseEnded)}, "all pages")
    assert inn.destination.missing_pages == 0
    assert wire.held.wait(GIVE_UP_S)
    wire.cut()
    wire.release()
    assert runs_on(inn.vm)
    if frame is FrameType.COMPLETE:
        pause_of(source)
        assert source.job.recover(inn.endpoint)
        inn.done()
    report = report_of(source)
    assert (report.status, report.verified_pages) == ("completed", expand_runs(*vm.memory.populated()).size)
    assert not inn.destination.waits_for_source
    assert runs_on(inn.vm)


def test_a_destination_that_cannot_wait_for_pages_is_not_begun_with(guests, inn, leave):
    inn.kind = lacking(features.POSTCOPY)
    vm = running(guests, "kv")
    source = leave(vm, inn.open())
    assert report_of(source).guest_at is GuestAt.SOURCE
    assert source.job.error.phase == "hello"
    assert "cannot let a guest wait for its pages" in source.job.error.reason
    assert runs_on(vm)


def test_a_page_that_is_said_to_be_missing_and_proven_is_neither(guests, inn, leave):
    class ProvesAll(MemoryProof):
        def prove(self, peer, spent_s, missing=None):
            super().prove(peer, spent_s)

    vm = running(guests, "kv")
    vm.pause()
    vm.memory.write(LATE_GPA, LATE)  # so what is old there is equal too
    source = leave(vm, inn.open(), kind=AlteredSource.having({"source.MemoryProof": ProvesAll}))
    assert report_of(source).guest_at is GuestAt.SOURCE
    assert "proven that is missing" in source.job.error.reason
    vm.resume()
    assert runs_on(vm)


def test_a_guest_switches_while_it_is_audited_over_several_connections(guests, inn, leave):
    vm = running(guests, "kv")
    source = leave(vm, inn.open(), verify=VerifyMode.AUDIT, wire=WireOptions(connections=3))
    report = report_of(source)
    assert report.status == "completed"
    assert inn.done().memory.read(LATE_GPA, len(LATE)) == LATE
    assert runs_on(inn.vm)


def test_a_guest_that_its_user_paused_switches_and_stays_paused(guests, inn, leave):
    vm = running(guests, "kv")
    vm.pause()
    source = leave(vm, inn.open())
    assert report_of(source).status == "completed"
    there = inn.done()
    assert there.status is VmStatus.PAUSED
    assert there.memory.read(LATE_GPA, len(LATE)) == LATE
    there.resume()
    assert runs_on(there)


def test_a_guest_that_has_switched_moves_on(guests, inn, leave, make_vm):
    """What it is afterwards is a guest like any other."""
    vm = running(guests, "smp", cpus=2)
    assert report_of(leave(vm, inn.open())).status == "completed"
    there = inn.done()
    second = Inn(make_vm)
    try:
        assert report_of(leave(there, second.open(), XenPolicy())).status == "completed"
        assert runs_on(second.done())
    finally:
        second.close()
