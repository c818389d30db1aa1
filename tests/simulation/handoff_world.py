"""The handoff of one guest between two processes, a network that delays, loses and cuts, a clock, and a person.

The code of both ends is the engine's (:mod:`pageferry.engine.handoff`), from READY to DROPPED; the rest is a model:

* A *line* is one connection. What is sent is under way until the network delivers it, in order, as late as it likes.
  Each end may find the latest line cut, by itself: what is under way to the other end may still arrive there.
* The *clock* goes on by a tick, a few times whenever it likes, and later only when nothing else can happen.
* A *process* may be killed. A guest that runs there ends with it.
* The *person* looks, when the source lets them take the guest back, whether it runs at the destination. If it does not,
  they take it back, a moment later.

What must hold: at no time may the guest run at both ends, and no end says what is not so, or will not be. In the end
the source knows where the guest is, or says that it does not.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Hashable, Sequence

from pageferry.core.errors import OrderError, PageferryError, RemoteStreamError
from pageferry.engine.handoff.custody import DestinationCustody, Handoff, SourceCustody, Takeover
from pageferry.engine.handoff.give import Giver
from pageferry.engine.handoff.take import answer_return, see_off, take
from pageferry.engine.wire.connections import NeverRan
from pageferry.engine.wire.peer import PeerFailedError, PeerRefusedError
from pageferry.stream.ferry_frames import Commit, Dropped, Failed, Frame, Ready, Recover, Refuse, Running
from simulation.interleave import Violated, step

SOURCE, DESTINATION = 0, 1
TOKEN = "token"
#: In seconds: how far the clock goes at once, how long a commit may be accepted, how long an answer is waited for.
TICK_S, LEASE_S, PATIENCE_S = 2.0, 4.0, 2.0


class Line:
    """One connection: what is under way to each end and has arrived there; which end has found it cut, or closed it."""

    def __init__(self) -> None:
        self.under_way: tuple[deque[Frame], deque[Frame]] = (deque(), deque())
        self.arrived: tuple[deque[Frame], deque[Frame]] = (deque(), deque())
        self.cut = [False, False]
        self.closed = [False, False]

    def fingerprint(self) -> Hashable:
        """Return all of it."""
        frames = [tuple(type(frame).__name__ for frame in queue) for queue in (*self.under_way, *self.arrived)]
        return (*frames, *self.cut, *self.closed)


class Killed(Exception):
    """This process was killed."""


class End:
    """One end of a line, as the handoff wants it."""

    def __init__(self, world: "HandoffWorld", line: Line, side: int) -> None:
        self._world = world
        self._line = line
        self._side = side

    def send(self, frame: Frame) -> None:
        """Put it under way, unless this end has found the line cut."""
        self._world.wait(self._side, f"send {type(frame).__name__}")
        if self._line.cut[self._side] or self._line.closed[self._side]:
            raise ConnectionResetError
        self._world.says(self._side, frame)
        self._line.under_way[1 - self._side].append(frame)

    def receive(self, within_s: float | None = None) -> Frame:
        """Wait for what has arrived, a cut, or the time."""
        within_s = PATIENCE_S if within_s is None else within_s
        self._world.wait(self._side, "receive", self._stirs, within_s)
        if not self._line.arrived[self._side]:
            raise ConnectionResetError if self._stirs() else TimeoutError
        frame = self._line.arrived[self._side].popleft()
        if isinstance(frame, Refuse):
            raise PeerRefusedError(frame.reason)
        if isinstance(frame, Failed):
            raise PeerFailedError(frame.reason)
        return frame

    def out_of_turn(self, frame: Frame) -> RemoteStreamError:
        """Return the error for a frame that has no place here."""
        return OrderError(f"{type(frame).__name__} out of turn", offset=0)

    def wait_for_end(self, within_s: float) -> None:
        """Wait until the other end is closed."""
        self._world.wait(self._side, "wait for the end", self._stirs, within_s)
        if self._line.cut[self._side] or not self._ended():
            raise TimeoutError

    def close(self) -> None:
        """Say nothing more; what is under way arrives."""
        self._line.closed[self._side] = True

    def _stirs(self) -> bool:
        return bool(self._line.arrived[self._side]) or self._line.cut[self._side] or self._ended()

    def _ended(self) -> bool:
        return self._line.closed[1 - self._side] and not self._line.under_way[self._side]


class HandoffWorld:
    """See the module.

    Args:
        alter: puts a fault into the handoff or the takeover.
        ticks: how often the clock goes on whenever it likes.
        cuts: which ends of lines find them cut, each once.
        kills: which processes may be killed.
        person: whether an operator takes the guest back.
    """

    def __init__(
        self,
        alter: Callable[["HandoffWorld"], None] = lambda _: None,
        *,
        ticks: int = 0,
        cuts: Sequence[int] = (),
        kills: Sequence[int] = (),
        person: bool = False,
    ) -> None:
        self.now = 0.0
        self.handoff = Handoff()
        self.takeover = Takeover(LEASE_S)
        self.never_ran = NeverRan()
        self._ticks, self._cuts, self._kills, self._person = ticks, tuple(cuts), tuple(kills), person
        self._lines: list[Line] = []
        self._knocking: deque[Line] = deque()
        self._waits: list[Callable[[], bool] | None] = [None, None]
        self._alive = [True, True]
        self._done = [False, False]
        self._runs_there = self._has_disks = self._said_never = self._has_heard = self._disturbed = False
        alter(self)

    # -- for the scheduler -----------------------------------------------------------------------------------------

    def actors(self) -> Sequence[tuple[str, Callable[[], None]]]:
        """Return both processes, the network, the clock, and who disturbs them."""
        first = self._line()
        bodies: list[tuple[str, Callable[[], None]]] = [
            ("source", lambda: self._live(SOURCE, lambda: self._source(first))),
            ("destination", lambda: self._live(DESTINATION, lambda: self._destination(first))),
            ("network", self._deliver),
            ("clock", self._tick),
        ]
        bodies += [(f"cutter {index}", lambda side=side: self._cut(side)) for index, side in enumerate(self._cuts)]
        bodies += [(f"killer {side}", lambda side=side: self._kill(side)) for side in self._kills]
        bodies += [("person", self._take_back)] if self._person else []
        return bodies

    def check(self) -> None:
        """Check what must hold at any time, and in the end."""
        runs_here = self._alive[SOURCE] and not self.handoff.committed
        if runs_here and self._runs_there:
            raise Violated("two guests")
        if self._said_never and self._runs_there:
            raise Violated("a guest runs of which it was said that it never would")
        if self.finished() and all(self._alive):
            source, destination = self.handoff.custody, self.takeover.custody
            if destination not in (DestinationCustody.OURS, DestinationCustody.NEVER):
                raise Violated(f"the destination has not decided: {destination}")
            if source not in (SourceCustody.HERE, SourceCustody.THERE, SourceCustody.UNKNOWN):
                raise Violated(f"the source has not decided: {source}")
            if (source is SourceCustody.THERE) > self._runs_there:
                raise Violated("a guest that runs nowhere is believed to be there")
            if not self._disturbed and not (source is SourceCustody.THERE and self._has_heard):
                raise Violated("nothing was wrong, and the handoff failed")

    def finished(self) -> bool:
        """Tell whether both processes have come to their end."""
        return all(self._done) and not (self._person and self._may_take_back())

    def fingerprint(self) -> Hashable:
        """Return everything shared."""
        return (
            self.now,
            self.handoff.custody,
            self.handoff.open_for_s(self.now),
            self.takeover.custody,
            self.takeover.left_s(self.now),
            TOKEN in self.never_ran,
            tuple(line.fingerprint() for line in self._lines),
            tuple(self._lines.index(line) for line in self._knocking),
            *self._alive,
            *self._done,
            self._runs_there,
            self._has_disks,
            self._said_never,
            self._has_heard,
            self._disturbed,
            self._person,
        )

    def close(self) -> None:
        """There is nothing to free."""

    # -- the processes ---------------------------------------------------------------------------------------------

    def _live(self, side: int, life: Callable[[], None]) -> None:
        with contextlib.suppress(Killed):
            life()
        self._done[side] = True
        self._hang_up(side)

    def _source(self, line: Line) -> None:
        giver: Giver[End] = Giver(
            self.handoff, self._come_back, patience_s=PATIENCE_S, now_s=lambda: self.now, sleep=self._sleep
        )
        peer = End(self, line, SOURCE)
        try:
            assert isinstance(peer.receive(), Ready)
            assert self.handoff.commit(self.now + LEASE_S)
            try:
                peer = giver.give(peer, Commit())
            except (OSError, PageferryError):
                if not self.handoff.committed:
                    raise
                peer = giver.ask_until_answered()
        except (OSError, PageferryError):
            return
        giver.take_leave(peer)

    def _destination(self, line: Line) -> None:
        peer = End(self, line, DESTINATION)
        try:
            ready = Ready(verified_pages=0)
            take(peer, self.takeover, ready, Commit, self._claim, self._release, self._start, lambda: self.now)
        except (OSError, PageferryError) as error:
            self.takeover.give_up()
            with contextlib.suppress(OSError):
                peer.send(Failed(reason=str(error)))
            peer.close()
        else:
            self._has_heard = see_off(peer, lambda _: None, self._returned)
            return
        self.never_ran.add(TOKEN)
        while (returned := self._accepted()) is not None:
            with contextlib.suppress(OSError):
                answer_return(returned, never_ran=TOKEN in self.never_ran)
            returned.close()

    def _claim(self) -> None:
        self.wait(DESTINATION, "claim the disks")
        self._has_disks = True

    def _release(self) -> None:
        self._has_disks = False

    def _start(self, paused: bool) -> None:
        self._runs_there = True

    def _returned(self) -> End | None:
        while (peer := self._accepted()) is not None:
            with contextlib.suppress(OSError):
                peer.send(Running())
                return peer
            peer.close()
        return None

    def _accepted(self) -> End | None:
        """Wait for the source, which comes and says RECOVER; None: it comes no more."""
        while True:
            self.wait(DESTINATION, "accept", lambda: bool(self._knocking) or self._done[SOURCE], None)
            if not self._knocking:
                return None
            peer = End(self, self._knocking.popleft(), DESTINATION)
            with contextlib.suppress(OSError, PageferryError):
                if isinstance(peer.receive(), Recover):
                    return peer
            peer.close()

    def _come_back(self, within_s: float) -> End:
        self.wait(SOURCE, "connect")
        if not self._alive[DESTINATION]:
            raise ConnectionRefusedError
        self._knocking.append(self._line())
        peer = End(self, self._lines[-1], SOURCE)
        peer.send(Recover(proof=""))
        return peer

    def _sleep(self, duration_s: float) -> None:
        self.wait(SOURCE, "sleep", lambda: False, duration_s)

    # -- what the ends do and meet ---------------------------------------------------------------------------------

    def wait(self, side: int, what: str, ready: Callable[[], bool] = lambda: True, within_s: float | None = 0) -> None:
        """Take a step when ``ready()``, or when so many seconds are over; None: never. Raises Killed."""
        until = None if within_s is None else self.now + within_s

        def may() -> bool:
            return ready() or (until is not None and self.now >= until) or not self._alive[side]

        self._waits[side] = may
        step(what, may)
        self._waits[side] = None
        if not self._alive[side]:
            raise Killed

    def says(self, side: int, frame: Frame) -> None:
        """Take note of what an end says, which must be so."""
        if isinstance(frame, Running) and not self._runs_there:
            raise Violated("RUNNING is said of a guest that does not run")
        if isinstance(frame, Failed):
            if self.takeover.custody is not DestinationCustody.NEVER:
                raise Violated("FAILED is said of a guest that may run yet")
            if self._has_disks:
                raise Violated("FAILED is said while the disks are kept")
            self._said_never = True
        if isinstance(frame, Dropped) and self.handoff.custody is not SourceCustody.THERE:
            raise Violated("DROPPED is said of a guest that may be here")

    def _line(self) -> Line:
        self._lines.append(Line())
        return self._lines[-1]

    def _deliver(self) -> None:
        while True:
            step("deliver", lambda: self._carrying() is not None)
            carrying = self._carrying()
            assert carrying is not None
            line, side = carrying
            frame = line.under_way[side].popleft()
            if not line.cut[side]:
                line.arrived[side].append(frame)

    def _carrying(self) -> tuple[Line, int] | None:
        """Return where the next frame goes."""
        ways = ((line, side) for line in self._lines for side in (SOURCE, DESTINATION) if line.under_way[side])
        return next(ways, None)

    def _tick(self) -> None:
        for _ in range(self._ticks):
            step("tick")
            self._disturbed = True
            self.now += TICK_S
        while True:
            step("late tick", self._all_wait)
            self.now += TICK_S

    def _all_wait(self) -> bool:
        idle = all(
            done or (wait is not None and not wait()) for done, wait in zip(self._done, self._waits, strict=True)
        )
        return self.finished() if all(self._done) else idle and self._carrying() is None

    def _cut(self, side: int) -> None:
        step(f"cut at {side}")
        self._disturbed = True
        self._lines[-1].cut[side] = True

    def _kill(self, side: int) -> None:
        step("kill")
        self._alive[side] = False
        self._hang_up(side)
        if side == DESTINATION:
            self._runs_there = False
            self._knocking.clear()

    def _hang_up(self, side: int) -> None:
        for line in self._lines:
            line.closed[side] = True

    def _take_back(self) -> None:
        step("look there", lambda: self._may_take_back() or self._done[SOURCE])
        if not self._may_take_back() or self._runs_there:
            self._person = False
            return
        step("take back")
        self._person = False
        if self._may_take_back():
            self.handoff.taken_back(self.now, SourceCustody.UNKNOWN)

    def _may_take_back(self) -> bool:
        unknown = self.handoff.custody is SourceCustody.UNKNOWN and self._done[SOURCE]  # it asks no more
        return unknown and self._alive[SOURCE] and not self.handoff.open_for_s(self.now)
