"""Doorbells: a driver's notifications reach the host's side of a device while the vCPU goes on.

A store to a device's notification area is one to device space like any other: the vCPU leaves the guest, and the bus
finds the device. Where a machine has doorbells its kernel takes the store, and signals an eventfd. The device's thread,
which sleeps at it, looks at the queues then, as it does whenever it is woken. A signal that comes while the guest is
held is in no state: the threads look once more when the guest runs again, here or elsewhere.
"""

from typing import Protocol


class Doorbells(Protocol):
    """What a machine can do with a store to device space."""

    def install(self, gpa: int, event: int) -> bool:
        """Have a store of any size at ``gpa`` signal an eventfd and reach no device; tell whether it does now."""

    def remove(self, gpa: int, event: int) -> None:
        """Let stores at ``gpa`` reach their device again; it was installed so."""
