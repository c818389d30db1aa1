"""A disk's requests are done on a thread of its own: what waits for them, and what does not."""

import struct
import threading
from pathlib import Path

import pytest
from virtio_driver import VERSION_1, VirtioDriver, wait_until

from pageferry.core.errors import VmError
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.devices.bus import DeviceBus
from pageferry.devices.pci import ConfigAddress, ConfigData, bar_of_slot, irq_of_slot
from pageferry.devices.virtio.blk import VirtioBlk
from pageferry.devices.virtio.disk_port import DiskPort
from pageferry.devices.virtio.queue import SplitQueue
from pageferry.devices.virtio.transport import VirtioPci
from pageferry.hypervisor.domain import Domain

PATIENCE_S = 60


class SlowDisk:
    """A disk of zeros that reads when it is let."""

    path = Path("slow")
    size_bytes = 1 << 20
    readonly = False

    def __init__(self):
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.full = self.claimed = False

    def read(self, views, offset):
        self.begun.release()
        assert self.go.acquire(timeout=PATIENCE_S)
        for view in views:
            view[:] = b"\5" * len(view)

    def claim(self):
        self.claimed = True

    def release(self):
        if self.full:
            raise OSError("no space")
        self.claimed = False

    def close(self):
        self.claimed = False


class Slow:
    """A machine with that disk, and its driver."""

    def __init__(self):
        self.memory, self.bus, self.disk = GuestMemory.linear(4 << 20), DeviceBus(), SlowDisk()
        self.bus.use_lock(threading.RLock())
        self.held = False
        self.port = DiskPort(self.disk, self.bus, lambda: self.held)
        model = VirtioBlk("disk0", self.memory, self.disk, on_requests=self.port.wake, on_reset=self.port.abandon)
        queues = tuple(SplitQueue(self.memory, size) for size in model.queue_sizes)
        line = self.bus.lines.line(irq_of_slot(1))
        self.function = VirtioPci(model, queues, bar_gpa=bar_of_slot(1), irq=irq_of_slot(1), line=line)
        self.port.connect(model, self.function)
        address = ConfigAddress()
        self.bus.add(address, self.function)
        self.bus.add_regions(ConfigData(address, [self.function]))
        self.driver = VirtioDriver(self.bus, self.memory, 1)
        assert self.driver.begin(VERSION_1)
        self.ring = self.driver.rings[0]
        self.port.claim()

    def ask(self):
        """Ask for a sector; return where it will be."""
        header, data, status = self.driver.area.take(16), self.driver.area.take(512), self.driver.area.take(1)
        self.memory.write(header, struct.pack("<IIQ", 0, 0, 0))
        self.ring.add([(header, 16)], [(data, 512), (status, 1)])
        self.ring.notify()
        return data

    def begun(self):
        """Wait until the disk was asked."""
        assert self.disk.begun.acquire(timeout=PATIENCE_S)


@pytest.fixture
def slow():
    made = Slow()
    yield made
    made.disk.go.release(100)
    made.port.close()


def test_a_slow_request_holds_up_no_access_to_a_device(slow):
    data = slow.ask()
    slow.begun()
    assert slow.driver.config(0, 8) == slow.disk.size_bytes // 512
    slow.ask()
    assert not slow.ring.collect()
    slow.disk.go.release(2)
    assert slow.ring.wait()
    assert slow.memory.read(data, 512) == b"\5" * 512


def test_what_is_in_flight_is_waited_for_and_what_is_behind_it_stays_in_the_queue(slow):
    slow.ask(), slow.ask()
    slow.begun()
    slow.held = True
    assert not slow.port.finish(0)
    slow.disk.go.release(2)
    assert slow.port.finish(PATIENCE_S)
    assert len(slow.ring.collect()) == 1
    assert slow.function.driver.queues[0].waiting() == 1
    slow.port.wake()
    slow.port.release()
    assert not slow.ring.collect()
    slow.held = False
    slow.port.claim()
    assert len(slow.ring.wait()) == 1


def test_a_driver_that_resets_its_device_waits_and_gets_no_answer(slow):
    slow.ask()
    slow.begun()
    resets = threading.Thread(target=setattr, args=(slow.driver, "status", 0))
    resets.start()
    wait_until(lambda: slow.port._waiting)  # the reset itself, after accesses that find the device
    slow.disk.go.release()
    resets.join()
    slow.port.release()
    assert not slow.ring.collect()
    slow.port.claim()
    assert slow.driver.begin(VERSION_1)
    slow.ring = slow.driver.rings[0]
    slow.disk.go.release()
    slow.ask()
    assert slow.ring.wait()


def test_what_was_in_flight_at_a_reset_is_not_given_back_to_the_driver_that_begins_then(slow):
    slow.ask()
    slow.begun()

    def begin_again():
        with slow.bus.locked():  # so the disk's thread finds the device set up again
            slow.driver.status = 0
            assert slow.driver.begin(VERSION_1)

    begins = threading.Thread(target=begin_again)
    begins.start()
    wait_until(lambda: slow.port._waiting)
    slow.disk.go.release()
    begins.join()
    slow.port.release()
    assert not slow.driver.rings[0].collect()


def test_a_disk_that_cannot_be_given_back_goes_on(slow):
    slow.disk.full = True
    with pytest.raises(OSError, match="no space"):
        slow.port.release()
    slow.disk.go.release()
    slow.ask()
    assert slow.ring.wait()
    assert slow.disk.claimed


def test_a_guest_whose_disk_does_not_answer_runs_on_where_it_was_to_stand_still(tmp_path):
    class Stuck(Domain):
        stuck = True

        def _let_devices_finish(self):
            if self.stuck:
                raise VmError("disk0 has not ended a request")

    vm = Stuck(VmConfig(memory_bytes=8 << 20, machine=MachineModel.PC))
    try:
        with pytest.raises(VmError, match="disk0"):
            vm.freeze()
        assert not vm.run_control.frozen
        with pytest.raises(VmError, match="disk0"):
            vm.save_state()
        vm.stuck = False
        vm.freeze()
        assert vm.save_state()
    finally:
        vm.close()
