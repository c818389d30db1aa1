"""Running, pausing and ending a guest's vCPUs: the part that every machine shares.

One thread per vCPU calls ``Vcpu.run()`` over and over. Nothing else ever enters a vCPU. Two kinds of pause nest
without knowing of each other: the *user's* (``pause``/``resume``: one flag) and the *hypervisor's* (``freeze`` and
``thaw``: a count, held for the length of one operator such as CLEAN, or by a migration from the pause to its end). A
vCPU runs when neither holds it.

A thread that waits for vCPUs to stop may hold the DOMAIN lock of the software hypervisor, never another that a vCPU may
take on its way out; and a vCPU's own thread (a device, a console sink) may not wait for that at all: it is refused.

Stopping is asked for with ``kick()``. A kick may come just before the vCPU enters the guest and be lost there, so
the waiting thread repeats it until every vCPU has said that it stopped.

A guest that still runs when the interpreter ends is stopped first: an emulator that is freed while it runs, or whose
thread Python ends in a callback, takes the process with it.
"""

import atexit
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from pageferry.core.errors import GuestCrash, PageferryError, RefusedError, VmError
from pageferry.core.threads import begin
from pageferry.core.vm import GuestEnd, VmStatus

_log = logging.getLogger(__name__)
_KICK_INTERVAL_S = 0.001
#: How long the end of the process waits for a vCPU, which may itself wait for a page that never comes.
_EXIT_PATIENCE_S = 2.0


@dataclass(frozen=True, slots=True)
class GuestExit:
    """The guest asked to end with an exit code."""

    code: int


@dataclass(frozen=True, slots=True)
class GuestReset:
    """The guest asked to be started anew: it ends here, and may be booted again."""


@dataclass(frozen=True, slots=True)
class SyncPoint:
    """The guest reached a sync point and showed a value: it pauses until the host has answered and resumes it."""

    value: int


@dataclass(frozen=True, slots=True)
class Wait:
    """The vCPU has nothing to do for so long; it may be woken early."""

    duration_s: float


@dataclass(frozen=True, slots=True)
class InvalidateTlb:
    """The guest changed its page tables: the vCPU forgets its translations. Its ``run()`` does that by itself."""


Effect = GuestExit | GuestReset | SyncPoint | Wait | InvalidateTlb
"""A device's request to the machine, acted on after the instruction that caused it has completed."""


class Vcpu(Protocol):
    """A vCPU as :class:`RunControl` needs it."""

    def run(self) -> Effect | None:
        """Run the guest until it is kicked or a device has an effect; called on the vCPU's own thread only.

        On return the vCPU is at an instruction boundary and its I/O is complete.

        Raises:
            GuestCrash: the guest did something that no machine survives.
            VmError: the machine failed.
        """

    def kick(self) -> None:
        """Make ``run()`` return soon; from any thread, any number of times. Lost if the vCPU is not yet inside."""


_running: "weakref.WeakSet[RunControl]" = weakref.WeakSet()


def _stop_at_exit(control: "RunControl") -> None:
    _running.add(control)
    # What is registered last is called first: before finalizers take the emulator away from under a vCPU.
    atexit.unregister(_stop_all)
    atexit.register(_stop_all)


def _stop_all() -> None:
    for control in tuple(_running):
        control.stop_for_exit()


class RunControl:
    """The run state of one guest.

    Args:
        vcpus: in index order; their threads start with the first ``resume()``.
        name: for the threads' names.
        on_stood: called with how many nanoseconds all vCPUs have stood, before they run on; they do not meanwhile.
        now_ns: a monotonic clock.
    """

    def __init__(
        self,
        vcpus: Sequence[Vcpu],
        *,
        name: str = "guest",
        on_stood: Callable[[int], None] = lambda ns: None,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._vcpus = tuple(vcpus)
        self._name = name
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._inside = [False] * len(self._vcpus)
        self._user_paused = True
        self._stops = 0
        self._closing = False
        self._end: GuestEnd | None = None
        self._sync_value: int | None = None
        self._on_stood = on_stood
        self._now_ns = now_ns
        self._standing_since_ns: int | None = None

    @property
    def status(self) -> VmStatus:
        """What the guest is doing; a ``stopped()`` section is not visible here."""
        with self._changed:
            return self._status()

    def _status(self) -> VmStatus:
        if self._end is not None:
            return VmStatus.CRASHED if self._end.crash is not None else VmStatus.SHUTDOWN
        return VmStatus.PAUSED if self._user_paused else VmStatus.RUNNING

    @property
    def end(self) -> GuestEnd | None:
        """Why the guest ended, once it has."""
        return self._end

    @property
    def sync_value(self) -> int | None:
        """The value of the sync point where the guest is paused now."""
        return self._sync_value

    @property
    def thread_ids(self) -> tuple[int | None, ...]:
        """The kernel's ids of the vCPUs' threads, in index order; None for one that has never run."""
        with self._changed:
            started = [thread.native_id for thread in self._threads]
        return (*started, *[None] * (len(self._vcpus) - len(started)))

    def resume(self) -> None:
        """Lift the user's pause.

        Raises:
            RefusedError: the guest has ended.
            OutOfThreadsError: it stays paused.
        """
        with self._changed:
            if self._end is not None or self._closing:
                raise RefusedError("the guest has ended and cannot be resumed")
            if not self._user_paused:
                return
            if not self._threads:
                _stop_at_exit(self)
            for index in range(len(self._threads), len(self._vcpus)):
                self._threads.append(begin(self._vcpu_main, f"{self._name}-vcpu{index}", index))
            self._user_paused = False
            self._sync_value = None
            self._run_on()

    def pause(self) -> None:
        """Set the user's pause; returns when every vCPU has stopped, or another thread has resumed the guest.

        Does nothing to a guest that has ended.

        Raises:
            VmError: a vCPU's own thread called.
        """
        self._refuse_vcpus()
        with self._changed:
            self._user_paused = True
            self._changed.notify_all()
            self._until_outside()

    def freeze(self) -> None:
        """Hold every vCPU outside the guest until :meth:`thaw`, whatever the user pauses or resumes; nests.

        The user's own pause is neither read nor changed.

        Raises:
            VmError: a vCPU's own thread called.
        """
        self._refuse_vcpus()
        with self._changed:
            self._stops += 1
            self._changed.notify_all()
            try:
                self._until_outside()
            except BaseException:
                self.thaw()
                raise

    def thaw(self) -> None:
        """Undo one :meth:`freeze`."""
        with self._changed:
            if self._stops == 0:
                raise VmError("the guest is not frozen")
            self._stops -= 1
            self._run_on()

    def count_standing(self) -> None:
        """Have ``on_stood`` called now for what has passed of a hold: the guest's time is read next. It is held."""
        with self._changed:
            self._tell_stood()

    def stand_from_now(self) -> None:
        """Count a hold from now on: the guest's time was just set. It is held."""
        with self._changed:
            self._standing_since_ns = self._now_ns()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Hold every vCPU outside the guest for the length of a ``with`` block."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    @property
    def frozen(self) -> bool:
        """Whether :meth:`freeze` holds the guest now."""
        with self._changed:
            return self._stops > 0

    @property
    def held(self) -> bool:
        """Whether no vCPU may be inside the guest now: paused by the user, frozen, ended or closed."""
        with self._changed:
            return self._held()

    @property
    def still(self) -> bool:
        """Whether every vCPU is outside the guest, its last I/O done, and none may enter."""
        with self._changed:
            return self._held() and not any(self._inside)

    def wait(self, timeout_s: float | None = None) -> VmStatus:
        """Wait until the user's pause holds or the guest has ended, and every vCPU is outside; return the status."""
        self._refuse_vcpus()
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while True:
                left_s = None if deadline_s is None else deadline_s - time.monotonic()
                if not self._changed.wait_for(lambda: self._status() is not VmStatus.RUNNING, left_s):
                    return self._status()
                self._until_outside()
                if not any(self._inside):  # or another thread has resumed it meanwhile
                    return self._status()

    def close(self) -> None:
        """Stop every vCPU for good and join the threads."""
        self._refuse_vcpus()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._until_outside()
        for thread in self._threads:
            thread.join()

    def stop_for_exit(self, patience_s: float = _EXIT_PATIENCE_S) -> None:
        """Stop every vCPU for good because the process ends; one that does not come in time is left behind."""
        if any(thread.is_alive() for thread in self._threads):  # none is in a child that was forked meanwhile
            with self._changed:
                self._closing = True
                self._changed.notify_all()
                self._until_outside(patience_s)

    def _held(self) -> bool:
        return self._user_paused or self._stops > 0 or self._closing or self._end is not None

    def _run_on(self) -> None:
        if not self._held():
            self._tell_stood()
            self._standing_since_ns = None
        self._changed.notify_all()

    def _tell_stood(self) -> None:
        if self._standing_since_ns is not None:
            now_ns = self._now_ns()
            self._on_stood(now_ns - self._standing_since_ns)
            self._standing_since_ns = now_ns

    def _refuse_vcpus(self) -> None:
        if threading.current_thread() in self._threads:
            raise VmError("a vCPU cannot wait for itself to stop", hint="ask from another thread")

    def _until_outside(self, patience_s: float = math.inf) -> None:
        give_up_s = time.monotonic() + patience_s
        while self._held() and any(self._inside) and time.monotonic() < give_up_s:
            for index, inside in enumerate(self._inside):
                if inside:
                    self._vcpus[index].kick()
            self._changed.wait(_KICK_INTERVAL_S)
        if self._held() and self._standing_since_ns is None:
            self._standing_since_ns = self._now_ns()

    def _vcpu_main(self, index: int) -> None:
        vcpu = self._vcpus[index]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._end is not None or not self._held())
                if self._closing or self._end is not None:
                    return
                self._inside[index] = True
            effect: Effect | None = None
            end: GuestEnd | None = None
            try:
                effect = vcpu.run()
            except GuestCrash as error:
                end = GuestEnd(crash=str(error))
            except PageferryError as error:
                _log.error("vcpu %d stopped: %s", index, error)
                end = GuestEnd(crash=f"the machine failed: {error}")
            except Exception as error:
                _log.exception("vcpu %d stopped by a defect", index)
                end = GuestEnd(crash=f"internal error: {error!r}")
            with self._changed:
                self._inside[index] = False
                self._act(effect, end)
                self._changed.notify_all()
                if self._end is not None or isinstance(effect, SyncPoint):
                    self._until_outside()  # one vCPU ended or stopped the guest: the others may not run on
                if isinstance(effect, Wait):
                    self._changed.wait_for(self._held, effect.duration_s)

    def _act(self, effect: Effect | None, end: GuestEnd | None) -> None:
        if isinstance(effect, GuestExit):
            end = GuestEnd(exit_code=effect.code)
        elif isinstance(effect, GuestReset):
            end = GuestEnd(exit_code=0, reset=True)
        elif isinstance(effect, SyncPoint):
            self._user_paused = True
            self._sync_value = effect.value
        if end is not None and self._end is None:
            self._end = end
