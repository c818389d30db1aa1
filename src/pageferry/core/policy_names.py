"""Policies by name and options, as a user gives them: the built-in ones, and a user's own as ``module:Name``."""

import importlib
import importlib.abc
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType, ModuleType
from typing import Any

from pageferry.core.errors import UsageError
from pageferry.core.policies import ConvergePolicy, DeadlinePolicy, DowntimePolicy, PostcopyPolicy, XenPolicy
from pageferry.core.policy import Decision, Policy, Progress, downtime_limit_s, may_switch

_POLICY_HINT = "a class with decide(progress) in a module on PYTHONPATH; see docs/guide/policies.md"

#: name -> (the policy, the options it takes, in the words of :func:`make_policy`)
POLICIES: dict[str, tuple[type[Any], dict[str, str]]] = {
    "downtime": (DowntimePolicy, {"downtime_limit_s": "limit_s", "max_rounds": "max_rounds"}),
    "converge": (ConvergePolicy, {"downtime_limit_s": "limit_s", "max_rounds": "max_rounds"}),
    "postcopy": (PostcopyPolicy, {"downtime_limit_s": "limit_s", "max_rounds": "max_rounds"}),
    "deadline": (DeadlinePolicy, {"deadline_s": "deadline_s"}),
    "xen": (XenPolicy, {"max_rounds": "max_rounds"}),
}

#: option -> what a person writes for it.
_WRITTEN = {"downtime_limit_s": "--downtime-limit", "max_rounds": "--max-rounds", "deadline_s": "--deadline"}

UsersPolicies = Mapping[str, Callable[..., Any]]
"""The makers of the users' own policies that are allowed, by ``module:Name``."""
NO_USERS_POLICIES: UsersPolicies = MappingProxyType({})


def load_policies(names: Iterable[str]) -> UsersPolicies:
    """Import users' own policies: what ``Name`` is in ``module``, for each ``module:Name``.

    Each is made of the module's file as it is when one is made, so an edited policy needs no new process.

    Raises:
        UsageError: one is not a policy, or its module cannot be imported.
    """
    return {name: _UsersClass(name) for name in names}


class _UsersClass:
    """A user's class that decides; loaded when this is made, and again when its module's file has changed.

    Args:
        name: ``module:Name``.

    Raises:
        UsageError: it cannot be loaded, or is not a policy.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._source: str | None = None
        self._class = self._loaded()

    def __call__(self, **options: float) -> Any:  # noqa: ANN401  # a user's own
        """Make one with these options.

        Raises:
            UsageError: the class cannot be loaded any more, or does not take an option or needs another.
        """
        self._class = self._loaded()
        self._check(options)
        return self._class(**options)

    def _loaded(self) -> Callable[..., Any]:
        name, _, attribute = self._name.partition(":")
        try:
            module = importlib.import_module(name)
            source = _source_of(name)
            if source is not None and self._source not in (None, source):
                module = _loaded_anew(name, source)
            self._source = source
            made_by = getattr(module, attribute)
        except Exception as error:  # whatever a user's code does
            raise UsageError(f"policy {self._name!r} cannot be loaded: {error!r}", hint=_POLICY_HINT) from error
        if not callable(getattr(made_by, "decide", None)):
            raise UsageError(f"policy {self._name!r} has no method decide", hint=_POLICY_HINT)
        users_own: Callable[..., Any] = made_by
        return users_own

    def _check(self, options: Mapping[str, float]) -> None:
        parameters = inspect.signature(self._class).parameters.values()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return
        takes = [parameter.name for parameter in parameters]
        if foreign := [_WRITTEN[option] for option in options if option not in takes]:
            known = [_WRITTEN[option] for option in _WRITTEN if option in takes]
            hint = f"it takes {' and '.join(known)}" if known else "it takes no options"
            raise UsageError(f"policy {self._name} takes no {' and no '.join(foreign)}", hint=hint)
        needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
        if lacking := [name for name in needed if name not in options]:
            asked = " and ".join(_WRITTEN.get(name, f"an argument {name}") for name in lacking)
            raise UsageError(f"policy {self._name} needs {asked}", hint=_POLICY_HINT)


def _source_of(module: str) -> str | None:
    # Not through bytecode: that is told apart by the second and by size.
    spec = importlib.util.find_spec(module)
    loader = None if spec is None else spec.loader
    return loader.get_source(module) if isinstance(loader, importlib.abc.InspectLoader) else None


def _loaded_anew(name: str, source: str) -> ModuleType:
    old = sys.modules.pop(name)
    spec = importlib.util.find_spec(name)
    assert spec is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        exec(compile(source, spec.origin or name, "exec"), module.__dict__)
    except BaseException:
        sys.modules[name] = old
        raise
    return module


def make_policy(
    name: str,
    *,
    users_own: UsersPolicies = NO_USERS_POLICIES,
    downtime_limit_s: float | None = None,
    max_rounds: int | None = None,
    deadline_s: float | None = None,
) -> Policy:
    """Return a policy by name, with the options that were given.

    Args:
        name: out of :data:`POLICIES`, or one of ``users_own``: what that gives when it is called with the options, by
            the names they have here.
        users_own: from :func:`load_policies`; no other module is imported here.
        downtime_limit_s: the downtime allowed.
        max_rounds: rounds at the most.
        deadline_s: the time allowed from beginning to end.

    Raises:
        UsageError: no such policy, a user's own that is not among these, an option does not belong to it or
            makes no sense, or it is not a policy.
    """
    given = {"downtime_limit_s": downtime_limit_s, "max_rounds": max_rounds, "deadline_s": deadline_s}
    options = {option: value for option, value in given.items() if value is not None}
    if ":" in name:
        return _users_own(name, users_own, options)
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
        UsageError: the policy has no such limit, a value makes no sense, or the policy is a user's own.
    """
    if not given:
        return policy
    if policy.name not in POLICIES:
        raise UsageError(
            f"the limits of policy {policy.name} are its own", hint="only those of built-in policies can be changed"
        )
    takes = POLICIES[policy.name][1]
    if foreign := given.keys() - takes.keys():
        raise UsageError(f"the {policy.name} policy has no {_in_words(foreign)}", hint=f"it has: {_in_words(takes)}")
    ours: Any = policy  # a dataclass, as all in the table are
    changed: Policy = replace(ours, **{takes[option]: value for option, value in given.items()})
    return changed


def _in_words(options: Any) -> str:  # noqa: ANN401  # any collection of names
    words = sorted(option.removesuffix("_s") for option in options)
    return ", ".join(f"{word.replace('_', ' ')} (--{word.replace('_', '-')})" for word in words)


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
            raise UsageError(f"policy {self.name} answered {decision!r}, which is not a Decision", hint=_POLICY_HINT)
        return decision


def _users_own(name: str, users_own: UsersPolicies, options: dict[str, float | int]) -> Policy:
    if name not in users_own:
        raise UsageError(
            f"policy {name!r} was not named when the guest's process was started",
            hint=f"run, receive or restore the guest with --allow-policy {name}",
        )
    try:
        policy = users_own[name](**options)
    except UsageError:
        raise
    except Exception as error:  # whatever a user's code does
        raise UsageError(f"policy {name!r} cannot be made: {error!r}", hint=_POLICY_HINT) from error
    return _UsersOwn(name, policy)
