"""One simulated migration: what is drawn, what must hold, and how it is brought to an end."""

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

from pageferry.core.errors import GuestAt, MigrationError, PolicyAbort
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.policies import ConvergePolicy, DowntimePolicy, PostcopyPolicy, XenPolicy
from pageferry.core.policy import Action, Decision, Policy, Progress
from pageferry.core.vm import VmStatus
from pageferry.engine.job import JobStatus
from pageferry.engine.options import MigrationOptions, VerifyMode, WireOptions
from pageferry.stream.packing import Packing
from simulation.interleave import Violated
from simulation.simulated_ends import ReceiverProcess, SourceProcess
from simulation.simulated_guest import Disk, Ledger, Machine, Refusals
from simulation.simulated_host import Process, Simulation
from simulation.simulated_network import Network, Pace, SimulatedEndpoint
from simulation.troubles import TROUBLES_S, Kind, Troubles

#: How long everything may take after the troubles, on the simulated clock; how often people look.
_SETTLE_S, _LOOK_S = 400.0, 0.5
#: What a machine may refuse once.
_REFUSALS = (
    "make_vm",
    "load_state",
    "claim_backends",
    "release_backends",
    "save_state",
    "await_memory",
    "resume",
    "resume",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A policy that was drawn: so many rounds, throttled or not, then this action."""

    rounds: int
    action: Action
    throttle: float
    limit_s: float | None = None
    name: str = "drawn"

    @property
    def switches(self) -> bool:
        """Whether it is for post-copy."""
        return self.action is Action.POST_COPY

    def decide(self, progress: Progress) -> Decision:
        """Count."""
        if len(progress.rounds) >= self.rounds:
            return Decision(action=self.action, reason="counted")
        return Decision(action=Action.NEXT_ROUND, reason="counted", throttle=self.throttle)


class Run:
    """One run.

    Args:
        seed: decides everything.
        kind: what it is about; None: drawn too.
    """

    def __init__(self, seed: int, kind: Kind | None = None) -> None:
        self.seed = seed
        self.simulation = Simulation(seed)
        self.draw = self.simulation.draw
        self.log: list[str] = []
        self.people = Process("people")
        draw = self.draw
        drawn = draw.choices(tuple(Kind), (4, 3, 3))[0]
        self.kind = drawn if kind is None else kind
        pace = Pace(
            latency_s=draw.choice((0.0001, 0.002, 0.05)),
            bytes_per_s=draw.choice((2e5, 2e6, 2e7, 1e9)),
            window_bytes=draw.choice((4096, 65_536, 1 << 20)),
        )
        self.troubles = Troubles(self)
        self.network = Network(self.simulation, pace, sent=self.troubles.sent, allows=self.troubles.allows)
        pages, self.cap = draw.choice((8, 24, 48)), draw.choice((None, None, None, 1 << 17, 1 << 20))
        window_bytes_per_s = pace.window_bytes / (2 * pace.latency_s)
        least_bytes_per_s = min(pace.bytes_per_s, window_bytes_per_s, self.cap or math.inf)
        copy_s = self._copy_s = 10 * pace.latency_s + pages * PAGE_SIZE / least_bytes_per_s
        self.ledger = Ledger(
            self.simulation,
            pages=pages,
            pace_s=copy_s * draw.choice((0.005, 0.02, 0.1)),
            moved=lambda: self.network.moved_bytes,
        )
        self.disk = Disk(draw.choice((0.0, 0.1, 3.0))) if draw.random() < 0.5 else None
        self.refusals = Refusals({})
        self.waits = draw.random() < 0.95
        self.healed = False
        self.holder: Machine | None = None
        self._before: Machine | None = None
        self.may_lose: str | None = None
        self.cancelled = self.disturbed = False
        self.stopped = True
        if self.disk is not None and self.disk.slow_s > 1.0:
            self.disturbed = True  # the lease may be over before somebody has it
        self.host = self.network.host_of(self.people)
        self.seen: dict[str, int] = {}

    def note(self, what: str) -> None:
        """Note what happens, to be told of a run that fails."""
        self.log.append(f"{self.simulation.now_s - 1000:12.6f} {what}")

    def machine(self, host) -> Machine:
        """Make a machine."""
        return Machine(host, self.ledger, self.disk, self.refusals, waits=self.waits)

    def expect_no_defect(self, error: Exception) -> None:
        """Check that an error is one that is raised on purpose."""
        if "internal error" in str(error):
            raise Violated(f"a defect: {error}") from error

    def expect_reason(self, error: MigrationError) -> None:
        """Check that a migration does not fail for nothing."""
        decided = isinstance(error, PolicyAbort) or "the pause was given up" in error.reason
        if not (self.disturbed or decided or not self.waits):
            raise Violated(f"nothing was wrong, and it failed: {error}") from error

    def expect_knows(self, error: MigrationError) -> None:
        """Check that a receiver which has not ended since knows what became of the guest."""
        there = not any(receiver.dead or receiver.ended for receiver in self.receivers)
        if "no guest of that migration is here" in str(error) and there:
            raise Violated(f"the receiver has forgotten the guest: {error}") from error

    def expect_no_threads(self, process: Process, *names: str) -> None:
        """Check that an attempt that is over has left no thread of these names."""
        for thread in self.simulation.threads:
            if thread.process is process and thread.name.partition(" ")[0] in names and thread.is_alive():
                raise Violated(f"{process.name} is done with an attempt, and its thread goes on: {thread.name}")

    # -- the truth -------------------------------------------------------------------------------------------------

    def moved(self, machine: Machine) -> None:
        """The guest is another machine's now."""
        if self.holder is not None and self.source.machine is self.holder and not self.source.dead:
            job = self.source.job
            if job is not None and not job.handoff.committed:
                raise Violated("a guest is taken that was not given")
        self._before, self.holder = self.holder, machine
        self.as_given = self.ledger.snapshot()

    def not_moved(self, machine: Machine) -> None:
        """It could not be started where it has arrived."""
        if self.holder is machine and machine is not self.source.machine:
            self.note(f"the guest is not {machine.name}'s after all")
            self.holder = self._before
            machine.host.process.machine = None

    def lost(self, why: str) -> None:
        """The guest is lost, with a good reason."""
        self.note(f"the guest is lost: {why}")
        self.may_lose = why
        self.holder = None

    def gave_up(self, machine: Machine) -> None:
        """A receiver has given up its guest, of which pages were missing."""
        if self.may_lose is None:
            raise Violated("a guest is given up for no reason")
        if self.holder is machine:
            self.lost(self.may_lose)

    def is_told(self, source: SourceProcess, guest_at: GuestAt) -> None:
        """A source says where the guest is."""
        self.expect_no_threads(source, "lane", "audit", "pause", "throttle")
        self.seen[f"told {guest_at}"] = 1
        if guest_at is GuestAt.SOURCE and self.holder is not source.machine:
            raise Violated(f"{source.name} says that the guest is there, and it is not")
        if guest_at is not GuestAt.SOURCE and self.cancelled:
            raise Violated(f"cancelled in time, and the guest is at {guest_at}")
        if self.source.job is not None and (source.job.status is JobStatus.COMPLETED) != (source.job.error is None):
            raise Violated(f"the job is {source.job.status}, and its error {source.job.error}")
        if guest_at is GuestAt.SOURCE and source.job.frozen and "claim_backends" not in self.refusals.left:
            raise Violated("the guest stands still at its source")
        if guest_at is GuestAt.DESTINATION and self.holder is source.machine:
            raise Violated(f"{source.name} says that the guest has moved, and it has not")

    # -- a run -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Do all of it.

        Raises:
            Violated: what must hold does not.
        """
        self.ledger.on_refused = self.not_moved
        try:
            with _defects() as defects:
                self.simulation.run(self._script, self.people)
            if defects:
                raise Violated(f"a defect was logged: {defects[0]}")
        except BaseException as error:
            for line in self.simulation.where():
                error.add_note(line)
            raise
        finally:
            self.simulation.close()
            for machine in self.ledger.machines:
                machine.lose()

    def _script(self) -> None:
        draw = self.draw
        policy, self.options = self._policy(), self._options()
        self.note(f"{policy}, {self.options}")
        self.source = SourceProcess(self)
        timeout_s = max(draw.choice((self.options.timeout_s, 2.0, 30.0)), 2 * self._copy_s)
        self.receiver = ReceiverProcess(self, "receiver", timeout_s)
        self.receivers = [self.receiver]
        self.there = SimulatedEndpoint(self.network, self.source, "there")
        machine = self.holder = self.source.machine
        self.ledger.fill(machine)
        machine.claim_backends()
        if draw.random() < 0.9:
            machine.resume(by_user=True)
            self.stopped = False
        if draw.random() < 0.2:
            self.refusals.left[draw.choice(_REFUSALS)] = 1
            self.disturbed = True
        self.troubles.plan()
        self.host.thread(self.troubles.run, "troubles").start()
        self.host.sleep(draw.random() * 0.1)
        if not self.source.dead:
            self.source.begin(self.there, policy, self.options)
        if draw.random() < 0.9:
            self._wait_for_end()
        if draw.random() < 0.5:
            self.host.sleep(draw.random() * 20)
        self.healed = True
        self.refusals.left.clear()
        self.note("healed")
        self._heal()
        self._settle()
        self._expect_one()
        self._move_again()
        self._clear_up()

    def _wait_for_end(self) -> None:
        until_s = self.simulation.now_s + TROUBLES_S
        while self.source.under_way and self.simulation.now_s < until_s:
            self.host.sleep(_LOOK_S * self.draw.random())
            if self.source.job.status is JobStatus.HELD and self.draw.random() < 0.1:
                self.troubles.go_on()

    def _policy(self) -> Policy:
        draw = self.draw
        if self.kind is Kind.POSTCOPY or draw.random() < 0.7:
            action = draw.choice((Action.STOP_AND_COPY, Action.POST_COPY))
            action = Action.POST_COPY if self.kind is Kind.POSTCOPY else action
            throttle = draw.choice((0.0, 0.0, 0.5))
            limit_s = draw.choice((None, None, 0.01, 1.0))
            return Drawn(rounds=draw.randint(1, 4), action=action, throttle=throttle, limit_s=limit_s)
        limit_s = draw.choice((0.001, 0.1, 5.0))
        return draw.choice(
            (
                XenPolicy(max_rounds=draw.randint(1, 5), min_dirty_pages=2),
                DowntimePolicy(limit_s=limit_s, max_rounds=6),
                ConvergePolicy(limit_s=limit_s, max_rounds=8),
                PostcopyPolicy(limit_s=limit_s),
            )
        )

    def _options(self) -> MigrationOptions:
        draw = self.draw
        wire = WireOptions(
            bandwidth_bytes_per_s=self.cap,
            connections=draw.choice((1, 1, 1, 2, 4)),
            compress=draw.choice((Packing.NONE, Packing.NONE, Packing.NONE, Packing.LZ4)),
        )
        return MigrationOptions(
            timeout_s=max(draw.choice((0.5, 2.0, 5.0, 15.0)), 2 * self._copy_s),
            verify=draw.choice((None, VerifyMode.FULL, VerifyMode.AUDIT)),
            wire=wire,
            hold=draw.random() < 0.2,
            pause_limit_s=draw.choice((None, None, None, 0.05, 1.0)),
        )

    # -- afterwards ------------------------------------------------------------------------------------------------

    def _heal(self) -> None:
        now_s = self.simulation.now_s
        self.network.stands_until_s = min(self.network.stands_until_s, now_s)
        for connection in self.network.connections:
            for way in connection.ways:
                if way.stands_until_s < 1e12:
                    way.stands_until_s = min(way.stands_until_s, now_s)
                self.simulation.wake(way.readers)

    def _settle(self) -> None:
        """Do as pageferry says, until it is known where the guest is."""
        until_s = self.simulation.now_s + _SETTLE_S
        while not self._is_settled():
            if self.simulation.now_s > until_s:
                raise Violated(f"it is not known where the guest is: {self._how_it_is()}")
            self._help()
            self.host.sleep(_LOOK_S)

    def _how_it_is(self) -> str:
        job = self.source.job
        said = "no job" if job is None else f"{job.status}, guest at {job.guest_at}, paused: {job.postcopy_paused}"
        here = self.receiver.machine is not None
        return f"source dead {self.source.dead}, {said}; receiver dead {self.receiver.dead}, has the guest: {here}"

    def _is_settled(self) -> bool:
        source, receiver = self.source, self.receiver
        job = None if source.dead else source.job
        if job is not None and (source.under_way or job.guest_at is GuestAt.UNKNOWN):
            return False
        if receiver.dead or receiver.attempt is None:
            return True
        return receiver.has_all

    def _help(self) -> None:
        source, receiver, job = self.source, self.receiver, self.source.job
        over = source.dead or (not source.under_way and job is not None and job.guest_at is GuestAt.DESTINATION)
        if over and not receiver.dead and receiver.attempt is not None and receiver.attempt.waits_for_source:
            receiver.attempt.abort()  # its pages are nowhere
        if source.dead:
            return
        if job is None:
            return
        if source.under_way:
            if job.status is JobStatus.HELD:
                job.go_on()
            if job.postcopy_paused is not None:
                if job.guest_at is not GuestAt.UNKNOWN and not receiver.has_guest:
                    self.troubles.give_up(source)  # it is lost
                elif job.guest_at is GuestAt.UNKNOWN and self.draw.random() < 0.3:
                    self.troubles.take_back()
                else:
                    source.recover(self.there)
            return
        if job.guest_at is GuestAt.UNKNOWN:
            if receiver.dead or receiver.ended or self.draw.random() < 0.2:
                self.troubles.take_back()
            else:
                source.recover(self.there)

    def _expect_one(self) -> None:
        """Check that the guest is where both ends say, and whole."""
        source, holder = self.source, self.holder
        if not source.dead and source.job is not None and source.job.guest_at is GuestAt.SOURCE:
            source.job.go_on_here()  # it may have stood still for want of its disk
        self.host.sleep(1.0)
        self.ledger.expect_alone()
        says_here = not source.dead and (source.job is None or source.job.guest_at is GuestAt.SOURCE)
        has = [receiver.machine for receiver in self.receivers if receiver.has_guest]
        if says_here:
            has.append(source.machine)
        self.note(f"the guest is with {[machine.name for machine in has]}")
        if self.may_lose is not None and holder is None and not has:
            self.seen["lost"] = 1
            return
        if holder is None or has != [holder]:
            names = [machine.name for machine in has]
            raise Violated(f"the guest is said to be with {names}, and is with {holder and holder.name}")
        self.seen[f"with {holder.name}"] = 1
        if holder.frozen:
            raise Violated(f"the guest stands still on {holder.name}")
        if self.disk is not None and self.disk.holder is not holder:
            raise Violated("the guest has no disk")
        if holder.log_dirty.enabled:
            raise Violated("log-dirty is on")
        if holder.end is None and (holder.status is VmStatus.PAUSED) != self.stopped:
            raise Violated(f"the guest is {holder.status}, and its user has {'' if self.stopped else 'not '}stopped it")
        count = self.ledger.count
        if holder.status is VmStatus.RUNNING:
            for _ in range(100):
                if self.ledger.count > count or holder.end is not None:
                    break
                self.host.sleep(self.ledger.rest_s() * 2)
            else:
                raise Violated(f"the guest makes no step on {holder.name}")

    def _move_again(self) -> None:
        """Move the guest once more, where nothing goes wrong."""
        holder = self.holder
        if holder is None or holder.end is not None:
            return
        self.ledger.ends_after = None
        self.network.pace = Pace(latency_s=0.001, bytes_per_s=1e9, window_bytes=1 << 20)
        there = ReceiverProcess(self, "next", 30.0)
        self.receivers.append(there)
        if holder is self.source.machine:
            source = self.source
        else:
            source = SourceProcess(self, holder, holder.name)
            source.host, source.machine = holder.host, holder
        self.source, self.receiver, self.cancelled = source, there, False
        source.begin(
            SimulatedEndpoint(self.network, holder.host.process, "there"), XenPolicy(), MigrationOptions(timeout_s=60.0)
        )
        source.join()
        self.host.sleep(3.0)
        if self.holder is not there.machine or there.machine is None:
            raise Violated(f"the guest did not move again: {source.told[-1:]}")
        self.ledger.expect_kept(there.machine)

    def _clear_up(self) -> None:
        for receiver in self.receivers:
            if not receiver.dead:
                receiver.close()
        if not self.source.dead:
            self.source.join()
        self.host.sleep(120.0)
        for machine in self.ledger.machines:
            ours = [receiver.machine for receiver in self.receivers]
            if machine in ours or machine.name == "source":
                if not machine.host.process.dead:
                    machine.close()
            elif not machine.closed and not machine.host.process.dead:
                raise Violated(f"a machine is left on {machine.name}")
        self.host.sleep(1.0)
        left = self.simulation.where()
        left = [line for line in left if not line.startswith("people: script")]
        if left:
            raise Violated(f"threads are left: {left}")
        for connection in self.network.connections:
            for end in connection.ends:
                if not end.closed and not end.host.process.dead:
                    raise Violated(f"{end.host.process.name} left connection {connection.index} open")


@contextlib.contextmanager
def _defects() -> Iterator[list[str]]:
    """Collect what the engine logs of its own defects."""
    found: list[str] = []

    class Defects(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR and record.exc_info:
                error = record.exc_info[1]
                found.append(f"{record.getMessage()}: {error!r}")

    handler, logger = Defects(), logging.getLogger("pageferry")
    propagates = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
