"""Parameters: what clients have set for migrations to come, in QEMU's words and ours."""

import threading
from typing import Any

from pageferry.core.policies import DowntimePolicy
from pageferry.core.policy_names import POLICIES
from pageferry.engine.options import WireOptions
from pageferry.vmm.arguments import Arguments
from pageferry.vmm.qmp_error import QmpError

Json = dict[str, Any]

#: Limits of a policy: parameter -> (the argument of ``migrate``, as make_policy calls it).
_LIMITS = {
    "downtime-limit": ("x-downtime-limit-s", "downtime_limit_s"),
    "x-max-rounds": ("x-max-rounds", "max_rounds"),
    "x-deadline-s": ("x-deadline-s", "deadline_s"),
}
_NAMES = (*_LIMITS, "max-bandwidth")
_EVENTS, _HOLD = "events", "pause-before-switchover"


class Parameters:
    """Limits and capabilities that hold for each ``migrate`` which does not say otherwise; from any thread.

    Those of a limit are kept, whatever policy comes, and given to one that has such a limit.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limits: Json = {}  # by parameter, in its unit
        self._bandwidth = 0
        self._hold = False

    def take(self, args: Arguments) -> tuple[Json, WireOptions | None]:
        """Return the limits that ``migrate-set-parameters`` names, as make_policy calls them, and the bandwidth.

        Raises:
            QmpError: a parameter does not exist here, or makes no sense.
            UsageError: there is too little bandwidth.
        """
        args.expect_only(_NAMES, "migration parameter")
        given = {
            "downtime-limit": args.number("downtime-limit"),
            "x-max-rounds": args.integer("x-max-rounds"),
            "x-deadline-s": args.number("x-deadline-s"),
        }
        given = {name: value for name, value in given.items() if value is not None}
        bandwidth = args.count("max-bandwidth")
        wire = None if bandwidth is None else WireOptions(bandwidth_bytes_per_s=bandwidth or None)
        return given, wire

    def keep(self, limits: Json, wire: WireOptions | None) -> None:
        """Keep what :meth:`take` returned for migrations to come."""
        with self._lock:
            self._limits |= limits
            if wire is not None:
                self._bandwidth = wire.bandwidth_bytes_per_s or 0

    def told(self) -> Json:
        """Return the answer to ``query-migrate-parameters``: what holds for a migration that says nothing.

        A whole number of milliseconds is an integer, as QEMU's clients read it.
        """
        with self._lock:
            default = {"downtime-limit": round(DowntimePolicy().limit_s * 1e3)}
            limits = {name: int(value) if value == int(value) else value for name, value in self._limits.items()}
            return default | limits | {"max-bandwidth": self._bandwidth}

    def set_capabilities(self, args: Arguments) -> None:
        """Take ``migrate-set-capabilities``: all of them or none.

        Raises:
            QmpError: a capability does not exist here, or cannot be changed.
        """
        wanted = [_capability(each) for each in args.array("capabilities")]
        args.done()
        for name, state in wanted:
            if name not in (_EVENTS, _HOLD):
                raise QmpError(f"no capability '{name}' here", hint=f"there are: {_EVENTS}, {_HOLD}")
            if name == _EVENTS and not state:
                raise QmpError("events are always sent")
        with self._lock:
            for name, state in wanted:
                self._hold = state if name == _HOLD else self._hold

    def capabilities(self) -> list[Json]:
        """Return the answer to ``query-migrate-capabilities``."""
        with self._lock:
            states = {_EVENTS: True, _HOLD: self._hold}
        return [{"capability": name, "state": state} for name, state in states.items()]

    def kept_for(self, policy: Any, *, saves: bool) -> Json:  # noqa: ANN401  # any JSON value
        """Return arguments of ``migrate`` that hold where it says nothing of them.

        Args:
            policy: that will decide, as it was sent; a user's own has limits of its own.
            saves: it is a save, which cannot be held.
        """
        takes = POLICIES[policy][1] if isinstance(policy, str) and policy in POLICIES else {}
        with self._lock:
            kept: Json = {}
            for name, value in self._limits.items():
                argument, option = _LIMITS[name]
                if option in takes:
                    kept[argument] = value / 1e3 if name == "downtime-limit" else value
            if self._bandwidth:
                kept["x-bandwidth"] = self._bandwidth
            if self._hold and not saves:
                kept["x-hold"] = True
        return kept


def limits_of_policy(given: Json) -> Json:
    """Return limits by the names of make_policy, in its units."""
    return {_LIMITS[name][1]: value / 1e3 if name == "downtime-limit" else value for name, value in given.items()}


def _capability(each: Any) -> tuple[str, bool]:  # noqa: ANN401  # any JSON value
    if not isinstance(each, dict):
        raise QmpError("Invalid parameter type for 'capabilities', expected: array of objects")
    args = Arguments(each)
    name, state = args.text("capability"), args.flag("state")
    args.done()
    return name, state
