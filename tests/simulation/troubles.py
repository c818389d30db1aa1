"""What goes wrong in a simulated migration, and what people ask for meanwhile: drawn, and done when it is due."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from pageferry.core.errors import GuestAt, PageferryError, VmError
from pageferry.core.events import Event, MigrationEnded, Phase, PhaseBegan, PostcopyPaused
from pageferry.core.vm import VmStatus
from pageferry.engine.options import WireOptions
from pageferry.engine.wire.peer import Peer
from pageferry.stream.ferry_frames import Join, Recover
from pageferry.stream.ferry_order import Side
from simulation.interleave import Violated
from simulation.simulated_ends import ReceiverProcess, SourceProcess
from simulation.simulated_guest import Machine
from simulation.simulated_host import Process
from simulation.simulated_network import Connection, SimulatedEndpoint

#: For how long there are troubles, on the simulated clock.
TROUBLES_S = 30.0
#: What else may happen at an end besides phases; and after what something is done how often.
_PAUSED, _UNKNOWN = "post-copy is cut", "it is not known where the guest is"
_MOMENTS = (
    (str(Phase.HELLO), 1),
    (str(Phase.PRECOPY), 1),
    (str(Phase.PAUSE), 2),
    (str(Phase.STATE), 1),
    (str(Phase.VERIFY), 2),
    (str(Phase.HANDOFF), 5),
    (str(Phase.POSTCOPY), 3),
    (_PAUSED, 3),
    (_UNKNOWN, 3),
)


class Kind(Enum):
    """What a run is about."""

    ANY = "any"
    HANDOFF = "handoff"
    POSTCOPY = "post-copy"


@dataclass
class Plan:
    """What is done when."""

    kind: str
    do: Callable[[], None]
    details: str = ""
    at_s: float = math.inf
    #: The connection, the end that sends, and how many bytes have gone; as drawn.
    sent: tuple[int, int, int] | None = None
    #: The process, what happens there, and how long after that.
    moment: tuple[str, str, float] | None = None
    done: bool = False


class Troubles:
    """The troubles of one run.

    Args:
        run: that they disturb.
    """

    def __init__(self, run) -> None:
        self._run = run
        self._plans: list[Plan] = []
        self._waiting: list = []

    def plan(self) -> None:
        """Draw them."""
        for plan in self._drawn():
            self._plans.append(plan)
            self._run.note(f"planned: {plan.kind} {plan.details}: {plan.at_s}, {plan.sent}, {plan.moment}")

    def sent(self, connection: Connection, side: int, sent_bytes: int) -> None:
        for plan in self._plans:
            here = plan.sent is not None and plan.sent[:2] == (connection.index, side)
            if here and not plan.done and sent_bytes >= plan.sent[2]:
                plan.done = True
                self._do(plan)
        self._run.simulation.expect_alive()

    def allows(self, connection: Connection, side: int, room_bytes: int) -> int:
        """Let a sender stop just where something happens."""
        for plan in self._plans:
            if not plan.done and plan.sent is not None and plan.sent[:2] == (connection.index, side):
                left = plan.sent[2] - connection.ways[1 - side].sent_bytes
                if 0 < left < room_bytes:
                    room_bytes = left
        return room_bytes

    def sees(self, process: Process) -> Callable[[Event], None]:
        """Return what is told of the events of one end."""

        def on_event(event: Event) -> None:
            if isinstance(event, PhaseBegan):
                happens = str(event.phase)
            elif isinstance(event, PostcopyPaused):
                happens = _PAUSED
            elif isinstance(event, MigrationEnded) and event.report.guest_at is GuestAt.UNKNOWN:
                happens = _UNKNOWN
            else:
                return
            self._run.seen[f"{process.name}: {happens}"] = 1
            self._run.note(f"{process.name}: {happens}")
            for plan in self._plans:
                if not plan.done and plan.moment is not None and plan.moment[:2] == (process.name, happens):
                    plan.at_s = self._run.simulation.now_s + plan.moment[2]
                    self._run.simulation.wake(self._waiting)

        return on_event

    def _do(self, plan: Plan) -> None:
        if self._run.healed:
            return
        self._run.note(f"{plan.kind} {plan.details}")
        self._run.seen[plan.kind] = 1
        self._run.disturbed = True
        plan.do()

    def run(self) -> None:
        """Do what is planned, when it is due."""
        until_s = self._run.simulation.now_s + TROUBLES_S
        while not self._run.healed and self._run.simulation.now_s < until_s:
            due = [plan for plan in self._plans if not plan.done and plan.at_s <= self._run.simulation.now_s]
            for plan in due:
                plan.done = True
                self._run.host.thread(self._do, plan.kind, (plan,)).start()
            at_s = min((plan.at_s for plan in self._plans if not plan.done), default=math.inf)
            self._run.simulation.wait(self._waiting, min(at_s, until_s) - self._run.simulation.now_s)

    def _duration_s(self) -> float:
        patience_s = self._run.options.timeout_s * self._run.draw.uniform(0.3, 4)  # what matters is beside that
        return self._run.draw.choice((10 ** self._run.draw.uniform(-4, 1.5), patience_s))

    def _drawn(self) -> Iterator[Plan]:
        """Draw what happens."""
        draw = self._run.draw
        if self._run.kind is Kind.ANY:
            for _ in range(draw.choice((0, 0, 1, 1, 2, 3, 5))):
                yield self._plan(self._thing())
            return
        phase = Phase.HANDOFF if self._run.kind is Kind.HANDOFF else Phase.POSTCOPY
        if phase is Phase.HANDOFF and draw.random() < 0.3:
            yield self._late_word()
        for _ in range(draw.choice((1, 1, 2, 3))):
            make = draw.choice((self._cut, self._cut, self._stall, self._stall, self._partition, self._stop_process))
            plan = self._kill() if draw.random() < 0.1 else make()
            plan.moment = (draw.choice(("source", "source", "receiver")), str(phase), self._soon_s())
            yield plan
        if draw.random() < 0.7:
            yield Plan("people", self._people, moment=("source", _UNKNOWN, self._soon_s()))
            yield Plan("people again", self._people, moment=("source", _PAUSED, self._soon_s()))
        if draw.random() < 0.3:
            yield self._plan(self._thing())

    def _soon_s(self) -> float:
        draw = self._run.draw
        return draw.choice((10 ** draw.uniform(-5, 0), self._run.network.pace.latency_s * draw.uniform(0, 4)))

    def _people(self) -> None:
        """Do what people do when they see that something is wrong, again and again."""
        source, job = self._run.source, self._run.source.job
        while not self._run.healed and not source.dead:
            if job.guest_at is GuestAt.UNKNOWN and self._run.draw.random() < 0.5:
                self.take_back()
            elif self._run.draw.random() < 0.9:
                self.recover()
            self._run.host.sleep(10 ** self._run.draw.uniform(-2, 0.7))

    def _plan(self, plan: Plan) -> Plan:
        """Draw when something happens."""
        draw = self._run.draw
        when = draw.random()
        if when < 0.35:
            side = draw.choice((0, 1))
            most = 5.7 if side == 0 else 3.3
            index = draw.choice((0, 0, 0, 1, 2, 3))
            plan.sent = (index, side, int(10 ** draw.uniform(1, most)))
        elif when < 0.8:
            moment = draw.choices([each for each, _ in _MOMENTS], [weight for _, weight in _MOMENTS])[0]
            plan.moment = (draw.choice(("source", "receiver")), moment, self._soon_s())
        else:
            plan.at_s = self._run.simulation.now_s + 10 ** draw.uniform(-3, 1.5)
        return plan

    def _thing(self) -> Plan:
        draw = self._run.draw
        things: list[tuple[int, Callable[[], Plan]]] = [
            (6, self._cut),
            (5, self._stall),
            (4, self._partition),
            (2, self._stop_process),
            (4, self._kill),
            (3, lambda: Plan("cancel", self._cancel)),
            (2, lambda: Plan("go on", self.go_on)),
            (2, lambda: Plan("recover", self.recover)),
            (2, lambda: Plan("resume --force", self.take_back)),
            (5, lambda: Plan("stop and cont", self._stop_and_cont)),
            (1, lambda: Plan("bandwidth", self._bandwidth)),
            (3, lambda: Plan("stranger", self._stranger)),
            (1, lambda: Plan("abandon", self._abandon)),
            (1, lambda: Plan("guest ends", self._guest_ends)),
            (1, lambda: Plan("receiver ends", self._receiver_ends)),
        ]
        (_, make) = draw.choices(things, [weight for weight, _ in things])[0]
        return make()

    def _some_connection(self) -> Connection | None:
        connections = self._run.network.connections
        return self._run.draw.choice(connections[-3:]) if connections else None

    def _cut(self) -> Plan:
        side, loses = self._run.draw.choice((None, 0, 1)), self._run.draw.random() < 0.5
        late_s = self._run.draw.choice((0.0, self._duration_s()))

        def cut() -> None:
            if (connection := self._some_connection()) is not None:
                connection.cut(side, loses=loses)
                for each in (0, 1):
                    connection.stand_still(each, late_s)

        return Plan("cut", cut, f"at {side}, loses {loses}, late {late_s:.4f}")

    def _late_word(self) -> Plan:
        """The source finds its connection cut, and what it said last arrives late."""
        late_s = min(10.0, self._run.options.timeout_s) * self._run.draw.uniform(0.2, 1.3)

        def cut() -> None:
            connection = self._run.network.connections[0]
            connection.cut(0, loses=False)
            connection.stand_still(1, late_s)

        after_s = self._run.network.pace.latency_s * self._run.draw.uniform(0.1, 1)
        return Plan("late word", cut, f"by {late_s:.4f}", moment=("source", str(Phase.HANDOFF), after_s))

    def _stall(self) -> Plan:
        side, duration_s = self._run.draw.choice((0, 1)), self._duration_s()

        def stall() -> None:
            if (connection := self._some_connection()) is not None:
                connection.stand_still(side, duration_s)

        return Plan("stall", stall, f"to {side} for {duration_s:.4f}")

    def _partition(self) -> Plan:
        duration_s = self._duration_s()

        def partition() -> None:
            self._run.network.stands_until_s = max(
                self._run.network.stands_until_s, self._run.simulation.now_s + duration_s
            )

        return Plan("partition", partition, f"for {duration_s:.4f}")

    def _stop_process(self) -> Plan:
        who, duration_s = self._run.draw.choice(("source", "receiver")), self._duration_s()

        def stop() -> None:
            self._run.simulation.stand_still(self._process(who), duration_s)

        return Plan(f"SIGSTOP {who}", stop, f"for {duration_s:.4f}")

    def _kill(self) -> Plan:
        who, power = self._run.draw.choice(("source", "receiver", "receiver")), self._run.draw.random() < 0.3
        again = who == "receiver" and self._run.draw.random() < 0.5
        return Plan(f"kill {who}", lambda: self.kill(self._process(who), power=power, again=again), f"power {power}")

    def _process(self, who: str) -> Process:
        return self._run.source if who == "source" else self._run.receiver

    def kill(self, process: Process, *, power: bool = False, again: bool = False) -> None:
        """Kill a process; a receiver may be started again at the same address."""
        if process.dead:
            return
        machines = [machine for machine in self._run.ledger.machines if machine.host.process is process]
        if self._run.holder in machines:
            self._run.lost(f"{process.name} was killed")
        elif process is self._run.source:
            self._run.may_lose = "its pages were in a source that was killed"
        process.dead = True
        self._run.network.lose_process(process, power=power)
        for machine in machines:
            if machine.disk is not None and machine.disk.holder is machine:
                machine.disk.holder = None
        if again:
            starter = self._run.host.thread(self._receive_again, "starter")
            starter.start()

    def _receive_again(self) -> None:
        self._run.host.sleep(self._run.draw.random())
        self._run.note("another receiver begins")
        self._run.receiver = ReceiverProcess(
            self._run, f"receiver {len(self._run.receivers) + 1}", self._run.options.timeout_s
        )
        self._run.receivers.append(self._run.receiver)

    def _cancel(self) -> None:
        if not self._run.source.dead and self._run.source.job is not None and self._run.source.under_way:
            self._run.cancelled = self._run.source.job.cancel() or self._run.cancelled
            self._run.note(f"cancelled in time: {self._run.cancelled}")

    def go_on(self) -> None:
        if not self._run.source.dead and self._run.source.job is not None:
            self._run.source.job.go_on()

    def recover(self) -> None:
        if not self._run.source.dead:
            self._run.source.recover(self._run.there)

    def take_back(self) -> None:
        """Resume by force, as a person may who has looked and seen that the guest runs nowhere else."""
        source, job = self._run.source, self._run.source.job
        if source.dead or job is None or job.guest_at is not GuestAt.UNKNOWN:
            return
        if self._runs_there():
            return
        looked_too_early = job.open_for_s > 0
        self._run.host.sleep(self._run.draw.choice((0.0, 1.0)))
        if source.dead or (looked_too_early and not job.open_for_s and self._runs_there()):
            return
        try:
            job.take_back()
        except VmError as error:
            self._run.note(f"not taken back: {error}")
        else:
            self._run.note("taken back")
            if job.guest_at is not GuestAt.SOURCE:
                raise Violated("taken back, and not here")
            if self._run.holder not in (None, source.machine):
                raise Violated("a guest is taken back that is elsewhere")
            if self._run.holder is None:  # what it did there is lost with the process there
                self._run.ledger.go_back(self._run.as_given)
                self._run.holder = source.machine
                self._run.stopped = source.machine.status is VmStatus.PAUSED

    def _runs_there(self) -> bool:
        return not self._run.receiver.dead and self._run.receiver.machine is not None

    def _stop_and_cont(self) -> None:
        if (machine := self._to_command()) is not None:
            machine.pause()
            self._run.stopped = True
            self._run.note(f"stopped on {machine.name}")
        self._run.host.sleep(10 ** self._run.draw.uniform(-3, 1))
        if (machine := self._to_command()) is not None and machine.end is None:
            machine.resume(by_user=True)
            self._run.stopped = False
            self._run.note(f"runs on, on {machine.name}")

    def _to_command(self) -> Machine | None:
        """Return the machine whose guest may be stopped and resumed; None: that is refused."""
        source, receiver = self._run.source, self._run.receiver
        if receiver.has_guest and self._run.holder is receiver.machine:
            waits = receiver.attempt is not None and receiver.attempt.waits_for_source
            return None if waits else receiver.machine
        here = source.job is None or (source.job.guest_at is GuestAt.SOURCE and not source.job.handing_over)
        return source.machine if here and not source.dead else None

    def _bandwidth(self) -> None:
        if not self._run.source.dead and self._run.source.job is not None:
            wire = WireOptions(bandwidth_bytes_per_s=self._run.draw.choice((1 << 17, 1 << 20, None)))
            self._run.source.job.change_limits({}, wire)

    def _abandon(self) -> None:
        if not self._run.source.dead and self._run.source.job is not None and self._run.source.under_way:
            self.give_up(self._run.source)

    def give_up(self, source: SourceProcess) -> None:
        # A signal at the source: a guest that has switched without all its pages is lost, which the user was told.
        self._run.may_lose = "it was given up at the source"
        source.job.abandon()

    def _guest_ends(self) -> None:
        self._run.ledger.ends_after = self._run.ledger.count + 1

    def _receiver_ends(self) -> None:
        if not self._run.receiver.dead:
            self._run.may_lose = "it was given up at the receiver"
            self._run.host.thread(self._end_receiver, "closer", (self._run.receiver,)).start()

    def _end_receiver(self, receiver: ReceiverProcess) -> None:
        receiver.close()
        self.kill(receiver)

    def _stranger(self) -> None:
        """Somebody connects, and says something or nothing."""
        kind = self._run.draw.randrange(5)

        def visit() -> None:
            endpoint = SimulatedEndpoint(self._run.network, self._run.people, "there")
            with contextlib.suppress(OSError, PageferryError):
                channel = endpoint.connect(5.0)
                with contextlib.closing(channel):
                    peer = Peer(channel, Side.SOURCE)
                    if kind == 1:
                        channel.send([self._run.draw.randbytes(50)])
                    elif kind > 1:
                        peer.greet()
                        peer.send(
                            Recover(proof=peer.proof(Recover, "0" * 32))
                            if kind == 2
                            else Join(proof=peer.proof(Join, "0" * 32), index=1)
                        )
                    if kind != 4:
                        channel.receive_some(1000, self._run.host.now_s() + self._run.draw.choice((0.1, 7.0)))

        self._run.host.thread(visit, "stranger").start()
