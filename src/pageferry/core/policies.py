"""The built-in policies: ``xen``, ``downtime``, ``converge``, ``deadline``, ``postcopy``.

Each is a small frozen object with one pure method; see :class:`pageferry.core.policy.Policy`. What they have in common
is what goes wrong without it: a policy that waits for "less than the limit" and nothing else can pass by the moment
when 2 MB were left, and then send for ever. So all of them look back at the *low-water mark*, the least that ever
remained, and do not go on when no round comes nearer to it.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.policy import Action, Decision, Progress
from pageferry.core.units import format_count, format_size

#: So often the fixed costs must have been measured before they alone are a reason to give up.
_FIXED_ROUNDS = 3
#: So many rounds may come no nearer than the best before them.
_PATIENCE_ROUNDS = 8
#: A round that leaves more than this share of what it had to send brings the end no nearer.
_NO_GAIN = 0.95
#: Fewer dirty pages than this are not worth another round.
_FEW_PAGES = 50
#: What a throttled round is to leave, and what one at the least that is made although a pause would fit, as a share of
#: what it has to send.
_WANTED_SHARE = 0.5
_MIN_THROTTLE, _MAX_THROTTLE = 0.05, 0.95


def _next_round(reason: str, throttle: float = 0.0) -> Decision:
    return Decision(action=Action.NEXT_ROUND, reason=reason, throttle=throttle)


def _stop(reason: str) -> Decision:
    return Decision(action=Action.STOP_AND_COPY, reason=reason)


def _abort(reason: str) -> Decision:
    return Decision(action=Action.ABORT, reason=reason)


def _rates(progress: Progress) -> str:
    wire = format_size(progress.wire_bytes_per_s or 0.0)
    return f"the guest dirties {format_size(progress.dirty_bytes_per_s)}/s, the wire moves {wire}/s"


def _dirty(pages: int, fewer_than: int | None = None) -> str:
    few = "" if fewer_than is None else f", fewer than {fewer_than}"
    return f"{format_count(pages, 'page')} {'is' if pages == 1 else 'are'} dirty{few}"


def _low_water(progress: Progress) -> str:
    low = progress.low_water
    return f"at best {format_size(low.remaining_pages * PAGE_SIZE)} remained, after round {low.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class XenPolicy:
    """Xen's rule: stop at ``max_rounds`` rounds, under ``min_dirty_pages`` dirty, or over ``max_factor`` x memory sent.

    It always ends in a stop-and-copy: total time is bounded, downtime is not.
    """

    max_rounds: int = 5
    min_dirty_pages: int = _FEW_PAGES
    max_factor: float = 3.0

    def __post_init__(self) -> None:
        if self.max_rounds < 1 or self.min_dirty_pages < 0 or self.max_factor <= 0:
            raise UsageError("the xen policy needs at least one round and a positive factor")

    @property
    def name(self) -> str:
        """``xen``."""
        return "xen"

    def decide(self, progress: Progress) -> Decision:
        """Apply the three limits in turn."""
        last = progress.last
        if last.remaining_pages < self.min_dirty_pages:
            return _stop(_dirty(last.remaining_pages, self.min_dirty_pages))
        if len(progress.rounds) >= self.max_rounds:
            return _stop(
                f"{format_count(len(progress.rounds), 'round')} {'was' if len(progress.rounds) == 1 else 'were'} made"
            )
        if progress.sent_pages > self.max_factor * progress.memory_pages:
            return _stop(f"more than {self.max_factor:g} x the memory was sent")
        return _next_round(_dirty(last.remaining_pages))


@dataclass(frozen=True, slots=True, kw_only=True)
class DowntimePolicy:
    """Stop when what is left, at the measured rate, plus the measured fixed costs, fits ``limit_s``.

    It goes on for a while where that shortens the pause a lot (:func:`_nears`). After ``max_rounds`` rounds that never
    fitted, or when no round comes nearer any more, it gives up and leaves the guest where it is: it does not break the
    promise that its name makes.
    """

    limit_s: float = 0.3
    max_rounds: int = 30

    def __post_init__(self) -> None:
        if not 0 < self.limit_s < math.inf or self.max_rounds < 1:
            raise UsageError("the downtime policy needs a positive limit and at least one round")

    @property
    def name(self) -> str:
        """``downtime``."""
        return "downtime"

    def decide(self, progress: Progress) -> Decision:
        """Compare the expected downtime with the limit."""
        expected = f"{progress.expected_downtime_s * 1e3:.0f} ms expected, {self.limit_s * 1e3:.0f} ms allowed"
        if progress.expected_downtime_s <= self.limit_s:
            if len(progress.rounds) < self.max_rounds and _nears(progress, self.limit_s):
                return _next_round(f"the downtime fits and shrinks: {expected}")
            return _stop(f"the downtime fits: {expected}")
        if why := _beyond(progress, self.limit_s):
            return _abort(why)
        if len(progress.rounds) >= self.max_rounds:
            return _abort(f"no convergence in {len(progress.rounds)} rounds: {expected}; {_rates(progress)}")
        if progress.rounds_since_low_water >= _PATIENCE_ROUNDS:
            since = f"{_low_water(progress)}, and {progress.rounds_since_low_water} rounds since came no nearer"
            return _abort(f"no convergence: {expected}; {since}; {_rates(progress)}")
        return _next_round(expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvergePolicy:
    """As ``downtime``, but a guest that writes faster than the wire moves is throttled until its memory fits.

    It runs freely while rounds shrink by themselves. Then it is throttled for the share of its time that would have
    made the last round leave half of what it had to send, computed anew after every round: the share grows where the
    guest writes the same few pages again and again, and is 0 again as soon as it is not needed. At most
    ``max_throttle``.
    """

    limit_s: float = 0.3
    max_rounds: int = 60
    max_throttle: float = _MAX_THROTTLE

    def __post_init__(self) -> None:
        if not 0 < self.limit_s < math.inf or self.max_rounds < 1 or not 0 < self.max_throttle < 1:
            raise UsageError("the converge policy needs a positive limit, a round and a throttle between 0 and 1")

    @property
    def name(self) -> str:
        """``converge``."""
        return "converge"

    def decide(self, progress: Progress) -> Decision:
        """Compare with the limit; throttle the guest as far as the last round shows that it must be."""
        expected = f"{progress.expected_downtime_s * 1e3:.0f} ms expected, {self.limit_s * 1e3:.0f} ms allowed"
        if progress.expected_downtime_s <= self.limit_s:
            if len(progress.rounds) < self.max_rounds and _nears(progress, self.limit_s):
                return _next_round(f"the downtime fits and shrinks: {expected}", progress.throttle)
            return _stop(f"the downtime fits: {expected}")
        if why := _beyond(progress, self.limit_s):
            return _abort(why)
        at_most = progress.throttle >= self.max_throttle and progress.rounds_since_low_water >= _PATIENCE_ROUNDS
        if len(progress.rounds) >= self.max_rounds or at_most:
            throttled = f"throttled for {progress.throttle:.0%} of its time"
            return _abort(f"no convergence, the guest {throttled}: {expected}; {_low_water(progress)}")
        throttle = self.throttle_for(progress)
        return _next_round(f"{expected}; the guest is throttled for {throttle:.0%}" if throttle else expected, throttle)

    def throttle_for(self, progress: Progress) -> float:
        """Return the share of its time for which the guest must be held so that the next round leaves half."""
        last = progress.last
        if not last.sent_pages or last.remaining_pages <= _WANTED_SHARE * last.sent_pages:
            # It shrinks well enough as it is; a throttle that is on stays, for it may be why.
            return progress.throttle
        run_share = (1.0 - progress.throttle) * _WANTED_SHARE * last.sent_pages / last.remaining_pages
        throttle = min(1.0 - run_share, self.max_throttle)
        return throttle if throttle >= _MIN_THROTTLE else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlinePolicy:
    """Be done ``deadline_s`` after the beginning, with as little downtime as that allows.

    It always ends in a stop-and-copy: at the latest when one more round and the stop-and-copy after it would not fit,
    earlier when another round brings nothing. A deadline that cannot be kept is missed by as little as possible.
    """

    deadline_s: float

    def __post_init__(self) -> None:
        if not 0 < self.deadline_s < math.inf:
            raise UsageError("the deadline policy needs a positive deadline")

    @property
    def name(self) -> str:
        """``deadline``."""
        return "deadline"

    def decide(self, progress: Progress) -> Decision:
        """Reckon what one more round would bring, and whether there is time for it."""
        remaining = progress.last.remaining_pages
        if remaining < _FEW_PAGES:
            return _stop(_dirty(remaining, _FEW_PAGES))
        round_s = progress.expected_downtime_s - progress.fixed_s
        left_bytes = min(remaining * PAGE_SIZE, progress.dirty_bytes_per_s * round_s)
        after_s = progress.expected_downtime_s  # as much again at the worst: the dirty rate is a lower bound
        left_s = self.deadline_s - progress.elapsed_s
        if round_s + after_s > left_s:
            left = f"{left_s:.2f} s are left" if left_s >= 0 else f"the deadline passed {-left_s:.2f} s ago"
            return _stop(f"{left}, another round and what follows would take {round_s + after_s:.2f} s")
        if left_bytes > _NO_GAIN * remaining * PAGE_SIZE and progress.at_low_water:
            return _stop(f"another round brings nothing: {_rates(progress)}")
        if progress.rounds_since_low_water >= _PATIENCE_ROUNDS:
            return _stop(f"no round comes nearer: {_low_water(progress)}")
        return _next_round(f"{left_s:.2f} s are left")


@dataclass(frozen=True, slots=True, kw_only=True)
class PostcopyPolicy:
    """As ``downtime`` for ``max_rounds`` rounds; if the pause still does not fit then, switch, and copy the rest after.

    It always ends, whatever the guest writes, and neither throttles the guest nor makes its pause longer; after the
    switch the guest waits for each page that it touches before it has come.
    """

    limit_s: float = 0.3
    max_rounds: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.limit_s < math.inf or self.max_rounds < 1:
            raise UsageError("the postcopy policy needs a positive limit and at least one round")

    @property
    def name(self) -> str:
        """``postcopy``."""
        return "postcopy"

    @property
    def switches(self) -> bool:
        """Whether it may decide for post-copy."""
        return True

    def decide(self, progress: Progress) -> Decision:
        """Stop if the pause fits, go on while a round may bring it nearer, switch then."""
        expected = f"{progress.expected_downtime_s * 1e3:.0f} ms expected, {self.limit_s * 1e3:.0f} ms allowed"
        if progress.expected_downtime_s <= self.limit_s:
            return _stop(f"the downtime fits: {expected}")
        no_gain = len(progress.rounds) > 1 and not progress.at_low_water
        if len(progress.rounds) < self.max_rounds and not no_gain:
            return _next_round(expected)
        left = f"{format_size(progress.last.remaining_pages * PAGE_SIZE)} are left to come after the switch"
        return Decision(action=Action.POST_COPY, reason=f"{left}; {expected}")


def _nears(progress: Progress, limit_s: float) -> bool:
    """Tell whether another round is worth its time although a pause now would fit ``limit_s``.

    It is as long as copying what remains would be the greater part of the pause, and every round since the first after
    which a pause would have fitted left at most half of what it had to send. So all such rounds together send less than
    twice what remained at the first; and a guest that writes more again is taken the next time it fits.
    """
    rate = progress.wire_bytes_per_s
    if not rate or progress.last.remaining_pages < _FEW_PAGES or progress.expected_downtime_s < 2 * progress.fixed_s:
        return False
    left = [stats.remaining_pages for stats in progress.rounds]
    pauses_s = [progress.fixed_s + pages * PAGE_SIZE / rate for pages in left]  # the last is what is expected now
    first = next(index for index, pause_s in enumerate(pauses_s) if pause_s <= limit_s)
    return all(after <= _WANTED_SHARE * before for before, after in pairwise(left[first:]))


def _beyond(progress: Progress, limit_s: float) -> str:
    """Return why no pause can fit ``limit_s``, whatever the guest writes; empty when one may."""
    if progress.fixed_s <= limit_s or len(progress.rounds) < _FIXED_ROUNDS:
        return ""
    return f"state and verification alone take {progress.fixed_s * 1e3:.0f} ms, and {limit_s * 1e3:.0f} ms are allowed"
