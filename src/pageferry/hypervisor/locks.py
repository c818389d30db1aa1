"""Ordered locks: the order is written once, here, and every acquisition is checked against it.

The RFC's second "special attention": ``p2m_set_l1e_flags()`` held ``hap_lock`` and called ``hap_write_p2m_entry()``,
which took it again; the patch removed one of the two and asked for something better. Xen's answer, and ours, is a
fixed order with a check at run time: a thread that holds a lock may only take one that stands *after* it. Taking the
same lock twice, the RFC's very case, breaks that rule and is an error at once, not a deadlock one day.

The order::

    DOMAIN  >  DEVICES  >  P2M  >  SHADOW  >  PAGING  >  LOG_DIRTY

- DOMAIN serialises the operators (ENABLE, PEEK, CLEAN, OFF) of one domain. Its holder may wait for vCPUs to stop, so a
  vCPU's thread never takes it (waiting for itself to stop is refused by the run control).
- DEVICES serialises the device bus. A device may write guest memory under it, and so mark; it may change the P2M. It
  may not call an operator: that would wait for the vCPU that is executing the access.
- P2M guards the table: an entry's type and the bit that goes with it change under this one lock (law 1).
- SHADOW guards the shadow tables, which are made from the guest's tables and the P2M.
- PAGING guards the pool that table frames come from (Xen's ``paging_lock``, once ``hap_lock``).
- LOG_DIRTY guards the bitmap. It is the innermost, and nothing is waited for under it, so that ``mark_dirty`` may be
  called from anywhere.

The run state (:class:`pageferry.core.run.RunControl`) has a lock of its own, held for a few instructions and never
while one of these is taken. Who waits there for vCPUs to stop holds DOMAIN at the most: a vCPU may need any other of
the locks on its way out.

No lock is recursive. One that had to be would be a class of its own, with that in its name.

Source: RFC, "locking in p2m_set_l1e_flags()"; Xen's ``mm-locks.h`` for the idea.
"""

import threading
from collections.abc import Callable, Iterator
from enum import IntEnum
from types import TracebackType
from typing import Protocol


class LockRank(IntEnum):
    """The order of acquisition: lower first."""

    DOMAIN = 1
    DEVICES = 2
    P2M = 3
    SHADOW = 4
    PAGING = 5
    LOG_DIRTY = 6


class LockOrderError(AssertionError):
    """A thread took a lock out of order: our own bug."""


class Primitive(Protocol):
    """What an ordered lock is made of: ``threading.Lock``, or a stand-in that a scheduler controls."""

    def acquire(self) -> bool:
        """Take it; waits."""

    def release(self) -> None:
        """Give it back."""


class _Held(threading.local):
    def __init__(self) -> None:
        self.locks: list[OrderedLock] = []


_held = _Held()


class OrderedLock:
    """A lock with a place in the order; used as ``with lock:``. Not recursive.

    The order binds across domains too: a thread works on one domain at a time.

    Args:
        rank: its place.
    """

    __slots__ = ("_lock", "rank")

    def __init__(self, rank: LockRank) -> None:
        self.rank = rank
        self._lock: Primitive = threading.Lock()

    def __enter__(self) -> None:
        held = _held.locks
        if held and held[-1].rank >= self.rank:
            raise LockOrderError(f"{self.rank.name} lock taken while holding {held[-1].rank.name}")
        self._lock.acquire()
        held.append(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _held.locks.pop()
        self._lock.release()

    @property
    def mine(self) -> bool:
        """Whether the calling thread holds this lock (for assertions)."""
        return any(lock is self for lock in _held.locks)

    def instrument(self, make: Callable[[str], Primitive]) -> None:
        """Replace what the lock is made of by ``make(name)``, before any thread uses it.

        For a scheduler that decides who gets it next (:mod:`simulation.interleave`).
        """
        self._lock = make(self.rank.name)


class DomainLocks:
    """One domain's locks."""

    __slots__ = ("devices", "domain", "log_dirty", "p2m", "paging", "shadow")

    def __init__(self) -> None:
        self.domain = OrderedLock(LockRank.DOMAIN)
        self.devices = OrderedLock(LockRank.DEVICES)
        self.p2m = OrderedLock(LockRank.P2M)
        self.shadow = OrderedLock(LockRank.SHADOW)
        self.paging = OrderedLock(LockRank.PAGING)
        self.log_dirty = OrderedLock(LockRank.LOG_DIRTY)

    def __iter__(self) -> Iterator[OrderedLock]:
        """In the order of acquisition."""
        locks: list[OrderedLock] = [getattr(self, name) for name in self.__slots__]
        return iter(sorted(locks, key=lambda lock: lock.rank))
