"""VirtioDevices: the virtio devices of one PC, the PCI bus that they are on, and what stands behind them on this host.

What stands behind a device is opened when the machine is made, and belongs to this process from :meth:`claim` to
:meth:`release` only: so a machine can be made for a guest that still runs elsewhere.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from pageferry.backends.disk import DiskFile
from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import DeviceKind, DeviceSpec
from pageferry.devices.bus import Device
from pageferry.devices.pci import SLOTS, PciHost, WiredOr, bar_of_slot, irq_of_slot
from pageferry.devices.virtio.blk import VirtioBlk
from pageferry.devices.virtio.model import VirtioModel
from pageferry.devices.virtio.queue import SplitQueue
from pageferry.devices.virtio.transport import VirtioPci

_log = logging.getLogger(__name__)


class Backend(Protocol):
    """What stands behind one device; opened, and not this process's to use before it was claimed."""

    def claim(self) -> None:
        """Take it. Nothing happens when it is taken already.

        Raises:
            VmError: somebody else has it.
        """

    def release(self) -> None:
        """Give it back, with all done that was asked of it. Nothing happens when it is not taken.

        Raises:
            OSError: something could not be done; it is taken still.
        """

    def close(self) -> None:
        """Let go of it for good. May be called twice."""


class VirtioDevices:
    """The devices; see the module's text. ``devices`` is what hangs on the bus, in this order.

    Args:
        specs: what the guest has, in the order of slots, from 1 on.
        memory: the guest's.
        set_line: sets the level of an ISA IRQ; called with the bus's lock held.

    Raises:
        UsageError: something that a device needs is not there.
        UnsupportedError: there are more devices than slots.
    """

    def __init__(self, specs: Sequence[DeviceSpec], memory: GuestMemory, set_line: Callable[[int, bool], None]) -> None:
        if len(specs) >= SLOTS:
            raise UnsupportedError("devices", f"a PC has room for {SLOTS - 1} virtio devices, not {len(specs)}")
        self._memory = memory
        self._backends: list[tuple[str, Backend]] = []
        self._lines = {irq: WiredOr(_line(set_line, irq)) for irq in {irq_of_slot(slot) for slot in range(SLOTS)}}
        self.specs: tuple[DeviceSpec, ...] = ()
        """As given, with what was found out about them here."""
        ordinals: Counter[DeviceKind] = Counter()
        functions = []
        try:
            for slot, spec in enumerate(specs, 1):
                model = self._model(f"{spec.kind}{ordinals[spec.kind]}", spec)
                ordinals[spec.kind] += 1
                functions.append(self._function(slot, model))
        except BaseException:
            self.close()
            raise
        self.devices: tuple[Device, ...] = (PciHost(functions), *functions)

    def _model(self, name: str, spec: DeviceSpec) -> VirtioModel:
        match spec.kind:
            case DeviceKind.DISK:
                disk = DiskFile(Path(spec.backend), readonly=spec.readonly)
                self._backends.append((name, disk))
                if spec.size_bytes not in (0, disk.size_bytes):
                    raise VmError(f"{name} of the guest has {spec.size_bytes} bytes, {disk.path} {disk.size_bytes}")
                self.specs += (replace(spec, size_bytes=disk.size_bytes),)
                return VirtioBlk(name, self._memory, disk)
        raise UnsupportedError(spec.kind, f"there is no device {spec.kind} here")

    def _function(self, slot: int, model: VirtioModel) -> VirtioPci:
        queues = tuple(SplitQueue(self._memory, size) for size in model.queue_sizes)
        irq = irq_of_slot(slot)
        return VirtioPci(model, queues, bar_gpa=bar_of_slot(slot), irq=irq, line=self._lines[irq].pin())

    def claim(self) -> None:
        """Take all that stands behind the devices. Nothing happens when it is taken already.

        Raises:
            VmError: somebody else has a part of it; none is taken that was not before.
        """
        taken: list[Backend] = []
        try:
            for _, backend in self._backends:
                backend.claim()
                taken.append(backend)
        except BaseException:
            for backend in taken:
                backend.release()
            raise

    def release(self) -> None:
        """Give back all that stands behind the devices, which do nothing any more; no vCPU is inside the guest.

        Raises:
            VmError: something of it could not be finished; what was given back can be claimed again.
        """
        for name, backend in self._backends:
            try:
                backend.release()
            except OSError as error:
                raise VmError(f"{name} could not be given back: {error.strerror}") from error

    def close(self) -> None:
        """Let go of all that stands behind the devices."""
        for _, backend in self._backends:
            backend.close()


def _line(set_line: Callable[[int, bool], None], irq: int) -> Callable[[bool], None]:
    return lambda level: set_line(irq, level)
