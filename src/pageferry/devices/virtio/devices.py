"""VirtioDevices: the virtio devices of one PC, the PCI bus that they are on, and what stands behind them on this host.

What stands behind a device is opened when the machine is made, and belongs to this process from :meth:`claim` to
:meth:`release` only: so a machine can be made for a guest that still runs elsewhere.

**Who touches guest memory when.** A vCPU's notification is served on its own thread, or wakes that of a disk or network
(:mod:`pageferry.devices.doorbells`); what comes from a network, on a :class:`~pageferry.backends.pump.Pump`'s. All of
them hold the bus's lock, and the threads look under it whether the guest is held. So once a freeze holds and that lock
was free, nothing here touches memory but what a disk has in flight (:mod:`.disk_port`), which is waited for; frames
wait in the link meanwhile::

    pump                          freeze
    takes the bus's lock          .
    not held: hands frames over   holds the guest, waits for its vCPUs
    .                             waits for the lock
    gives the lock back           .
    takes the lock: held, sleeps  returns: memory stands still
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from pageferry.backends.disk import DiskFile
from pageferry.backends.link import open_link
from pageferry.core.device_spec import (
    MAX_DEVICES,
    SPECS_NAME,
    DeviceKind,
    DeviceSpec,
    decode_specs,
    device_names,
    encode_specs,
)
from pageferry.core.errors import UnsupportedError, UsageError, VmError
from pageferry.core.memory import GuestMemory
from pageferry.core.run import Effect
from pageferry.devices.bus import DeviceBus
from pageferry.devices.doorbells import Doorbells
from pageferry.devices.pci import ConfigAddress, ConfigData, bar_of_slot, irq_of_slot
from pageferry.devices.virtio.balloon import VirtioBalloon
from pageferry.devices.virtio.blk import VirtioBlk
from pageferry.devices.virtio.console import RECEIVE, VirtioConsole
from pageferry.devices.virtio.disk_port import DiskPort
from pageferry.devices.virtio.model import VirtioModel
from pageferry.devices.virtio.net import VirtioNet
from pageferry.devices.virtio.net_port import NetPort
from pageferry.devices.virtio.queue import SplitQueue
from pageferry.devices.virtio.rng import VirtioRng
from pageferry.devices.virtio.transport import VirtioPci

_MAC = re.compile("[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_GROUP_ADDRESS = 1


class Backend(Protocol):
    """A disk or network of this host for one device; opened, but not to be used before it is claimed."""

    def claim(self) -> None:
        """Take it. Nothing happens when it is taken already.

        Raises:
            VmError: another process has it.
        """

    def release(self) -> None:
        """Give it back, with all done that was asked of it. Nothing happens when it is not taken.

        Raises:
            OSError: something could not be done; it is taken still.
        """

    def close(self) -> None:
        """Let go of it for good. May be called twice."""


class SpecList:
    """The list of the guest's devices, as a state of its own: it tells a restore what to make.

    Args:
        specs: as they are here.
    """

    name = SPECS_NAME
    ports = mmio = range(0)

    def __init__(self, specs: tuple[DeviceSpec, ...]) -> None:
        self._specs = specs

    def read(self, offset: int, size: int) -> int:
        """Nothing to read."""
        return 0

    def write(self, offset: int, size: int, value: int) -> Effect | None:
        """Nothing to write."""
        return None

    def save(self) -> bytes:
        """Return the specs."""
        return encode_specs(self._specs)

    def load(self, data: bytes) -> None:
        """Check that the guest has these devices, whatever stands behind them.

        Raises:
            VmError: it has others.
        """
        try:
            theirs = decode_specs(data)
        except ValueError as error:
            raise VmError(f"the state of device {self.name} is not a list of devices: {error}") from error
        if [replace(spec, backend="") for spec in theirs] != [replace(spec, backend="") for spec in self._specs]:
            names = [", ".join(device_names(specs)) or "none" for specs in (theirs, self._specs)]
            raise VmError(f"the guest's virtio devices ({names[0]}) are not this machine's ({names[1]})")


class VirtioDevices:
    """The devices; see the module's text.

    Args:
        specs: what the guest has, in the order of slots, from 1 on.
        memory: the guest's.
        bus: the guest's.
        held: tells whether the guest stands still, so that no memory of it may be touched.

    Raises:
        UsageError: something that a device needs is not there.
        UnsupportedError: there are more devices than slots, or a kind that is not known here.
    """

    def __init__(
        self, specs: Sequence[DeviceSpec], memory: GuestMemory, bus: DeviceBus, held: Callable[[], bool]
    ) -> None:
        if len(specs) > MAX_DEVICES:
            raise UnsupportedError("devices", f"a PC has room for {MAX_DEVICES} virtio devices, not {len(specs)}")
        self._memory = memory
        self._bus = bus
        self._held = held
        self._backends: list[tuple[str, Backend]] = []
        self._ports: list[NetPort | DiskPort] = []
        self._disks: list[tuple[str, DiskPort]] = []
        self._consoles: list[tuple[VirtioConsole, VirtioPci]] = []
        self.specs: tuple[DeviceSpec, ...] = ()
        """As given, with what was found out about them here."""
        self._functions: list[VirtioPci] = []
        try:
            for slot, (name, spec) in enumerate(zip(device_names(tuple(specs)), specs, strict=True), 1):
                self._functions.append(self._make(name, spec, slot))
        except BaseException:
            self.close()
            raise

    def plug_in(self) -> None:
        """Add a PCI bus with the devices to the guest's bus."""
        address = ConfigAddress()
        self._bus.add(address, SpecList(self.specs), *self._functions)
        self._bus.add_regions(ConfigData(address, self._functions))

    def use_doorbells(self, doorbells: Doorbells) -> None:
        """Have drivers wake the threads of their devices by themselves; before anything runs."""
        for port in self._ports:
            port.use_doorbells(doorbells)

    # -- making them -------------------------------------------------------------------------------------------------

    def _make(self, name: str, spec: DeviceSpec, slot: int) -> VirtioPci:
        match spec.kind:
            case DeviceKind.DISK:
                return self._make_disk(name, spec, slot)
            case DeviceKind.NET:
                return self._make_net(name, spec, slot)
            case DeviceKind.CONSOLE:
                console = VirtioConsole(name, self._memory)
                function = self._function(console, slot)
                self._consoles.append((console, function))
            case DeviceKind.RNG:
                function = self._function(VirtioRng(name, self._memory, os.urandom), slot)
            case DeviceKind.BALLOON:
                function = self._function(VirtioBalloon(name, self._memory), slot)
            case _:
                raise UnsupportedError("device", f"there is no device {spec.kind!r} here, which the guest has")
        self.specs += (spec,)
        return function

    def _make_disk(self, name: str, spec: DeviceSpec, slot: int) -> VirtioPci:
        disk = DiskFile.named(spec.backend, readonly=spec.readonly)
        port = DiskPort(disk, self._bus, self._held)
        self._backends.append((name, port))
        if spec.size_bytes not in (0, disk.size_bytes):
            raise UsageError(
                f"{name} of the guest has {spec.size_bytes} bytes, {disk.path} has {disk.size_bytes}",
                hint=f"name the guest's own disk: --disk {name.removeprefix(spec.kind)}=PATH",
            )
        self.specs += (replace(spec, size_bytes=disk.size_bytes),)
        model = VirtioBlk(name, self._memory, disk, on_requests=port.wake, on_reset=port.abandon)
        function = self._function(model, slot)
        port.connect(model, function)
        self._ports.append(port)
        self._disks.append((name, port))
        return function

    def _make_net(self, name: str, spec: DeviceSpec, slot: int) -> VirtioPci:
        mac = _mac(name, spec.mac)
        port = NetPort(open_link(spec.backend), mac, self._bus, self._held)
        self._backends.append((name, port))
        self._ports.append(port)
        model = VirtioNet(name, self._memory, port.link, mac=mac, wake=port.wake)
        function = self._function(model, slot)
        port.connect(model, function)
        self.specs += (spec,)
        return function

    def _function(self, model: VirtioModel, slot: int) -> VirtioPci:
        queues = tuple(SplitQueue(self._memory, size) for size in model.queue_sizes)
        irq = irq_of_slot(slot)
        return VirtioPci(model, queues, bar_gpa=bar_of_slot(slot), irq=irq, line=self._bus.lines.line(irq))

    # -- whose they are ----------------------------------------------------------------------------------------------

    def claim(self) -> None:
        """Take all that stands behind the devices. Nothing happens when it is taken already.

        Raises:
            VmError: another process has a part of it; nothing is taken then.
        """
        try:
            for _, backend in self._backends:
                backend.claim()
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give back all that stands behind the devices; no vCPU is inside the guest. :meth:`claim` takes it again.

        Raises:
            VmError: a part of it could not be finished.
        """
        for name, backend in self._backends:
            try:
                backend.release()
            except OSError as error:
                raise VmError(f"what was written to {name} is not on the disk: {error.strerror}") from error

    def close(self) -> None:
        """Let go of all that stands behind the devices. May be called twice."""
        for _, backend in self._backends:
            backend.close()

    # -- what the host does ------------------------------------------------------------------------------------------

    def finish(self, patience_s: float) -> None:
        """Return when no request that was in flight still is; the guest is held, so that none begins.

        Raises:
            VmError: a disk has not ended one in so long.
        """
        for name, port in self._disks:
            if not port.finish(patience_s):
                raise VmError(
                    f"{name} has not ended a request of the guest in {patience_s:.0f} s",
                    hint="check the storage under its disk; the guest cannot be paused before that answers",
                )

    def wake(self) -> None:
        """Hand the guest, which may run again, what came meanwhile, and do what it has asked for."""
        for port in self._ports:
            port.wake()
        if self._consoles:
            with self._bus.locked():
                self._serve_consoles()

    def _serve_consoles(self) -> None:
        if not self._held():
            for _, function in self._consoles:
                function.serve(RECEIVE)

    def on_console(self, sink: Callable[[bytes], None] | None) -> None:
        """Set who sees what the guest writes to its virtio consoles."""
        for console, _ in self._consoles:
            console.sink = sink

    def type(self, data: bytes) -> int | None:
        """Give input to the first virtio console that a driver runs; return how many bytes were taken.

        The bus is locked, and the guest not frozen; what is typed while it is paused waits.

        Returns:
            None: the guest has no such console.
        """
        for console, function in self._consoles:
            if function.live:
                taken = console.type(data)
                self._serve_consoles()
                return taken
        return None


def _mac(name: str, text: str) -> bytes:
    """Return the bytes of a station's address.

    Raises:
        UsageError: it is not an address of one station.
    """
    address = bytes.fromhex(text.replace(":", "")) if _MAC.fullmatch(text) else b""
    if not address or address[0] & _GROUP_ADDRESS:
        raise UsageError(f"{text!r} is not an address for {name}", hint="as 52:54:00:12:34:56")
    return address
