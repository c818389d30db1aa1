"""Who may run the guest, as each end knows it: two state machines without clock, socket or thread.

At the source, :class:`Handoff`::

    HERE -- commit --> COMMITTED -- running --> THERE
    | ^                  |  |                     |
    | |<---- refused ----+  +-- lost --> UNKNOWN  |
    | |                                  |  |     |
    | +<------- refused, taken back -----+  +-- running --> THERE
    | +<------------------ taken back ------------+
    +-- keep --> KEPT

*Refused*: the destination promised that the guest never runs there, or the commit never left whole. *Taken back*: a
person declared it. *Kept*: the guest was saved and runs on. A cancel is possible in HERE only, and once it was heard
nothing leaves HERE; so is giving up a pause that takes too long.

At the destination, :class:`Takeover`::

    COMING -- ready --> READY -- accept, within the lease --> ACCEPTED -- run --> OURS
       |                  |                                      |
       +---- give up -----+--------------- give up --------------+--> NEVER

**The lease** keeps a commit that is held up on its way from starting a second guest. The source says in its hello how
long it stands by its word; the destination's time begins when it says READY, before the source can hear it, and is
shorter by a margin. The destination looks twice: when the commit comes, and when the disks are ours and the guest is
about to run. So when the time is over at the source, either the guest runs at the destination or it never will. NEVER
is a promise, given to any source that asks.
"""

import threading
from enum import StrEnum

from pageferry.core.errors import GuestAt

#: The part of the source's lease within which a destination accepts a commit: clocks may differ in rate by less.
_DESTINATION_PART = 0.9


class SourceCustody(StrEnum):
    """Who has the guest, as its source knows it."""

    HERE = "here"
    COMMITTED = "committed"
    UNKNOWN = "unknown"
    THERE = "there"
    KEPT = "kept"


_GUEST_AT = {
    SourceCustody.HERE: GuestAt.SOURCE,
    SourceCustody.COMMITTED: GuestAt.SOURCE,
    SourceCustody.UNKNOWN: GuestAt.UNKNOWN,
    SourceCustody.THERE: GuestAt.DESTINATION,
    SourceCustody.KEPT: GuestAt.SOURCE,
}


class Handoff:
    """The handoff of one guest, at its source. Any thread may look or cancel; one drives it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # between cancel and commit, and between an answer and a person
        self._custody = SourceCustody.HERE
        self._cancelled = False
        self._given_up = False
        self._open_until_s = 0.0

    @property
    def custody(self) -> SourceCustody:
        """How far it is."""
        return self._custody

    @property
    def guest_at(self) -> GuestAt:
        """Where the guest is; SOURCE up to the commit, and after it as long as the answer is awaited."""
        return _GUEST_AT[self._custody]

    @property
    def committed(self) -> bool:
        """Whether the guest may run elsewhere, so that it must not run here."""
        return self._custody not in (SourceCustody.HERE, SourceCustody.KEPT)

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
            in_time = self._custody is SourceCustody.HERE
            self._cancelled = self._cancelled or in_time
            return in_time

    def give_up(self) -> bool:
        """Forbid the commit because the pause takes too long; return False when it is too late, or was cancelled."""
        with self._lock:
            in_time = self._custody is SourceCustody.HERE and not self.forbidden
            self._given_up = self._given_up or in_time
            return in_time

    def commit(self, open_until_s: float = 0.0) -> bool:
        """Go from HERE to COMMITTED, before the destination hears of it; return False when it is forbidden.

        Args:
            open_until_s: when the lease ends, on a clock of the caller's: no commit is accepted later; 0: no lease.
        """
        self._open_until_s = open_until_s
        return self._leave(SourceCustody.COMMITTED)

    def keep(self) -> bool:
        """Go from HERE to KEPT, before a saved guest's file gets its name; return False when it is forbidden."""
        return self._leave(SourceCustody.KEPT)

    def running(self) -> None:
        """The destination runs the guest."""
        with self._lock:
            self._move(SourceCustody.THERE, SourceCustody.COMMITTED, SourceCustody.UNKNOWN)

    def refused(self) -> None:
        """The guest does not run at the destination and never will."""
        with self._lock:
            self._move(SourceCustody.HERE, SourceCustody.COMMITTED, SourceCustody.UNKNOWN)

    def lost(self) -> None:
        """No answer to the commit was heard."""
        self._move(SourceCustody.UNKNOWN, SourceCustody.COMMITTED, SourceCustody.UNKNOWN)

    def open_for_s(self, now_s: float) -> float:
        """Return how long the commit may still be accepted, on the clock of :meth:`commit`; 0: it cannot be."""
        return (
            max(0.0, self._open_until_s - now_s)
            if self._custody in (SourceCustody.COMMITTED, SourceCustody.UNKNOWN)
            else 0.0
        )

    def taken_back(self, now_s: float, custody: SourceCustody) -> bool:
        """A person knows that the guest runs nowhere else; :meth:`open_for_s` is 0 by then.

        Args:
            now_s: on the clock of :meth:`commit`.
            custody: what it was when the person was asked to be sure.

        Returns:
            False when it is not that any more: the destination has answered meanwhile, and nothing was taken back.
        """
        if self.open_for_s(now_s):
            raise AssertionError("a guest whose commit may still be accepted cannot be taken back")
        with self._lock:
            if self._custody is not custody:
                return False
            self._move(SourceCustody.HERE, SourceCustody.UNKNOWN, SourceCustody.THERE)
            return True

    def _leave(self, custody: SourceCustody) -> bool:
        with self._lock:
            if self.forbidden:
                return False
            self._move(custody, SourceCustody.HERE)
            return True

    def _move(self, custody: SourceCustody, *allowed: SourceCustody) -> None:
        if self._custody not in allowed:
            raise AssertionError(f"a guest that is {self._custody} cannot become {custody}")
        self._custody = custody


class DestinationCustody(StrEnum):
    """Who has the guest, as its destination knows it."""

    COMING = "coming"
    READY = "ready"
    ACCEPTED = "accepted"
    OURS = "ours"
    NEVER = "never"


class Takeover:
    """The handoff of one guest, at its destination; for one thread.

    Args:
        lease_s: how long the source stands by its word, as it says.
    """

    def __init__(self, lease_s: float) -> None:
        self._accepts_for_s = lease_s * _DESTINATION_PART
        self._accepts_until_s = 0.0
        self._custody = DestinationCustody.COMING

    @property
    def custody(self) -> DestinationCustody:
        """How far it is."""
        return self._custody

    def ready(self, now_s: float) -> None:
        """READY is about to be said: from now on a commit may come."""
        self._move(DestinationCustody.READY, DestinationCustody.COMING)
        self._accepts_until_s = now_s + self._accepts_for_s

    def left_s(self, now_s: float) -> float:
        """Return for how long a commit is still accepted; 0: it is not."""
        return max(0.0, self._accepts_until_s - now_s)

    def accept(self, now_s: float) -> bool:
        """A commit has come; return False when the lease is over, so that the commit does not count."""
        if not self.left_s(now_s):
            return False
        self._move(DestinationCustody.ACCEPTED, DestinationCustody.READY)
        return True

    def run(self) -> None:
        """The guest runs here now, or is ours to run."""
        self._move(DestinationCustody.OURS, DestinationCustody.ACCEPTED)

    def give_up(self) -> None:
        """The guest never runs here; only from now on may that be promised."""
        self._move(
            DestinationCustody.NEVER,
            DestinationCustody.COMING,
            DestinationCustody.READY,
            DestinationCustody.ACCEPTED,
            DestinationCustody.NEVER,
        )

    def _move(self, custody: DestinationCustody, *allowed: DestinationCustody) -> None:
        if self._custody not in allowed:
            raise AssertionError(f"a guest that is {self._custody} cannot become {custody}")
        self._custody = custody
