"""Every field of a migration's report against an independent count of the same thing.

``FIELDS`` is the table: field -> what it is compared with. The counts are the test's own (tests/helpers/onlooker.py):
the bytes at a proxy, the records on a tape of the wire, what the tracker returned, the guest's own counter of work,
calls that are noted where they are made, and spans of the test's clock around what is timed: a time in the report must
lie between the least that it can have been and the most. A field that is missing from the table fails a test.

What no count can tell:

- ``bandwidth_bytes_per_s`` and ``delta_cache_bytes``, and ``compress`` of a migration that sent nothing, are what was
  asked for. That a cap is kept to: test_data_plane.py, test_save.py.
- ``round_ends.fixed_s`` is an estimate of what a pause will cost. Only its part for the state has a floor, which is
  compared: saving it took so long in the rehearsal, and loading it will take as long again.
- ``fault_count`` has no second count on ``kvm``: the kernel keeps none, and the report says null.
- ``explanation`` is made of the other fields by a pure function, with tests of its own
  (tests/unit/core/test_explain.py).
- ``postcopy.waits`` and how long they were are the destination's own count; compared is what it said of them.
- ``guest_time.work_after_per_s`` is known to ``demo`` alone, which sees both ends
  (tests/unit/core/test_guest_time.py).
"""

import os
import struct
import time
from collections import Counter
from dataclasses import dataclass

import pytest
from at_work import runs_on, work
from machines import KINDS
from onlooker import OWN, Onlooker, decisions, gfns_of, named_zero, populated_pages
from proxy import Wire
from trips import LOOPBACK, Inn, Taped, source_of

from pageferry.core.errors import GuestAt, MigrationError
from pageferry.core.events import DOWNTIME_PHASES, MigrationReport, Phase
from pageferry.core.explain import explain
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.hugepages import HugePages
from pageferry.core.policy import Action
from pageferry.core.vm import VmConfig
from pageferry.engine.options import DEFAULT_WIRE, VerifyMode, WireOptions
from pageferry.engine.wire.channel import Endpoint
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.workloads import load_workload
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.vm import KvmVm
from pageferry.stream.ferry_frames import COMPLETE_BODY, Digests, FrameType, Missing, Pages
from pageferry.stream.format import FENCE, RECORD_HEADER
from pageferry.stream.hvm_context import decode_machine_state
from pageferry.stream.packing import Packing, available, packer
from pageferry.stream.records import DeltaPages, HvmContext, PackedPages

MiB = 1 << 20
MEMORY_BYTES = 32 * MiB
CAP = 256 * MiB
PACKING = next(iter(available()), Packing.NONE)
CACHE_BYTES = 0 if PACKING is Packing.NONE else 64 * MiB
ROUNDING_S = 1e-6
FENCE_BYTES = RECORD_HEADER.size + FENCE.size


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A migration to look at."""

    accel: str
    tracker: str
    there: str
    decisions: tuple
    wire: WireOptions = DEFAULT_WIRE
    verify: VerifyMode | None = VerifyMode.FULL
    unix: bool = False


SCENARIOS = {
    "kvm": Scenario(accel="kvm", tracker="kvm-bitmap", there="kvm", decisions=decisions(0, 0, 0)),
    "soft": Scenario(accel="soft", tracker="hap", there="kvm", decisions=decisions(0, 0, 0)),
    "all at once": Scenario(
        accel="kvm",
        tracker="pagemap-scan",
        there="soft",
        decisions=decisions(0, 0.5, 0.5, 0),
        wire=WireOptions(bandwidth_bytes_per_s=CAP, connections=3, compress=PACKING, delta_cache_bytes=CACHE_BYTES),
        verify=VerifyMode.AUDIT,
    ),
    "given up": Scenario(accel="soft", tracker="shadow", there="soft", decisions=decisions(0, 0.5, last=Action.ABORT)),
    "switched": Scenario(accel="soft", tracker="hap", there="kvm", decisions=decisions(0, 0, last=Action.POST_COPY)),
    "handed over": Scenario(accel="kvm", tracker="kvm-bitmap", there="kvm", decisions=(), unix=True),
}


class Seen:
    """One migration, over: what the report says, and what the test saw."""

    def __init__(self, scenario, folder):
        self.scenario = scenario
        make = {(kind.accel, kind.tracker): kind.make_vm for kind in KINDS}
        option = {"huge_pages": HugePages.OFF} if scenario.unix else {}  # a file, which can be handed over
        self.vm = make[scenario.accel, scenario.tracker](VmConfig(memory_bytes=MEMORY_BYTES), **option)
        endpoint = Endpoint(path=str(folder / "inn.sock")) if scenario.unix else LOOPBACK
        self.inn = Inn({"kvm": KvmVm, "soft": Domain}[scenario.there], endpoint)
        self.wire = None
        boot(self.vm, load_workload("hotset"), params=GuestParams(working_set_bytes=4 * MiB))
        self.vm.resume()
        assert runs_on(self.vm)
        self.onlooker = Onlooker(self.vm, list(scenario.decisions))
        self.arrived = None  # when the destination had all and was about to run it
        self.equal = None
        self._move()

    def _move(self):
        here, onlooker = self.inn.open(before_run=self._before_run), self.onlooker
        if self.scenario.wire.connections == 1 and not self.scenario.unix:
            self.wire = Wire(here)
            here = Endpoint.parse(self.wire.uri)
        onlooker.taped = Taped(here)
        self.source = source_of(
            self.vm,
            onlooker.taped,
            onlooker,
            verify=self.scenario.verify,
            wire=self.scenario.wire,
            on_event=onlooker.on_event,
            work_before=onlooker.work_before,
        )
        self.began_s = time.monotonic()
        try:
            self.report: MigrationReport = self.source.run()
        except MigrationError:
            self.report = self.source.job.report
        self.returned_s = time.monotonic()
        self.there = self.inn.outcome()
        if self.wire is not None:
            self.wire.close()
        self.moved = not isinstance(self.there, Exception)
        self.per_round = onlooker.rounds() if onlooker.round_began else []
        self.late = [frame for frame in onlooker.taped.placed()[1] if isinstance(frame, Pages)] if self.moved else []
        if onlooker.switches:  # what the guest wrote since is another matter
            pairs = zip(self.vm.memory.page_views(OWN[::2]), self.there.memory.page_views(OWN[::2]), strict=True)
            self.equal = all(bytes(a) == bytes(b) for a, b in pairs)

    def _before_run(self, there, name):
        self.arrived = time.monotonic()
        if self.onlooker.switches:  # to look at a page that is missing is to wait for it
            return
        self.work_there = sum(work(there))
        populated = self.vm.memory.populated()
        pairs = zip(self.vm.memory.views(*populated), there.memory.views(*populated), strict=True)
        self.equal = all(a == b for a, b in pairs)

    def close(self):
        """Free the machines."""
        self.inn.close()
        self.vm.close()

    def events(self, index):
        """The page records of a round."""
        return [record.event for record in self.per_round[index][0]]

    def sendings(self, index):
        """The calls that sent pages of a round."""
        places = {(record.connection, record.begin) for record in self.per_round[index][0]}
        return [each for each in self.onlooker.taped.sendings if (each.connection, each.begin) in places]

    def frozen(self):
        """The call that paused the guest for good, if it came to that."""
        calls = [each for each in self.onlooker.of("freeze") if each.thread == "MainThread"]
        return calls[-1] if Phase.PAUSE in self.onlooker.began else None

    def counter(self):
        """How often each page is on the tapes."""
        counts = Counter()
        for index in range(len(self.per_round)):
            for event in self.events(index):
                counts.update(gfns_of(event).tolist())
        counts.update(gfn for frame in self.late for gfn in frame.gfns.tolist())
        return counts

    def dirty(self, index):
        """What the tracker returned for a round, frame by frame; round 0 has no such thing."""
        begin, end = self.onlooker.round_began[index], self.onlooker.ends_of_rounds()[index]
        calls = self.onlooker.of("clean_range", begin, end)
        if index == len(self.onlooker.decided):  # the stop-and-copy takes what a PEEK says
            begin = self.onlooker.began[Phase.STOP_AND_COPY]
            calls = self.onlooker.of("peek", begin, end)[:1]
        return [gfn for call in calls for gfn in call.result.gfns().tolist()]

    def state(self):
        """The record of the guest's state, if it was sent."""
        records, _ = self.onlooker.taped.placed()
        return next((record.event for record in records if isinstance(record.event, HvmContext)), None)

    def said(self, number):
        """The bodies of the frames of a type that the destination sent."""
        at, found = 48, []  # after its preamble
        while at < len(self.inn.said):
            kind, size = struct.unpack_from("<II", self.inn.said, at)
            found += [bytes(self.inn.said[at + 8 : at + 8 + size])] * (kind == number)
            at += 8 + size
        return found

    def digests(self):
        """The frames of digests that were sent at the pause."""
        return [frame for frame in self.onlooker.taped.placed()[1] if isinstance(frame, Digests)]


@pytest.fixture(scope="module")
def look(tmp_path_factory, request):
    """Looks at a scenario: at each only once."""
    seen = {}

    def at(name):
        if name not in seen:
            seen[name] = Seen(SCENARIOS[name], tmp_path_factory.mktemp("report"))
        return seen[name]

    yield at
    for each in seen.values():
        each.close()


FIELDS = {}


def counted(*names):
    """Register what looks at fields, by their names in the JSON."""

    def register(function):
        assert not set(names) & set(FIELDS)
        FIELDS.update(dict.fromkeys(names, function))
        return function

    return register


def within(value, least, most):
    """A time, or a rate, is between what the test's clock says, except for rounding."""
    assert least - ROUNDING_S * max(1, abs(least)) <= value <= most + ROUNDING_S * max(1, abs(most))


def since_began(seen, least_s, most_s):
    """The bounds of a time since the migration began, which was between the call of ``run`` and its first event."""
    return least_s - seen.onlooker.began[Phase.CONNECT].at_s, most_s - seen.began_s


# -- what it was -------------------------------------------------------------------------------------------------------


@counted("status", "guest_at")
def where_the_guest_runs(seen):
    assert seen.report.status == ("completed" if seen.moved else "failed")
    assert seen.report.guest_at is (GuestAt.DESTINATION if seen.moved else GuestAt.SOURCE)
    assert runs_on(seen.there if seen.moved else seen.vm)
    if seen.moved and not seen.scenario.unix:  # there both have the same memory, and with it the same counter
        stands = work(seen.vm)
        assert runs_on(seen.there)
        assert work(seen.vm) == stands


@counted("source_accel", "destination_accel", "tracker", "policy", "memory_bytes")
def what_the_test_made(seen):
    assert seen.report.source_accel == seen.scenario.accel
    assert seen.report.destination_accel == seen.scenario.there
    assert seen.report.tracker == seen.scenario.tracker
    assert seen.report.policy == "onlooker"
    assert seen.report.memory_bytes == MEMORY_BYTES == seen.vm.memory.size_bytes


@counted("connections")
def connections_that_were_accepted(seen):
    assert seen.report.connections == len(seen.inn.channels) == len(seen.onlooker.taped.tapes)


@counted("compress", "delta_cache_bytes")
def how_the_records_are_packed(seen):
    packed = [event for index in range(len(seen.per_round)) for event in seen.events(index)]
    packed = [event for event in packed if isinstance(event, PackedPages | DeltaPages)]
    assert seen.report.compress == seen.scenario.wire.compress
    assert seen.report.delta_cache_bytes == seen.scenario.wire.delta_cache_bytes
    assert bool(packed) == (seen.scenario.wire.compress is not Packing.NONE)
    for event in packed:
        assert len(packer(seen.scenario.wire.compress).unpack(event.data, event.pfns.size * PAGE_SIZE)) > 0


@counted("bandwidth_bytes_per_s")
def the_cap_that_was_asked_for(seen):
    assert seen.report.bandwidth_bytes_per_s == seen.scenario.wire.bandwidth_bytes_per_s


@counted("shared_memory")
def whether_both_have_one_file_and_no_page_was_sent(seen):
    shared = seen.scenario.unix
    assert seen.report.shared_memory == shared
    assert bool(seen.counter()) != shared
    if shared:
        files = [os.fstat(vm.memory.storage.fd) for vm in (seen.vm, seen.there)]
        assert len({file.st_ino for file in files}) == 1


@counted("reason")
def the_policys_words(seen):
    given = seen.scenario.decisions[-1].reason if seen.scenario.decisions else "the destination has the same memory"
    assert seen.report.reason == given


@counted("warnings")
def nothing_to_warn_of(seen):
    assert seen.report.warnings == ()  # both ends have the CPU of this host


@counted("file")
def no_file(seen):
    assert seen.report.file is None  # of a save: test_save.py, test_save_processes.py


# -- what was sent -----------------------------------------------------------------------------------------------------


@counted("sent_bytes")
def bytes_on_the_wire(seen):
    assert seen.report.sent_bytes == sum(map(len, seen.onlooker.taped.tapes))
    if seen.wire is not None:
        assert seen.report.sent_bytes == seen.wire.forwarded_bytes


@counted("rounds.index", "rounds.final")
def rounds_in_their_order(seen):
    last = len(seen.onlooker.round_began) - 1
    expected = [(index, seen.moved and index == last) for index in range(last + 1)]
    assert [(stats.index, stats.final) for stats in seen.report.rounds] == expected
    sweeps = len(seen.onlooker.of("clean_range"))  # of a guest this small one CLEAN is a round
    assert len(expected) == (sweeps + 1 + seen.moved if expected else 0)


@counted("rounds.sent_pages", "rounds.zero_pages")
def pages_on_the_tape(seen):
    for index, stats in enumerate(seen.report.rounds):
        events = seen.events(index)
        assert stats.sent_pages == sum(gfns_of(event).size for event in events)
        assert stats.zero_pages == sum(named_zero(event).size for event in events)


@counted("rounds.sent_bytes")
def bytes_of_the_records_on_the_tape(seen):
    for stats, (records, passed) in zip(seen.report.rounds, seen.per_round, strict=True):
        pages = sum(record.end - record.begin for record in records)
        if seen.scenario.verify is VerifyMode.FULL:  # nothing but pages and, at its end, a FENCE
            assert pages == passed - (0 if stats.final else FENCE_BYTES)
        assert pages <= stats.sent_bytes <= passed


@counted("rounds.packed_pages", "rounds.packed_bytes", "rounds.delta_pages", "rounds.delta_bytes")
def packed_records_on_the_tape(seen):
    for stats, (records, _) in zip(seen.report.rounds, seen.per_round, strict=True):
        for kind, pages, size in (
            (PackedPages, stats.packed_pages, stats.packed_bytes),
            (DeltaPages, stats.delta_pages, stats.delta_bytes),
        ):
            mine = [record for record in records if isinstance(record.event, kind)]
            assert pages == sum(record.event.pfns.size for record in mine)
            assert size == sum(record.end - record.begin for record in mine)


@counted("rounds.dirty_pages")
def pages_that_the_tracker_returned(seen):
    for index, stats in enumerate(seen.report.rounds):
        if index:
            later = seen.onlooker.switches and stats.final  # what is dirty then, is missing
            assert stats.dirty_pages == (0 if later else len(seen.dirty(index)))
        else:
            assert seen.counter().keys() >= set(OWN[::2].tolist())
            assert OWN[::2].size < stats.dirty_pages <= populated_pages(seen.vm)
            assert stats.dirty_pages == sum(gfns_of(event).size for event in seen.events(0))


@counted("rounds.remaining_pages")
def pages_dirty_by_the_tests_own_peek(seen):
    for stats in seen.report.rounds:
        if stats.final:
            assert stats.remaining_pages == 0
        else:
            least = seen.onlooker.round_progress[stats.index].dirty_pages
            assert 0 < least <= stats.remaining_pages <= seen.onlooker.decided[stats.index][0].dirty_pages


@counted("rounds.duration_s")
def spans_of_the_rounds(seen):
    for stats, end in zip(seen.report.rounds, seen.onlooker.ends_of_rounds(), strict=True):
        sendings = seen.sendings(stats.index)
        first_s = min((each.began_s for each in sendings), default=0.0)
        last_s = max((each.ended_s for each in sendings), default=0.0)
        outside_s = end.at_s - seen.onlooker.round_began[stats.index].at_s
        within(stats.duration_s, last_s - first_s, outside_s)


@counted("sent.pages", "sent.rewritten_pages", "sent.again_pages")
def how_often_each_page_is_on_the_tape(seen):
    counts, sent = seen.counter(), seen.report.sent
    assert sent.pages == len(counts)
    assert sent.rewritten_pages == sum(number > 1 for number in counts.values())
    assert sent.again_pages == sum(number - 1 for number in counts.values())


@counted("sent.hot.first_gfn", "sent.hot.pages", "sent.hot.sent_pages", "sent.hot.again_pages")
def how_often_the_hot_ones_are(seen):
    counts = seen.counter()
    most = max(counts.values(), default=0) - 1
    for hot in seen.report.sent.hot:
        inside = {gfn: counts[gfn] for gfn in range(hot.first_gfn, hot.first_gfn + hot.pages) if gfn in counts}
        assert hot.sent_pages == sum(inside.values())
        assert hot.again_pages == sum(number - 1 for number in inside.values())
        edges = (inside[hot.first_gfn], inside[hot.first_gfn + hot.pages - 1])
        assert all(2 * (number - 1) >= most for number in edges)
    covered = [gfn for hot in seen.report.sent.hot for gfn in range(hot.first_gfn, hot.first_gfn + hot.pages)]
    assert {gfn for gfn, number in counts.items() if most and 2 * (number - 1) >= most} <= set(covered)


@counted("sent.heat.first_gfns", "sent.heat.last_gfns", "sent.heat.pages", "sent.heat.rounds_per_row", "sent.heat.rows")
def where_and_when_each_page_is(seen):
    heat = seen.report.sent.heat
    per_round = [Counter() for _ in seen.per_round]
    for index, counts in enumerate(per_round):
        for event in seen.events(index):
            counts.update(gfns_of(event).tolist())
    per_round.append(Counter(gfn for frame in seen.late for gfn in frame.gfns.tolist()))
    all_counts = seen.counter()
    assert heat.rounds_per_row == 1
    assert not any(map(bool, per_round[len(heat.rows) :]))
    found = 0
    for cell, (first, last) in enumerate(zip(heat.first_gfns, heat.last_gfns, strict=True)):
        inside = range(first, last + 1)
        found += sum(all_counts[gfn] for gfn in inside)
        assert heat.pages[cell] == sum(gfn in all_counts for gfn in inside)
        for row, counts in zip(heat.rows, per_round, strict=False):
            assert row[cell] == sum(counts[gfn] for gfn in inside)
    assert found == all_counts.total()


# -- proof and state ---------------------------------------------------------------------------------------------------


@counted("verified")
def memories_that_the_test_compared(seen):
    assert seen.report.verified == seen.moved
    assert seen.equal is (True if seen.moved else None)


@counted("verified_pages", "audited_pages")
def digests_on_the_wire(seen):
    frames = seen.digests()
    late = sum(frame.gfns.size for frame in seen.late)  # each has a digest of its own
    assert seen.report.verified_pages == sum(int(frame.pages.sum()) for frame in frames) + late
    assert seen.report.audited_pages == sum(int(frame.pages[frame.audited].sum()) for frame in frames)
    if seen.scenario.verify is VerifyMode.AUDIT:
        assert 0 < seen.report.audited_pages < seen.report.verified_pages
    if seen.moved and not seen.scenario.unix:
        assert seen.report.verified_pages == populated_pages(seen.vm)


@counted("state_bytes", "devices.name", "devices.size_bytes")
def the_state_on_the_wire(seen):
    state = seen.state()
    assert seen.report.state_bytes == (None if state is None else len(state.data))
    devices = [] if state is None else decode_machine_state(state.data).devices
    assert [(each.name, each.size_bytes) for each in seen.report.devices] == [
        (device.name, len(device.data)) for device in devices
    ]


@counted("devices.save_ns")
def how_long_each_device_took(seen):
    for each in seen.report.devices:
        call = seen.onlooker.device_calls[each.name][-1]
        whole = seen.onlooker.of("save_state")[-1]
        within(
            each.save_ns, 0.9 * 1e9 * (call.ended_s - call.began_s) - 1e3, 1e9 * (whole.ended_s - whole.began_s) + 1e3
        )


# -- time --------------------------------------------------------------------------------------------------------------


@counted("total_s")
def from_the_first_event_to_the_end(seen):
    least_s = seen.onlooker.taped.sendings[-1].ended_s
    within(seen.report.total_s, *since_began(seen, least_s, seen.returned_s))


@counted("paused_at_s")
def when_the_pause_began(seen):
    if seen.frozen() is None:
        assert seen.report.paused_at_s is None
    else:
        began = seen.onlooker.began[Phase.PAUSE].at_s
        least_s = seen.onlooker.ended[Phase.PRECOPY].at_s
        within(seen.report.paused_at_s, *since_began(seen, least_s, began))


@counted("downtime_s")
def for_how_long_the_guest_ran_nowhere(seen):
    if not seen.moved:
        assert seen.report.downtime_s is None
        return
    frozen = seen.frozen()
    if not seen.onlooker.switches:
        assert seen.work_there == seen.onlooker.began[Phase.STOP_AND_COPY].work  # it did nothing meanwhile
    within(
        seen.report.downtime_s, seen.arrived - frozen.ended_s, seen.returned_s - seen.onlooker.ended[Phase.PRECOPY].at_s
    )


@counted("downtime_parts_s")
def what_was_done_meanwhile(seen):
    parts = seen.report.downtime_parts_s
    if not seen.moved:
        assert parts is None
        return
    assert sum(parts.values()) == pytest.approx(seen.report.downtime_s)
    assert list(parts) == [str(phase) for phase in DOWNTIME_PHASES]
    began, ended = seen.onlooker.began, seen.onlooker.ended
    edges = (Phase.PRECOPY, *DOWNTIME_PHASES)
    for before, phase, after in zip(edges, DOWNTIME_PHASES, DOWNTIME_PHASES[1:], strict=False):
        inside_s = ended[phase].at_s - began[phase].at_s
        within(parts[str(phase)], inside_s, began[after].at_s - ended[before].at_s)
    within(parts["handoff"], seen.arrived - began[Phase.HANDOFF].at_s, seen.returned_s - ended[Phase.VERIFY].at_s)
    save = seen.onlooker.of("save_state")[-1]
    assert parts["state"] >= save.ended_s - save.began_s
    assert parts["pause"] >= seen.frozen().ended_s - seen.frozen().began_s


@counted("fault_count")
def pages_that_vcpus_made_dirty(seen):
    if seen.scenario.accel == "kvm":
        assert seen.report.fault_count is None
        return
    found = [gfn for index in range(1, len(seen.report.rounds)) for gfn in seen.dirty(index)]
    by_vcpus = len(found) - sum(gfn in set(OWN.tolist()) for gfn in found)
    assert seen.report.fault_count >= by_vcpus > 0
    if seen.moved:  # else it has written since
        assert seen.report.fault_count == by_vcpus


@counted("throttled_s")
def for_how_long_it_was_held(seen):
    freezes, thaws = (
        [each for each in seen.onlooker.of(name) if each.thread == "throttle"] for name in ("freeze", "thaw")
    )
    assert bool(freezes) == any(decision.throttle for decision in seen.scenario.decisions)
    least_s = sum(thaw.began_s - freeze.ended_s for freeze, thaw in zip(freezes, thaws, strict=True))
    nexts_s = [*(each.began_s for each in freezes), seen.returned_s][1:]  # it looks at the clock after it let go
    most_s = sum(next_s - freeze.began_s for freeze, next_s in zip(freezes, nexts_s, strict=False))
    within(seen.report.throttled_s, least_s, most_s)


@counted("round_ends.ended_s")
def when_rounds_ended(seen):
    for index, end in enumerate(seen.report.round_ends):
        least_s = max(each.ended_s for each in seen.sendings(index))
        within(end.ended_s, *since_began(seen, least_s, seen.onlooker.decided[index][0].at_s))


@counted("round_ends.work")
def what_the_guest_says_it_had_done(seen):
    for index, end in enumerate(seen.report.round_ends):
        assert seen.onlooker.decided[index][0].work <= end.work <= seen.onlooker.round_ended[index].work


@counted(
    "round_ends.throttle", "round_ends.decision.action", "round_ends.decision.reason", "round_ends.decision.throttle"
)
def what_the_policy_said(seen):
    planned = seen.scenario.decisions
    assert [end.decision for end in seen.report.round_ends] == list(planned)
    before = [0.0, *(decision.throttle for decision in planned[:-1])] if planned else []
    assert [end.throttle for end in seen.report.round_ends] == before


@counted("round_ends.fixed_s", "round_ends.expected_downtime_s")
def what_a_pause_would_have_cost(seen):
    for index, end in enumerate(seen.report.round_ends):
        first_s = seen.onlooker.round_began[0].at_s
        rehearsals = [each for each in seen.onlooker.of("save_state") if each.ended_s < first_s]
        assert end.fixed_s >= 2 * min(each.ended_s - each.began_s for each in rehearsals)
        moved_bytes = duration_s = 0
        for stats in reversed(seen.report.rounds[: index + 1]):
            content = PAGE_SIZE * (stats.sent_pages - stats.zero_pages)
            moved_bytes += max(stats.sent_bytes, content)
            duration_s += stats.duration_s
            if moved_bytes >= 4 * MiB:
                break
        remaining_bytes = PAGE_SIZE * seen.report.rounds[index].remaining_pages
        assert end.expected_downtime_s == pytest.approx(end.fixed_s + remaining_bytes * duration_s / moved_bytes)


# -- the guest's time --------------------------------------------------------------------------------------------------


@counted("guest_time")
def nothing_where_there_was_no_precopy(seen):
    assert (seen.report.guest_time is None) == (not seen.onlooker.decided)


def in_precopy(function):
    """Only where there was any."""

    def looks(seen):
        if seen.onlooker.decided:
            function(seen, seen.report.guest_time)

    return looks


def rehearsed(seen):
    """The calls that froze the guest and let it go to see what its state costs."""
    return seen.onlooker.of("freeze")[0], seen.onlooker.of("thaw")[0]


def last_moment(seen):
    """When the guest did its last work before the pause, or the end: at the least and the most; and its work then."""
    onlooker = seen.onlooker
    if seen.frozen() is None:
        end = onlooker.ended[Phase.PRECOPY]
        return end.at_s, seen.returned_s, end.work, None
    return seen.frozen().ended_s, onlooker.ended[Phase.PAUSE].at_s, *[onlooker.ended[Phase.PAUSE].work] * 2


@counted("guest_time.precopy_s")
@in_precopy
def from_the_handshake_to_the_pause(seen, spent):
    first_s, last_s, _, _ = last_moment(seen)
    within(spent.precopy_s, first_s - rehearsed(seen)[0].began_s, last_s - seen.onlooker.ended[Phase.HELLO].at_s)


@counted("guest_time.rehearsal_s", "guest_time.enable_s", "guest_time.clean_s")
@in_precopy
def calls_that_held_it(seen, spent):
    onlooker, (freeze, thaw) = seen.onlooker, rehearsed(seen)
    (enable,) = onlooker.of("enable")
    within(spent.rehearsal_s, thaw.ended_s - freeze.began_s, enable.began_s - onlooker.began[Phase.PRECOPY].at_s)
    within(spent.enable_s, enable.ended_s - enable.began_s, onlooker.round_began[0].at_s - thaw.ended_s)
    inside_s = sum(each.ended_s - each.began_s for each in onlooker.of("clean_range"))
    outside_s = sum(each.at_s for each, _ in onlooker.decided[1:]) - sum(
        each.at_s for each in onlooker.round_began[1 : len(onlooker.decided)]
    )
    within(spent.clean_s, inside_s, outside_s)


@counted("guest_time.work_before_per_s", "guest_time.work_during_per_s", "guest_time.work_after_per_s")
@in_precopy
def by_the_guests_own_counter(seen, spent):
    onlooker, before = seen.onlooker, seen.onlooker.work_before
    first, rehearsal = onlooker.began[Phase.PRECOPY], rehearsed(seen)[0]
    most_work = onlooker.round_began[0].work
    least = (first.work - before.work) / (rehearsal.began_s - before.at_s)
    within(spent.work_before_per_s, least, (most_work - before.work) / (first.at_s - before.at_s))
    first_s, last_s, least_work, last_work = last_moment(seen)
    least = (least_work - most_work) / (last_s - first.at_s)
    assert spent.work_during_per_s >= least > 0
    if last_work is not None:
        within(spent.work_during_per_s, least, (last_work - first.work) / (first_s - rehearsal.began_s))
    assert spent.work_after_per_s is None


@counted("guest_time.lost_s")
@in_precopy
def work_that_was_not_done(seen, spent):
    missing = spent.work_before_per_s * spent.precopy_s - spent.work_during_per_s * spent.precopy_s
    assert spent.lost_s == pytest.approx(missing / spent.work_before_per_s)


# -- after the switch --------------------------------------------------------------------------------------------------


@counted("postcopy")
def nothing_where_nothing_was_missing(seen):
    assert (seen.report.postcopy is not None) == seen.onlooker.switches


def after_the_switch(function):
    """Only where there was one."""

    def looks(seen):
        if seen.onlooker.switches:
            function(seen, seen.report.postcopy)

    return looks


@counted("postcopy.missing_pages", "postcopy.sent_pages", "postcopy.zero_pages")
@after_the_switch
def pages_that_went_afterwards(seen, late):
    missing = [frame for frame in seen.onlooker.taped.placed()[1] if isinstance(frame, Missing)]
    assert late.missing_pages == sum(int(frame.pages.sum()) for frame in missing)
    assert late.missing_pages == len(seen.dirty(len(seen.onlooker.decided)))
    assert late.sent_pages == len({gfn for frame in seen.late for gfn in frame.gfns.tolist()}) == late.missing_pages
    assert late.zero_pages == sum(int(frame.zero.sum()) for frame in seen.late)


@counted("postcopy.urgent_pages")
@after_the_switch
def pages_that_were_waited_for(seen, late):
    heads = [struct.unpack_from("<II", body) for body in seen.said(FrameType.WANTED)]
    assert sum(count for count, _ in heads) == late.missing_pages
    assert late.urgent_pages == sum(count for count, flags in heads if flags & 1)


@counted("postcopy.duration_s", "postcopy.cuts", "postcopy.cut_s")
@after_the_switch
def how_long_they_took(seen, late):
    least_s = seen.onlooker.taped.sendings[-1].ended_s - seen.onlooker.ended[Phase.HANDOFF].at_s
    within(late.duration_s, least_s, seen.returned_s - seen.arrived)
    assert (late.cuts, late.cut_s) == (0, 0.0)  # of real ones: test_postcopy.py


@counted(
    "postcopy.waits",
    "postcopy.waited_s",
    "postcopy.median_wait_s",
    "postcopy.p99_wait_s",
    "postcopy.longest_wait_s",
)
@after_the_switch
def what_the_destination_told(seen, late):
    ((waits, *times_ns),) = (COMPLETE_BODY.unpack(body) for body in seen.said(FrameType.COMPLETE))
    told_s = (late.waited_s, late.median_wait_s, late.p99_wait_s, late.longest_wait_s)
    assert (late.waits, *told_s) == (waits, *(time_ns / 1e9 for time_ns in times_ns))
    assert 0 <= late.median_wait_s <= late.p99_wait_s <= late.longest_wait_s <= late.waited_s
    assert late.waited_s <= late.waits * late.longest_wait_s + ROUNDING_S


# -- words -------------------------------------------------------------------------------------------------------------


@counted("explanation.outcome", "explanation.rates", "explanation.guest_time", "explanation.hot", "explanation.advice")
def words_of_these_numbers(seen):
    assert seen.report.explanation == explain(seen.report)
    assert seen.report.reason in seen.report.explanation.outcome


# -- the table ---------------------------------------------------------------------------------------------------------


def leaves(value, path=""):
    """The names of all fields of a report as JSON; of values in lists and tuples without their number."""
    if isinstance(value, dict) and path != "downtime_parts_s":
        for name, each in value.items():
            yield from leaves(each, f"{path}.{name}".lstrip("."))
    elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        for each in value:
            yield from leaves(each, path)
    else:
        yield path


def test_every_field_has_its_count(look, kvm_support):
    told = {name for scenario in SCENARIOS for name in leaves(look(scenario).report.to_json())}
    empty = {name for name in told if any(other.startswith(f"{name}.") for other in told)}  # null, or no entry
    assert told - empty == set(FIELDS) - {"guest_time", "postcopy"}


@pytest.mark.parametrize("name", sorted(FIELDS))
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_report_says_what_was_seen(look, kvm_support, scenario, name):
    if scenario == "all at once" and PACKING is Packing.NONE:
        pytest.skip("neither lz4 nor zstd is installed")
    FIELDS[name](look(scenario))
