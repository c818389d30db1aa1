"""A stock Linux on virtio devices: its drivers find them, a file system, a network, memory that goes back; it moves.

On ``kvm`` that needs a KVM that runs ring 0 natively, as that of ``make test-npt`` does.
"""

import shutil
import subprocess
from contextlib import contextmanager

import pytest
from ethernet_peer import EthernetPeer
from guest_shell import Terminal
from linux_image import READY, linux_image
from trips import source_of

from pageferry.backends.disk import DiskFile
from pageferry.core.device_spec import DeviceKind, DeviceSpec
from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.guests.linux.boot import boot_linux
from pageferry.guests.linux.image import load_kernel
from pageferry.kvm.probe_ring_0 import expect_ring_0

pytestmark = [pytest.mark.timeout(900), pytest.mark.exhaustive("another boot; test_linux has one in every run")]

MiB = 1 << 20
DISK_BYTES = 32 * MiB
#: What the guest fills and frees: much more than what it moves with then.
FREED_MIB = 100
PINGS = 3


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    return path


@pytest.fixture
def peer(tmp_path):
    with EthernetPeer(tmp_path / "net.sock") as peer:
        yield peer


@pytest.fixture
def vm(accel, make_vm, disk, peer, tmp_path):
    if accel == "kvm":
        try:
            expect_ring_0()
        except UnsupportedError as error:
            pytest.skip(f"{error}; make test-npt has such a KVM")
    devices = (
        DeviceSpec(kind=DeviceKind.DISK, backend=str(disk)),
        DeviceSpec(kind=DeviceKind.NET, backend=f"unix:{tmp_path}/net.sock", mac="52:54:00:12:34:56"),
        *(DeviceSpec(kind=kind) for kind in (DeviceKind.CONSOLE, DeviceKind.RNG, DeviceKind.BALLOON)),
    )
    image = linux_image()
    made = make_vm(VmConfig(memory_bytes=256 * MiB, machine=MachineModel.PC, devices=devices))
    kernel, initrd = load_kernel(image.kernel), image.initramfs.read_bytes()
    boot_linux(made, kernel, initrd=initrd, command_line="console=ttyS0 console=hvc0 quiet")
    yield made
    made.close()


def is_used(disk):
    """Whether a process holds the lock of the disk."""
    probe = DiskFile(disk, readonly=False)
    try:
        probe.claim()
    except VmError:
        return True
    finally:
        probe.close()
    return False


@contextmanager
def pinging(peer):
    """In the block the guest exchanges pings with its network, all of them sound."""
    before = peer.pings
    yield f"ping -c {PINGS} -s 1400 10.0.2.2 | grep -o '[0-9]* packets received'"
    assert peer.pings >= before + PINGS
    assert not peer.faults


def test_linux_works_on_its_devices_and_moves_with_them(vm, make_vm, inns, disk, peer):
    terminal = Terminal()
    terminal.attach(vm)
    vm.resume()
    terminal.wait_for(READY)
    assert terminal.run("ls /sys/bus/virtio/drivers/*/ | grep -c virtio[0-9]") == ["5"]
    assert terminal.run("cat /sys/block/vda/serial") == ["disk0"]
    assert len(terminal.run("head -c 64 /dev/hwrng | sha256sum")) == 1
    terminal.run("ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up")
    fill = f"dd if=/dev/urandom of=/tmp/x bs=1M count={FREED_MIB} 2>/dev/null; stat -c %s /tmp/x; rm /tmp/x"
    assert terminal.run(fill) == [str(FREED_MIB * MiB)]
    terminal.run("mke2fs -q /dev/vda; mkdir -p /mnt; mount -t ext2 /dev/vda /mnt")
    terminal.run("dd if=/dev/urandom of=/mnt/file bs=64k count=16 2>/dev/null; sync")
    ours = terminal.run("sha256sum < /mnt/file")
    terminal.run("echo 3 > /proc/sys/vm/drop_caches; sleep 5")  # free pages are reported after two seconds
    busy = "dd if=/dev/urandom of=/mnt/busy bs=64k count=4 2>/dev/null; sync"
    terminal.run(f"(while :; do {busy}; done) & echo $! > /tmp/busy")
    with pinging(peer) as ping:
        assert terminal.run(ping) == [f"{PINGS} packets received"]
    inn = inns(make_vm)
    for moves in range(1, 3):
        source, announced = vm, peer.announced
        report = source_of(source, inn.open(before_run=lambda made, _: terminal.attach(made))).run()
        assert report.verified
        assert report.sent_bytes < FREED_MIB * MiB
        vm = inn.outcome()
        assert not isinstance(vm, Exception), vm
        source.close()
        assert is_used(disk), "the lock is the destination's"
        terminal.run("echo 3 > /proc/sys/vm/drop_caches")
        assert terminal.run("sha256sum < /mnt/file") == ours
        with pinging(peer) as ping:
            assert terminal.run(ping) == [f"{PINGS} packets received"]
        assert (peer.connections, peer.announced > announced) == (1 + moves, True)
    terminal.run("kill $(cat /tmp/busy); wait; umount /mnt")
    assert not terminal.run("dmesg | grep -iE 'bug:|warning:|stall|lockup|i/o error|ext4-fs error'")
    vm.close()
    assert not is_used(disk)
    if shutil.which("e2fsck") is not None:
        assert subprocess.run(["e2fsck", "-fn", disk], capture_output=True, check=False).returncode == 0
