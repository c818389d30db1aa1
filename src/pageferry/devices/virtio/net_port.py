"""NetPort: the host's side of one network device: its link, and the pump that carries frames both ways."""

import logging
from collections.abc import Callable
from functools import partial

from pageferry.backends.link import Link, rarp
from pageferry.backends.pump import Pump
from pageferry.devices.bus import DeviceBus
from pageferry.devices.doorbells import Doorbells
from pageferry.devices.virtio.net import RECEIVE, TRANSMIT, VirtioNet
from pageferry.devices.virtio.transport import VirtioPci

_log = logging.getLogger(__name__)

#: When the network is told again where the guest is, after it was told at once: a bridge's port takes a while to open.
_ANNOUNCEMENTS_S = (0.05, 0.2, 0.45, 0.8)


class NetPort:
    """The port; claimed and released as what stands behind a device.

    Args:
        link: to the network.
        mac: the guest's address.
        bus: the guest's.
        held: tells whether the guest stands still.
    """

    def __init__(self, link: Link, mac: bytes, bus: DeviceBus, held: Callable[[], bool]) -> None:
        self.mac = mac
        self.link = link
        self._bus = bus
        self._held = held
        self._pump: Pump | None = None
        self._model: VirtioNet | None = None
        self._function: VirtioPci | None = None

    def connect(self, model: VirtioNet, function: VirtioPci) -> None:
        """Be the port of a device; before anything else."""
        self._model, self._function = model, function
        take, announce = partial(self._take, model, function), self._announce
        self._pump = Pump(f"{model.name}-frames", take, announce=announce, pauses_s=_ANNOUNCEMENTS_S)

    def use_doorbells(self, doorbells: Doorbells) -> None:
        """Have the driver wake the pump by itself where the machine can; before anything runs."""
        assert self._function is not None
        assert self._pump is not None
        self._function.use_doorbells(doorbells, self._pump.event)

    def wake(self) -> None:
        """Look again whether frames can be carried, on the pump's thread."""
        if self._pump is not None:
            self._pump.wake()

    def claim(self) -> None:
        """Take the link, tell the network where the guest is, and begin to carry frames.

        Raises:
            VmError: another process has the link.
        """
        self.link.claim()
        if self._model is not None and self._pump is not None:
            self._model.reconnected()
            self._pump.start(self.link.fileno())

    def release(self) -> None:
        """Carry no more, and give the link back."""
        if self._pump is not None:
            self._pump.stop()
        self.link.release()

    def close(self) -> None:
        """Let go of everything. May be called twice."""
        if self._pump is not None:
            self._pump.close()
        self.link.close()

    def _take(self, model: VirtioNet, function: VirtioPci) -> bool:
        with self._bus.locked():
            if self._held():
                return False
            function.work(TRANSMIT, model.transmit)
            function.serve(RECEIVE)
            return function.live and model.has_room

    def _announce(self) -> None:
        with self._bus.locked():
            try:
                self.link.send([memoryview(rarp(self.mac))])
            except OSError as error:
                _log.debug("the network was not told where %s is: %s", self.mac.hex(":"), error)
