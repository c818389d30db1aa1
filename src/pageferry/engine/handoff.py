"""Who may run the guest, as its source knows it: a state machine without clock, socket or thread.

::

    HERE -- commit --> COMMITTED -- running --> THERE
    | ^                  |  |                     |
    | |<---- refused ----+  +-- lost --> UNKNOWN  |
    | |                                  |  |     |
    | +<------- refused, taken back -----+  +-- running --> THERE
    | +<------------------ taken back ------------+
    +-- keep --> KEPT

*Refused*: the destination promised that the guest never runs there. *Taken back*: a person declared it. *Kept*: the
guest was saved and runs on. A cancel is possible in HERE only, and once it was heard nothing leaves HERE; so is
giving up a pause that takes too long.
"""

import threading
from enum import StrEnum

from pageferry.core.errors import GuestAt


class Custody(StrEnum):
    """How far the handoff is."""

    HERE = "here"
    COMMITTED = "committed"
    UNKNOWN = "unknown"
    THERE = "there"
    KEPT = "kept"


_GUEST_AT = {
    Custody.HERE: GuestAt.SOURCE,
    Custody.COMMITTED: GuestAt.SOURCE,
    Custody.UNKNOWN: GuestAt.UNKNOWN,
    Custody.THERE: GuestAt.DESTINATION,
    Custody.KEPT: GuestAt.SOURCE,
}


class Handoff:
    """The handoff of one guest, at its source. Any thread may look or cancel; one drives it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # between cancel and commit
        self._custody = Custody.HERE
        self._cancelled = False
        self._given_up = False

    @property
    def custody(self) -> Custody:
        """How far it is."""
        return self._custody

    @property
    def guest_at(self) -> GuestAt:
        """Where the guest is; SOURCE up to the commit, and after it as long as the answer is awaited."""
        return _GUEST_AT[self._custody]

    @property
    def committed(self) -> bool:
        """Whether the guest may run elsewhere, so that it must not run here."""
        return self._custody not in (Custody.HERE, Custody.KEPT)

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was in time."""
        return self._cancelled

    @property
    def forbidden(self) -> bool:
        """Whether the guest stays here, by :meth:`cancel` or :meth:`give_up`."""
        return self._cancelled or self._given_up

    def cancel(self) -> bool:
        """Forbid the commit; return False when it is too late."""
        with self._lock:
            in_time = self._custody is Custody.HERE
            self._cancelled = self._cancelled or in_time
            return in_time

    def give_up(self) -> bool:
        """Forbid the commit because the pause takes too long; return False when it is too late, or was cancelled."""
        with self._lock:
            in_time = self._custody is Custody.HERE and not self.forbidden
            self._given_up = self._given_up or in_time
            return in_time

    def commit(self) -> bool:
        """Go from HERE to COMMITTED, before the destination hears of it; return False when it is forbidden."""
        return self._leave(Custody.COMMITTED)

    def keep(self) -> bool:
        """Go from HERE to KEPT, before a saved guest's file gets its name; return False when it is forbidden."""
        return self._leave(Custody.KEPT)

    def running(self) -> None:
        """The destination runs the guest."""
        self._move(Custody.THERE, Custody.COMMITTED, Custody.UNKNOWN)

    def refused(self) -> None:
        """The destination promises that the guest does not run there and never will."""
        self._move(Custody.HERE, Custody.COMMITTED, Custody.UNKNOWN)

    def taken_back(self) -> None:
        """A person knows that the guest runs nowhere else."""
        self._move(Custody.HERE, Custody.UNKNOWN, Custody.THERE)

    def lost(self) -> None:
        """No answer to the commit can be had."""
        self._move(Custody.UNKNOWN, Custody.COMMITTED, Custody.UNKNOWN)

    def _leave(self, custody: Custody) -> bool:
        with self._lock:
            if self.forbidden:
                return False
            self._move(custody, Custody.HERE)
            return True

    def _move(self, custody: Custody, *allowed: Custody) -> None:
        if self._custody not in allowed:
            raise AssertionError(f"a guest that is {self._custody} cannot become {custody}")
        self._custody = custody
