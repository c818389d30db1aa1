"""A stock Linux on virtio devices: its drivers find them, a file system, a network, memory that goes back; it moves.

On ``kvm`` that needs a KVM that runs ring 0 natively, as that of ``make test-npt`` does.
"""

import shutil
import subprocess
from contextlib import contextmanager
from hashlib import sha256

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
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.probe_ring_0 import expect_ring_0
from pageferry.kvm.vm import KvmVm

pytestmark = [pytest.mark.timeout(3600), pytest.mark.exhaustive("another boot; test_linux has one in every run")]

MiB = 1 << 20
COMMAND_LINE = "console=ttyS0 console=hvc0 quiet"
#: See tests/kvm/test_linux.py.
ON_KVM = " nosoftlockup rcupdate.rcu_cpu_stall_suppress=1"
TROUBLE = "bug:|warning:|i/o error|ext4-fs error"
DISK_BYTES = 32 * MiB
#: What the guest fills and frees: on ``soft`` much more than what it moves with then. A KVM that runs ring 0 may itself
#: be emulated, and takes minutes for that.
FREED_MIB = {"soft": 100, "kvm": 8}
#: Where it goes: machines of its own kind and, from a real CPU, through software and back.
STOPS = {"soft": ("soft", "soft"), "kvm": ("kvm", "soft", "kvm")}
MACHINES = {"soft": Domain, "kvm": KvmVm}
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
def vm(accel, disk, peer, tmp_path):
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
    made = MACHINES[accel](VmConfig(memory_bytes=256 * MiB, machine=MachineModel.PC, devices=devices))
    kernel, initrd = load_kernel(image.kernel), image.initramfs.read_bytes()
    boot_linux(made, kernel, initrd=initrd, command_line=COMMAND_LINE + ON_KVM * (accel == "kvm"))
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
    # Where it prints for longer than a second its own alarm has it print again.
    yield f"ping -c {PINGS} -s 1400 10.0.2.2 | grep -o '[0-9]* packets received' | tail -n 1"
    assert peer.pings >= before + PINGS
    assert not peer.faults


def test_linux_works_on_its_devices_and_moves_with_them(vm, accel, inns, disk, peer, tmp_path):
    freed_mib = FREED_MIB[accel]
    terminal = Terminal()
    terminal.attach(vm)
    vm.resume()
    terminal.wait_for(READY)
    assert terminal.run("ls /sys/bus/virtio/drivers/*/ | grep -c virtio[0-9]") == ["5"]
    assert terminal.run("cat /sys/block/vda/serial") == ["disk0"]
    assert len(terminal.run("head -c 64 /dev/hwrng | sha256sum")) == 1
    terminal.run("ip addr add 10.0.2.15/24 dev eth0; ip link set eth0 up")
    fill = f"dd if=/dev/urandom of=/tmp/x bs=1M count={freed_mib} 2>/dev/null; stat -c %s /tmp/x; rm /tmp/x"
    assert terminal.run(fill) == [str(freed_mib * MiB)]
    terminal.run("mke2fs -q /dev/vda; mkdir -p /mnt; mount -t ext2 /dev/vda /mnt")
    terminal.run("dd if=/dev/urandom of=/mnt/file bs=64k count=16 2>/dev/null; sync")
    ours = terminal.run("sha256sum < /mnt/file")
    terminal.run("echo 3 > /proc/sys/vm/drop_caches; sleep 5")  # free pages are reported after two seconds
    busy = "dd if=/dev/urandom of=/mnt/busy bs=64k count=4 2>/dev/null; sync"
    terminal.run(f"(while :; do {busy}; done) & echo $! > /tmp/busy")
    with pinging(peer) as ping:
        assert terminal.run(ping) == [f"{PINGS} packets received"]
    for moves, stop in enumerate(STOPS[accel], 1):
        inn, source, announced = inns(MACHINES[stop]), vm, peer.announced
        report = source_of(source, inn.open(before_run=lambda made, _: terminal.attach(made))).run()
        assert report.verified
        assert accel == "kvm" or report.sent_bytes < freed_mib * MiB
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
    trouble = TROUBLE if accel == "kvm" else f"{TROUBLE}|stall|lockup"
    assert not terminal.run(f"dmesg | grep -iE '{trouble}'")
    vm.close()
    assert not is_used(disk)
    if shutil.which("e2fsck") is not None:
        assert subprocess.run(["e2fsck", "-fn", disk], capture_output=True, check=False).returncode == 0
        copy = tmp_path / "file"
        subprocess.run(["debugfs", "-R", f"dump /file {copy}", disk], capture_output=True, check=True)
        assert ours == [f"{sha256(copy.read_bytes()).hexdigest()}  -"]
