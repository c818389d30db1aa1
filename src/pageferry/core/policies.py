"""The policies: ``xen``, ``downtime``, ``deadline``, ``converge``, ``postcopy``, and a user's own.

Each is a small frozen object with one pure method; see :class:`pageferry.core.policy.Policy`. What they have in common
is what goes wrong without it: a policy that waits for "less than the limit" and nothing else can pass by the moment
when 2 MB were left, and then send for ever. So all of them look back at the *low-water mark*, the least that ever
remained, and do not go on when no round comes nearer to it.
"""

import importlib
from dataclasses import dataclass, replace
from typing import Any

from pageferry.core.errors import UsageError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.policy import Action, Decision, Policy, Progress, downtime_limit_s, may_switch

#: So often the fixed costs must have been measured before they alone are a reason to give up.
_FIXED_ROUNDS = 3
#: So many rounds may come no nearer than the best before them.
_PATIENCE_ROUNDS = 8
#: A round that leaves more than this share of what it had to send brings the end no nearer.
_NO_GAIN = 0.95
#: Fewer dirty pages than this are not worth another round.
_FEW_PAGES = 50
#: What a throttled round is to leave, as a share of what it has to send.
_WANTED_SHARE = 0.5
_POLICY_HINT = "a class with decide(progress) in a module on PYTHONPATH; see docs/policies.md"
_MIN_THROTTLE, _MAX_THROTTLE = 0.05, 0.95


def _next_round(reason: str, throttle: float = 0.0) -> Decision:
    return Decision(action=Action.NEXT_ROUND, reason=reason, throttle=throttle)


def _stop(reason: str) -> Decision:
    return Decision(action=Action.STOP_AND_COPY, reason=reason)


def _abort(reason: str) -> Decision:
    return Decision(action=Action.ABORT, reason=reason)


def _rates(progress: Progress) -> str:
    wire = (progress.wire_bytes_per_s or 0.0) / 1e6
    return f"the guest dirties {progress.dirty_bytes_per_s / 1e6:.0f} MB/s, the wire moves {wire:.0f} MB/s"


def _low_water(progress: Progress) -> str:
    low = progress.low_water
    return f"at best {low.remaining_pages * PAGE_SIZE / 1e6:.1f} MB remained, after round {low.index}"


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
            return _stop(f"{last.remaining_pages} pages are dirty, fewer than {self.min_dirty_pages}")
        if len(progress.rounds) >= self.max_rounds:
            return _stop(f"{len(progress.rounds)} rounds were made")
        if progress.sent_pages > self.max_factor * progress.memory_pages:
            return _stop(f"more than {self.max_factor:g} x the memory was sent")
        return _next_round(f"{last.remaining_pages} pages are dirty")


@dataclass(frozen=True, slots=True, kw_only=True)
class DowntimePolicy:
    """Stop when what is left, at the measured rate, plus the measured fixed costs, fits ``limit_s``.

    After ``max_rounds`` rounds that never fitted, or when no round comes nearer any more, it gives up and leaves the
    guest where it is: it does not break the promise that its name makes.
    """

    limit_s: float = 0.3
    max_rounds: int = 30

    def __post_init__(self) -> None:
        if not self.limit_s > 0 or self.max_rounds < 1:
            raise UsageError("the downtime policy needs a positive limit and at least one round")

    @property
    def name(self) -> str:
        """``downtime``."""
        return "downtime"

    def decide(self, progress: Progress) -> Decision:
        """Compare the expected downtime with the limit."""
        expected = f"{progress.expected_downtime_s * 1e3:.0f} ms expected, {self.limit_s * 1e3:.0f} ms allowed"
        if progress.expected_downtime_s <= self.limit_s:
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
    """As ``downtime``, but a guest that writes faster than the wire moves is held back until its memory fits.

    Nothing is held while rounds shrink by themselves. Then the guest is held for the share of its time that would have
    made the last round leave half of what it had to send, reckoned anew after every round: it grows where the guest
    writes the same few pages again and again, and ends as soon as it is not needed. At most ``max_throttle``.
    """

    limit_s: float = 0.3
    max_rounds: int = 60
    max_throttle: float = _MAX_THROTTLE

    def __post_init__(self) -> None:
        if not self.limit_s > 0 or self.max_rounds < 1 or not 0 < self.max_throttle < 1:
            raise UsageError("the converge policy needs a positive limit, a round and a throttle between 0 and 1")

    @property
    def name(self) -> str:
        """``converge``."""
        return "converge"

    def decide(self, progress: Progress) -> Decision:
        """Compare with the limit; hold the guest back as far as the last round shows that it must be."""
        expected = f"{progress.expected_downtime_s * 1e3:.0f} ms expected, {self.limit_s * 1e3:.0f} ms allowed"
        if progress.expected_downtime_s <= self.limit_s:
            return _stop(f"the downtime fits: {expected}")
        if why := _beyond(progress, self.limit_s):
            return _abort(why)
        at_most = progress.throttle >= self.max_throttle and progress.rounds_since_low_water >= _PATIENCE_ROUNDS
        if len(progress.rounds) >= self.max_rounds or at_most:
            held = f"held for {progress.throttle:.0%} of its time"
            return _abort(f"no convergence, the guest {held}: {expected}; {_low_water(progress)}")
        throttle = self.throttle_for(progress)
        return _next_round(f"{expected}; the guest is held for {throttle:.0%}" if throttle else expected, throttle)

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
        if not self.deadline_s > 0:
            raise UsageError("the deadline policy needs a positive deadline")

    @property
    def name(self) -> str:
        """``deadline``."""
        return "deadline"

    def decide(self, progress: Progress) -> Decision:
        """Reckon what one more round would bring, and whether there is time for it."""
        remaining = progress.last.remaining_pages
        if remaining < _FEW_PAGES:
            return _stop(f"{remaining} pages are dirty, fewer than {_FEW_PAGES}")
        round_s = progress.expected_downtime_s - progress.fixed_s
        left_bytes = min(remaining * PAGE_SIZE, progress.dirty_bytes_per_s * round_s)
        after_s = progress.expected_downtime_s  # as much again at the worst: the dirty rate is a lower bound
        left_s = self.deadline_s - progress.elapsed_s
        if round_s + after_s > left_s:
            return _stop(
                f"{left_s:.2f} s are left, another round and what follows would take {round_s + after_s:.2f} s"
            )
        if left_bytes > _NO_GAIN * remaining * PAGE_SIZE and progress.at_low_water:
            return _stop(f"another round brings nothing: {_rates(progress)}")
        if progress.rounds_since_low_water >= _PATIENCE_ROUNDS:
            return _stop(f"no round comes nearer: {_low_water(progress)}")
        return _next_round(f"{left_s:.2f} s are left")


@dataclass(frozen=True, slots=True, kw_only=True)
class PostcopyPolicy:
    """As ``downtime`` for ``max_rounds`` rounds; if the pause still does not fit then, switch, and copy the rest after.

    It always ends, whatever the guest writes, and neither holds the guest back nor makes its pause longer; after the
    switch the guest waits for each page that it touches before it has come.
    """

    limit_s: float = 0.3
    max_rounds: int = 3

    def __post_init__(self) -> None:
        if not self.limit_s > 0 or self.max_rounds < 1:
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
        left = f"{progress.last.remaining_pages * PAGE_SIZE / 1e6:.1f} MB are left to come after the switch"
        return Decision(action=Action.POST_COPY, reason=f"{left}; {expected}")


def _beyond(progress: Progress, limit_s: float) -> str:
    """Return why no pause can fit ``limit_s``, whatever the guest writes; empty when one may."""
    if progress.fixed_s <= limit_s or len(progress.rounds) < _FIXED_ROUNDS:
        return ""
    return f"state and verification alone take {progress.fixed_s * 1e3:.0f} ms of the {limit_s * 1e3:.0f} ms allowed"


#: name -> (the policy, the options it takes, in the words of :func:`make_policy`)
POLICIES: dict[str, tuple[type[Any], dict[str, str]]] = {
    "downtime": (DowntimePolicy, {"downtime_limit_s": "limit_s", "max_rounds": "max_rounds"}),
    "converge": (ConvergePolicy, {"downtime_limit_s": "limit_s", "max_rounds": "max_rounds"}),
    "postcopy": (PostcopyPolicy, {"downtime_limit_s": "limit_s", "max_rounds": "max_rounds"}),
    "deadline": (DeadlinePolicy, {"deadline_s": "deadline_s"}),
    "xen": (XenPolicy, {"max_rounds": "max_rounds"}),
}


def make_policy(
    name: str,
    *,
    downtime_limit_s: float | None = None,
    max_rounds: int | None = None,
    deadline_s: float | None = None,
) -> Policy:
    """Return a policy by name, with the options that were given.

    Args:
        name: out of :data:`POLICIES`, or ``module:Name`` for a user's own: what that name in that module gives when it
            is called with the options, by the names they have here.
        downtime_limit_s: the downtime allowed.
        max_rounds: rounds at the most.
        deadline_s: the time allowed from beginning to end.

    Raises:
        UsageError: there is no such policy, an option does not belong to it or has no sense, or it is none.
    """
    given = {"downtime_limit_s": downtime_limit_s, "max_rounds": max_rounds, "deadline_s": deadline_s}
    options = {option: value for option, value in given.items() if value is not None}
    if ":" in name:
        return _users_own(name, options)
    if name not in POLICIES:
        raise UsageError(f"unknown policy {name!r}", hint=f"known: {', '.join(POLICIES)}, module:Name")
    kind, takes = POLICIES[name]
    if foreign := options.keys() - takes.keys():
        raise UsageError(f"the {name} policy has no {_in_words(foreign)}", hint=f"it has: {_in_words(takes)}")
    if name == "deadline" and deadline_s is None:
        raise UsageError("the deadline policy needs a deadline", hint="--deadline SECONDS")
    policy: Policy = kind(**{takes[option]: value for option, value in options.items()})
    return policy


def with_limits(policy: Policy, given: dict[str, float | int]) -> Policy:
    """Return the policy with other limits.

    Args:
        policy: any.
        given: options by the names of :func:`make_policy`.

    Raises:
        UsageError: the policy has no such limit, a value has no sense, or the policy is a user's own.
    """
    if not given:
        return policy
    if policy.name not in POLICIES:
        raise UsageError(f"the limits of policy {policy.name} are its own", hint="only built-in policies have ours")
    takes = POLICIES[policy.name][1]
    if foreign := given.keys() - takes.keys():
        raise UsageError(f"the {policy.name} policy has no {_in_words(foreign)}", hint=f"it has: {_in_words(takes)}")
    ours: Any = policy  # a dataclass, as all in the table are
    changed: Policy = replace(ours, **{takes[option]: value for option, value in given.items()})
    return changed


def _in_words(options: Any) -> str:  # noqa: ANN401  # any collection of names
    return ", ".join(sorted(option.removesuffix("_s").replace("_", " ") for option in options))


@dataclass(frozen=True, slots=True)
class _UsersOwn:
    """A user's policy, whose mistakes end the migration with their own words and not as ours."""

    name: str
    policy: Any

    @property
    def limit_s(self) -> float | None:
        """The downtime limit of the user's policy, if it says so."""
        return downtime_limit_s(self.policy)

    @property
    def switches(self) -> bool:
        """Whether the user's policy may decide for post-copy."""
        return may_switch(self.policy)

    def decide(self, progress: Progress) -> Decision:
        """Ask the user's policy.

        Raises:
            UsageError: it failed, or gave something else than a Decision.
        """
        try:
            decision = self.policy.decide(progress)
        except Exception as error:
            raise UsageError(f"policy {self.name} failed: {error!r}", hint=_POLICY_HINT) from error
        if not isinstance(decision, Decision):
            raise UsageError(f"policy {self.name} answered {decision!r}, which is no Decision", hint=_POLICY_HINT)
        return decision


def _users_own(name: str, options: dict[str, float | int]) -> Policy:
    module, _, attribute = name.partition(":")
    try:
        policy = getattr(importlib.import_module(module), attribute)(**options)
        if not callable(policy.decide):
            raise TypeError("its decide is no method")
    except Exception as error:  # whatever a user's code does
        raise UsageError(f"policy {name!r} cannot be made: {error!r}", hint=_POLICY_HINT) from error
    return _UsersOwn(name, policy)
