"""Migrations between two machines in one process: the other end, policies that count, a copy of what is sent."""

import math
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from at_work import runs_on, until

from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import GuestAt, MigrationError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.policies import XenPolicy
from pageferry.core.policy import Action, Decision
from pageferry.core.vm import VmStatus
from pageferry.engine.destination import Destination
from pageferry.engine.options import MigrationOptions
from pageferry.engine.source import Source
from pageferry.engine.wire.channel import Channel, Endpoint
from pageferry.engine.wire.peer import Peer
from pageferry.hypervisor import invariants
from pageferry.hypervisor.domain import Domain
from pageferry.stream.decoder import Decoder
from pageferry.stream.ferry import FerryDecoder
from pageferry.stream.ferry_frames import Digests, FrameType, Join, Pages, SourceHello, Switch
from pageferry.stream.ferry_order import Conversation, Side, Stage
from pageferry.stream.format import EXTENSIONS
from pageferry.stream.intake import NEED_DATA
from pageferry.stream.order import Role
from pageferry.stream.records import End

#: How long a connection may stand still where no test is about that.
TIMEOUT_S = 60
LOOPBACK = Endpoint(host="127.0.0.1")
#: A policy makes so many rounds if only the test can end it.
FOREVER = math.inf


class Inn:
    """A destination on a thread: takes in one guest after another, each as ``make_vm`` makes it.

    ``made`` are the machines, ``destination`` takes in the last guest, ``channels`` are its connections, ``said`` what
    was sent on the first of them, ``vm`` that guest, or ``error`` what became of it instead. ``kind`` is the class of
    ``destination``. ``asked_within_s``: how long it waits for a source that has not heard of its guest.
    """

    asked_within_s = 0.0

    def __init__(self, make_vm, endpoint=LOOPBACK, *, kind=Destination):
        self.make_vm = make_vm
        self.kind = kind
        self._listener = endpoint.listen()
        self.endpoint = endpoint.bound(self._listener)
        self.made = []
        self.channels = []
        self.said = bytearray()
        self.destination = self.vm = self.error = None
        self._thread = None

    def _make(self, config):
        self.made.append(self.make_vm(config))
        return self.made[-1]

    def _accept(self, wait_s):
        sock = self._listener.accept_within(wait_s)
        if sock is None:
            return None
        self.channels.append(Channel(sock, TIMEOUT_S))
        return Peer(self._watched(self.channels[-1]), Side.DESTINATION)

    def _watched(self, channel):
        """Return a further connection, as the destination is to have it."""
        return channel

    def _heard(self, channel):
        send = channel.send

        def tee(buffers, fd=None):
            self.said.extend(b"".join(map(bytes, buffers)))
            send(buffers, fd)

        channel.send = tee
        return channel

    def _serve(self, options):
        try:
            self.channels.append(self._heard(Channel(self._listener.accept(), TIMEOUT_S)))
            self.destination = self.kind(
                Peer(self.channels[0], Side.DESTINATION),
                self._make,
                accept=self._accept,
                asked_within_s=self.asked_within_s,
                **options,
            )
            self.vm = self.destination.run()
        except (MigrationError, OSError) as error:  # an OSError: closed before a source came
            self.error = error

    def open(self, **options):
        """Wait for a guest, on a thread; return where. ``options`` are the Destination's."""
        self.vm = self.error = None
        self.channels, self.said = [], bytearray()
        self._thread = threading.Thread(target=self._serve, args=(options,))
        self._thread.start()
        return self.endpoint

    def outcome(self):
        """Return the guest that arrived, or the error, when it is clear which."""
        self._thread.join()
        return self.vm or self.error

    def check_out(self):
        """Return the guest that arrived; it is the caller's from now on."""
        guest, self.vm = self.vm, None
        self.made.remove(guest)
        return guest

    def close(self):
        """Take in no more guests, and give everything back."""
        self._listener.shutdown()
        for channel in self.channels:
            channel.abort()
        if self._thread is not None:
            self._thread.join()
        self._listener.close()
        for vm in self.made:
            if isinstance(vm, Domain) and vm is self.vm and not vm.closed:
                invariants.check(vm)
            vm.close()


class Rounds:
    """A policy that makes so many rounds; after each it calls ``after_round(index)``.

    ``limit_s``: a downtime limit that it does not look at.
    """

    name = "rounds"

    def __init__(self, rounds, after_round=lambda index: None, *, limit_s=None):
        self.limit_s = limit_s
        self._rounds = rounds
        self._after_round = after_round

    def decide(self, progress):
        """Count."""
        self._after_round(progress.last.index)
        enough = len(progress.rounds) >= self._rounds
        return Decision(action=Action.STOP_AND_COPY if enough else Action.NEXT_ROUND, reason="counted")


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A record on a tape: bytes ``begin`` to ``end`` of that connection."""

    connection: int
    begin: int
    end: int
    event: object


@dataclass(frozen=True, kw_only=True)
class Sending:
    """One call that sent: when it began and came back, on which connection, and where its first byte is on the tape."""

    began_s: float
    ended_s: float
    connection: int
    begin: int


@dataclass
class Taped:
    """An endpoint that keeps a copy of what the source sends, connection by connection."""

    endpoint: Endpoint
    before_connect: Callable[[int], None] = lambda index: None
    tapes: list[bytearray] = field(default_factory=list)
    channels: list[Channel] = field(default_factory=list)
    sendings: list[Sending] = field(default_factory=list)

    def __str__(self):
        return str(self.endpoint)

    def __getattr__(self, name):
        return getattr(self.endpoint, name)

    def connect(self, timeout_s, given_up):
        """Connect, with a tape."""
        connection = len(self.tapes)
        self.before_connect(connection)
        channel = self.endpoint.connect(timeout_s, given_up)
        self.channels.append(channel)
        tape, send = bytearray(), channel.send
        self.tapes.append(tape)

        def tee(buffers, fd=None):
            copies = [bytes(buffer) for buffer in buffers]  # the guest may write meanwhile: send what is on the tape
            began_s, begin = time.monotonic(), len(tape)
            tape.extend(b"".join(copies))
            send(copies, fd)
            sending = Sending(began_s=began_s, ended_s=time.monotonic(), connection=connection, begin=begin)
            self.sendings.append(sending)

        channel.send = tee
        return channel

    def placed(self, agreed=EXTENSIONS, connection=0):
        """Return the records of the stream on a tape, or of the section there, which a strict reader takes.

        And the frames that follow the stream, of a migration that came so far.
        """
        tape = bytes(self.tapes[connection])
        conversation = Conversation(Side.DESTINATION)
        frames, at = FerryDecoder(conversation), 0
        while (hello := frames.next_event()) is NEED_DATA:
            wanted = frames.wanted_bytes
            frames.feed(tape[at : at + wanted])
            at += wanted
        assert isinstance(hello, Join if connection else SourceHello)
        stream = Decoder(agreed=agreed, role=Role.SECTION if connection else Role.READER)
        stream.feed(tape[at:])
        records, begin = [], at
        while (event := stream.next_event()) is not NEED_DATA:
            end = at + stream.offset
            records.append(Placed(connection=connection, begin=begin, end=end, event=event))
            begin = end
        if connection or not stream.ended:
            return records, []
        conversation.passed(Side.DESTINATION, FrameType.DESTINATION_HELLO)
        conversation.stream_passed(stream.offset)
        return records, list(self._frames(conversation, frames, tape[begin:]))

    @staticmethod
    def _frames(conversation, frames, data):
        """Yield the frames that follow the stream; what the destination says in between is taken as said."""
        at = 0
        while at < len(data):
            if data[at : at + 4] == struct.pack("<I", FrameType.DROPPED):
                conversation.passed(
                    Side.DESTINATION, FrameType.RUNNING if conversation.stage is Stage.COMMITTED else FrameType.COMPLETE
                )
            while (frame := frames.next_event()) is NEED_DATA and at < len(data):
                wanted = frames.wanted_bytes
                frames.feed(data[at : at + wanted])
                at += wanted
            yield frame
            if isinstance(frame, Digests) and frame.last:
                conversation.passed(Side.DESTINATION, FrameType.READY)
            if isinstance(frame, Switch):
                conversation.passed(Side.DESTINATION, FrameType.RUNNING)
            if isinstance(frame, Pages):  # their content follows
                at += int((~frame.zero).sum()) * PAGE_SIZE

    def records(self, agreed=EXTENSIONS, connection=0):
        """Return the records alone, of a whole stream."""
        records, _ = self.placed(agreed, connection)
        assert isinstance(records[-1].event, End)
        return [record.event for record in records]


def source_of(vm, endpoint, policy=None, *, on_event=lambda event: None, work_before=None, kind=Source, **options):
    """Return a Source, or another of that ``kind``; ``options`` are those of :class:`MigrationOptions`."""
    endpoint = Endpoint.parse(endpoint) if isinstance(endpoint, str) else endpoint
    options = MigrationOptions(**({"timeout_s": TIMEOUT_S} | options))
    return kind(vm, endpoint, policy or XenPolicy(), options, on_event=on_event, work_before=work_before)


def out_of_lease(source):
    """Wait until a commit that was not answered cannot be accepted any more."""
    until(lambda: not source.job.open_for_s, "end of the lease")


class Move:
    """One migration of ``vm`` to an inn, taped; ``there`` is the Vm that arrived, or the error."""

    def __init__(self, vm, inn):
        self.vm = vm
        self.inn = inn
        self.there = None
        self.taped = None
        self.source = None

    def run(self, policy=None, *, before_connect=lambda index: None, **options):
        """Move the guest; return the report."""
        self.taped = Taped(self.inn.open(), before_connect)
        try:
            self.source = source_of(self.vm, self.taped, policy, **options)
            return self.source.run()
        finally:
            self.there = self.inn.outcome()

    def expect_equal(self):
        """The memories are equal where the source has storage."""
        assert not isinstance(self.there, Exception), self.there
        gfns = expand_runs(*self.vm.memory.populated())
        ours, theirs = (memory.page_views(gfns) for memory in (self.vm.memory, self.there.memory))
        assert [int(g) for g, a, b in zip(gfns, ours, theirs, strict=True) if bytes(a) != bytes(b)] == []


def expect_as_before(vm, inn, source):
    """Law 5: the source as it was, log-dirty off, no guest at the destination, and the next attempt works."""
    assert source.job.report.status in ("failed", "cancelled")
    assert source.job.report.guest_at is GuestAt.SOURCE
    assert not vm.log_dirty.enabled
    assert vm.status is VmStatus.RUNNING
    assert runs_on(vm)
    second = source_of(vm, inn.open())
    assert second.run().status == "completed"
    assert runs_on(inn.outcome())


class Running:
    """An attempt on a thread of its own."""

    def __init__(self, source):
        self._source = source
        self.error = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            self._source.run()
        except MigrationError as error:
            self.error = error

    def status(self, wanted):
        """Wait for a status."""
        until(lambda: self._source.job.report is not None or self._source.job.status == wanted, wanted)
        assert self._source.job.status == wanted

    def rounds(self, count):
        """Wait for so many rounds."""
        until(
            lambda: self._source.job.report is not None or self._source.job.traffic().rounds >= count, f"{count} rounds"
        )

    def end(self):
        """Wait for the end; return the report."""
        self._thread.join()
        return self._source.job.report
