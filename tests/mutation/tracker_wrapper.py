"""Machines with another tracker in front of their own: how a fault is injected."""

from typing import Any, cast

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.frames import GfnArray
from pageferry.core.machine import Machine
from pageferry.core.vm import LogDirty, LogDirtyStats, VmConfig
from pageferry.testing.lab import MakeVm

WINDOW_S = 2.0
"""How long a fault that is a race gives another thread for what that is sure to do soon."""


class Faithful:
    """A tracker that passes everything on, as it should be: the base of the faults.

    CLEAN is here the CLEAN of all frames: a fault in ``clean_range`` is a fault of both.
    """

    def __init__(self, vm: Machine) -> None:
        self._vm = vm
        self._sound: LogDirty = vm.log_dirty

    @property
    def tracker(self) -> str:
        """The name of the tracker behind, and of the fault."""
        return f"{self._sound.tracker}, {type(self).__name__}"

    @property
    def enabled(self) -> bool:
        """As the tracker behind says."""
        return self._sound.enabled

    def enable(self) -> None:
        """ENABLE."""
        self._sound.enable()

    def peek(self) -> DirtyBitmap:
        """PEEK."""
        return self._sound.peek()

    def clean(self) -> DirtyBitmap:
        """CLEAN."""
        return self.clean_range(range(self._vm.memory.gfn_limit))

    def clean_range(self, gfns: range) -> DirtyBitmap:
        """CLEAN of a range."""
        return self._sound.clean_range(gfns)

    def off(self) -> None:
        """OFF."""
        self._sound.off()

    def mark(self, gfns: GfnArray) -> None:
        """Mark frames."""
        self._sound.mark(gfns)

    def stats(self) -> LogDirtyStats:
        """Return the counters."""
        return self._sound.stats()


class _MutantVm:
    """A machine whose tracker is another; everything else is the machine's own."""

    def __init__(self, vm: Machine, log_dirty: LogDirty) -> None:
        self._vm = vm
        self.log_dirty = log_dirty

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vm, name)


def mutated(make_vm: MakeVm, fault: type[Faithful]) -> MakeVm:
    """Return a maker of the same machines with one fault in their trackers."""

    def make(config: VmConfig) -> Machine:
        vm = make_vm(config)
        log_dirty = fault(vm)
        vm.memory.on_write(log_dirty.mark)
        return cast(Machine, _MutantVm(vm, log_dirty))

    return make
