"""A program that tells what a CPU owes to an operating system prints the same in a guest as on the host."""

import shutil
import subprocess
from pathlib import Path

import pytest
from linux_guest import Said
from linux_image import linux_image

from pageferry.core.errors import UnsupportedError
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.guests.linux.boot import boot_linux
from pageferry.guests.linux.image import load_kernel
from pageferry.guests.linux.initramfs import PROGRAM, cpio
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.probe_ring_0 import expect_ring_0
from pageferry.kvm.vm import KvmVm

SOURCE = Path(__file__).parents[1] / "linux" / "conformance.c"
PATIENCE_S = 900
#: A line that only a process with all rights prints, and the host's may have lost them.
PORTS = ("ports", "a port that", "a word that")
#: What the emulator lacks: breakpoints on data (hypervisor/cpu.py says so).
SOFT_DIFFERS = {
    "watchpoint": "failed 0, hits 0, exit 7",
}


def facts(text):
    """Return the program's lines by name, without those that depend on rights."""
    lines = [line.partition(": ") for line in text.splitlines()]
    return {name: said for name, _, said in lines if said and not name.startswith(PORTS)}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if (compiler := shutil.which("gcc")) is None:
        pytest.skip("no gcc here: apt-get install gcc libc6-dev")
    path = tmp_path_factory.mktemp("conformance") / "conformance"
    subprocess.run([compiler, "-std=gnu11", "-O1", "-static", "-o", path, SOURCE], check=True)
    return path


@pytest.mark.exhaustive("a minute of an emulated CPU; test_linux boots and works in every run")
@pytest.mark.timeout(2 * PATIENCE_S)
@pytest.mark.parametrize("accel", ["soft", pytest.param("kvm", marks=pytest.mark.kvm)])
def test_a_guest_prints_what_the_host_prints(program, accel):
    make_vm, differs = (Domain, SOFT_DIFFERS) if accel == "soft" else (KvmVm, {})
    if accel == "kvm":
        try:
            expect_ring_0()
        except UnsupportedError as error:
            pytest.skip(f"{error}; make test-npt has such a KVM")
    image, said = linux_image(), Said()
    script = b"#!/bin/busybox sh\nconformance\n"
    initrd = image.initramfs.read_bytes()
    initrd += bytes(-len(initrd) % 4)
    initrd += cpio([("bin/conformance", PROGRAM, program.read_bytes()), ("bin/work", PROGRAM, script)])
    vm = make_vm(VmConfig(memory_bytes=256 << 20, machine=MachineModel.PC))
    try:
        said.listen_to(vm)
        command_line = "console=ttyS0 quiet pageferry=work"
        boot_linux(vm, load_kernel(image.kernel), initrd=initrd, command_line=command_line)
        vm.resume()
        said.wait_for(lambda: b"\ndone\r" in bytes(said), "end of the program", PATIENCE_S)
    finally:
        vm.close()
    in_guest = facts(bytes(said).decode().replace("\r", "").partition("pageferry: ready\n")[2])
    on_host = facts(subprocess.run([program], capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout)
    assert len(on_host) > 70
    assert {name: said for name, said in in_guest.items() if name in on_host} == on_host | differs
