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

Postcondition on success: the guest runs (or is paused, if it was) at the destination; here it stays frozen.
Postcondition on failure before COMMIT: the guest is here, running or paused as it was, log-dirty is off, and another
attempt starts afresh. After COMMIT without an answer: frozen here, ``guest_at`` is UNKNOWN.
"""

import contextlib
import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from pageferry import __version__
from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import (
    GuestAt,
    MigrationError,
    PeerError,
    PolicyAbort,
    VerifyError,
    VmError,
)
from pageferry.core.events import (
    DOWNTIME_PHASES,
    DeviceCost,
    Event,
    MigrationEnded,
    MigrationReport,
    Phase,
    RoundEnded,
)
from pageferry.core.frames import PAGE_SIZE, GfnArray
from pageferry.core.policy import Action, Policy, Progress, RoundStats
from pageferry.core.vm import Vm, VmStatus
from pageferry.engine import estimates, verify
from pageferry.engine.conversation import Peer, PeerFailedError
from pageferry.engine.failures import as_migration_error
from pageferry.engine.phases import PhaseClock, guarded
from pageferry.engine.rounds import PageSender
from pageferry.engine.throttle import Throttle
from pageferry.engine.transport import DEFAULT_TIMEOUT_S, Channel, Endpoint
from pageferry.stream.codec import Encoder
from pageferry.stream.ferry import (
    Commit,
    DestinationHello,
    Digests,
    Failed,
    Frame,
    Mismatch,
    Ready,
    Running,
    Side,
    SourceHello,
)
from pageferry.stream.ferry_frames import MAX_DIGESTS
from pageferry.stream.hvm_context import encode_machine_state
from pageferry.stream.records import CpuidPolicy, End, HvmContext, HvmParams, StaticDataEnd, TscInfo

_log = logging.getLogger(__name__)

#: How much memory is cleaned at once, 1 GiB: its bitmap is 32 KiB, and its pages are on the wire for a good part of a
#: second, in which many of those that come later are written again.
_CHUNK_PAGES = 1 << 18


def _ignore(_: Event) -> None:
    """See nothing."""


class Source:
    """One attempt to move a guest away.

    Args:
        vm: the guest; running or paused.
        endpoint: where the destination listens.
        policy: decides after each round.
        name: what the guest is called, for people.
        timeout_s: how long the connection may stand still.
        on_event: sees every event, on the thread that calls :meth:`run`.
    """

    def __init__(
        self,
        vm: Vm,
        endpoint: Endpoint,
        policy: Policy,
        *,
        name: str = "guest",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        on_event: Callable[[Event], None] = _ignore,
    ) -> None:
        self._vm = vm
        self._endpoint = endpoint
        self._policy = policy
        self._name = name
        self._timeout_s = timeout_s
        self._on_event = guarded(on_event)
        self._clock = PhaseClock(self._on_event)
        self._commit_lock = threading.Lock()
        self._cancelled = False
        self._committed = False
        self._armed = False
        self._channel: Channel | None = None
        self._encoder = Encoder()
        self._sender = PageSender(vm.memory, self._encoder, self._on_event, self._clock.now_s)
        self._throttle = Throttle(vm, self._clock.now_s)
        self._fixed_s = 0.0
        self._fault_count: int | None = None
        self._peer_accel: str | None = None
        self._state_bytes: int | None = None
        self._devices: tuple[DeviceCost, ...] = ()
        self._verified_pages = 0
        self._began_s: float | None = None
        self._running_at_s: float | None = None
        self._stop_reason = ""
        self.status = "setup"
        self.guest_at = GuestAt.SOURCE
        self.frozen = False
        self.report: MigrationReport | None = None
        self.error: MigrationError | None = None

    # -- what others may ask ---------------------------------------------------------------------------------------

    @property
    def elapsed_s(self) -> float:
        """How long the attempt has taken so far, or took."""
        if self.report is not None:
            return self.report.total_s
        return 0.0 if self._began_s is None else self._clock.now_s() - self._began_s

    def ram(self) -> dict[str, Any]:
        """Return progress in the words of QMP's query-migrate."""
        sent_pages = sum(stats.sent_pages for stats in self._sender.rounds)
        sent_bytes = 0 if self._channel is None else self._channel.sent_bytes
        elapsed_s = self.elapsed_s
        return {
            "ram": {
                "total": self._vm.memory.size_bytes,
                "remaining": self._sender.remaining_pages * PAGE_SIZE,
                "transferred": sent_bytes,
                "normal": sent_pages,
                "normal-bytes": sent_pages * PAGE_SIZE,
                "duplicate": 0,
                "skipped": 0,
                "dirty-sync-count": len(self._sender.rounds),
                "page-size": PAGE_SIZE,
                "mbps": sent_bytes * 8 / 1e6 / elapsed_s if elapsed_s else 0.0,
            }
        }

    @property
    def handing_over(self) -> bool:
        """Whether COMMIT was sent, so that the guest is not ours to pause or resume."""
        return self._committed

    def cancel(self) -> bool:
        """Ask for an end of the attempt, from any thread; the guest stays here.

        Returns:
            False when it is too late: COMMIT was sent.
        """
        with self._commit_lock:
            if self._committed:
                return False
            self._cancelled = True
            if self._channel is not None:
                self._channel.abort()
        return True

    def take_back(self) -> None:
        """Declare that the guest is here after an attempt that ended UNKNOWN.

        The caller knows that the destination does not run it and never will.

        Raises:
            VmError: the attempt did not end UNKNOWN.
        """
        if self.guest_at is not GuestAt.UNKNOWN or self.report is None or self._running_at_s is not None:
            raise VmError("there is no guest to take back")
        self.guest_at = GuestAt.SOURCE
        self._disarm()
        self._thaw()

    # -- the attempt -----------------------------------------------------------------------------------------------

    def run(self) -> MigrationReport:
        """Move the guest; call once. ``report`` is set afterwards, also when this raises.

        Raises:
            MigrationError: it did not move (``guest_at`` SOURCE), or nobody knows (UNKNOWN).
        """
        self._began_s = self._clock.now_s()
        self.status = "active"
        try:
            with self._failures():
                self._go()
        except MigrationError as error:
            self.error = error
            self._fall_back()
            self._finish("cancelled" if self._cancelled else "failed", error.reason)
            raise
        except BaseException:
            self._fall_back()
            self._finish("failed", "interrupted")
            raise
        return self._finish("completed", self._stop_reason)

    def _go(self) -> None:
        phase = self._clock.phase
        with phase(Phase.CONNECT):
            peer = self._connect()
        with phase(Phase.HELLO):
            self._hello(peer)
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

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn whatever goes wrong inside into a MigrationError that knows phase and place."""
        try:
            yield
        except MigrationError:
            raise
        except Exception as error:
            at = GuestAt.UNKNOWN if self._committed else GuestAt.SOURCE
            if self._cancelled:
                raise PolicyAbort("cancelled", phase=str(self._clock.current), guest_at=at) from error
            raise as_migration_error(
                error, phase=self._clock.current, guest_at=at, peer=str(self._endpoint), timeout_s=self._timeout_s
            ) from error

    def _fall_back(self) -> None:
        """After a failure: everything as it was, unless the commit is out. Whatever else fails, the guest runs on."""
        if self._channel is not None:
            self._channel.close()
        self._throttle.close()
        if self._committed:
            self.guest_at = GuestAt.UNKNOWN
            return
        try:
            self._disarm()
        finally:
            self._thaw()

    def _disarm(self) -> None:
        """Turn log-dirty off, as far as the tracker can; its failure may be why we are here."""
        if not self._armed:
            return
        try:
            self._fault_count = self._vm.log_dirty.stats().fault_count
        except Exception:
            _log.warning("the tracker's counters are lost", exc_info=True)
        try:
            self._vm.log_dirty.off()
            self._armed = False
        except Exception:
            _log.exception("log-dirty could not be turned off")

    def _thaw(self) -> None:
        if self.frozen:
            self._vm.thaw()
            self.frozen = False

    def _finish(self, status: str, reason: str) -> MigrationReport:
        downtime_s, parts = None, None
        if self._running_at_s is not None:
            downtime_s = self._running_at_s - self._clock.began_s[Phase.PAUSE]
            parts = self._clock.parts_s(DOWNTIME_PHASES, self._running_at_s)
        self.report = MigrationReport(
            status=status,
            guest_at=self.guest_at,
            source_accel=self._vm.accel,
            destination_accel=self._peer_accel,
            tracker=self._vm.log_dirty.tracker,
            policy=self._policy.name,
            memory_bytes=self._vm.memory.size_bytes,
            rounds=tuple(self._sender.rounds),
            total_s=self.elapsed_s,
            downtime_s=downtime_s,
            downtime_parts_s=parts,
            state_bytes=self._state_bytes,
            devices=self._devices,
            verified=self._verified_pages > 0,
            verified_pages=self._verified_pages,
            fault_count=self._fault_count,
            throttled_s=self._throttle.held_s,
            reason=reason,
        )
        self.status = status
        self._on_event(MigrationEnded(report=self.report))
        return self.report

    # -- phases ----------------------------------------------------------------------------------------------------

    def _expect_alive(self) -> None:
        end = self._vm.end
        if end is not None:
            why = f"it crashed: {end.crash}" if end.crash is not None else f"exit code {end.exit_code}"
            raise self._abort(f"the guest ended meanwhile ({why})")

    def _abort(self, reason: str) -> PolicyAbort:
        return PolicyAbort(reason, phase=str(self._clock.current), guest_at=GuestAt.SOURCE)

    def _unexpected(self, frame: Frame) -> PeerError:
        what = f"the destination answered {type(frame).__name__} out of turn"
        at = GuestAt.UNKNOWN if self._committed else GuestAt.SOURCE
        return PeerError(what, phase=str(self._clock.current), guest_at=at)

    def _connect(self) -> Peer:
        channel = self._endpoint.connect(self._timeout_s, given_up=lambda: self._cancelled)
        with self._commit_lock:
            self._channel = channel
            if self._cancelled:
                raise self._abort("cancelled")
        return Peer(channel, Side.SOURCE)

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
            )
        )
        hello = peer.receive()
        if not isinstance(hello, DestinationHello):
            raise self._unexpected(hello)
        self._peer_accel = hello.accel

    def _precopy(self, peer: Peer) -> None:
        log_dirty = self._vm.log_dirty
        self._expect_alive()
        static = (CpuidPolicy(leaves=self._vm.cpuid), StaticDataEnd())
        peer.channel.send([self._encoder.header(), *(self._encoder.record(record) for record in static)])
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

        return self._sender.send(
            peer.channel, chunks, expected_pages=expected_pages, final=final, check=check, count_dirty=count_dirty
        )

    def _pause(self) -> None:
        self._vm.freeze()
        self.frozen = True
        self._throttle.close()  # only now: a guest that is let go for a moment writes
        self._expect_alive()

    def _stop_and_copy(self, peer: Peer) -> None:
        # Nobody writes any more: PEEK is enough, and a failure from here on has no bits to give back.
        gfns = self._vm.log_dirty.peek().gfns()
        stats = self._send_round(peer, [gfns], expected_pages=gfns.size, final=True)
        self._sender.send_removed(peer.channel, self._vm.memory.removed())
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
        peer.channel.close()
