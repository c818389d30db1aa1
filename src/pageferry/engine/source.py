"""The source's side of a migration, phase by phase.

::

    source                                        destination
      | -- HELLO ------------------------------------> |  makes a machine, or refuses
      | <------------------------------------ HELLO -- |
      |  ENABLE                                         |
      | == pre-copy: CLEAN, then copy, round by round => |  scatters pages into place
      |  freeze the guest ........................ downtime begins
      | == stop-and-copy: what is dirty ==============> |
      | == state, END ================================> |
      | -- DIGESTS -----------------------------------> |  digests the same pages
      | <------------------------------------ READY -- |  (or MISMATCH: fail closed)
      | -- COMMIT ------------------------------------> |  from here on the source never runs it again by itself
      | <---------------------------------- RUNNING -- |  downtime ends

What holds when it ends, and what others may ask meanwhile, is :mod:`pageferry.engine.attempt`'s.
"""

import contextlib
import uuid
from collections.abc import Iterable, Iterator

import numpy as np

from pageferry import __version__
from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import GuestAt, PeerError, TruncatedError, VerifyError
from pageferry.core.events import DeviceCost, Phase, RoundEnded
from pageferry.core.frames import GfnArray
from pageferry.core.policy import Action, Progress, RoundStats
from pageferry.core.vm import VmStatus
from pageferry.engine import estimates, features, verify
from pageferry.engine.attempt import Attempt
from pageferry.engine.conversation import Peer, PeerFailedError
from pageferry.engine.joining import join
from pageferry.engine.lane import Lane
from pageferry.engine.lanes import Lanes
from pageferry.engine.transport import Channel
from pageferry.stream.codec import Encoder
from pageferry.stream.ferry import (
    Commit,
    DestinationHello,
    Digests,
    Failed,
    Mismatch,
    Ready,
    Running,
    Side,
    SourceHello,
)
from pageferry.stream.ferry_frames import MAX_DIGESTS
from pageferry.stream.format import RecordType
from pageferry.stream.hvm_context import encode_machine_state
from pageferry.stream.order import Role
from pageferry.stream.records import CpuidPolicy, End, HvmContext, HvmParams, StaticDataEnd, TscInfo

#: How much memory is cleaned at once, 1 GiB: its bitmap is 32 KiB, and its pages are on the wire for a good part of a
#: second, in which many of those that come later are written again.
_CHUNK_PAGES = 1 << 18
#: A destination that fails cuts further connections first and then says why; so long we listen.
_LAST_WORDS_S = 2.0


class Source(Attempt):
    """One attempt to move a guest away, phase by phase."""

    _lanes: Lanes
    _agreed: frozenset[RecordType]

    def _go(self) -> None:
        phase = self._clock.phase
        with phase(Phase.CONNECT):
            peer = self._connect()
        with phase(Phase.HELLO):
            self._hello(peer)
        with contextlib.closing(self._lanes):
            with phase(Phase.PRECOPY):
                self._precopy(peer)
            with phase(Phase.PAUSE):
                self._pause()
            with phase(Phase.STOP_AND_COPY):
                self._stop_and_copy(peer)
            with phase(Phase.STATE):
                self._state(peer)
        with phase(Phase.VERIFY):
            self._verify(peer)
        with phase(Phase.HANDOFF):
            self._handoff(peer)
        self._leave(peer)

    def _expect_alive(self) -> None:
        end = self._vm.end
        if end is not None:
            why = f"it crashed: {end.crash}" if end.crash is not None else f"exit code {end.exit_code}"
            raise self._abort(f"the guest ended meanwhile ({why})")

    def _connect(self) -> Peer:
        return Peer(self._open(), Side.SOURCE)

    def _open(self) -> Channel:
        channel = self._endpoint.connect(self._timeout_s, given_up=lambda: self._cancelled)
        channel.pacer = self._pacer
        with self._commit_lock:
            self._channels.append(channel)
            if self._cancelled:
                raise self._abort("cancelled")
        return channel

    def _hello(self, peer: Peer) -> None:
        peer.greet()
        starts, lengths = self._vm.memory.populated()
        peer.send(
            SourceHello(
                version=__version__,
                memory_bytes=self._vm.memory.size_bytes,
                cpus=self._vm.config.cpus,
                accel=self._vm.accel,
                cpuid=self._vm.cpuid,
                migration_id=str(uuid.uuid4()),
                name=self._name,
                populated=verify.hint_runs(starts, lengths),
                populated_pages=int(lengths.sum()),
                features=features.offer(self._wire),
                connections=self._wire.connections,
            )
        )
        hello = peer.receive()
        if not isinstance(hello, DestinationHello):
            raise self._unexpected(hello)
        self._peer_accel = hello.accel
        features.check_answer(self._wire, hello.features)
        self._agreed = features.records_of(hello.features)
        main = Lane(self._vm.memory, peer.channel, self._encoder, self._agreed)
        self._lanes = Lanes(main, [self._join(hello.token, index) for index in range(1, self._wire.connections)])

    def _join(self, token: str, index: int) -> Lane:
        channel = self._open()
        join(channel, token, index)
        encoder = Encoder(Role.SECTION)
        channel.send([encoder.header(agreed=self._agreed), encoder.record(StaticDataEnd())])
        return Lane(self._vm.memory, channel, encoder, self._agreed)

    def _precopy(self, peer: Peer) -> None:
        log_dirty = self._vm.log_dirty
        self._expect_alive()
        static = (CpuidPolicy(leaves=self._vm.cpuid), StaticDataEnd())
        header = self._encoder.header(agreed=self._agreed)
        peer.channel.send([header, *(self._encoder.record(record) for record in static)])
        state_s = self._measure_state()
        log_dirty.enable()
        self._armed = True
        # Law 3: the snapshot of what has storage comes after ENABLE. A page touched later is dirty by then.
        gfns = expand_runs(*self._vm.memory.populated())
        chunks, expected_pages = iter([gfns]), gfns.size
        while True:
            throttle = self._throttle.share
            stats = self._send_round(peer, chunks, expected_pages=expected_pages)
            self._expect_alive()
            self._fixed_s = state_s + estimates.verify_s(self._vm.memory, self._clock.now_s)
            progress = Progress(
                memory_pages=self._vm.memory.pages,
                rounds=tuple(self._sender.rounds),
                fixed_s=self._fixed_s,
                elapsed_s=self.elapsed_s,
                throttle=throttle,
            )
            decision = self._policy.decide(progress)
            self._on_event(RoundEnded(stats=stats, decision=decision))
            if decision.action is Action.ABORT:
                raise self._abort(decision.reason)
            if decision.action is Action.STOP_AND_COPY:
                self._stop_reason = decision.reason
                return
            self._throttle.set(decision.throttle)
            chunks, expected_pages = self._clean_in_chunks(), stats.remaining_pages

    def _clean_in_chunks(self) -> Iterator[GfnArray]:
        """Yield what is dirty, each part of memory cleaned only when those before it are sent.

        A page that is written again before its turn is thus sent once, and no CLEAN stops the guest for long.
        """
        gfn_limit = self._vm.memory.gfn_limit
        for first in range(0, gfn_limit, _CHUNK_PAGES):
            yield self._vm.log_dirty.clean_range(range(first, min(first + _CHUNK_PAGES, gfn_limit))).gfns()

    def _measure_state(self) -> float:
        return estimates.state_s(self._vm, self._clock.now_s)

    def _send_round(
        self, peer: Peer, chunks: Iterable[GfnArray], *, expected_pages: int, final: bool = False
    ) -> RoundStats:
        def check() -> None:
            if peer.channel.readable():
                raise self._unexpected(peer.receive())
            if self._cancelled:
                raise self._abort("cancelled")

        def count_dirty() -> int:
            return 0 if final else self._vm.log_dirty.peek().count()

        try:
            return self._sender.send(
                self._lanes, chunks, expected_pages=expected_pages, final=final, check=check, count_dirty=count_dirty
            )
        except OSError:
            if peer.channel.readable(_LAST_WORDS_S if self._wire.connections > 1 else 0):
                with contextlib.suppress(OSError, TruncatedError):
                    check()  # the destination may have said why it cut the others
            raise

    def _pause(self) -> None:
        self._vm.freeze()
        self.frozen = True
        self._throttle.close()  # only now: a guest that is let go for a moment writes
        self._expect_alive()

    def _stop_and_copy(self, peer: Peer) -> None:
        # Nobody writes any more: PEEK is enough, and a failure from here on has no bits to give back.
        gfns = self._vm.log_dirty.peek().gfns()
        stats = self._send_round(peer, [gfns], expected_pages=gfns.size, final=True)
        self._lanes.send_removed(self._vm.memory.removed())
        self._on_event(RoundEnded(stats=stats, decision=None))

    def _state(self, peer: Peer) -> None:
        state = self._vm.save_state()
        context = encode_machine_state(state)
        self._state_bytes = len(context)
        self._devices = tuple(
            DeviceCost(name=device.name, size_bytes=len(device.data), save_ns=device.save_ns)
            for device in state.devices
        )
        records = (TscInfo(), HvmParams(), HvmContext(data=context), End())
        self._lanes.finish()
        peer.channel.send([self._encoder.record(record) for record in records])
        peer.stream_passed(self._encoder.offset)

    def _verify(self, peer: Peer) -> None:
        memory = self._vm.memory
        starts, lengths = verify.populated_runs(memory)
        if not starts.size:
            peer.send(Digests(first_gfns=starts, pages=lengths.astype(np.uint32), digests=verify.NO_DIGESTS, last=True))
        for piece in verify.batches(lengths, verify.FRAME_PAGES, MAX_DIGESTS):
            digests = verify.digest_runs(memory, starts[piece], lengths[piece])
            pages = lengths[piece].astype(np.uint32)
            last = piece.stop == starts.size
            peer.send(Digests(first_gfns=starts[piece], pages=pages, digests=digests, last=last))
        answer = peer.receive()
        if isinstance(answer, Mismatch):
            raise self._difference(peer, answer)
        if not isinstance(answer, Ready) or answer.verified_pages != int(lengths.sum()):
            raise self._unexpected(answer)
        self._verified_pages = answer.verified_pages

    def _difference(self, peer: Peer, mismatch: Mismatch) -> PeerError:
        gfn = verify.first_different_page(self._vm.memory, mismatch.first_gfn, mismatch.page_digests)
        cause = VerifyError("the destination's memory is not ours", gfn=gfn)
        with contextlib.suppress(OSError):
            peer.send(Failed(reason=str(cause), gfn=gfn))
        error = PeerError(str(cause), phase=str(Phase.VERIFY), guest_at=GuestAt.SOURCE)
        error.__cause__ = cause
        return error

    def _handoff(self, peer: Peer) -> None:
        with self._commit_lock:
            if self._cancelled:
                raise self._abort("cancelled")
            paused = self._vm.status is VmStatus.PAUSED
            self._committed = True
        peer.send(Commit(paused=paused))
        try:
            answer = peer.receive()
        except PeerFailedError:
            self._committed = False  # a destination that says so promises that the guest never runs there
            raise
        if not isinstance(answer, Running):
            raise self._unexpected(answer)
        self._running_at_s = self._clock.now_s()
        self.guest_at = GuestAt.DESTINATION

    def _leave(self, peer: Peer) -> None:
        """The guest is gone: free what served its migration; it stays frozen here."""
        self._disarm()
        for channel in self._channels:
            channel.close()
