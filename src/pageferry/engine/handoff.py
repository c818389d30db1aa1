"""Who may run the guest, as its source knows it: a state machine without clock, socket or thread.

::

    HERE --commit--> COMMITTED --running--> THERE
      ^                  |  |                 ^
      |<---- refused ----+  +-- lost --> UNKNOWN
      |                                    |  |
      +<------- refused, taken back -------+  +-- running --> THERE

*Refused*: the destination promised that the guest never runs there. *Taken back*: a person declared it. A cancel is
possible in HERE only, and once it was heard nothing commits any more.
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


_GUEST_AT = {
    Custody.HERE: GuestAt.SOURCE,
    Custody.COMMITTED: GuestAt.SOURCE,
    Custody.UNKNOWN: GuestAt.UNKNOWN,
    Custody.THERE: GuestAt.DESTINATION,
}


class Handoff:
    """The handoff of one guest, at its source. Any thread may look or cancel; one drives it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # between cancel and commit
        self._custody = Custody.HERE
        self._cancelled = False

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
        """Whether the destination may run the guest, so that it must not run here."""
        return self._custody is not Custody.HERE

    @property
    def cancelled(self) -> bool:
        """Whether :meth:`cancel` was in time."""
        return self._cancelled

    def cancel(self) -> bool:
        """Forbid the commit; return False when it is too late."""
        with self._lock:
            self._cancelled = self._cancelled or not self.committed
            return not self.committed

    def commit(self) -> bool:
        """Go from HERE to COMMITTED, before the destination hears of it; return False when it was cancelled."""
        with self._lock:
            if self._cancelled:
                return False
            self._move(Custody.COMMITTED, Custody.HERE)
            return True

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

    def _move(self, custody: Custody, *allowed: Custody) -> None:
        if self._custody not in allowed:
            raise AssertionError(f"a guest that is {self._custody} cannot become {custody}")
        self._custody = custody
