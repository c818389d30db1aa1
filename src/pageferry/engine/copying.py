"""Copying: what migrating and saving have in common: rounds of a running guest, pause, last pages, state."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from pageferry.core.bitmap import expand_runs
from pageferry.core.events import DeviceCost, RoundEnd, RoundEnded
from pageferry.core.frames import GfnArray
from pageferry.core.policy import Action, Decision, Progress, RoundStats
from pageferry.engine import estimates
from pageferry.engine.attempt import HELD, Attempt
from pageferry.engine.guest_time import Stall
from pageferry.engine.pages.lanes import Lanes
from pageferry.engine.postcopy.late_counts import LateCounts
from pageferry.engine.postcopy.server import LeftBehind
from pageferry.stream.hvm_context import encode_machine_state
from pageferry.stream.records import CpuidPolicy, End, HvmContext, HvmParams, PlainRecord, StaticDataEnd, TscInfo

#: How much memory is cleaned at once, 1 GiB: its bitmap is 32 KiB, and its pages are on the wire for a good part of a
#: second, in which many of those that come later are written again.
_CHUNK_PAGES = 1 << 18
#: While we are held, a round in so much time keeps what is left small.
HELD_ROUND_S = 1.0


class Copying(Attempt):
    """An attempt in rounds; a subclass says where to, and opens ``_lanes``."""

    _judged_rounds: int | None = None
    _may_switch = False
    _switches = False
    _lanes: Lanes

    def _before_record(self) -> None:
        """Do what is due before a record of page data; raise to end the attempt."""
        if self._cancelled:
            raise self._abort("cancelled")

    def _before_rounds(self, gfns: GfnArray) -> None:
        """Do what is due when log-dirty is on; ``gfns`` (uint64[n]) will be sent first."""

    def _settle(self, number: int) -> None:
        """Wait until whatever was sent in round ``number`` is in place; raise to end the attempt."""

    def _expect_alive(self) -> None:
        end = self._vm.end
        if end is not None:
            why = f"it crashed: {end.crash}" if end.crash is not None else f"exit code {end.exit_code}"
            raise self._abort(f"the guest ended meanwhile ({why})")

    def _on_sent(self, gfns: GfnArray) -> None:
        self._prover.sent(gfns)
        self._sent.add(len(self._sender.rounds), gfns)

    def _static_records(self) -> tuple[PlainRecord, ...]:
        """Return what comes first in a stream."""
        return (CpuidPolicy(leaves=self._vm.cpuid), StaticDataEnd())

    def _copy_running(self) -> None:
        """Copy round by round, from ENABLE until the policy says stop.

        Raises:
            PolicyAbort: it says that it is no use, or the guest ended.
            OSError: cut or stalled, or the disk is full.
        """
        self._stall.begin()
        with self._stall.spent_on(Stall.REHEARSAL):
            self._state_s = estimates.state_s(self._vm, self._clock.now_s)
        gfns = self._enable()
        self._before_rounds(gfns)
        chunks, expected_pages = iter([gfns]), gfns.size
        self._prover.prepare()
        while True:
            throttle = self._throttle.share
            stats = self._send_round(chunks, expected_pages=expected_pages)
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
            if decision.action is Action.POST_COPY and not self._may_switch:
                raise self._abort(f"the policy wants post-copy, which was not agreed on: {decision.reason}")
            if decision.action in (Action.STOP_AND_COPY, Action.POST_COPY):
                self._switches = decision.action is Action.POST_COPY
                self._stop_reason = decision.reason
                self._prover.close()
                return
            self._throttle.set(decision.throttle)
            if self.status == HELD:
                self._go_on.wait(HELD_ROUND_S)
            self._prover.prepare()
            chunks, expected_pages = self._clean_in_chunks(), stats.remaining_pages

    def _held(self, decision: Decision) -> Decision:
        """Turn a stop into another round as long as we are told to hold."""
        if self._go_on.is_set():
            self.status = "active"
            return decision
        if decision.action not in (Action.STOP_AND_COPY, Action.POST_COPY):
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
            gfns = dirty.gfns(range(first, min(first + _CHUNK_PAGES, gfn_limit)))
            self._prover.cleaned(gfns)
            yield gfns

    def _send_round(self, chunks: Iterable[GfnArray], *, expected_pages: int, final: bool = False) -> RoundStats:
        def before_record() -> None:
            self._before_record()
            if not final:
                self._prover.send_due(self._lanes)

        def count_dirty() -> int:
            if final:
                return 0
            self._before_record()
            self._prover.catch_up(self._lanes, self._before_record)
            self._settle(len(self._sender.rounds))
            return self._vm.log_dirty.peek().count()

        return self._sender.send(
            self._lanes,
            chunks,
            expected_pages=expected_pages,
            final=final,
            before_record=before_record,
            count_dirty=count_dirty,
        )

    def _pause(self) -> None:
        self._vm.freeze()
        self.frozen = True
        self._stall.end()
        self._throttle.close()  # only now: a guest that is let go for a moment writes
        self._expect_alive()

    def _stop_and_copy(self) -> None:
        # Nobody writes any more: PEEK is enough, and a failure from here on has no bits to give back.
        gfns = self._vm.log_dirty.peek().gfns()
        self._prover.cleaned(gfns)
        if self._switches:
            gfns, left = gfns[:0], gfns[self._vm.memory.are_ram(gfns)]
            if left.size:
                self._left = LeftBehind(self._vm.memory, left)
                self._late_counts = LateCounts(self._left, self._clock.now_s)
        stats = self._send_round([gfns], expected_pages=gfns.size, final=True)
        self._lanes.send_removed(self._vm.memory.removed())
        self._on_event(RoundEnded(stats=stats, decision=None))

    def _final_records(self) -> tuple[PlainRecord, ...]:
        """Save the state of the frozen guest; return what comes last in a stream."""
        state = self._vm.save_state()
        context = encode_machine_state(state)
        self._state_bytes = len(context)
        self._devices = tuple(
            DeviceCost(name=device.name, size_bytes=len(device.data), save_ns=device.save_ns)
            for device in state.devices
        )
        return (TscInfo(), HvmParams(), HvmContext(data=context), End())
