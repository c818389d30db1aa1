"""A stock Linux on virtio devices: its drivers find them, a file system on a disk, memory that goes back; it moves."""

import shutil
import subprocess

import pytest
from guest_shell import Terminal
from linux_image import READY, linux_image
from trips import source_of

from pageferry.core.device_spec import DeviceKind, DeviceSpec
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.guests.linux.boot import boot_linux
from pageferry.guests.linux.image import load_kernel
from pageferry.hypervisor.domain import Domain

pytestmark = [pytest.mark.timeout(900), pytest.mark.exhaustive("another boot; test_linux has one in every run")]

MiB = 1 << 20
DISK_BYTES = 32 * MiB
#: What the guest fills and frees: much more than what it moves with then.
FREED_MIB = 64


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    return path


@pytest.fixture
def vm(disk):
    others = (DeviceSpec(kind=kind) for kind in (DeviceKind.RNG, DeviceKind.BALLOON))
    devices = (DeviceSpec(kind=DeviceKind.DISK, backend=str(disk)), *others)
    image = linux_image()
    made = Domain(VmConfig(memory_bytes=256 * MiB, machine=MachineModel.PC, devices=devices))
    kernel, initrd = load_kernel(image.kernel), image.initramfs.read_bytes()
    boot_linux(made, kernel, initrd=initrd, command_line="console=ttyS0 quiet")
    yield made
    made.close()


def test_linux_works_on_its_devices_and_moves_with_them(vm, inns, disk):
    terminal = Terminal()
    terminal.attach(vm)
    vm.resume()
    terminal.wait_for(READY)
    assert terminal.run("ls /sys/bus/virtio/drivers/*/ | grep -c virtio[0-9]") == ["3"]
    assert terminal.run("cat /sys/block/vda/serial") == ["disk0"]
    assert len(terminal.run("head -c 64 /dev/hwrng | sha256sum")) == 1
    terminal.run(f"head -c {FREED_MIB}M /dev/zero | tr '\\0' x > /tmp/x; rm /tmp/x")
    terminal.run("mke2fs -q /dev/vda; mkdir -p /mnt; mount -t ext2 /dev/vda /mnt")
    terminal.run("seq 100000 > /mnt/file; sync")
    ours = terminal.run("sha256sum < /mnt/file")
    terminal.run("echo 3 > /proc/sys/vm/drop_caches; sleep 5")  # free pages are reported after two seconds
    terminal.run("(while :; do seq 20000 > /mnt/busy; sync; done) & echo $! > /tmp/busy")
    inn = inns(Domain)
    for _ in range(2):
        report = source_of(vm, inn.open(before_run=lambda made, _: terminal.attach(made))).run()
        assert report.verified
        assert report.sent_bytes < FREED_MIB * MiB
        vm = inn.outcome()
        assert not isinstance(vm, Exception), vm
        terminal.run("echo 3 > /proc/sys/vm/drop_caches")
        assert terminal.run("sha256sum < /mnt/file") == ours
    terminal.run("kill $(cat /tmp/busy); wait; umount /mnt")
    assert not terminal.run("dmesg | grep -iE 'bug:|warning:|stall|lockup|i/o error|ext4-fs error'")
    vm.close()
    if shutil.which("e2fsck") is not None:
        assert subprocess.run(["e2fsck", "-fn", disk], capture_output=True, check=False).returncode == 0
