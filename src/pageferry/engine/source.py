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
from dataclasses import replace

from pageferry import __version__
from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import GuestAt, TruncatedError, VmError
from pageferry.core.events import DeviceCost, Phase, RoundEnd, RoundEnded
from pageferry.core.frames import GfnArray
from pageferry.core.policy import Action, Decision, Progress, RoundStats
from pageferry.core.vm import VmStatus
from pageferry.engine import estimates, features, verify
from pageferry.engine.attempt import HELD, Attempt
from pageferry.engine.conversation import Peer, PeerFailedError
from pageferry.engine.guest_time import Stall
from pageferry.engine.joining import join
from pageferry.engine.lane import Lane
from pageferry.engine.lanes import Lanes
from pageferry.engine.page_cache import PageCache
from pageferry.engine.page_coder import PackingCoder, PageCoder, PlainCoder
from pageferry.engine.transport import Channel
from pageferry.stream.codec import Encoder
from pageferry.stream.ferry import (
    Commit,
    DestinationHello,
    Mismatch,
    Running,
    Side,
    SourceHello,
)
from pageferry.stream.format import RecordType
from pageferry.stream.hvm_context import encode_machine_state
from pageferry.stream.order import Role
from pageferry.stream.packing import Packing, packer
from pageferry.stream.records import CpuidPolicy, End, HvmContext, HvmParams, StaticDataEnd, TscInfo

#: How much memory is cleaned at once, 1 GiB: its bitmap is 32 KiB, and its pages are on the wire for a good part of a
#: second, in which many of those that come later are written again.
_CHUNK_PAGES = 1 << 18
#: A destination that fails may cut further connections before it says why; so long we listen.
_LAST_WORDS_S = 1.0
#: While we are held, a round in so much time keeps what is left small.
_HELD_ROUND_S = 1.0


class Source(Attempt):
    """One attempt to move a guest away, phase by phase."""

    _judged_rounds: int | None = None
    _lanes: Lanes
    _agreed: frozenset[RecordType]

    def _go(self) -> None:
        phase = self._clock.phase
        with phase(Phase.CONNECT):
            peer = self._connect()
        with phase(Phase.HELLO):
            self._hello(peer)
        with self._last_words(peer):
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
                machine=str(self._vm.config.machine),
                migration_id=str(uuid.uuid4()),
                name=self._name,
                populated=verify.hint_runs(starts, lengths),
                populated_pages=int(lengths.sum()),
                features=self._offer,
                connections=self._wire.connections,
            )
        )
        hello = peer.receive()
        if not isinstance(hello, DestinationHello):
            raise self._unexpected(hello)
        self._peer_accel = hello.accel
        features.check_answer(self._wire, self._offer, hello.features)
        self._agreed = features.records_of(hello.features)
        self._prover.agree(hello.features)
        main = self._lane(peer.channel, self._encoder)
        self._lanes = Lanes(main, [self._join(hello.token, index) for index in range(1, self._wire.connections)])

    @property
    def _offer(self) -> tuple[str, ...]:
        return features.offer(self._wire, audit=self._prover.may_audit)

    def _join(self, token: str, index: int) -> Lane:
        channel = self._open()
        join(channel, token, index)
        encoder = Encoder(Role.SECTION)
        channel.send([encoder.header(agreed=self._agreed), encoder.record(StaticDataEnd())])
        return self._lane(channel, encoder)

    def _lane(self, channel: Channel, encoder: Encoder) -> Lane:
        memory, packing = self._vm.memory, self._wire.compress
        coder: PageCoder = PlainCoder(memory, encoder)
        if packing is not Packing.NONE:
            share_bytes = self._wire.delta_cache_bytes // self._wire.connections
            cache = PageCache(share_bytes, memory.gfn_limit) if share_bytes else None
            coder = PackingCoder(memory, encoder, packer(packing), cache)
        says_zero = RecordType.ZERO_PAGES in self._agreed
        return Lane(memory, channel, encoder, coder, says_zero=says_zero, on_sent=self._on_sent)

    def _on_sent(self, gfns: GfnArray) -> None:
        self._prover.sent(gfns)
        self._sent.add(len(self._sender.rounds), gfns)

    def _precopy(self, peer: Peer) -> None:
        self._expect_alive()
        self._stall.begin()
        static = (CpuidPolicy(leaves=self._vm.cpuid), StaticDataEnd())
        header = self._encoder.header(agreed=self._agreed)
        peer.channel.send([header, *(self._encoder.record(record) for record in static)])
        with self._stall.spent_on(Stall.REHEARSAL):
            self._state_s = estimates.state_s(self._vm, self._clock.now_s)
        gfns = self._enable()
        chunks, expected_pages = iter([gfns]), gfns.size
        self._prover.prepare()
        while True:
            throttle = self._throttle.share
            stats = self._send_round(peer, chunks, expected_pages=expected_pages)
            ended_s = self.elapsed_s
            self._expect_alive()
            self._fixed_s = self._state_s + self._prover.cost_s()
            progress = Progress(
                memory_pages=self._vm.memory.pages,
                rounds=self._rounds_to_judge(),
                fixed_s=self._fixed_s,
                elapsed_s=self.elapsed_s,
                throttle=throttle,
            )
            decision = self._held(self._policy.decide(progress))
            self._round_ends.append(self._round_end(ended_s, progress, decision))
            self._on_event(RoundEnded(stats=stats, decision=decision))
            if decision.action is Action.ABORT:
                raise self._abort(decision.reason)
            if decision.action is Action.STOP_AND_COPY:
                self._stop_reason = decision.reason
                self._prover.close()
                return
            self._throttle.set(decision.throttle)
            if self.status == HELD:
                self._go_on.wait(_HELD_ROUND_S)
            self._prover.prepare()
            chunks, expected_pages = self._clean_in_chunks(), stats.remaining_pages

    def _held(self, decision: Decision) -> Decision:
        """Turn a stop into another round as long as we are told to hold."""
        if self._go_on.is_set():
            self.status = "active"
            return decision
        if decision.action is not Action.STOP_AND_COPY:
            return decision
        if self.status != HELD:
            self._judged_rounds = len(self._sender.rounds)
            self.status = HELD
        return replace(decision, action=Action.NEXT_ROUND, reason=f"ready, and held: {decision.reason}")

    def _rounds_to_judge(self) -> tuple[RoundStats, ...]:
        """Return the rounds that count for the policy: those that were only made because we were held do not."""
        rounds = tuple(self._sender.rounds)
        if self._judged_rounds is None or len(rounds) <= self._judged_rounds:
            return rounds
        return (*rounds[: self._judged_rounds], replace(rounds[-1], index=self._judged_rounds))

    def _enable(self) -> GfnArray:
        """Turn log-dirty on; return what has storage, to be sent first.

        Law 3: the snapshot comes after ENABLE. A page touched later is dirty by then.
        """
        with self._stall.spent_on(Stall.ENABLE):
            self._vm.log_dirty.enable()
        self._armed = True
        return expand_runs(*self._vm.memory.populated())

    def _round_end(self, ended_s: float, progress: Progress, decision: Decision) -> RoundEnd:
        work = self._stall.work()
        return RoundEnd(
            ended_s=ended_s,
            work=None if work is None else work.work,
            fixed_s=progress.fixed_s,
            expected_downtime_s=progress.expected_downtime_s,
            throttle=progress.throttle,
            decision=decision,
        )

    def _clean_in_chunks(self) -> Iterator[GfnArray]:
        """Yield what is dirty, each part of memory cleaned only when those before it are sent.

        A page that is written again before its turn is thus sent once, and no CLEAN stops the guest for long.
        """
        gfn_limit = self._vm.memory.gfn_limit
        for first in range(0, gfn_limit, _CHUNK_PAGES):
            with self._stall.spent_on(Stall.CLEAN):
                dirty = self._vm.log_dirty.clean_range(range(first, min(first + _CHUNK_PAGES, gfn_limit)))
            gfns = dirty.gfns()
            self._prover.cleaned(gfns)
            yield gfns

    def _send_round(
        self, peer: Peer, chunks: Iterable[GfnArray], *, expected_pages: int, final: bool = False
    ) -> RoundStats:
        def check() -> None:
            self._hear(peer)
            if self._cancelled:
                raise self._abort("cancelled")

        def before_record() -> None:
            check()
            if not final:
                self._prover.send_due(self._lanes)

        def count_dirty() -> int:
            if final:
                return 0
            check()
            self._prover.catch_up(self._lanes, check)
            return self._vm.log_dirty.peek().count()

        return self._sender.send(
            self._lanes,
            chunks,
            expected_pages=expected_pages,
            final=final,
            before_record=before_record,
            count_dirty=count_dirty,
        )

    def _hear(self, peer: Peer, wait_s: float = 0.0) -> None:
        """Raise what the destination says, if it says anything."""
        if peer.channel.readable(wait_s):
            frame = peer.receive()
            if isinstance(frame, Mismatch):
                raise self._prover.mismatch(frame, len(self._sender.rounds))
            raise self._unexpected(frame)

    @contextlib.contextmanager
    def _last_words(self, peer: Peer) -> Iterator[None]:
        """Prefer what the destination says on the first connection to how one of them broke."""
        try:
            yield
        except OSError as error:
            if not isinstance(error, VmError):
                with contextlib.suppress(OSError, TruncatedError):
                    self._hear(peer, _LAST_WORDS_S if self._wire.connections > 1 else 0.0)
            raise

    def _pause(self) -> None:
        self._vm.freeze()
        self.frozen = True
        self._stall.end()
        self._throttle.close()  # only now: a guest that is let go for a moment writes
        self._expect_alive()

    def _stop_and_copy(self, peer: Peer) -> None:
        # Nobody writes any more: PEEK is enough, and a failure from here on has no bits to give back.
        gfns = self._vm.log_dirty.peek().gfns()
        self._prover.cleaned(gfns)
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
        spent_s = self._clock.now_s() - self._clock.began_s[Phase.PAUSE] + self._state_s / 2  # it is loaded there
        answer = self._prover.prove(peer, spent_s)
        if answer is not None:
            raise self._unexpected(answer)

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
