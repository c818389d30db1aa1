import struct

import pytest
from kernels import BootedVm, elf, note, number

from pageferry.core.errors import UsageError
from pageferry.core.vm import MachineModel
from pageferry.guests.elf_file import read_elf
from pageferry.guests.pvh import boot_pvh, find_pvh

GPA = 0x20_0000
MIB, GIB = 1 << 20, 1 << 30


def entry_note(entry=GPA + 16, size=4):
    return note(b"GNU", 3, b"build id") + note(b"Xen", 18, entry.to_bytes(size, "little"))


def kernel(*, notes=None, bits=32):
    image = elf((GPA, b"code" * 8, 4096), bits=bits, entry=GPA, notes=entry_note() if notes is None else notes)
    return find_pvh(read_elf(image, name="k"))


@pytest.mark.parametrize(("bits", "size"), [(32, 4), (64, 4), (64, 8)])
def test_the_note_says_where_a_kernel_is_entered(bits, size):
    found = kernel(bits=bits, notes=entry_note(size=size))
    assert found.entry == GPA + 16
    assert [(part.gpa, part.data, part.size_bytes) for part in found.parts] == [(GPA, b"code" * 8, 4096)]


@pytest.mark.parametrize("notes", [b"", note(b"GNU", 18, b"\0\0\x20\0"), note(b"Xen", 6, b"linux"), b"\1\0\0\0"])
def test_without_the_note_it_is_another_kind_of_file(notes):
    assert kernel(notes=notes) is None


def test_an_entry_outside_of_what_is_loaded_is_refused():
    with pytest.raises(UsageError, match="k has its entry point 0x100 outside"):
        kernel(notes=entry_note(0x100))


def test_a_kernel_finds_command_line_module_and_memory():
    vm = BootedVm(5 * GIB)
    boot_pvh(vm, kernel(), initrd=b"module" * 1000, command_line="console=com1")
    assert vm.memory.read(GPA, 8) == b"codecode"
    info = vm.memory.read(vm.first.rbx, 4096)
    assert (number(info, 0, 4), number(info, 4, 4)) == (0x336EC578, 1)
    assert vm.string(number(info, 24, 8)) == b"console=com1"
    assert vm.memory.read(number(info, 32, 8), 8) == b"RSD PTR "
    assert number(info, 12, 4) == 1
    gpa, size, text, _ = struct.unpack("<4Q", vm.memory.read(number(info, 16, 8), 32))
    assert vm.memory.read(gpa, size) == b"module" * 1000
    assert text == 0
    at, count = number(info, 40, 8), number(info, 48, 4)
    entries = [struct.unpack("<QQII", vm.memory.read(at + 24 * index, 24)) for index in range(count)]
    assert [(a, a + s) for a, s, kind, _ in entries if kind == 1] == [(0, 0x9FC00), (MIB, 3 * GIB), (4 * GIB, 6 * GIB)]


def test_without_a_module_there_is_none():
    vm = BootedVm()
    boot_pvh(vm, kernel())
    info = vm.memory.read(vm.first.rbx, 64)
    assert number(info, 12, 4) == number(info, 16, 8) == 0


def test_it_is_entered_in_protected_mode_without_paging():
    vm = BootedVm(cpus=2)
    boot_pvh(vm, kernel())
    vm.expect_protected_mode(GPA + 16)


def test_it_needs_a_pc():
    with pytest.raises(UsageError, match="k needs a PC, and the machine is plain"):
        boot_pvh(BootedVm(machine=MachineModel.PLAIN), kernel())
