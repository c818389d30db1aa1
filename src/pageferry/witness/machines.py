"""Machines whose tracker has a witness, of each kind."""

from collections.abc import Callable

from pageferry.core.errors import UnsupportedError
from pageferry.core.vm import LogDirty, VmConfig
from pageferry.devices.standard_machine import StandardMachine
from pageferry.kvm.fds import VmFd
from pageferry.kvm.trackers import TRACKERS, TrackedVm, Tracker, find_tracker
from pageferry.witness import DIGESTS
from pageferry.witness.cross_check import CrossCheck


def with_witness(primary_name: str | Tracker, witness_name: str) -> Tracker:
    """Return a tracker of KVM's with a witness.

    Args:
        primary_name: the tracker, which the engine uses: a name, or one of one's own.
        witness_name: another tracker, or ``digests``.

    Raises:
        UnsupportedError: there is no such tracker, or the two cannot be on at once.
    """
    primary = find_tracker(primary_name)
    if witness_name == DIGESTS:
        return Tracker(
            prepare=primary.prepare, make=lambda vm: _against(vm, primary, None), own_mapping=primary.own_mapping
        )
    witness = find_tracker(witness_name)
    if primary.own_mapping == witness.own_mapping:  # two of KVM's own logs, or two that protect one mapping
        others = [name for name, other in TRACKERS.items() if other.own_mapping != primary.own_mapping]
        called = primary_name if isinstance(primary_name, str) else "your tracker"
        raise UnsupportedError(
            "oracle",
            f"{called} and {witness_name} cannot be on at once",
            hint=f"--oracle {DIGESTS}, or one of {', '.join(others)}",
        )

    def prepare(vm: VmFd) -> None:
        primary.prepare(vm)
        witness.prepare(vm)

    return Tracker(prepare=prepare, make=lambda vm: _against(vm, primary, witness), own_mapping=True)


def _against(vm: TrackedVm, primary: Tracker, witness: Tracker | None) -> LogDirty:
    first = primary.make(vm)
    try:
        second = None if witness is None else witness.make(vm)
    except BaseException:
        CrossCheck(first, None, vm.memory, still=lambda: False).close()
        raise
    return CrossCheck(first, second, vm.memory, still=lambda: vm.run_control.still)


def with_digests(make_vm: Callable[[VmConfig], StandardMachine]) -> Callable[[VmConfig], StandardMachine]:
    """Return what makes the same machines, their tracker with digests for a witness."""

    def make(config: VmConfig) -> StandardMachine:
        vm = make_vm(config)
        vm.replace_tracker(CrossCheck(vm.log_dirty, None, vm.memory, still=lambda: vm.run_control.still))
        return vm

    return make
