"""A machine whose guest runs in this process: the narrow waist, and run control, console and sync points besides.

``vmm`` and the conformance kit use these. The engine does not, and a guest of another hypervisor does not have them.
"""

from collections.abc import Callable
from typing import Protocol

from pageferry.core.vm import Vm, VmStatus


class RunControlled(Protocol):
    """The user's pause, and the vCPUs' threads. Methods may be called from any thread but a vCPU's own."""

    @property
    def vcpu_threads(self) -> tuple[int | None, ...]:
        """The kernel's ids of the threads that run the vCPUs, in index order; None for one that has never run."""

    def pause(self) -> None:
        """Stop every vCPU at an instruction boundary with no I/O under way; returns when all have stopped.

        ``resume`` undoes it. Nothing happens when the guest is not running.
        """

    def wait(self, timeout_s: float | None = None) -> VmStatus:
        """Wait until the guest is not running (paused, at a sync point, or ended); return the status then."""


class Console(Protocol):
    """The guest's serial console."""

    def on_console(self, sink: Callable[[bytes], None] | None) -> None:
        """Send the guest's console output to ``sink``, byte by byte, on the vCPU's thread; None drops it."""

    def type_console(self, data: bytes) -> int:
        """Give the guest console input, from any thread; return how many bytes were taken, the first ones.

        Fewer than all when the guest does not read; none while it is frozen: what is taken is in the saved state.
        """


class PowerButton(Protocol):
    """The guest's power button."""

    def press_power_button(self) -> None:
        """Ask the guest's operating system to shut down, from any thread; one that is paused finds out later.

        Raises:
            VmError: it does not listen, or is being moved.
        """


class SyncPoints(Protocol):
    """Points where a guest of the guest ABI stops until the host has answered; for tests."""

    def attach_sync(self, attached: bool) -> None:
        """Decide whether sync points pause the guest (True) or are passed over (False, as at first)."""

    def sync_value(self) -> int | None:
        """Return the value the guest gave at the sync point where it is paused now, else None."""

    def reply_sync(self, value: int) -> None:
        """Answer the sync point where the guest is paused: its next read of the sync port gives ``value`` (u32)."""


class Machine(Vm, RunControlled, Console, PowerButton, SyncPoints, Protocol):
    """All that this process can do with a guest that it runs."""
