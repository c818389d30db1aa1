"""Checks of virtio devices: a driver on the bus plays the guest, over a disk that the check plays."""

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from virtio_driver import VERSION_1, Pci, VirtioDriver, wait_until

from pageferry.core.device_spec import DeviceKind, DeviceSpec
from pageferry.core.vm import MachineModel
from pageferry.testing.conformance import Check, check_of
from pageferry.testing.lab import Lab, require

_SECTORS = 64
_IN = 0
#: RAM that no guest of the kit touches, and what of it the driver uses.
_BEGIN, _END = 0x10_0000, 0x20_0000
_TARGET, _STATUS, _HEADER = 0x13_0000, 0x13_1000, 0x13_2000
_RINGS = 0x14_0000
_COMMAND, _MEMORY, _MASTER, _NO_INTX = 4, 1 << 1, 1 << 2, 1 << 10
_PATIENCE_S = 60.0


@contextmanager
def with_disk(lab: Lab) -> Iterator[tuple[Lab, Path]]:
    """Return a lab whose machines are PCs with one disk, the same file; each sector holds its number."""
    with tempfile.TemporaryDirectory(prefix="pageferry-") as folder:
        path = Path(folder, "disk")
        path.write_bytes(b"".join(number.to_bytes(4, "little") * 128 for number in range(_SECTORS)))
        spec = DeviceSpec(kind=DeviceKind.DISK, backend=str(path))

        def make_vm(config: Any) -> Any:
            return lab.make_vm(replace(config, machine=MachineModel.PC, devices=(spec,)))

        yield replace(lab, make_vm=make_vm), path


class _Reader:
    """A guest's driver, which reads sectors one by one."""

    def __init__(self, vm: Any) -> None:
        self.driver = VirtioDriver(vm.platform.bus, vm.memory, 1)
        self._memory = vm.memory

    def begin(self) -> None:
        """Set the device up, with a small queue, so that its indices pass its end."""
        self.driver._area_start = _RINGS
        require(self.driver.begin(VERSION_1, sizes={0: 4}), "the disk takes no driver")
        self.driver.pci.write(_COMMAND, 2, _MEMORY | _MASTER | _NO_INTX)  # the guest has no handler

    def ask(self, sector: int) -> None:
        """Ask for a sector, whose first bytes become other ones; the device is not told, but may see it by itself."""
        self._memory.write(_HEADER, _IN.to_bytes(8, "little") + sector.to_bytes(8, "little"))
        self._memory.write(_TARGET, b"\xff" * 512)
        self.driver.rings[0].add([(_HEADER, 16)], [(_TARGET, 512), (_STATUS, 1)])

    def answer(self) -> tuple[list[tuple[int, int]], bytes]:
        """Let the device work; return what it gave back, and what it wrote."""
        self.driver.rings[0].notify()
        return self.driver.rings[0].wait(), self._memory.read(_TARGET, 4)

    def memory(self) -> bytes:
        """Return all that is the driver's."""
        data: bytes = self._memory.read(_BEGIN, _END - _BEGIN)
        return data

    def go_on(self, vm: Any, memory: bytes) -> None:
        """Be the driver of the same device on another machine, with that memory; the device does what waits."""
        vm.memory.write(_BEGIN, memory)
        driver = self.driver
        driver.bus, driver.memory, driver.pci = vm.platform.bus, vm.memory, Pci(vm.platform.bus, 1)
        driver.rings[0].memory = self._memory = vm.memory
        vm.resume()
        vm.release_backends()

    def answered(self) -> tuple[list[tuple[int, int]], bytes]:
        """Return what the device gave back by itself, and what it wrote."""
        return self.driver.rings[0].collect(), self._memory.read(_TARGET, 4)


def disk_moves(lab: Lab) -> None:
    """A disk that was at work goes on elsewhere where it was: it answers what was asked, once, in the same rings."""
    with with_disk(lab) as (pcs, _), pcs.guest("idle") as here, pcs.guest("idle") as there:
        reader = _Reader(here.vm)
        here.vm.resume()
        reader.begin()
        for sector in range(6):
            reader.ask(sector)
            reader.answer()
        here.vm.pause()
        reader.ask(7)
        there.vm.load_state(here.vm.save_state())
        here.vm.release_backends()
        reader.go_on(there.vm, reader.memory())
        used, data = reader.answered()
        require([length for _, length in used] == [513], f"the disk gave back {used} after the move")
        require(data == (7).to_bytes(4, "little"), f"the disk wrote {data!r} after the move")
        require(not reader.driver.broken, "the disk needs a reset after the move")


def disk_finishes_before_a_freeze_holds(lab: Lab) -> None:
    """A request that is in flight at a freeze is answered, here or elsewhere, once."""
    with with_disk(lab) as (pcs, _), pcs.guest("idle") as here, pcs.guest("idle") as there:
        reader = _Reader(here.vm)
        here.vm.resume()
        reader.begin()
        port = _port_of(here.vm)
        disk = port.disk
        sound, begun, saved = disk.read, threading.Event(), threading.Event()

        def read(views: Any, offset: int) -> None:
            begun.set()
            # The state is only saved meanwhile where the freeze does not wait for this.
            wait_until(lambda: saved.is_set() or port._waiting)
            sound(views, offset)

        disk.read = read
        reader.ask(5)
        reader.driver.rings[0].notify()
        require(begun.wait(_PATIENCE_S), "the disk was not asked")
        here.vm.freeze()
        there.vm.load_state(here.vm.save_state())
        memory = reader.memory()
        saved.set()
        here.vm.release_backends()
        reader.go_on(there.vm, memory)
        used, data = reader.answered()
        require([length for _, length in used] == [513], f"the disk gave back {used} of what was in flight")
        require(data == (5).to_bytes(4, "little"), f"the disk wrote {data!r} of what was in flight")


def disk_marks_after_the_write(lab: Lab) -> None:
    """What a disk reads into memory is dirty after a CLEAN that comes in the middle of the transfer."""
    with with_disk(lab) as (pcs, _), pcs.guest("idle") as guest:
        reader = _Reader(guest.vm)
        guest.vm.resume()
        reader.begin()
        disk = _port_of(guest.vm).disk
        sound, log_dirty = disk.read, guest.log_dirty

        def read(views: Any, offset: int) -> None:
            log_dirty.clean()
            sound(views, offset)

        disk.read = read
        log_dirty.enable()
        reader.ask(5)
        _, data = reader.answer()
        require(data == (5).to_bytes(4, "little"), "the disk read nothing")
        dirty = log_dirty.peek()
        require(bool(dirty.test(_TARGET >> 12)), "the page that the disk wrote is clean")


def _port_of(vm: Any) -> Any:
    (_, port), *_ = vm.virtio._disks
    return port


CHECKS: tuple[Check, ...] = (
    check_of(None, disk_moves),
    check_of(None, disk_finishes_before_a_freeze_holds),
    check_of(4, disk_marks_after_the_write),
)
