"""Simulated hosts: one clock and one thread at a time, in the order that a seed draws.

Threads are real ones, but only one runs, until it waits or takes a *step*, where another may be chosen. Time passes
when all threads wait: to the first that waits no longer; and by a microsecond when somebody looks at the clock. So a
run is repeated by its seed.

A host belongs to a *process*, which may stand still for a while, or be killed: none of its threads goes on then.
"""

import heapq
import random
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from pageferry.engine.host import Host
from simulation.interleave import Violated

_LOOK_S = 1e-6
#: A run that takes more steps than this has no end.
_MAX_TURNS = 100_000
_NEVER_S = 1e12


class Abandoned(BaseException):
    """Unwinds a thread whose run is over, or whose process was killed."""


class Process:
    """What is killed, or stands still, as one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.stands_until_s = 0.0


class Simulation:
    """The time and the threads of one run.

    Args:
        seed: decides which thread goes on, and whatever else is drawn.
    """

    def __init__(self, seed: object) -> None:
        self.draw = random.Random(str(seed))
        self.now_s = 1000.0
        self.error: BaseException | None = None
        self.turns = 0
        self.over = False
        self._change_share = self.draw.choice((0.02, 0.1, 0.3))
        self._ready: list[SimulatedThread] = []
        self._timers: list[tuple[float, int, SimulatedThread | None, int]] = []
        self._count = 0
        self._done = threading.Lock()
        self._done.acquire()
        self.threads: list[SimulatedThread] = []
        self.current: SimulatedThread | None = None
        self._script: SimulatedThread | None = None

    def run(self, script: Callable[[], None], process: Process) -> None:
        """Run ``script`` on a thread until it is done; other threads stay where they are then.

        Raises:
            BaseException: what ended a thread, or that all of them wait for ever.
        """
        self._script = SimulatedThread(self, script, "script", (), process)
        self._script.start()
        self._hand_over(None)
        self._done.acquire()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """End all threads where they are."""
        self.over = True
        for thread in self.threads:
            if not thread.done:
                thread.abandoned = True
                self.current = thread
                thread.go.release()
            thread.real.join()

    def where(self) -> list[str]:
        """Return where each thread is that is not done: its process, name and innermost lines."""
        frames, told = sys._current_frames(), []
        for thread in self.threads:
            frame = frames.get(thread.real.ident or 0)
            if thread.done or thread.process.dead or frame is None:
                continue
            lines = [f"{each.filename.rpartition('/')[2]}:{each.lineno}" for each in traceback.extract_stack(frame)]
            lines = [line for line in lines if not line.startswith(("threading.py", "simulated_host.py"))]
            told.append(f"{thread.process.name}: {thread.name}: " + " ".join(lines[-7:]))
        return told

    # -- for hosts -------------------------------------------------------------------------------------------------

    def look(self) -> float:
        """Return the time."""
        self._expect_alive()
        self.now_s += _LOOK_S
        return self.now_s

    def step(self) -> None:
        """Let another thread go first, perhaps."""
        self._expect_alive()
        if self._ready and self.draw.random() < self._change_share:
            self._ready.append(self._this())
            self._hand_over(self._this())

    def wait(self, waiters: "list[SimulatedThread]", within_s: float | None = None) -> bool:
        """Wait among ``waiters`` until woken; return False when the time was over before."""
        self._expect_alive()
        thread = self._this()
        waiters.append(thread)
        thread.waiters, thread.woken = waiters, False
        if within_s is not None and within_s < _NEVER_S:
            self._timer(self.now_s + max(0.0, within_s), thread)
        self._hand_over(thread)
        return thread.woken

    def wake(self, waiters: "list[SimulatedThread]", how_many: int | None = None) -> None:
        """Wake threads that wait, the first first."""
        for thread in waiters[:how_many]:
            waiters.remove(thread)
            thread.waiters, thread.woken = None, True
            thread.ticket += 1
            self._ready.append(thread)

    def stand_still(self, process: Process, duration_s: float) -> None:
        """Let no thread of a process go on for a while."""
        process.stands_until_s = max(process.stands_until_s, self.now_s + duration_s)
        self._timer(process.stands_until_s, None)

    def begin(self, thread: "SimulatedThread") -> None:
        """Take in a new thread."""
        self.threads.append(thread)
        thread.real.start()
        self._ready.append(thread)

    def end(self, thread: "SimulatedThread", error: BaseException | None) -> None:
        """A thread is done; on that thread."""
        thread.done = True
        if self.over:
            return
        if error is not None and self.error is None:
            self.error = error
        self.wake(thread.joining)
        self._hand_over(None if thread is not self._script else thread)

    def expect_alive(self) -> None:
        """Go no further on a thread whose process was killed, or whose run is over."""
        self._expect_alive()

    # -- who goes on -----------------------------------------------------------------------------------------------

    def _this(self) -> "SimulatedThread":
        assert self.current is not None
        return self.current

    def _expect_alive(self) -> None:
        thread = self._this()
        if thread.abandoned:
            raise Abandoned
        if thread.process.dead:
            self._hand_over(thread)  # and never come back

    def _timer(self, at_s: float, thread: "SimulatedThread | None") -> None:
        self._count += 1
        heapq.heappush(self._timers, (at_s, self._count, thread, 0 if thread is None else thread.ticket))

    def _hand_over(self, thread: "SimulatedThread | None") -> None:
        """Let the next thread go on; return on ``thread``, if it is one, when it is its turn again."""
        chosen = None
        if self.error is None and not (self._script is not None and self._script.done):
            try:
                chosen = self._choose()
            except Violated as error:
                self.error = error
        if chosen is None:
            self._done.release()
        elif chosen is thread:
            return
        else:
            self.current = chosen
            chosen.go.release()
        if thread is not None and not thread.done:
            thread.go.acquire()
            if thread.abandoned:
                raise Abandoned

    def _choose(self) -> "SimulatedThread":
        self.turns += 1
        if self.turns > _MAX_TURNS:
            raise Violated("it does not end")
        while True:
            self._ready = [thread for thread in self._ready if not thread.process.dead]
            able = [thread for thread in self._ready if thread.process.stands_until_s <= self.now_s]
            if able:
                chosen = able[self.draw.randrange(len(able))] if len(able) > 1 else able[0]
                self._ready.remove(chosen)
                return chosen
            if not self._timers:
                raise Violated("all wait for ever")
            at_s, _, thread, ticket = heapq.heappop(self._timers)
            if thread is None:
                self.now_s = max(self.now_s, at_s)
            elif thread.ticket == ticket and thread.waiters is not None and not thread.process.dead:
                self.now_s = max(self.now_s, at_s)
                thread.waiters.remove(thread)
                thread.waiters = None
                thread.ticket += 1
                self._ready.append(thread)


class SimulatedThread:
    """A thread of a process, as ``threading.Thread`` is."""

    def __init__(
        self,
        simulation: Simulation,
        target: Callable[..., object],
        name: str,
        args: tuple[Any, ...],
        process: Process,
    ) -> None:
        self.name = name
        self.process = process
        self.done = self.abandoned = self.woken = False
        self.ticket = 0
        self.waiters: list[SimulatedThread] | None = None
        self.joining: list[SimulatedThread] = []
        self.go = threading.Lock()
        self.go.acquire()
        self._simulation = simulation
        self._target, self._args = target, args
        self.real = threading.Thread(target=self._main, name=name, daemon=True)
        self.ident: int | None = None

    def start(self) -> None:
        """Begin."""
        self.ident = len(self._simulation.threads) + 1
        self._simulation.begin(self)

    def join(self, timeout: float | None = None) -> None:
        """Wait until it is done."""
        if not self.done:
            self._simulation.wait(self.joining, timeout)

    def is_alive(self) -> bool:
        """Tell whether it has begun and is not done."""
        return self.ident is not None and not self.done

    def _main(self) -> None:
        self.go.acquire()
        error = None
        try:
            if not self.abandoned:
                self._target(*self._args)
        except Abandoned:
            pass
        except BaseException as caught:
            error = caught
        self._simulation.end(self, error)


class SimulatedHost(Host):
    """The host of one process.

    Args:
        simulation: it is a part of.
        process: whose threads run here.
    """

    def __init__(self, simulation: Simulation, process: Process) -> None:
        self.simulation = simulation
        self.process = process

    def now_s(self):
        """Look at the clock."""
        return self.simulation.look()

    def sleep(self, duration_s):
        """Wait."""
        self.simulation.wait([], duration_s)

    def lock(self):
        """Make a lock."""
        return SimulatedLock(self.simulation)

    def condition(self):
        """Make a condition."""
        return SimulatedCondition(self.simulation)

    def event(self):
        """Make an event."""
        return SimulatedEvent(self.simulation)

    def queue(self, size):
        """Make a queue."""
        return SimulatedQueue(self.simulation, size)

    def thread(self, target, name, args=()):
        """Make a thread of this process."""
        return SimulatedThread(self.simulation, target, name, args, self.process)

    def readable(self, sock, wait_s):
        """Ask the simulated socket."""
        return sock.wait_readable(wait_s)

    def writable(self, sock, wait_s):
        """Ask the simulated socket."""
        sock.wait_writable(wait_s)
        return True


class SimulatedLock:
    """A lock, which its holder may take again."""

    def __init__(self, simulation):
        self._simulation = simulation
        self._holder = None
        self._depth = 0
        self._waiters = []

    def acquire(self):
        """Take it."""
        self._simulation.step()
        thread = self._simulation.current
        while self._holder not in (None, thread):
            self._simulation.wait(self._waiters)
        self._holder = thread
        self._depth += 1
        return True

    def release(self):
        """Give it back."""
        if self._simulation.over:
            return
        assert self._holder is self._simulation.current
        self._depth -= 1
        if not self._depth:
            self._holder = None
            self._simulation.wake(self._waiters, 1)

    def let_go(self):
        """Give all of it back; return how often it was taken."""
        depth, self._depth = self._depth, 1
        self.release()
        return depth

    def take_again(self, depth):
        """Take it as often as it was."""
        self.acquire()
        self._depth = depth

    def __enter__(self):
        self.acquire()

    def __exit__(self, *_):
        self.release()


class SimulatedCondition(SimulatedLock):
    """A condition."""

    def __init__(self, simulation):
        super().__init__(simulation)
        self._waiting = []

    def wait(self, timeout=None):
        """Wait for a notification."""
        depth = self.let_go()
        woken = self._simulation.wait(self._waiting, timeout)
        self.take_again(depth)
        return woken

    def wait_for(self, predicate, timeout=None):
        """Wait until the predicate is true, or the time is over."""
        until_s = None if timeout is None else self._simulation.now_s + timeout
        while not (result := predicate()):
            left_s = None if until_s is None else until_s - self._simulation.now_s
            if left_s is not None and left_s <= 0:
                break
            self.wait(left_s)
        return result

    def notify(self, n=1):
        """Wake so many."""
        if not self._simulation.over:
            self._simulation.wake(self._waiting, n)

    def notify_all(self):
        """Wake all."""
        self.notify(None)


class SimulatedEvent:
    """An event."""

    def __init__(self, simulation):
        self._simulation = simulation
        self._set = False
        self._waiters = []

    def is_set(self):
        """Tell whether it has happened."""
        return self._set

    def set(self):
        """Let it happen."""
        self._simulation.step()
        self._set = True
        self._simulation.wake(self._waiters)

    def clear(self):
        """Let it happen again."""
        self._set = False

    def wait(self, timeout=None):
        """Wait for it; return whether it has happened."""
        self._simulation.step()
        if not self._set:
            self._simulation.wait(self._waiters, timeout)
        return self._set


class SimulatedQueue:
    """A queue of tasks."""

    def __init__(self, simulation, size):
        self._changed = SimulatedCondition(simulation)
        self._size = size
        self._items = []
        self._unfinished = 0

    def put(self, item):
        """Put one more, when there is room."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._items) < self._size)
            self._items.append(item)
            self._unfinished += 1
            self._changed.notify_all()

    def get(self):
        """Take the first, when there is one."""
        with self._changed:
            self._changed.wait_for(lambda: self._items)
            self._changed.notify_all()
            return self._items.pop(0)

    def task_done(self):
        """What was taken is done."""
        with self._changed:
            self._unfinished -= 1
            self._changed.notify_all()

    def join(self):
        """Wait until all is done."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unfinished)
