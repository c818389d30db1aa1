"""How pages travel: every way there is ends in equal memory, and the report says what an independent count says."""

import contextlib
import socket
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest

from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import GuestAt, MigrationError, UsageError
from pageferry.core.events import RoundProgress
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.policies import XenPolicy
from pageferry.core.policy import Action, Decision
from pageferry.core.token_bucket import BURST_S
from pageferry.engine import features
from pageferry.engine.destination import Destination
from pageferry.engine.source import Source
from pageferry.engine.transport import Channel, Endpoint
from pageferry.engine.wire import MIN_BANDWIDTH_BYTES_PER_S, WireOptions
from pageferry.guests.abi import read_status
from pageferry.stream.codec import NEED_DATA, Decoder
from pageferry.stream.ferry import Conversation, FerryDecoder, Side, SourceHello
from pageferry.stream.format import EXTENSIONS, PageType
from pageferry.stream.records import PageData, ZeroPages

#: Frames that no guest program touches.
FREE = np.arange(6000, 6400, dtype=np.uint64)


@dataclass
class Taped:
    """An endpoint that keeps a copy of what the source sends."""

    endpoint: Endpoint
    tape: bytearray = field(default_factory=bytearray)

    def connect(self, timeout_s, given_up):
        channel = self.endpoint.connect(timeout_s, given_up)
        send = channel.send

        def tee(buffers):
            copies = [bytes(buffer) for buffer in buffers]  # the guest may write meanwhile: send what is on the tape
            self.tape.extend(b"".join(copies))
            send(copies)

        channel.send = tee
        return channel

    def records(self, agreed=EXTENSIONS):
        """The records of the stream that is on the tape, which a strict reader takes."""
        talk = Conversation(Side.DESTINATION)
        hello = FerryDecoder(talk)
        hello.feed(bytes(self.tape))
        assert isinstance(hello.next_event(), SourceHello)
        stream = Decoder(agreed=agreed)
        stream.feed(hello.trailing_data)
        events = []
        while (event := stream.next_event()) is not NEED_DATA:
            events.append(event)
        assert stream.ended
        return events


class Steps:
    """A policy that makes so many rounds; after each it calls ``after_round(index)``."""

    name = "steps"

    def __init__(self, rounds, after_round):
        self._rounds = rounds
        self._after_round = after_round

    def decide(self, progress):
        self._after_round(progress.last.index)
        done = len(progress.rounds) >= self._rounds
        return Decision(action=Action.STOP_AND_COPY if done else Action.NEXT_ROUND, reason="steps")


class Move:
    """One migration of ``vm`` to a machine of its kind over TCP; ``there`` is the Vm that arrived, or the error."""

    def __init__(self, vm, make_vm, accel):
        self.vm = vm
        self._make_vm = make_vm
        self._accel = accel
        self.there = None
        self.made = []
        self.taped = None

    def _make(self, config):
        self.made.append(self._make_vm(config))
        return self.made[-1]

    def _serve(self, listener):
        try:
            channel = Channel(listener.accept()[0], 10)
            self.there = Destination(channel, self._make, accel=self._accel).run()
        except MigrationError as error:
            self.there = error

    def run(self, policy=None, **options):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = threading.Thread(target=self._serve, args=(listener,))
            server.start()
            self.taped = Taped(Endpoint(host="127.0.0.1", port=listener.getsockname()[1]))
            try:
                self.source = Source(self.vm, self.taped, policy or XenPolicy(), timeout_s=10, **options)
                return self.source.run()
            finally:
                server.join()

    def expect_equal(self):
        assert not isinstance(self.there, MigrationError), self.there
        gfns = expand_runs(*self.vm.memory.populated())
        ours, theirs = (memory.page_views(gfns) for memory in (self.vm.memory, self.there.memory))
        assert [int(g) for g, a, b in zip(gfns, ours, theirs, strict=True) if bytes(a) != bytes(b)] == []


@pytest.fixture
def move(guests, make_vm, accel):
    with contextlib.ExitStack() as stack:

        def begin(vm):
            trip = Move(vm, make_vm, accel)
            stack.callback(lambda: [each.close() for each in trip.made])
            return trip

        yield begin


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
    report = trip.run(Steps(3, change))
    trip.expect_equal()
    first, later = named_zero(trip.taped.records())
    assert set(FREE[:100].tolist()) <= set(first)
    assert not set(FREE[100:].tolist()) & set(first)
    assert later == [*FREE[100:150].tolist(), *FREE[150:200:2].tolist()]
    assert not set(still_data.tolist()) & {*first, *later}
    assert report.rounds[0].zero_pages == len(first)
    assert [stats.zero_pages for stats in report.rounds[1:]] == [50, 25, 0]
    assert report.verified
    assert trip.source.traffic().zero_pages == len(first) + len(later)


def test_without_an_agreement_the_stream_is_xens_unchanged(guests, move, monkeypatch):
    monkeypatch.setattr(features, "agree", lambda offered: ())
    vm = guests("idle")
    fill(vm, FREE, 1)
    trip = move(vm)
    report = trip.run(Steps(2, lambda index: fill(vm, FREE, 0) if index == 0 else None))
    trip.expect_equal()
    events = trip.taped.records(agreed=())
    assert named_zero(events)[1] == []
    again = [e.pfns[e.types == PageType.NOTAB] for e in events if isinstance(e, PageData)]
    assert np.isin(np.concatenate(again), FREE).sum() == 2 * FREE.size  # zero the second time, and sent as data
    assert report.rounds[1].zero_pages == 0


def test_a_destination_that_takes_up_what_was_not_offered_is_refused(guests, move, monkeypatch):
    monkeypatch.setattr(features, "agree", lambda offered: ("teleport",))
    monkeypatch.setattr(features, "records_of", lambda agreed: frozenset())
    vm = guests("idle")
    trip = move(vm)
    with pytest.raises(MigrationError, match="teleport, which was not offered") as failed:
        trip.run()
    assert failed.value.guest_at is GuestAt.SOURCE
    assert not vm.log_dirty.enabled


@pytest.mark.parametrize("workload", ["random", "sweep"])
def test_a_running_guest_among_zero_pages_arrives_equal(guests, move, workload):
    vm = guests(workload)
    fill(vm, FREE, 0)
    vm.resume()
    trip = move(vm)
    report = trip.run()
    assert report.verified
    assert report.rounds[0].zero_pages >= FREE.size
    before = read_status(vm.memory, 1)[0].work
    assert read_status(trip.there.memory, 1)[0].work >= before


# -- bandwidth ---------------------------------------------------------------------------------------------------------


def test_a_capped_migration_is_no_faster_than_the_cap_from_the_first_byte_to_the_last(guests, move):
    cap = 16 << 20
    vm = guests("random")
    fill(vm, FREE, 1)
    vm.resume()
    trip = move(vm)
    report = trip.run(wire=WireOptions(bandwidth_bytes_per_s=cap))
    assert report.verified
    assert report.sent_bytes == len(trip.taped.tape)
    assert report.bandwidth_bytes_per_s == cap
    assert report.sent_bytes <= 1.05 * cap * (report.total_s + BURST_S)
    for stats in report.rounds:  # the stop-and-copy too
        assert stats.sent_bytes <= 1.05 * cap * (stats.duration_s + 2 * BURST_S)


def test_a_cancel_does_not_wait_for_the_cap(guests, move):
    vm = guests("idle")
    fill(vm, FREE, 1)
    trip = move(vm)
    with pytest.raises(MigrationError, match="cancelled"):
        trip.run(
            wire=WireOptions(bandwidth_bytes_per_s=MIN_BANDWIDTH_BYTES_PER_S),
            on_event=lambda event: trip.source.cancel() if isinstance(event, RoundProgress) else None,
        )
    assert trip.source.traffic().sent_bytes < FREE.size * PAGE_SIZE
    assert not vm.log_dirty.enabled


def test_a_cap_below_what_a_peer_waits_for_is_refused():
    with pytest.raises(UsageError, match="65535 bytes a second is too little") as refused:
        WireOptions(bandwidth_bytes_per_s=MIN_BANDWIDTH_BYTES_PER_S - 1)
    assert "0 for no limit" in refused.value.hint
