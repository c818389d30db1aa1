"""TokenBucket: how long to wait so that bytes leave no faster than a rate; pure, the caller tells the time."""

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
