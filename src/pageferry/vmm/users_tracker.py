"""A user's own dirty tracker, named ``module:Name``; see docs/guide/trackers.md.

``Name`` is a :class:`pageferry.kvm.trackers.Tracker`, for KVM's machines, or anything that is called with a machine
and returns what implements :class:`pageferry.core.vm.LogDirty`. Its mistakes are told as its own.
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import PageferryError, UsageError, VmError
from pageferry.core.frames import GfnArray
from pageferry.core.machine import Machine
from pageferry.core.vm import LOG_DIRTY_MEMBERS, LogDirty, LogDirtyStats, VmConfig
from pageferry.devices.standard_machine import StandardMachine
from pageferry.kvm.trackers import Closeable, TrackedVm, Tracker

_Result = TypeVar("_Result")

_HINT = "see docs/guide/trackers.md"


def load_tracker(name: str) -> Tracker | Callable[[StandardMachine], LogDirty]:
    """Import a user's tracker.

    Args:
        name: ``module:Name``.

    Raises:
        UsageError: its module cannot be imported, or it is neither a Tracker nor can be called.
    """
    module, _, attribute = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a user's code does
        hint = f"a class in a module on PYTHONPATH; {_HINT}"
        raise UsageError(f"tracker {name!r} cannot be loaded: {error!r}", hint=hint) from error
    if isinstance(found, Tracker):
        return replace(found, make=lambda vm: _make(name, found.make, vm))
    if not callable(found):
        raise UsageError(f"tracker {name!r} is {found!r}: neither a Tracker nor a class that makes one", hint=_HINT)
    made_by: Callable[[StandardMachine], LogDirty] = found
    return made_by


def tracked_by(
    name: str, made_by: Callable[[StandardMachine], LogDirty], make_vm: Callable[[VmConfig], Machine]
) -> Callable[[VmConfig], StandardMachine]:
    """Return what makes the same machines with a user's tracker in the place of their own.

    Making one raises UsageError if the tracker cannot be made, or is not a tracker.
    """

    def make(config: VmConfig) -> StandardMachine:
        vm = make_vm(config)
        assert isinstance(vm, StandardMachine)
        try:
            vm.replace_tracker(_make(name, made_by, vm))
        except BaseException:
            vm.close()
            raise
        return vm

    return make


def _make(name: str, made_by: Callable[[Any], LogDirty], vm: StandardMachine | TrackedVm) -> "UsersTracker":
    try:
        log = made_by(vm)
    except PageferryError:
        raise
    except Exception as error:  # whatever a user's code does
        raise UsageError(f"tracker {name!r} cannot be made: {error!r}", hint=_HINT) from error
    if missing := [member for member in LOG_DIRTY_MEMBERS if not hasattr(log, member)]:
        raise UsageError(f"tracker {name!r} made {type(log).__name__}, which has no {', '.join(missing)}", hint=_HINT)
    return UsersTracker(name, log)


class UsersTracker:
    """A user's tracker, whose errors are told as such; implements :class:`pageferry.core.vm.LogDirty`.

    Args:
        name: ``module:Name``.
        log: the tracker.
    """

    def __init__(self, name: str, log: LogDirty) -> None:
        self._name = name
        self._log = log

    @property
    def tracker(self) -> str:
        """The name that it gives itself."""
        return self._log.tracker

    @property
    def enabled(self) -> bool:
        """Whether log-dirty is on."""
        return self._log.enabled

    def enable(self) -> None:
        """ENABLE."""
        self._ask("enable", self._log.enable)

    def peek(self) -> DirtyBitmap:
        """PEEK."""
        return self._bitmap("peek", self._ask("peek", self._log.peek))

    def clean(self) -> DirtyBitmap:
        """CLEAN."""
        return self._bitmap("clean", self._ask("clean", self._log.clean))

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of a range; the protocol has ValueError for a wrong range."""
        return self._bitmap("clean_range", self._ask("clean_range", lambda: self._log.clean_range(gfns), (ValueError,)))

    def off(self) -> None:
        """OFF."""
        self._ask("off", self._log.off)

    def mark(self, gfns: GfnArray) -> None:
        """Mark frames."""
        self._ask("mark", lambda: self._log.mark(gfns))

    def stats(self) -> LogDirtyStats:
        """Return the counters."""
        return self._ask("stats", self._log.stats)

    def close(self) -> None:
        """Close it if it can be closed."""
        if isinstance(self._log, Closeable):
            self._log.close()

    def _ask(self, what: str, call: Callable[[], _Result], promised: tuple[type[Exception], ...] = ()) -> _Result:
        try:
            return call()
        except PageferryError:
            raise
        except promised:
            raise
        except Exception as error:  # whatever a user's code does
            raise VmError(f"tracker {self._name} failed in {what}: {error!r}", hint=_HINT) from error

    def _bitmap(self, what: str, result: DirtyBitmap) -> DirtyBitmap:
        if not isinstance(result, DirtyBitmap):
            raise VmError(f"tracker {self._name} returned {result!r} from {what}, not a DirtyBitmap", hint=_HINT)
        return result
