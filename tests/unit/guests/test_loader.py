import pytest
from kernels import BootedVm, bzimage, elf, note, vmlinux

from pageferry.core.errors import UsageError
from pageferry.core.vm import MachineModel
from pageferry.guests.boot import GuestParams
from pageferry.guests.loader import KernelOptions, linux, named
from pageferry.guests.workloads import WORKLOADS

MIB = 1 << 20
MULTIBOOT = b"\x02\xb0\xad\x1b\x00\x00\x00\x00\xfe\x4f\x52\xe4"
FILES = {
    "a Linux kernel": (bzimage(), 0x100_0000),
    "a PVH kernel": (elf((0x20_0000, b"code", 4), notes=note(b"Xen", 18, b"\0\0\x20\0")), 0x20_0000),
    "a multiboot kernel": (elf((0x40_0000, MULTIBOOT, 64), bits=32, entry=0x40_0010), 0x40_0010),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_kernel_is_told_by_what_is_in_its_file_and_needs_a_pc(kind, tmp_path):
    content, entry = FILES[kind]
    (tmp_path / "k").write_bytes(content)
    (tmp_path / "i").write_bytes(b"an initrd")
    loader = named(str(tmp_path / "k"), None, KernelOptions(initrd=tmp_path / "i", command_line="quiet"))
    assert (loader.name, loader.machine) == (str(tmp_path / "k"), MachineModel.PC)
    vm = BootedVm()
    loader.load(vm)
    assert vm.first.rip == entry
    assert b"quiet" in vm.string(0x20000)


def test_a_workload_and_a_program_run_on_any_machine():
    loader = named("idle", GuestParams(seed=5), None)
    assert (loader.name, loader.machine) == ("idle", None)
    vm = BootedVm(machine=MachineModel.PLAIN)
    loader.load(vm)
    assert vm.first.rip == 0x100000


@pytest.mark.parametrize("image", [vmlinux, bzimage])
def test_linux_is_taken_by_its_64_bit_entry(image, tmp_path):
    (tmp_path / "k").write_bytes(image())
    vm = BootedVm()
    linux(tmp_path / "k", KernelOptions()).load(vm)
    assert vm.first.efer & 0x400


def test_what_is_not_for_it_is_refused(tmp_path):
    (tmp_path / "k").write_bytes(bzimage())
    with pytest.raises(UsageError, match="--initrd and --append are for a kernel, and kv is not one"):
        named("kv", None, KernelOptions(command_line="quiet"))
    with pytest.raises(UsageError, match="are for a workload"):
        named(str(tmp_path / "k"), GuestParams(), None)


def test_an_empty_initrd_is_refused(tmp_path):
    (tmp_path / "k").write_bytes(bzimage())
    (tmp_path / "empty").touch()
    with pytest.raises(UsageError, match="empty is empty"):
        linux(tmp_path / "k", KernelOptions(initrd=tmp_path / "empty"))
    with pytest.raises(UsageError, match="gone: No such file"):
        linux(tmp_path / "k", KernelOptions(initrd=tmp_path / "gone"))


def test_what_is_nothing_is_refused_with_what_there_could_be(tmp_path):
    (tmp_path / "text").write_text("no kernel\n")
    with pytest.raises(UsageError, match="is nothing that a guest can be") as caught:
        named(str(tmp_path / "text"), None, None)
    assert "PVH note" in caught.value.hint
    with pytest.raises(UsageError, match="unknown workload") as caught:
        named("nonesuch", None, None)
    assert all(name in caught.value.hint for name in WORKLOADS)
