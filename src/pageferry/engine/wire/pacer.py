"""Pacer: one bandwidth cap for all connections of a migration; and the token bucket that it is made of, pure."""

import threading
from collections.abc import Callable

from pageferry.core.frames import PAGE_SIZE
from pageferry.engine.host import THIS_HOST
from pageferry.stream.format import MAX_PAGES_PER_RECORD

#: A sender that was late may catch up by what it missed in so long, and no more: half of a tenth of a second, so that
#: a cap that is looked at over a second or more holds within 5 %.
BURST_S = 0.05


class TokenBucket:
    """Lets bytes pass at ``rate_bytes_per_s``.

    A reservation may be larger than the bucket: it begins when those before it are paid for, and those after it wait.
    Bytes that begin in any span of ``t`` seconds are at most ``rate x (t + BURST_S)``, and the last reservation more.

    Args:
        rate_bytes_per_s: more than 0.
        now_s: the time now, on any monotonic clock.
    """

    def __init__(self, rate_bytes_per_s: float, now_s: float) -> None:
        self._rate_bytes_per_s = rate_bytes_per_s
        self._paid_s = now_s  # when all that was reserved is paid for

    def reserve(self, size_bytes: int, now_s: float) -> float:
        """Reserve ``size_bytes`` and return the seconds to wait before they may leave.

        Args:
            size_bytes: 0 or more.
            now_s: never before that of an earlier call.
        """
        begin_s = max(self._paid_s, now_s - BURST_S)
        self._paid_s = begin_s + size_bytes / self._rate_bytes_per_s
        return max(0.0, begin_s - now_s)


class Pacer:
    """Tells senders when to send; any number of threads may ask.

    Args:
        rate_bytes_per_s: the cap, for all of them together; None: no cap.
        now_s: a monotonic clock in seconds.
    """

    def __init__(self, rate_bytes_per_s: int | None, now_s: Callable[[], float] = THIS_HOST.now_s) -> None:
        self._lock = threading.Lock()
        self._now_s = now_s
        self.set_rate(rate_bytes_per_s)

    def set_rate(self, rate_bytes_per_s: int | None) -> None:
        """Change the cap; what waits already goes when it was told to."""
        with self._lock:
            self.rate_bytes_per_s = rate_bytes_per_s
            self._bucket = None if rate_bytes_per_s is None else TokenBucket(rate_bytes_per_s, self._now_s())

    @property
    def batch_pages(self) -> int:
        """How many pages to send at once, so that the cap holds at any time and no receiver waits long for a record."""
        rate = self.rate_bytes_per_s
        if rate is None:
            return MAX_PAGES_PER_RECORD
        return max(1, min(MAX_PAGES_PER_RECORD, int(rate * BURST_S) // PAGE_SIZE))

    def reserve(self, size_bytes: int) -> float:
        """Reserve ``size_bytes`` and return the seconds to wait before they may leave."""
        with self._lock:
            return 0.0 if self._bucket is None else self._bucket.reserve(size_bytes, self._now_s())
