"""A deterministic scheduler: explores every order in which a few threads can take their steps, in the real code.

Each *actor* runs on a thread of its own, but only one runs at a time, and only from one *step* to the next: an actor
calls :func:`step` (or acquires an instrumented lock) to say that another actor may go first now. No other actor may
depend on what it does before its first step. An actor that waits for a lock, or for anything else, gives ``ready``; one
that is not ready is not chosen. So an execution is a list of
choices, and can be repeated.

:func:`explore` walks the tree of choices depth first. Each execution starts anew and replays the choices up to where it
differs from the one before (*stateless* exploration: real threads cannot be copied). A state that was seen before is
not explored again. What tells two states apart is the world's own fingerprint, which lock is held, and for each actor
its whole stack: every frame's position and the values of its local variables. Everything an actor will do next
follows from these, as long as it keeps nothing on the evaluation stack across a step (see :func:`note`).

Source: the stateless search is that of Godefroid's VeriSoft.
"""

import dis
import os
import sys
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cache
from types import CodeType
from typing import Protocol

import numpy as np

from pageferry.core.bitmap import DirtyBitmap

_MAX_STEPS = 10_000


class Violated(Exception):
    """A law does not hold; ``schedule`` tells how to get there: ``actor: step`` in order."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.schedule: tuple[str, ...] = ()


class World(Protocol):
    """What one execution happens in; a fresh one each time."""

    def actors(self) -> Sequence[tuple[str, Callable[[], None]]]:
        """Return the names and bodies of the actors."""

    def check(self) -> None:
        """Check what must hold between any two steps; raises :class:`Violated`."""

    def finished(self) -> bool:
        """Tell whether what the actors still do is of no interest."""

    def fingerprint(self) -> Hashable:
        """Return everything shared that an actor's future depends on."""

    def close(self) -> None:
        """Free it; no actor runs any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explored:
    """What an exploration saw: distinct states with a choice, executions (schedules), and steps in all of them."""

    states: int
    schedules: int
    steps: int


class _Abandoned(BaseException):
    """Unwinds an actor whose execution is of no more interest."""


class _Actor:
    def __init__(self, name: str, body: Callable[[], None], execution: "_Execution") -> None:
        self.name = name
        self.at = ""
        self.ready: Callable[[], bool] | None = None
        self.noted: object = None
        self.done = False
        self.abandoned = False
        self.go = threading.Lock()
        self.go.acquire()
        self._body = body
        self._execution = execution
        self.thread = threading.Thread(target=self._main, name=name, daemon=True)

    def _main(self) -> None:
        _this.actor = self
        try:
            self._body()
        except _Abandoned:
            return
        except BaseException as error:
            self._execution.error = error
        self.done = True
        self._execution.hand_over(self)

    def pause(self, at: str, ready: Callable[[], bool] | None) -> None:
        """Let the execution choose who goes next; returns when it is this actor. On the actor's thread."""
        if not self.abandoned:
            self.at, self.ready = at, ready
            if self._execution.hand_over(self):
                return
            self.go.acquire()
        if self.abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """Unwind it; its locks are given back on the way."""
        self.abandoned = True
        self.go.release()
        self.thread.join()

    def fingerprint(self) -> Hashable:
        """Return the stack: positions and local values, from the last step to the body."""
        frames: list[Hashable] = [self.at, self.done, _value(self.noted)]
        frame = None if self.done else sys._current_frames().get(self.thread.ident or 0)
        while frame is not None and frame.f_code is not _Actor.pause.__code__:
            frame = frame.f_back  # the scheduler's own
        while frame is not None and frame.f_code is not _Actor._main.__code__:
            local = frame.f_locals
            values = tuple((name, _value(local[name])) for name in sorted(local) if not name.endswith("_ns"))
            frames.append((frame.f_code.co_qualname, _instruction(frame.f_code, frame.f_lasti), values))
            frame = frame.f_back
        return tuple(frames)


class _This(threading.local):
    actor: _Actor | None = None


_this = _This()


def step(at: str, ready: Callable[[], bool] | None = None) -> None:
    """Let any other actor go first; go on when chosen, which happens only when ``ready()``.

    Does nothing on a thread that is not an actor.
    """
    if _this.actor is not None:
        _this.actor.pause(at, ready)


def note(value: object) -> None:
    """Tell of a value that the calling actor holds in no local variable across its next step."""
    if _this.actor is not None:
        _this.actor.noted = value


class ScheduledLock:
    """A lock whose next holder the scheduler chooses; for :meth:`pageferry.hypervisor.locks.OrderedLock.instrument`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.held = False

    def acquire(self) -> bool:
        """Take it, as a step."""
        step(f"lock {self.name}", lambda: not self.held)
        assert not self.held
        self.held = True
        return True

    def release(self) -> None:
        """Give it back."""
        self.held = False


@cache
def _offsets(code: CodeType) -> list[int]:
    return [instruction.offset for instruction in dis.get_instructions(code)]


def _instruction(code: CodeType, last: int) -> int:
    """Return the number of an instruction; the interpreter may point behind it, into its inline cache."""
    return bisect_right(_offsets(code), last)


def _value(value: object) -> Hashable:
    """Return what stands for a value in a fingerprint; shared objects are the world's business."""
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, int | float | str | bytes):
        return value
    if isinstance(value, np.ndarray | array):
        return value.tobytes()
    if isinstance(value, DirtyBitmap):
        return value.words.tobytes()
    if isinstance(value, tuple | list):
        return tuple(_value(each) for each in value)
    return type(value).__name__


class _Execution:
    """One run from the beginning: replays ``path``, then takes the first actor that can go, until the end.

    The choice is made on the thread of the actor that pauses, so that one which goes on costs no change of threads.
    """

    def __init__(self, world: World, path: list[int], seen: set[int]) -> None:
        self.world = world
        self.path = path
        self.widths: list[int] = []
        self.schedule: list[str] = []
        self.error: BaseException | None = None
        self._seen = seen
        self._replayed = len(path)
        self._actors: list[_Actor] = []
        self._over = threading.Lock()
        self._over.acquire()

    def run(self) -> None:
        """Run to the end, or to a state seen before.

        Raises:
            Violated: a law does not hold, or no actor can go on.
        """
        for name, body in self.world.actors():
            actor = _Actor(name, body, self)
            actor.thread.start()  # up to its first step
            self._actors.append(actor)
            self._over.acquire()
        self._started = True
        if first := self._choose():
            first.go.release()
            self._over.acquire()
        if self.error is not None:
            raise self.error

    _started = False

    def hand_over(self, actor: _Actor) -> bool:
        """Choose who goes on and wake it, or ``run`` when it is over; tell whether it is this actor itself."""
        _this.actor = None  # what the world's checks call is not a step of the actor
        chosen = self._choose() if self._started and self.error is None else None
        _this.actor = actor
        if chosen is actor:
            return True
        (self._over if chosen is None else chosen.go).release()
        return False

    def _choose(self) -> _Actor | None:
        try:
            able = self._able()
            if not able or self.world.finished() or (len(able) > 1 and not self._branch(len(able))):
                return None
        except Exception as error:
            self.error = error
            return None
        actor = able[self.path[len(self.widths) - 1]] if len(able) > 1 else able[0]
        self.schedule.append(f"{actor.name}: {actor.at}")
        assert len(self.schedule) < _MAX_STEPS
        return actor

    def _able(self) -> list[_Actor]:
        if len(self.widths) >= self._replayed:  # what is replayed was checked before
            self.world.check()
        able = [a for a in self._actors if not a.done and (a.ready is None or a.ready())]
        if not able and not all(actor.done for actor in self._actors):
            raise Violated("deadlock: " + ", ".join(f"{a.name} at {a.at}" for a in self._actors if not a.done))
        return able

    def _branch(self, width: int) -> bool:
        """Go on at a place with a choice, unless this state was there before."""
        if len(self.widths) >= self._replayed:
            state = hash((self.world.fingerprint(), tuple(actor.fingerprint() for actor in self._actors)))
            if state in self._seen:
                return False
            self._seen.add(state)
            self.path.append(0)
        self.widths.append(width)
        return True

    def close(self) -> None:
        """End every actor."""
        for actor in self._actors:
            actor.abandon()
        self.world.close()


@contextmanager
def _on_one_cpu() -> Iterator[None]:
    # Handing over between threads of one CPU costs a third of what it costs between two.
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def explore(make_world: Callable[[], World]) -> Explored:
    """Explore every interleaving of a world's actors.

    Raises:
        Violated: with the schedule that leads there. Any other error of an actor comes out as it is, with a note.
    """
    with _on_one_cpu():
        return _explore(make_world)


def _explore(make_world: Callable[[], World]) -> Explored:
    seen: set[int] = set()
    path: list[int] = []
    schedules = steps = 0
    while True:
        execution = _Execution(make_world(), path, seen)
        try:
            execution.run()
        except Exception as error:
            if isinstance(error, Violated):
                error.schedule = tuple(execution.schedule)
            error.add_note("schedule: " + "; ".join(execution.schedule))
            raise
        finally:
            execution.close()
        schedules += 1
        steps += len(execution.schedule)
        widths = execution.widths
        del path[len(widths) :]
        while path and path[-1] + 1 == widths[len(path) - 1]:
            path.pop()
        if not path:
            return Explored(states=len(seen), schedules=schedules, steps=steps)
        path[-1] += 1
