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
        rate_bytes_per_s: the cap, for all of them together.
        now_s: a monotonic clock in seconds.
    """

    def __init__(self, rate_bytes_per_s: int, now_s: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._now_s = now_s
        self._bucket = TokenBucket(rate_bytes_per_s, now_s())
        self.batch_pages = max(1, min(MAX_PAGES_PER_RECORD, int(rate_bytes_per_s * BURST_S) // PAGE_SIZE))
        """How many pages to send at once, so that the cap holds at any time and no receiver waits long for a record."""

    def reserve(self, size_bytes: int) -> float:
        """Reserve ``size_bytes`` and return the seconds to wait before they may leave."""
        with self._lock:
            return self._bucket.reserve(size_bytes, self._now_s())
