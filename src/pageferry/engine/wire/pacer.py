"""Pacer: one bandwidth cap for all connections of a migration."""

import threading
import time
from collections.abc import Callable

from pageferry.core.frames import PAGE_SIZE
from pageferry.core.token_bucket import BURST_S, TokenBucket
from pageferry.stream.format import MAX_PAGES_PER_RECORD


class Pacer:
    """Tells senders when to send; any number of threads may ask.

    Args:
        rate_bytes_per_s: the cap, for all of them together; None: no cap.
        now_s: a monotonic clock in seconds.
    """

    def __init__(self, rate_bytes_per_s: int | None, now_s: Callable[[], float] = time.monotonic) -> None:
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
