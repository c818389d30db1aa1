"""Fault: one wrong step put in the place of a right one, in one machine or one migration and no longer than that."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from typing import Any, TypeVar

from pageferry.core.vm import VmConfig
from pageferry.kvm.trackers import Tracker
from pageferry.testing.conformance import DEFAULT_MEMORY_BYTES
from pageferry.testing.lab import MakeVm

ODD, BEHIND_THE_HOLE = DEFAULT_MEMORY_BYTES
_Inject = TypeVar("_Inject", bound=Callable[..., Any])


class Room(StrEnum):
    """Where a fault is injected, and so what finds it: the kit on that machine, or migrations.

    TRACKER: in front of a sound tracker, as :mod:`mutation.tracker_faults` has them.
    """

    TRACKER = "tracker"
    HYPERVISOR = "hypervisor"
    KVM = "kvm"
    UFFD = "uffd"
    ENGINE = "engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault.

    ``stands_for`` is the real bug, as ``project: what went wrong``; ``law`` the law that it breaks
    (docs/internals/laws.md), None for the plain meaning of an operator, or of save and load; ``found_by`` the checks
    that must find it, on the first try. ``inject`` breaks a machine that was just made, or is a broken class (see
    :mod:`.moving`). ``tracker`` is that machine's, by name or one of the fault's own, where it is not KVM's default;
    ``cpus`` is how many vCPUs it has.
    """

    name: str
    summary: str
    stands_for: str
    room: Room
    law: int | None
    found_by: tuple[str, ...]
    inject: Callable[..., Any]
    memory_bytes: int
    needs: str = ""
    tracker: str | Tracker = ""
    cpus: int = 1

    @property
    def on_kvm(self) -> bool:
        """Whether its machines are KVM's."""
        return self.room in (Room.KVM, Room.UFFD)

    @property
    def possible(self) -> bool:
        """Whether the implementation has what the fault breaks (``needs``, a module's name)."""
        return not self.needs or find_spec(self.needs) is not None


class Faults:
    """The faults of one room, collected by a decorator.

    Args:
        room: that room.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._faults: list[Fault] = []

    def __call__(
        self,
        stands_for: str,
        *,
        law: int | None,
        found_by: tuple[str, ...],
        memory_bytes: int = ODD,
        needs: str = "",
        tracker: str | Tracker = "",
        cpus: int = 1,
    ) -> Callable[[_Inject], _Inject]:
        """Register the decorated function or class; its name is the fault's, its docstring the summary."""

        def register(inject: _Inject) -> _Inject:
            name = re.sub(r"(?<!^)(?=[A-Z])|_", "-", inject.__name__).lower()
            fault = Fault(
                name=f"tracker-{name}" if self._room is Room.TRACKER else name,
                summary=(inject.__doc__ or "").partition("\n")[0],
                stands_for=stands_for,
                room=self._room,
                law=law,
                found_by=found_by,
                inject=inject,
                memory_bytes=memory_bytes,
                needs=needs,
                tracker=tracker,
                cpus=cpus,
            )
            self._faults.append(fault)
            return inject

        return register

    def all(self) -> tuple[Fault, ...]:
        """Return them in the order they were registered."""
        return tuple(self._faults)


def injected(make_vm: MakeVm, inject: Callable[..., Any]) -> MakeVm:
    """Return a maker of the same machines, each broken by ``inject`` before anything runs."""

    def make(config: VmConfig) -> Any:
        vm = make_vm(config)
        inject(vm)
        return vm

    return make
