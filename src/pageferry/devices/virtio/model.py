"""A kind of virtio device as its transport sees it: identity, features, queues, and how it serves them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pageferry.devices.virtio.queue import SplitQueue


@dataclass(slots=True)
class Driver:
    """The settings of the guest's driver: the features in use, and the queues."""

    features: int
    queues: Sequence[SplitQueue]

    def has(self, feature: int) -> bool:
        """Tell whether the feature bit of this number is in use."""
        return bool(self.features >> feature & 1)


class VirtioModel(Protocol):
    """One device without its transport. Methods are called with the device bus's lock held."""

    @property
    def name(self) -> str:
        """Its key among the devices of the guest."""

    @property
    def device_id(self) -> int:
        """Its type, as section 5 numbers them."""

    @property
    def pci_class(self) -> int:
        """Base class, subclass and interface, 24 bits."""

    @property
    def features(self) -> int:
        """What it offers besides the features of the ring and the transport: bits 0 to 23, and 50 up."""

    @property
    def queue_sizes(self) -> tuple[int, ...]:
        """Most entries of each queue."""

    @property
    def config(self) -> bytes:
        """Its configuration, which drivers only read."""

    def serve(self, index: int, driver: Driver) -> None:
        """Do what there is to do with a queue: its driver has notified, or the host has something for it.

        Raises:
            VmError: the driver broke the rules; the device needs a reset.
        """

    def reset(self) -> None:
        """Forget the driver."""

    def save(self) -> bytes:
        """Return what is its own; the queues are the transport's."""

    def load(self, data: bytes) -> None:
        """Replace what is its own.

        Raises:
            VmError: it cannot be that.
        """
