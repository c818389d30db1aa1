"""How pages travel: every way there is ends in equal memory, and the report says what an independent count says."""

import re
import socket
import threading
import time

import numpy as np
import pytest
from altered import AlteredDestination, AlteredSource, alter, lacking
from at_work import runs_on, work
from tiers import sample
from trips import Rounds

from pageferry.core.bitmap import expand_runs
from pageferry.core.cpuid import SOFT_CPU
from pageferry.core.errors import GuestAt, MigrationError, UnsupportedError, UsageError, VmError
from pageferry.core.events import Phase, RoundProgress
from pageferry.core.frames import PAGE_SIZE, PAGES_PER_2M
from pageferry.engine import features
from pageferry.engine.destination import Destination
from pageferry.engine.options import MIN_BANDWIDTH_BYTES_PER_S, VerifyMode, WireOptions
from pageferry.engine.pages.receive import PageWriter, Receiver
from pageferry.engine.wire.acceptor import Acceptor
from pageferry.engine.wire.channel import Channel
from pageferry.engine.wire.connections import connection_of, join
from pageferry.engine.wire.pacer import BURST_S
from pageferry.engine.wire.peer import Peer, PeerFailedError
from pageferry.stream import packing as packing_module
from pageferry.stream.ferry_frames import Join, Reached, SourceHello
from pageferry.stream.ferry_order import Side
from pageferry.stream.format import PageType
from pageferry.stream.packing import Packing, available, packer
from pageferry.stream.records import Audit, DeltaPages, Fence, PackedPages, PageData, ZeroPages

#: Frames that no guest program touches.
FREE = np.arange(6000, 6400, dtype=np.uint64)


def fill(vm, gfns, value):
    for gfn in gfns.tolist():
        vm.memory.write(gfn * PAGE_SIZE, bytes([value]) * PAGE_SIZE)


def named_zero(events):
    """The gfns of round 0's XALLOC, and of later ZERO_PAGES."""
    first = [e.pfns[e.types == PageType.XALLOC] for e in events if isinstance(e, PageData)]
    later = [e.pfns for e in events if isinstance(e, ZeroPages)]
    return [np.concatenate([np.empty(0, np.uint64), *each]).tolist() for each in (first, later)]


# -- zero pages --------------------------------------------------------------------------------------------------------


def test_zero_pages_travel_by_name(guests, move):
    """Zero from the beginning: XALLOC in round 0. Zero later: ZERO_PAGES. And a zero page that is not one any more."""
    vm = guests("idle")
    fill(vm, FREE, 1)
    fill(vm, FREE[:100], 0)
    still_data = FREE[200:]

    def change(index):
        if index == 0:
            fill(vm, FREE[50:60], 7)
            fill(vm, FREE[100:150], 0)
        if index == 1:
            fill(vm, FREE[100:110], 9)
            fill(vm, FREE[150:200:2], 0)

    trip = move(vm)
    report = trip.run(Rounds(3, change))
    trip.expect_equal()
    first, later = named_zero(trip.taped.records())
    assert set(FREE[:100].tolist()) <= set(first)
    assert not set(FREE[100:].tolist()) & set(first)
    assert later == [*FREE[100:150].tolist(), *FREE[150:200:2].tolist()]
    assert not set(still_data.tolist()) & {*first, *later}
    assert report.rounds[0].zero_pages == len(first)
    assert [stats.zero_pages for stats in report.rounds[1:]] == [50, 25, 0]
    assert report.verified
    assert trip.source.job.traffic().counts.zero_pages == len(first) + len(later)


def test_without_an_agreement_the_stream_is_xens_unchanged(guests, move):
    vm = guests("idle")
    fill(vm, FREE, 1)
    trip = move(vm, lacking(features.ZERO_PAGES, features.FENCE, features.AUDIT))
    report = trip.run(Rounds(2, lambda index: fill(vm, FREE, 0) if index == 0 else None))
    trip.expect_equal()
    events = trip.taped.records(agreed=())
    assert named_zero(events)[1] == []
    again = [e.pfns[e.types == PageType.NOTAB] for e in events if isinstance(e, PageData)]
    assert np.isin(np.concatenate(again), FREE).sum() == 2 * FREE.size  # zero the second time, and sent as data
    assert report.rounds[1].zero_pages == 0


def test_a_destination_that_takes_up_what_was_not_offered_is_refused(guests, move):
    vm = guests("idle")
    trip = move(vm, AlteredDestination.having({"features.agree": lambda offered, **_: ("teleport",)}))
    with pytest.raises(MigrationError, match="uses teleport, which was not offered") as failed:
        trip.run()
    assert failed.value.guest_at is GuestAt.SOURCE
    assert not vm.log_dirty.enabled


@pytest.mark.parametrize(
    "workload", sample(["random", "sweep"], "one guest that writes all the time", quick=["random"])
)
def test_a_running_guest_among_zero_pages_arrives_equal(guests, move, workload):
    vm = guests(workload)
    fill(vm, FREE, 0)
    vm.resume()
    trip = move(vm)
    report = trip.run()
    assert report.verified
    assert report.rounds[0].zero_pages >= FREE.size
    before = work(vm)
    assert work(trip.there) >= before


# -- bandwidth ---------------------------------------------------------------------------------------------------------


def test_a_capped_migration_is_no_faster_than_the_cap_from_the_first_byte_to_the_last(guests, move):
    cap = 16 << 20
    vm = guests("random")
    fill(vm, FREE, 1)
    vm.resume()
    trip = move(vm)
    began_s = time.monotonic()
    report = trip.run(wire=WireOptions(bandwidth_bytes_per_s=cap))
    assert report.verified
    assert report.sent_bytes == len(trip.taped.tapes[0])
    for sending in trip.taped.sendings:  # at no moment more than the cap allows until then, however late a thread is
        assert sending.begin <= 1.05 * cap * (sending.ended_s - began_s + BURST_S)
    assert report.bandwidth_bytes_per_s == cap
    assert report.sent_bytes <= 1.05 * cap * (report.total_s + BURST_S)
    for stats in report.rounds:  # the stop-and-copy too
        assert stats.sent_bytes <= 1.05 * cap * (stats.duration_s + 2 * BURST_S)


@pytest.mark.parametrize("later", [8 << 20, None])
def test_a_cap_that_changes_during_a_round_leaves_no_page_out(guests, move, later):
    vm = guests("idle")
    fill(vm, FREE, 1)
    trip = move(vm)

    def change(event):
        if isinstance(event, RoundProgress):
            trip.source._pacer.set_rate(later)

    report = trip.run(Rounds(1), wire=WireOptions(bandwidth_bytes_per_s=16 << 20), on_event=change)
    trip.expect_equal()
    assert report.rounds[0].sent_pages == report.rounds[0].dirty_pages


def test_a_cancel_does_not_wait_for_the_cap(guests, move):
    vm = guests("idle")
    fill(vm, FREE, 1)
    trip = move(vm)
    with pytest.raises(MigrationError, match="cancelled"):
        trip.run(
            wire=WireOptions(bandwidth_bytes_per_s=MIN_BANDWIDTH_BYTES_PER_S),
            on_event=lambda event: trip.source.job.cancel() if isinstance(event, RoundProgress) else None,
        )
    assert trip.source.job.traffic().sent_bytes < FREE.size * PAGE_SIZE
    assert not vm.log_dirty.enabled


def test_a_cap_below_what_a_peer_waits_for_is_refused():
    with pytest.raises(UsageError, match="65535 bytes a second is too little") as refused:
        WireOptions(bandwidth_bytes_per_s=MIN_BANDWIDTH_BYTES_PER_S - 1)
    assert "0 for no limit" in refused.value.hint


# -- several connections -----------------------------------------------------------------------------------------------

#: Frames of eight 2 MiB pieces, so of every connection there can be here.
WIDE = np.arange(2048, 6144, 16, dtype=np.uint64)


def expect_as_before(vm, move):
    """The guest is here and free, log-dirty is off, and the next attempt works."""
    assert not vm.log_dirty.enabled
    trip = move(vm)
    assert trip.run(wire=WireOptions(connections=2)).status == "completed"
    trip.expect_equal()


@pytest.mark.parametrize("connections", [1, 3])
def test_a_guest_moves_that_has_no_page_on_the_first_connection(guests, move, connections):
    vm = guests("idle")
    assert vm.memory.release([(0, vm.memory.size_bytes)])
    fill(vm, np.array([600], np.uint64), 1)  # of the second connection, if there are more
    trip = move(vm)
    report = trip.run(
        Rounds(2, lambda _: fill(vm, np.array([3], np.uint64), 0)), wire=WireOptions(connections=connections)
    )
    trip.expect_equal()
    assert report.verified


@pytest.mark.parametrize("connections", sample([2, 3, 4], "three are neither a pair nor a power of two", quick=[3]))
def test_every_page_travels_on_its_own_connection_in_order(guests, move, connections):
    vm = guests("idle")
    fill(vm, WIDE, 1)

    def change(index):
        fill(vm, WIDE[:: index + 2], 2 + index)
        fill(vm, WIDE[index::7], 0)

    trip = move(vm)
    report = trip.run(Rounds(4, change), wire=WireOptions(connections=connections))
    trip.expect_equal()
    assert report.verified
    assert report.connections == len(trip.taped.tapes) == connections
    assert report.sent_bytes == sum(map(len, trip.taped.tapes))
    sent = []
    for connection in range(connections):
        events = trip.taped.records(connection=connection)
        pfns = np.concatenate([e.pfns for e in events if isinstance(e, PageData | ZeroPages)])
        assert set(((pfns >> np.uint64(9)) % np.uint64(connections)).tolist()) == {connection}
        sent.append(pfns.size)
    assert sum(sent) == sum(stats.sent_pages for stats in report.rounds)
    zeros = [sum(map(len, named_zero(trip.taped.records(connection=each)))) for each in range(connections)]
    assert sum(zeros) == sum(stats.zero_pages for stats in report.rounds)


@pytest.mark.parametrize(
    "workload", sample(["random", "hotset"], "one guest that writes all the time", quick=["hotset"])
)
def test_a_running_guest_moves_over_several_connections(guests, move, workload):
    vm = guests(workload)
    fill(vm, WIDE, 3)
    vm.resume()
    trip = move(vm)
    report = trip.run(wire=WireOptions(connections=3, bandwidth_bytes_per_s=64 << 20))
    assert report.verified
    assert report.sent_bytes <= 1.05 * (64 << 20) * (report.total_s + BURST_S)  # all of them together
    assert work(trip.there) >= work(vm)


@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize("connection", sample([0, 1, 2], "a first and another connection are two kinds", quick=[0, 2]))
@pytest.mark.parametrize("when", sample([0, 2], "a later round is like the first", quick=[2]))
def test_a_lost_connection_fails_the_migration_whichever_it_is(guests, move, side, connection, when):
    vm = guests("idle")
    fill(vm, WIDE, 1)
    trip = move(vm)

    def cut(index):
        fill(vm, WIDE, 2 + index)
        if index == when:
            channels = trip.taped.channels if side == "source" else trip.inn.channels
            channels[connection].abort()

    with pytest.raises(MigrationError) as failed:
        trip.run(Rounds(6, cut), wire=WireOptions(connections=3))
    assert failed.value.guest_at is GuestAt.SOURCE
    assert "cut" in str(failed.value)
    assert isinstance(trip.there, MigrationError)
    expect_as_before(vm, move)


def test_connections_that_joined_are_closed_when_the_attempt_fails_before_their_first_page(guests, move):
    def fail(*parts):
        raise VmError("no thread to make room with")

    trip = move(guests("idle"))
    trip.inn.kind = AlteredDestination.having({"destination.Populator": fail})
    with pytest.raises(MigrationError, match="no thread to make room with"):
        trip.run(wire=WireOptions(connections=3))
    assert isinstance(trip.there, MigrationError)
    assert [channel.socket.fileno() for channel in trip.inn.channels] == [-1, -1, -1]


@pytest.mark.parametrize("says", ["hello", "token", "index", "nothing", "noise"])
def test_a_stranger_cannot_join_and_does_no_harm(guests, move, says):
    vm = guests("idle")
    strangers, refusals = [], []

    def knock(index):
        if index != 2:  # connection 1 has joined, and 2 is waited for
            return
        channel = trip.taped.endpoint.connect(10)
        strangers.append(channel)
        peer = Peer(channel, Side.SOURCE)
        if says == "noise":
            channel.send([b"GET / HTTP/1.1\r\n\r\n"])
        elif says != "nothing":
            peer.greet()
        if says == "hello":
            peer.send(
                SourceHello(version="1", memory_bytes=4096, cpus=1, accel="soft", cpuid=vm.cpuid, migration_id="x")
            )
        if says == "token":
            peer.send(Join(proof="guess", index=2))
        if says == "index":  # a peer that knows the token, and a number that is taken
            token = re.search(rb'"token":"(\w+)"', bytes(trip.inn.said)).group(1).decode()
            peer.send(Join(proof=peer.proof(Join, token), index=1))
        if says in ("hello", "token", "index"):
            refusals.append(peer)
        if says == "nothing":
            channel.abort()

    trip = move(vm)
    report = trip.run(before_connect=knock, wire=WireOptions(connections=3))
    trip.expect_equal()
    assert report.status == "completed"
    for peer in refusals:
        with pytest.raises(PeerFailedError, match="another guest is being received"):
            peer.receive()
    for channel in strangers:
        channel.close()


def test_a_connection_that_joins_when_nothing_is_going_on_is_sent_away():
    with Acceptor("tcp://127.0.0.1:0", timeout_s=10) as acceptor:
        channel = acceptor.endpoint.connect(10)
        with pytest.raises(PeerFailedError, match="no guest is being received here"):
            join(channel, "late", 1)
        channel.close()


def test_a_source_that_leaves_while_its_connections_join_ends_the_attempt(make_vm):
    left, right = socket.socketpair()
    source = Channel(left, 10)
    asked = threading.Event()

    def accept(wait_s):
        asked.set()
        source.abort()

    destination = Destination(Peer(Channel(right, 3600), Side.DESTINATION), make_vm, accept=accept)
    hello = {"version": "1", "memory_bytes": 32 << 20, "cpus": 1, "accel": "soft", "cpuid": SOFT_CPU}

    def ask():
        peer = Peer(source, Side.SOURCE)
        peer.greet()
        peer.send(SourceHello(**hello, migration_id="x", features=("connections",), connections=2))

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(MigrationError, match="cut") as failed:
        destination.run()
    asking.join()
    assert asked.is_set()
    assert failed.value.guest_at is GuestAt.SOURCE
    source.close()


def test_a_destination_that_takes_one_connection_only_is_not_migrated_to(guests, move):
    vm = guests("idle")
    with pytest.raises(MigrationError, match="takes one connection only") as failed:
        move(vm, lacking(features.CONNECTIONS)).run(wire=WireOptions(connections=2))
    assert failed.value.hint == "leave out --connections"
    assert failed.value.guest_at is GuestAt.SOURCE


def test_a_page_on_another_pages_connection_is_refused(guests, move):
    def next_one(gfns, count):
        return connection_of(gfns + np.uint64(PAGES_PER_2M), count)

    vm = guests("idle")
    fill(vm, WIDE, 1)
    wrong = AlteredSource.having({"pages.send.connection_of": next_one})
    with pytest.raises(MigrationError, match="belongs on another connection") as failed:
        move(vm).run(wire=WireOptions(connections=2), kind=wrong)
    assert failed.value.guest_at is GuestAt.SOURCE
    assert not vm.log_dirty.enabled


@pytest.mark.parametrize("connections", [1, 3])
def test_an_audit_follows_each_page_on_its_connection(guests, move, connections):
    vm = guests("random", working_set_bytes=8 << 20)
    fill(vm, WIDE, 1)  # lies still, so that there is something to audit on each connection however fast the guest is
    vm.resume()
    trip = move(vm)
    wire = WireOptions(connections=connections)
    policy = Rounds(4, lambda index: runs_on(vm))  # so there is something left for the stop-and-copy
    report = trip.run(policy, verify=VerifyMode.AUDIT, wire=wire)
    assert report.verified
    audited = []
    for index in range(connections):
        records = [record for record in trip.taped.records(connection=index) if isinstance(record, Audit)]
        audited.append((np.concatenate([record.first_gfns for record in records]) // 512 % connections).tolist())
    assert [set(each) for each in audited] == [{index} for index in range(connections)]
    assert 0 < report.audited_pages <= report.verified_pages


@pytest.mark.parametrize("connection", [0, 1, 2])
def test_a_wrong_page_is_found_while_the_guest_runs_whichever_connection_it_came_on(guests, move, connection):
    class Spoils(PageWriter):
        def page_data(self, header):
            ahead = super().page_data(header)
            if self._index == connection:
                self._words[WIDE[np.isin(WIDE, header.pfns)][:1], 7] ^= np.uint64(1)
            return ahead

    vm = guests("idle")
    fill(vm, WIDE, 1)
    vm.resume()
    trip = move(vm, AlteredDestination.having({"pages.receive.PageWriter": Spoils}))
    with pytest.raises(MigrationError, match="memory is not ours") as failed:
        trip.run(Rounds(1000), wire=WireOptions(connections=3), verify=VerifyMode.AUDIT)
    assert failed.value.phase == Phase.PRECOPY
    assert int(failed.value.__cause__.gfn) // 512 % 3 == connection
    vm.pause()
    expect_as_before(vm, move)


@pytest.mark.parametrize("connections", [0, 17])
def test_impossible_numbers_of_connections_are_refused(connections):
    with pytest.raises(UsageError, match=f"{connections} connections are not possible"):
        WireOptions(connections=connections)


# -- fences ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connections", [1, 3])
def test_when_a_round_has_ended_all_that_it_sent_is_in_place(guests, move, connections):
    """The last connection takes its pages in only when the first waits for it."""
    waits = threading.Event()
    rounds = []

    class Tells(Receiver):
        def _wait_reached(self, number):
            waits.set()
            super()._wait_reached(number)

    class TakesLate(PageWriter):
        def page_data(self, header):
            if self._index == 2 and len(rounds) < 3:  # no test waits in the stop-and-copy
                assert waits.wait(60)
            return super().page_data(header)

    def compare(index):
        gfns = expand_runs(*vm.memory.populated())
        ours, theirs = (memory.page_views(gfns) for memory in (vm.memory, trip.inn.made[0].memory))
        rounds.append([int(g) for g, a, b in zip(gfns, ours, theirs, strict=True) if bytes(a) != bytes(b)])
        waits.clear()
        fill(vm, WIDE, index + 2)

    vm = guests("idle")
    fill(vm, WIDE, 1)
    trip = move(vm, AlteredDestination.having({"destination.Receiver": Tells, "pages.receive.PageWriter": TakesLate}))
    trip.run(Rounds(3, compare), wire=WireOptions(connections=connections))
    trip.expect_equal()
    assert rounds == [[], [], []]
    for index in range(connections):
        records = trip.taped.records(connection=index)
        assert [record.number for record in records if isinstance(record, Fence)] == [0, 1, 2]


def test_a_destination_that_does_not_know_fences_is_not_waited_for(guests, move):
    trip = move(guests("idle"), lacking(features.FENCE))
    trip.run()
    trip.expect_equal()
    assert not any(isinstance(record, Fence) for record in trip.taped.records())


def test_an_answer_to_another_fence_ends_the_migration(guests, move):
    vm = guests("idle")
    trip = move(vm, AlteredDestination.having({"destination.Reached": lambda number: Reached(number=number + 1)}))
    with pytest.raises(MigrationError, match="the destination answered Reached out of turn") as failed:
        trip.run()
    assert failed.value.guest_at is GuestAt.SOURCE
    expect_as_before(vm, move)


# -- packed pages ------------------------------------------------------------------------------------------------------


PACKINGS = [Packing.LZ4, Packing.ZSTD]


@pytest.fixture(params=PACKINGS, ids=str)
def packing(request):
    if request.param not in available():
        pytest.skip(f"the library for {request.param} is not installed")
    return request.param


def fill_random(vm, gfns, seed):
    random = np.random.default_rng(seed)
    for gfn in gfns.tolist():
        vm.memory.write(gfn * PAGE_SIZE, random.bytes(PAGE_SIZE))


@pytest.mark.parametrize("connections", [1, 2])
def test_packed_pages_arrive_and_those_that_do_not_get_smaller_go_as_they_are(guests, move, packing, connections):
    vm = guests("idle")
    small, large = WIDE[:128], WIDE[128:]
    fill(vm, small, 1)
    fill_random(vm, large, 1)

    def change(index):
        if index == 0:
            fill(vm, small[::2], 5)
            fill_random(vm, large[::9], 5)
        if index == 1:
            fill_random(vm, large[::2], 6)

    trip = move(vm)
    report = trip.run(Rounds(3, change), wire=WireOptions(compress=packing, connections=connections))
    trip.expect_equal()
    assert report.compress == str(packing)
    packed, plain = [], []
    for connection in range(connections):
        events = trip.taped.records(connection=connection)
        packed += [e for e in events if isinstance(e, PackedPages)]
        plain += [e for e in events if isinstance(e, PageData) and e.payload]
    assert packed
    assert plain
    assert sum(e.pfns.size for e in packed) == sum(stats.packed_pages for stats in report.rounds)
    on_the_wire = sum(8 + -(-(8 + 8 * e.pfns.size + len(e.data)) // 8) * 8 for e in packed)
    assert on_the_wire == sum(stats.packed_bytes for stats in report.rounds)
    counts = trip.source.job.traffic().counts
    assert (counts.packed_pages, counts.packed_bytes) == (sum(e.pfns.size for e in packed), on_the_wire)


@pytest.mark.parametrize("workload", sample(["random", "kv"], "kv checks itself", quick=["kv"]))
def test_a_running_guest_moves_packed(guests, move, packing, workload):
    vm = guests(workload)
    vm.resume()
    trip = move(vm)
    report = trip.run(wire=WireOptions(compress=packing))
    assert report.verified
    assert report.rounds[0].packed_pages
    assert work(trip.there) >= work(vm)


def test_a_destination_without_the_library_is_not_migrated_to(guests, move, packing):
    vm = guests("idle")
    with pytest.raises(MigrationError, match=f"the destination cannot unpack {packing}") as failed:
        move(vm, lacking(*features.PACK.values())).run(wire=WireOptions(compress=packing))
    assert "pip install 'pageferry[compress]'" in failed.value.hint
    assert failed.value.guest_at is GuestAt.SOURCE
    assert not vm.log_dirty.enabled


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_a_source_without_the_library_says_so_before_anything_begins(packing, monkeypatch):
    def nothing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(packing_module.importlib, "import_module", nothing)
    with pytest.raises(UnsupportedError, match=f"--compress {packing} needs a library") as missing:
        WireOptions(compress=packing)
    assert "pip install" in missing.value.hint
    assert available() == ()


def test_packed_data_that_is_not_what_it_should_be_ends_the_migration(guests, move, packing):
    def spoiling(packing):
        made = packer(packing)
        alter(made, "pack", lambda sound: lambda data: sound(data)[:-5] + b"wrong")
        return made

    vm = guests("idle")
    fill(vm, WIDE, 1)
    wrong = AlteredSource.having({"source.packer": spoiling})
    with pytest.raises(MigrationError, match=r"packed by|came out of|PACKED_PAGES|memory is not ours") as failed:
        move(vm).run(wire=WireOptions(compress=packing), kind=wrong)
    assert failed.value.guest_at is GuestAt.SOURCE


def test_an_offer_of_two_packings_is_answered_with_one(packing):
    both = ("zero-pages", *features.PACK.values())
    used = features.agree(both, shared=False)
    assert used[0] == "zero-pages"
    assert len(used) == 2
    assert features.packing_of(used) in available()


@pytest.mark.parametrize("connections", [1, 2])
def test_of_a_page_that_is_sent_again_and_again_only_the_change_travels(guests, move, packing, connections):
    vm = guests("idle")
    fill_random(vm, WIDE, 1)

    def change(index):
        for gfn in WIDE.tolist():
            vm.memory.write(gfn * PAGE_SIZE + 8 * index, bytes([index + 1]))

    trip = move(vm)
    wire = WireOptions(compress=packing, delta_cache_bytes=64 << 20, connections=connections)
    report = trip.run(Rounds(3, change), wire=wire)
    trip.expect_equal()
    assert [stats.delta_pages for stats in report.rounds] == [0, *3 * [WIDE.size]]
    deltas = [
        event
        for connection in range(connections)
        for event in trip.taped.records(connection=connection)
        if isinstance(event, DeltaPages)
    ]
    assert sum(event.pfns.size for event in deltas) == sum(stats.delta_pages for stats in report.rounds)
    on_the_wire = sum(8 + -(-(8 + 8 * event.pfns.size + len(event.data)) // 8) * 8 for event in deltas)
    assert on_the_wire == sum(stats.delta_bytes for stats in report.rounds) < 3 * WIDE.size * PAGE_SIZE // 10
    assert report.delta_cache_bytes == 64 << 20
    counts = trip.source.job.traffic().counts
    assert (counts.delta_pages, counts.delta_bytes) == (3 * WIDE.size, on_the_wire)


@pytest.mark.parametrize("workload", sample(["hotset", "kv"], "kv checks itself", quick=["kv"]))
def test_a_running_guest_moves_by_its_changes(guests, move, packing, workload):
    vm = guests(workload)
    vm.resume()
    trip = move(vm)
    wire = WireOptions(compress=packing, delta_cache_bytes=4 << 20)  # smaller than what it writes
    report = trip.run(Rounds(5), wire=wire, verify=VerifyMode.AUDIT)
    assert report.verified
    assert work(trip.there) >= work(vm)


def test_a_destination_that_takes_no_deltas_is_not_migrated_to(guests, move, packing):
    vm = guests("idle")
    with pytest.raises(MigrationError, match="takes no deltas") as failed:
        move(vm, lacking(features.DELTA)).run(wire=WireOptions(compress=packing, delta_cache_bytes=4 << 20))
    assert failed.value.hint == "leave out --delta-cache"
    assert failed.value.guest_at is GuestAt.SOURCE


def test_a_delta_cache_without_a_packing_or_too_small_for_a_batch_is_refused(packing):
    with pytest.raises(UsageError, match="a delta cache needs a packing"):
        WireOptions(delta_cache_bytes=64 << 20)
    with pytest.raises(UsageError, match="delta cache of 8388607 bytes is too small") as small:
        WireOptions(delta_cache_bytes=(8 << 20) - 1, compress=packing, connections=2)
    assert "at least 8 MiB" in small.value.hint
