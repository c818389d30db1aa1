"""Predicts what the proof at the pause will cost, by measuring before it."""

from collections.abc import Callable

from pageferry.core.frames import PAGES_PER_2M, GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.engine.accounts import PageAccounts
from pageferry.engine.verify.digests import digest_runs, sample_runs

_SAMPLES = 3
#: How much of its time measuring may take.
_MEASURING_SHARE = 0.05


class ProofCost:
    """Measures how long it takes to find and to digest what has storage.

    Args:
        memory: the guest's.
        accounts: of its pages; told what has storage.
        now_s: a monotonic clock in seconds.
    """

    def __init__(self, memory: GuestMemory, accounts: PageAccounts, now_s: Callable[[], float]) -> None:
        self.pages_per_s: float | None = None
        """How fast this host digests; None before the first measurement, or of no pages."""
        self.found_s = 0.0
        """How long finding took."""
        self._memory = memory
        self._accounts = accounts
        self._now_s = now_s
        self._measure_at_s = now_s()

    def measure(self) -> None:
        """Measure; call it before every round, for the host's speed may change.

        It takes up to 20 ms per GiB, in which the guest writes, and does nothing where that is much beside the rounds
        since the last time.
        """
        began_s = self._now_s()
        if began_s < self._measure_at_s:
            return
        self._accounts.found(*self._memory.populated())
        self.found_s = self._now_s() - began_s
        sample = sample_runs(*self._accounts.populated.runs(max_pages=PAGES_PER_2M))
        self.pages_per_s = digest_pages_per_s(self._memory, *sample, self._now_s) or self.pages_per_s
        ended_s = self._now_s()
        self._measure_at_s = ended_s + (ended_s - began_s) / _MEASURING_SHARE

    def digest_s(self, pages: int) -> float:
        """Return how long digesting so many pages takes; 0 as long as that is not known."""
        return pages / self.pages_per_s if self.pages_per_s else 0.0


def digest_pages_per_s(
    memory: GuestMemory, starts: GfnArray, lengths: GfnArray, now_s: Callable[[], float]
) -> float | None:
    """Return how fast this host digests these runs of guest memory; None when there are none.

    The best of a few samples: the guest, which runs now, only disturbs them.
    """
    if not starts.size:
        return None
    times_s = []
    for _ in range(_SAMPLES):
        began_s = now_s()
        digest_runs(memory, starts, lengths)
        times_s.append(now_s() - began_s)
    return int(lengths.sum()) / min(times_s)
