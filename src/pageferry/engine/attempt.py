"""Attempt: what others may ask of a guest's copy to somewhere else, and what is left when it ends.

The phases are in :mod:`pageferry.engine.source` (to another process) and :mod:`pageferry.engine.image.save` (to a file,
which has postconditions of its own). Postcondition on success: the guest runs (or is paused, if it was) at the
destination; here it stays frozen. Postcondition on failure before COMMIT: the guest is here, running or paused as it
was, log-dirty is off, and another attempt starts afresh. After COMMIT without an answer: frozen here, ``guest_at`` is
UNKNOWN.
"""

import contextlib
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace

from pageferry.core.errors import GuestAt, MigrationError, PolicyAbort, VmError
from pageferry.core.events import (
    DOWNTIME_PHASES,
    DeviceCost,
    Event,
    MigrationEnded,
    MigrationReport,
    Phase,
    PostcopyPaused,
    PostcopyStats,
    RoundEnd,
)
from pageferry.core.explain import explain
from pageferry.core.guest_time import WorkSample
from pageferry.core.policy import Policy, downtime_limit_s
from pageferry.core.policy_names import with_limits
from pageferry.core.vm import Vm
from pageferry.engine.guest_time import StallMeter
from pageferry.engine.lookout import Lookout, Outlook, Traffic
from pageferry.engine.options import WireOptions
from pageferry.engine.pages.counts import SendCounts
from pageferry.engine.phases import PhaseClock, guarded
from pageferry.engine.postcopy.late_counts import LateCounts
from pageferry.engine.postcopy.recovery import Recovery
from pageferry.engine.postcopy.server import LeftBehind
from pageferry.engine.rounds import PageSender
from pageferry.engine.throttle import Throttle
from pageferry.engine.verify.prove import Prover, VerifyMode
from pageferry.engine.wire.channel import Endpoint
from pageferry.engine.wire.outlet import Outlet
from pageferry.engine.wire.pacer import Pacer
from pageferry.stream.codec import Encoder

_log = logging.getLogger(__name__)

#: The status of an attempt that is ready and waits to be told to go on; QEMU's word.
HELD = "pre-switchover"


def _explained(report: MigrationReport) -> MigrationReport:
    try:
        return replace(report, explanation=explain(report))
    except Exception:  # words for a person; the outcome does not depend on them
        _log.exception("the report could not be explained")
        return report


class Attempt(ABC):
    """One attempt to copy a guest away; the phases are a subclass's.

    Args:
        vm: the guest; running or paused.
        policy: decides after each round.
        verify: when memory is digested; None: as fits the downtime limit.
        wire: how pages may travel.
        hold: do not pause the guest before :meth:`go_on`, however ready all is; rounds go on meanwhile.
        on_event: sees every event, on the thread that calls :meth:`run`.
        work_before: what the guest had done some time ago, on the clock ``time.monotonic``, to compare with; nobody
            paused it since. None: the rate is taken from the handshake.
    """

    _downtime_phases: tuple[Phase, ...] = DOWNTIME_PHASES
    _file: str | None = None

    def __init__(
        self,
        vm: Vm,
        policy: Policy,
        *,
        verify: VerifyMode | None,
        wire: WireOptions,
        hold: bool,
        on_event: Callable[[Event], None],
        work_before: WorkSample | None,
    ) -> None:
        self._vm = vm
        self._policy = policy
        self._wire = wire
        self._on_event = guarded(on_event)
        self._clock = PhaseClock(self._on_event)
        self._commit_lock = threading.Lock()
        self._cancelled = False
        self._committed = False
        self._armed = False
        self._channels: list[Outlet] = []
        self._pacer = Pacer(wire.bandwidth_bytes_per_s)
        self._go_on = threading.Event()
        if not hold:
            self._go_on.set()
        self._encoder = Encoder()
        self._sent = SendCounts(vm.memory.gfn_limit)
        self._sender = PageSender(self._on_event, self._clock.now_s)
        self._lookout = Lookout(self._sender, self._clock.now_s)
        self._throttle = Throttle(vm, self._clock.now_s)
        self._stall = StallMeter(vm, self._clock.now_s, work_before)
        self._state_s = 0.0
        self._fixed_s = 0.0
        self._round_ends: list[RoundEnd] = []
        self._fault_count: int | None = None
        self._peer_accel: str | None = None
        self._state_bytes: int | None = None
        self._devices: tuple[DeviceCost, ...] = ()
        self._prover = Prover(vm, verify, downtime_limit_s(policy), self._clock.now_s)
        self._began_s: float | None = None
        self._running_at_s: float | None = None
        self._stop_reason = ""
        self._left: LeftBehind | None = None
        self._recovery = Recovery()
        self._ended = threading.Event()
        self._late_counts: LateCounts | None = None
        self._cut_reason = ""
        self.status = "setup"
        self.guest_at = GuestAt.SOURCE
        self.frozen = False
        self._shared = False
        self.report: MigrationReport | None = None
        self.error: MigrationError | None = None

    @property
    def elapsed_s(self) -> float:
        """How long the attempt has taken so far, or took."""
        if self.report is not None:
            return self.report.total_s
        return 0.0 if self._began_s is None else self._clock.now_s() - self._began_s

    def traffic(self) -> Traffic:
        """Return how far it is, from any thread."""
        return self._lookout.traffic(
            memory_bytes=self._vm.memory.size_bytes,
            late_pages=None if self._left is None else self._left.left_pages,
            sent_bytes=sum(channel.sent_bytes for channel in self._channels),
        )

    def outlook(self) -> Outlook:
        """Return how fast it goes and when it will be over, from any thread."""
        if self._late_counts is not None and self._committed:
            return self._lookout.outlook_after_switch(self._late_counts)
        return self._lookout.outlook(
            fixed_s=self._fixed_s, limit_s=downtime_limit_s(self._policy), held=self.status == HELD
        )

    def change_limits(self, given: dict[str, float | int], bandwidth: WireOptions | None = None) -> None:
        """Change limits of the attempt while it runs, from any thread; all of them or none.

        Args:
            given: limits of the policy, by the names of :func:`pageferry.core.policy_names.make_policy`.
            bandwidth: with the new cap; None leaves it as it is.

        Raises:
            UsageError: the policy has no such limit, or a value has no sense.
        """
        self._policy = with_limits(self._policy, given)
        self._prover.limit_s = downtime_limit_s(self._policy)
        if bandwidth is not None:
            self._pacer.set_rate(bandwidth.bandwidth_bytes_per_s)

    def go_on(self) -> None:
        """Let an attempt that was told to hold pause the guest when all is ready; from any thread."""
        self._go_on.set()

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
            self._go_on.set()
            for channel in self._channels:
                channel.abort()
        return True

    @property
    def postcopy_paused(self) -> str | None:
        """Why pages that the guest needs at the destination are here without a connection, or None."""
        return self._cut_reason if self._recovery.waiting else None

    @property
    def keeps_pages(self) -> bool:
        """Whether the guest may run at the destination and need pages that are here only."""
        return self._left is not None and self._committed and self.report is None

    def recover(self, endpoint: Endpoint) -> bool:
        """Go on with a migration that was cut after the switch; from any thread.

        Returns:
            False when it does not wait for that.
        """
        return self._recovery.ask(endpoint)

    def abandon(self) -> None:
        """Give up whatever is under way, from any thread: a guest that has switched without all its pages is lost.

        An answer to the commit is still waited for.
        """
        self._recovery.abandon()
        if not self.cancel() and self.guest_at is GuestAt.DESTINATION:
            for channel in self._channels:
                channel.abort()

    def take_back(self) -> None:
        """Declare that the guest is here after an attempt that ended UNKNOWN, or waits for somebody to find out.

        The caller knows that the destination does not run it and never will.

        Raises:
            VmError: the attempt did not end UNKNOWN.
        """
        if self.guest_at is GuestAt.UNKNOWN and self._recovery.end():
            self._ended.wait()
        if self.guest_at is not GuestAt.UNKNOWN or self.report is None or self._running_at_s is not None:
            raise VmError("there is no guest to take back")
        self.guest_at = GuestAt.SOURCE
        self._disarm()
        self._thaw()

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

    @abstractmethod
    def _go(self) -> None:
        """Go through the phases; raise whatever goes wrong."""

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
            raise self._as_migration_error(error, at) from error

    @abstractmethod
    def _as_migration_error(self, error: Exception, guest_at: GuestAt) -> MigrationError:
        """Return what to raise from an error that is no MigrationError."""

    def _pause_postcopy(self, error: Exception) -> None:
        """Say that the connection is lost while pages are here that the guest needs at the destination."""
        for channel in self._channels:
            channel.abort()
        if self._late_counts is not None:
            self._late_counts.cut()
        if not isinstance(error, MigrationError):
            error = self._as_migration_error(error, self.guest_at)
        self._cut_reason = error.reason
        self.status = "postcopy-paused"
        self._recovery.begin()
        self._on_event(PostcopyPaused(reason=self._cut_reason))

    def _fall_back(self) -> None:
        """After a failure: everything as it was, unless the commit is out. Whatever else fails, the guest runs on."""
        self._stall.end()
        for channel in self._channels:
            channel.close()
        self._prover.close()
        self._throttle.close()
        if self._committed:
            if self.guest_at is not GuestAt.DESTINATION:
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
        assert self._began_s is not None
        ended_s = self._clock.now_s()
        if self._left is not None:
            self._sent.add(len(self._sender.rounds), self._left.gone.gfns())
        downtime_s, parts = None, None
        if self._running_at_s is not None:
            downtime_s = self._running_at_s - self._clock.began_s[Phase.PAUSE]
            parts = self._clock.parts_s(self._downtime_phases, self._running_at_s)
        report = MigrationReport(
            status=status,
            guest_at=self.guest_at,
            source_accel=self._vm.accel,
            destination_accel=self._peer_accel,
            tracker=self._vm.log_dirty.tracker,
            policy=self._policy.name,
            memory_bytes=self._vm.memory.size_bytes,
            rounds=tuple(self._sender.rounds),
            total_s=ended_s - self._began_s,
            sent_bytes=self.traffic().sent_bytes,
            connections=self._wire.connections,
            compress=str(self._wire.compress),
            delta_cache_bytes=self._wire.delta_cache_bytes,
            bandwidth_bytes_per_s=self._pacer.rate_bytes_per_s,
            downtime_s=downtime_s,
            downtime_parts_s=parts,
            state_bytes=self._state_bytes,
            devices=self._devices,
            verified=self._prover.verified_pages > 0,
            verified_pages=self._prover.verified_pages + (0 if self._left is None else self._left.sent_pages),
            audited_pages=self._prover.audited_pages,
            shared_memory=self._shared,
            fault_count=self._fault_count,
            throttled_s=self._throttle.held_s,
            reason=reason,
            round_ends=tuple(self._round_ends),
            sent=self._sent.result(),
            paused_at_s=self._paused_at_s(),
            guest_time=self._stall.result(),
            explanation=None,
            file=self._file,
            postcopy=self._postcopy(ended_s),
        )
        self.report = _explained(report)
        self.status = status
        self._ended.set()
        self._on_event(MigrationEnded(report=self.report))
        return self.report

    def _paused_at_s(self) -> float | None:
        paused_s = self._clock.began_s.get(Phase.PAUSE)
        return None if paused_s is None or self._began_s is None else paused_s - self._began_s

    def _postcopy(self, ended_s: float) -> PostcopyStats | None:
        if self._late_counts is None or self._running_at_s is None:
            return None
        return self._late_counts.stats(self._running_at_s, ended_s)

    def _abort(self, reason: str) -> PolicyAbort:
        return PolicyAbort(reason, phase=str(self._clock.current), guest_at=GuestAt.SOURCE)
