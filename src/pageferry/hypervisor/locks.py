"""Ordered locks: the order is written once, here, and every acquisition is checked against it.

The RFC's second "special attention": ``p2m_set_l1e_flags()`` held ``hap_lock`` and called ``hap_write_p2m_entry()``,
which took it again; the patch removed one of the two and asked for something better. Xen's answer, and ours, is a
fixed order with a check at run time: a thread that holds a lock may only take one that stands *after* it. Taking the
same lock twice, the RFC's very case, breaks that rule and is an error at once, not a deadlock one day.

The order::

    DOMAIN  >  P2M  >  SHADOW  >  PAGING  >  LOG_DIRTY

- DOMAIN serialises the operators (ENABLE, PEEK, CLEAN, OFF) of one domain. Its holder may wait for vCPUs to stop, so a
  vCPU's thread never takes it.
- P2M guards the table: an entry's type and the bit that goes with it change under this one lock (law 1).
- SHADOW guards the shadow tables, which are made from the guest's tables and the P2M.
- PAGING guards the pool that table frames come from (Xen's ``paging_lock``, once ``hap_lock``).
- LOG_DIRTY guards the bitmap. It is the innermost, so that ``mark_dirty`` may be called from anywhere.

Source: RFC, "locking in p2m_set_l1e_flags()"; Xen's ``mm-locks.h`` for the idea.
"""

import threading
from enum import IntEnum
from types import TracebackType


class LockRank(IntEnum):
    """The order of acquisition: lower first."""

    DOMAIN = 1
    P2M = 2
    SHADOW = 3
    PAGING = 4
    LOG_DIRTY = 5


class LockOrderError(AssertionError):
    """A thread took a lock out of order: our own bug."""


class _Held(threading.local):
    def __init__(self) -> None:
        self.ranks: list[int] = []


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
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        ranks = _held.ranks
        if ranks and ranks[-1] >= self.rank:
            raise LockOrderError(f"{self.rank.name} lock taken while holding {LockRank(ranks[-1]).name}")
        self._lock.acquire()
        ranks.append(self.rank)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _held.ranks.pop()
        self._lock.release()

    @property
    def mine(self) -> bool:
        """Whether the calling thread holds a lock of this rank (for assertions)."""
        return self.rank in _held.ranks


class DomainLocks:
    """One domain's locks."""

    __slots__ = ("domain", "log_dirty", "p2m", "paging", "shadow")

    def __init__(self) -> None:
        self.domain = OrderedLock(LockRank.DOMAIN)
        self.p2m = OrderedLock(LockRank.P2M)
        self.shadow = OrderedLock(LockRank.SHADOW)
        self.paging = OrderedLock(LockRank.PAGING)
        self.log_dirty = OrderedLock(LockRank.LOG_DIRTY)
