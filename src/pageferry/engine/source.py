"""The source's side of a migration, phase by phase.

::

    source                                        destination
      | -- HELLO ------------------------------------> |  makes a machine, or refuses
      | <------------------------------------ HELLO -- |
      | -- JOIN, on each further connection ---------> |
      |  ENABLE                                         |
      | == pre-copy: CLEAN, then copy, round by round => |  scatters pages into place
      | <--------------- REACHED, after each round --- |
      |  freeze the guest ........................ downtime begins
      | == stop-and-copy: what is dirty ==============> |
      | == state, END ================================> |
      | -- DIGESTS -----------------------------------> |  digests the same pages
      | <------------------------------------ READY -- |  (or MISMATCH: fail closed)
      |  gives its disks back                           |
      | -- COMMIT ------------------------------------> |  from here on the source never runs it again by itself
      | <---------------------------------- RUNNING -- |  downtime ends
      | -- DROPPED -----------------------------------> |

Where the policy decides for post-copy, what is dirty at the freeze stays here: it is named before DIGESTS, SWITCH
stands for COMMIT, and the destination asks for it afterwards (:mod:`pageferry.engine.postcopy.client`). What happens
when an answer to COMMIT or SWITCH is lost stands in :mod:`pageferry.engine.handoff.give`.

What holds at the end is written in :mod:`pageferry.engine.attempt`; what others may ask meanwhile, in
:mod:`pageferry.engine.job`.
"""

import contextlib
import math
import uuid
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from pageferry.core.errors import GuestAt, MigrationError, PageferryError, TransportError, TruncatedError, VmError
from pageferry.core.events import Event, MigrationReport, Phase, PostcopyPaused, PostcopyProgress, PostcopyRecovered
from pageferry.core.frames import GfnArray
from pageferry.core.guest_time import WorkSample
from pageferry.core.host_cpu import HostCpu, cpu_warning
from pageferry.core.hugepages import HugePages
from pageferry.core.policy import Action, Policy, may_switch
from pageferry.core.version import __version__
from pageferry.core.vm import Vm, VmStatus
from pageferry.engine import features
from pageferry.engine.attempt import Attempt
from pageferry.engine.failures import ConnectError, as_migration_error
from pageferry.engine.handoff.give import Giver
from pageferry.engine.host import THIS_HOST, Host
from pageferry.engine.job import JobStatus
from pageferry.engine.options import DEFAULT_OPTIONS, DEFAULT_WIRE, MigrationOptions
from pageferry.engine.pages.cache import PageCache
from pageferry.engine.pages.encode import PackingCoder, PageCoder, PlainCoder
from pageferry.engine.pages.send import Lane, Lanes
from pageferry.engine.postcopy.server import MissingPages, Postcopy
from pageferry.engine.precopy import HELD_ROUND_S, Precopy, last_dirty, stop_and_copy
from pageferry.engine.progress import Rounds
from pageferry.engine.verify.digests import hint_runs
from pageferry.engine.verify.prove import MemoryProof
from pageferry.engine.wire.channel import Channel, Endpoint
from pageferry.engine.wire.connections import come_back, connection_of, join
from pageferry.engine.wire.peer import Peer
from pageferry.engine.wire.tls_errors import TlsError
from pageferry.stream.encoder import Encoder
from pageferry.stream.ferry_frames import (
    Commit,
    DestinationHello,
    Frame,
    Mismatch,
    Reached,
    SourceHello,
    Switch,
)
from pageferry.stream.ferry_order import Side
from pageferry.stream.format import RecordType
from pageferry.stream.order import Role
from pageferry.stream.packing import Packing, packer
from pageferry.stream.records import StaticDataEnd

_FIRST_GFN = np.zeros(1, np.uint64)
#: How long the destination may take COMMIT or SWITCH at its word, at most: a moment, unless the network holds it up.
_LEASE_S = 10.0
#: So much of the time for which a connection may stand still passes between two rounds of a migration that is held.
_HELD_SHARE = 0.25
#: A destination that fails may cut further connections before it says why; so long we listen.
_LAST_WORDS_S = 1.0


def _ignore(_: Event) -> None:
    """See nothing."""


class DestinationSink:
    """Sends pages to a destination, and hears what it says meanwhile.

    Args:
        lanes: one for each connection.
        peer: the destination, on the first of them.
        proof: knows which pages a MISMATCH is of.
        rounds: of the migration.
        fences: whether the destination answers a FENCE.
    """

    def __init__(self, lanes: Lanes, peer: Peer, proof: MemoryProof, rounds: Rounds, *, fences: bool) -> None:
        self.lanes = lanes
        self._peer = peer
        self._proof = proof
        self._rounds = rounds
        self._fences = fences

    def begin(self, gfns: GfnArray) -> None:
        """Pages that are not sent are zeros at the destination already; the format demands one all the same."""
        if not (connection_of(gfns, len(self.lanes.all)) == 0).any():
            self.lanes.all[0].name_untouched(_FIRST_GFN)

    def check(self, wait_s: float = 0.0) -> None:
        """Raise what the destination says, if it says anything within ``wait_s``."""
        if self._peer.channel.readable(wait_s):
            raise self._complaint(self._peer.receive())

    def fence(self, number: int) -> None:
        """Wait until the destination has everything that was sent in round ``number``; raises what it says instead."""
        if not self._fences:
            return
        self.lanes.send_fence(number)
        frame = self._peer.receive()
        if frame != Reached(number=number):
            raise self._complaint(frame)

    def _complaint(self, frame: Frame) -> PageferryError:
        if isinstance(frame, Mismatch):
            return self._proof.mismatch(frame, self._rounds.index)
        return self._peer.out_of_turn(frame)


class Source:
    """One attempt to move a guest away.

    Args:
        vm: the guest; running or paused.
        endpoint: where the destination listens.
        policy: decides after each round.
        options: how to move it.
        host_cpu: the CPU that it runs on; None: not known.
        on_event: sees every event, on the thread that calls :meth:`run`.
        work_before: see :class:`~pageferry.engine.attempt.Attempt`.
        host: under this end.
    """

    def __init__(
        self,
        vm: Vm,
        endpoint: Endpoint,
        policy: Policy,
        options: MigrationOptions = DEFAULT_OPTIONS,
        *,
        host_cpu: HostCpu | None = None,
        on_event: Callable[[Event], None] = _ignore,
        work_before: WorkSample | None = None,
        host: Host = THIS_HOST,
    ) -> None:
        self._vm = vm
        self._host = host
        self.endpoint = endpoint
        """Where the destination listens: the one that was asked last."""
        self._options = options
        self._host_cpu = host_cpu
        self._wire = options.wire
        self._lease_s = min(_LEASE_S, options.timeout_s)
        self._held_round_s = min(HELD_ROUND_S, _HELD_SHARE * options.timeout_s)
        self._attempt = Attempt(
            vm,
            policy,
            wire=options.wire,
            pause_limit_s=options.pause_limit_s,
            hold=options.hold,
            on_event=on_event,
            work_before=work_before,
            host=host,
        )
        self.job = self._attempt.job
        self._proof = MemoryProof(
            vm,
            self._attempt.accounts,
            options.verify,
            limit_s=lambda: self.job.downtime_limit_s,
            now_s=self._attempt.clock.now_s,
        )
        self._encoder = Encoder()
        self._giver: Giver[Peer] | None = None  # from READY on, which was heard at
        self._ready_at_s = 0.0

    def run(self) -> MigrationReport:
        """Move the guest; call once. ``job.report`` is set afterwards, also when this raises.

        Raises:
            MigrationError: it did not move (``guest_at`` SOURCE), or that is not known (UNKNOWN), or it moved and is
                lost (DESTINATION, in post-copy).
        """
        attempt, report, phase = self._attempt, self._attempt.report, self._attempt.clock.phase
        with attempt.under_way(self._as_migration_error), contextlib.closing(self._proof):
            with phase(Phase.CONNECT):
                peer = Peer(self._connect(self._options.timeout_s), Side.SOURCE)
            with phase(Phase.HELLO):
                token, agreed = self._hello(peer)
                self._proof.agree(audits=features.AUDIT in agreed)
                sink = self._sink(peer, token, features.records_of(agreed))
            with self._last_words(sink):
                with contextlib.closing(sink.lanes):
                    with attempt.precopy():
                        attempt.expect_alive()
                        peer.channel.send(self._stream_begin(features.records_of(agreed)))
                        if report.shared_memory:
                            switches = self._wait_while_held(sink)
                        else:
                            switches = self._precopy(sink, may_switch=features.POSTCOPY in agreed)
                    with phase(Phase.PAUSE):
                        attempt.stop_guest()
                    with phase(Phase.STOP_AND_COPY):
                        if not report.shared_memory:
                            self._stop_and_copy(sink, switches=switches)
                    with phase(Phase.STATE):
                        records = attempt.guest.last_records()
                        sink.lanes.finish()
                        peer.channel.send([self._encoder.record(record) for record in records])
                        peer.stream_passed(self._encoder.offset)
                with phase(Phase.VERIFY):
                    self._verify(peer)
            with phase(Phase.HANDOFF):
                self._giver = Giver(
                    self.job.handoff,
                    partial(self._come_back, token),
                    patience_s=self._options.timeout_s,
                    now_s=self._host.now_s,
                    sleep=self._host.sleep,
                )
                peer = self._hand_over(peer, self._giver)
                report.running_at_s = attempt.clock.now_s()
            if self.job.postcopy is not None:
                with phase(Phase.POSTCOPY):
                    peer = self._serve(peer, self._giver, self.job.postcopy)
            attempt.guest.release()
            self._giver.take_leave(peer)
            self.job.close()
        assert self.job.report is not None
        return self.job.report

    def find_out(self, endpoint: Endpoint) -> MigrationReport:
        """After :meth:`run` left it UNKNOWN where the guest is: ask the destination, at ``endpoint``.

        Raises:
            MigrationError: it is here, and runs on (``guest_at`` SOURCE); or it is still UNKNOWN.
        """
        assert self._giver is not None
        self.endpoint = endpoint
        with self._attempt.under_way(self._as_migration_error):
            peer = self._giver.ask()
            self._attempt.guest.release()
            self._giver.take_leave(peer)
            self.job.close()
        assert self.job.report is not None
        return self.job.report

    def _as_migration_error(self, error: Exception, guest_at: GuestAt) -> MigrationError:
        return as_migration_error(
            error,
            phase=self._attempt.clock.current,
            guest_at=guest_at,
            peer=str(self.endpoint),
            timeout_s=self._options.timeout_s,
        )

    # -- connect, hello --------------------------------------------------------------------------------------------

    def _connect(self, within_s: float) -> Channel:
        self.endpoint.expect_suits(self._options.credentials)
        try:
            channel = self._open(within_s)
        except TlsError:
            raise
        except OSError as error:
            raise ConnectError(error) from error
        channel.pacer = self.job.pacer
        self.job.opened(channel)
        return channel

    def _open(self, within_s: float) -> Channel:
        handoff, credentials = self.job.handoff, self._options.credentials
        channel = self.endpoint.connect(within_s, given_up=lambda: handoff.cancelled)
        if credentials is None:
            return channel
        expected = credentials.peer or self.endpoint.host.partition("%")[0]
        try:
            channel.secure(credentials.context, server_name=expected, given_up=lambda: handoff.cancelled)
        except BaseException:
            channel.close()
            raise
        return channel

    def _come_back(self, token: str, within_s: float) -> Peer:
        channel = self._connect(within_s)
        try:
            peer = come_back(channel, token)
        except BaseException:
            channel.close()
            raise
        channel.timeout_s = self._options.timeout_s
        return peer

    def _hello(self, peer: Peer) -> tuple[str, tuple[str, ...]]:
        """Offer the guest; return the migration's token and what the destination uses of the offer."""
        peer.greet()
        starts, lengths = self._vm.memory.populated()
        self._attempt.rounds.expect(int(lengths.sum()))
        shares = peer.channel.local and self._wire == DEFAULT_WIRE
        storage = self._vm.memory.storage if shares else None
        if shares and self._vm.memory.huge_pages is HugePages.ANONYMOUS:
            self._attempt.warn("the guest's memory is private and is copied: --hugepages thp or off hands it over")
        offered = features.offer(
            self._wire,
            audit=self._proof.may_audit,
            shared=storage is not None,
            postcopy=may_switch(self.job.policy),
        )
        peer.send(
            SourceHello(
                version=__version__,
                memory_bytes=self._vm.memory.size_bytes,
                cpus=self._vm.config.cpus,
                accel=self._vm.accel,
                cpuid=self._vm.cpuid,
                machine=str(self._vm.config.machine),
                devices=self._vm.config.devices,
                migration_id=str(uuid.uuid4()),
                name=self._options.name,
                populated=hint_runs(starts, lengths),
                populated_pages=int(lengths.sum()),
                features=offered,
                connections=self._wire.connections,
                host_cpu=self._host_cpu,
                lease_ms=math.ceil(self._lease_s * 1e3),
            ),
            None if storage is None else storage.fd,
        )
        hello = peer.expect(DestinationHello)
        features.check_answer(self._wire, offered, hello.features)
        if (warning := cpu_warning(self._host_cpu, hello.host_cpu)) is not None:
            self._attempt.warn(warning)
        self._attempt.report.destination_accel = hello.accel
        self._attempt.report.shared_memory = features.SHARED_MEMORY in hello.features
        return hello.token, hello.features

    def _sink(self, peer: Peer, token: str, records: frozenset[RecordType]) -> DestinationSink:
        """Open a lane for each connection."""
        main = self._lane(peer.channel, self._encoder, records)
        others = []
        for index in range(1, self._wire.connections):
            channel = self._connect(self._options.timeout_s)
            join(channel, token, index)
            encoder = Encoder(Role.SECTION)
            channel.send([encoder.header(agreed=records), encoder.record(StaticDataEnd())])
            others.append(self._lane(channel, encoder, records))
        fences = RecordType.FENCE in records
        return DestinationSink(Lanes(main, others, self._host), peer, self._proof, self._attempt.rounds, fences=fences)

    def _lane(self, channel: Channel, encoder: Encoder, records: frozenset[RecordType]) -> Lane:
        memory, packing = self._vm.memory, self._wire.compress
        coder: PageCoder = PlainCoder(memory, encoder)
        if packing is not Packing.NONE:
            share_bytes = self._wire.delta_cache_bytes // self._wire.connections
            cache = PageCache(share_bytes, memory.gfn_limit) if share_bytes else None
            coder = PackingCoder(memory, encoder, packer(packing), cache)
        says_zero = RecordType.ZERO_PAGES in records
        return Lane(memory, channel, encoder, coder, says_zero=says_zero, on_sent=self._attempt.accounts.sent)

    # -- the stream ------------------------------------------------------------------------------------------------

    def _stream_begin(self, records: frozenset[RecordType]) -> list[bytes]:
        return [self._encoder.header(agreed=records), *map(self._encoder.record, self._attempt.guest.first_records())]

    def _precopy(self, sink: DestinationSink, *, may_switch: bool) -> bool:
        """Copy the running guest; return whether it switches before all of its pages have gone."""
        precopy = Precopy(self._attempt, sink, self._proof, may_switch=may_switch, held_round_s=self._held_round_s)
        decision = precopy.run()
        self._attempt.report.stop_reason = decision.reason
        switches = decision.action is Action.POST_COPY
        if not switches:
            self._proof.foresee(self._attempt.state_s)
        return switches

    def _wait_while_held(self, sink: DestinationSink) -> bool:
        """Stand in for pre-copy where the destination has our memory: nothing of it is sent, not even what is dirty."""
        self._attempt.rounds.expect(0)
        sink.begin(_FIRST_GFN[:0])
        if not self.job.may_go_on:
            self.job.status = JobStatus.HELD
        while not self.job.wait_to_go_on(self._held_round_s):
            sink.check()
            sink.fence(self._attempt.rounds.index)  # or the destination takes us for gone
            self._attempt.expect_alive()
        self.job.status = JobStatus.ACTIVE
        self.job.check()
        self._attempt.report.stop_reason = "the destination has the same memory"
        return False

    def _stop_and_copy(self, sink: DestinationSink, *, switches: bool) -> None:
        """Send what is dirty, or note it as missing."""
        gfns = last_dirty(self._attempt)
        if switches:
            missing = gfns[self._vm.memory.are_ram(gfns)]
            gfns = gfns[:0]
            if missing.size:
                pages = MissingPages(self._vm.memory, missing)
                self.job.postcopy = Postcopy(pages, self._host)
        stop_and_copy(self._attempt, sink, gfns)

    @contextlib.contextmanager
    def _last_words(self, sink: DestinationSink) -> Iterator[None]:
        """Prefer what the destination says on the first connection to how one of them broke."""
        try:
            yield
        except OSError as error:
            if not isinstance(error, VmError):
                with contextlib.suppress(OSError, TruncatedError):
                    sink.check(_LAST_WORDS_S if self._wire.connections > 1 else 0.0)
            raise

    def _verify(self, peer: Peer) -> None:
        proof, report, postcopy = self._proof, self._attempt.report, self.job.postcopy
        if report.shared_memory:
            proof.look(peer)
        else:
            # The guest stands still since the pause, and will while its state is loaded.
            clock = self._attempt.clock
            spent_s = clock.now_s() - clock.began_s[Phase.PAUSE] + self._attempt.state_s / 2
            if postcopy is not None:
                postcopy.missing.announce(peer)
            proof.prove(peer, spent_s, None if postcopy is None else postcopy.missing.bitmap)
        self._ready_at_s = self._attempt.clock.now_s()
        report.verified_pages, report.audited_pages = proof.verified_pages, proof.audited_pages

    # -- the handoff -----------------------------------------------------------------------------------------------

    def _hand_over(self, peer: Peer, giver: Giver[Peer]) -> Peer:
        """Hand the guest over; return the connection on which the destination may ask for pages."""
        handoff, postcopy = self.job.handoff, self.job.postcopy
        self._attempt.guest.release_backends()  # before the destination hears that it may take them
        if not handoff.commit(self._ready_at_s + self._lease_s):
            raise self.job.stays()
        paused = self._vm.status is VmStatus.PAUSED  # only now: up to the commit its user may stop it
        try:
            return giver.give(peer, Commit(paused=paused) if postcopy is None else Switch(paused=paused))
        except (OSError, PageferryError) as error:
            if not handoff.committed:
                raise
            if postcopy is not None:
                return self._recovered(giver, postcopy, error)
            try:
                return giver.ask_until_answered()
            except (OSError, PageferryError) as answer:
                raise error if handoff.committed else answer from error

    def _serve(self, peer: Peer, giver: Giver[Peer], postcopy: Postcopy) -> Peer:
        """Answer for the pages that are missing there, over as many connections as it takes; return the last."""
        missing = postcopy.missing

        def on_progress() -> None:
            progress = PostcopyProgress(
                missing_pages=missing.pages, sent_pages=missing.sent_pages, urgent_pages=missing.urgent_pages
            )
            self._attempt.on_event(progress)

        self.job.status = JobStatus.POSTCOPY_ACTIVE
        if postcopy.recovery.abandoned:  # before the answer to SWITCH was there
            peer.channel.abort()
        while True:
            try:
                postcopy.connected()
                missing.serve(peer, on_progress)
                return peer
            except (OSError, PageferryError) as error:
                peer = self._recovered(giver, postcopy, error)

    def _recovered(self, giver: Giver[Peer], postcopy: Postcopy, error: Exception) -> Peer:
        """After a cut, wait to be told where to connect, and until the destination is there.

        Raises:
            PeerFailedError: where the guest is was not known, and it is here.
            TransportError: it was given up.
        """
        handoff = self.job.handoff
        self._cut(postcopy, error)
        while (endpoint := postcopy.recovery.wait()) is not None:
            self.job.status = JobStatus.POSTCOPY_RECOVER
            self.endpoint = endpoint
            try:
                peer = giver.ask()
            except (OSError, PageferryError) as again:
                if not handoff.committed:
                    raise
                self._cut(postcopy, again)
                continue
            self.job.status = JobStatus.POSTCOPY_ACTIVE
            self._attempt.on_event(PostcopyRecovered())
            return peer
        lost = "given up before all pages had gone, and the guest is lost"
        reason = lost if handoff.guest_at is GuestAt.DESTINATION else postcopy.cut_reason
        raise TransportError(reason, phase=str(self._attempt.clock.current), guest_at=handoff.guest_at)

    def _cut(self, postcopy: Postcopy, error: Exception) -> None:
        """Note that the connection is lost while pages are here that the guest needs at the destination."""
        self.job.cut()
        self.job.close()
        if not isinstance(error, MigrationError):
            error = self._as_migration_error(error, self.job.guest_at)
        postcopy.cut(error.reason)
        self.job.status = JobStatus.POSTCOPY_PAUSED
        postcopy.recovery.begin()
        self._attempt.on_event(PostcopyPaused(reason=error.reason))
