import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernels import BootedVm, elf, number

from pageferry.core.errors import UsageError
from pageferry.core.vm import MachineModel
from pageferry.guests.multiboot import boot_multiboot, find_multiboot

GPA = 0x40_0000
MIB, GIB = 1 << 20, 1 << 30


def header(flags, *addresses):
    return struct.pack("<III", 0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFFFFFF) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


def elf_kernel(flags=3, entry=GPA + 12):
    return elf((GPA, header(flags) + b"code", 4096), bits=32, entry=entry)


def flat_kernel(*, before=8, load_end=GPA + 0x60, bss_end=GPA + 0x1000, header_gpa=GPA + 8, load=GPA, entry=GPA + 0x40):
    """A file of any format, that begins with ``before`` bytes before its header."""
    return (bytes(before) + header(1 << 16, header_gpa, load, load_end, bss_end, entry)).ljust(0x100, b"x")


def parts(data):
    kernel = find_multiboot(data, name="k")
    return kernel.entry, [(part.gpa, part.data, part.size_bytes) for part in kernel.parts]


def test_an_elf_file_goes_where_its_headers_say():
    assert parts(elf_kernel()) == (GPA + 12, [(GPA, header(3) + b"code", 4096)])


def test_a_file_of_any_format_goes_where_the_multiboot_header_says():
    data = flat_kernel()
    assert parts(data) == (GPA + 0x40, [(GPA, data[:0x60], 0x1000)])


def test_without_ends_all_of_the_file_is_loaded_and_no_more():
    data = flat_kernel(load_end=0, bss_end=0)
    assert parts(data) == (GPA + 0x40, [(GPA, data, 0x100)])


@pytest.mark.parametrize("data", [b"", b"\x02\xb0\xad\x1b", bytes(8192) + header(0), header(0)[:-1], b"x" + header(0)])
def test_without_a_whole_header_near_the_start_it_is_another_kind_of_file(data):
    assert find_multiboot(data, name="k") is None


BAD = {
    r"flags 0x4; 0x4 is a video mode": elf_kernel(flags=4),
    "without addresses, and is not an ELF file": header(0).ljust(100, b"\0"),
    "entry point 0x1 outside": elf_kernel(entry=1),
    "ends inside its multiboot header": header(1 << 16, GPA),
    "addresses outside the file": flat_kernel(load_end=GPA + 0x101),
    "addresses outside the file$": flat_kernel(header_gpa=GPA + 9),
    "entry point 0x400100 outside": flat_kernel(load_end=0, bss_end=0, entry=GPA + 0x100),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_file_is_one_clear_error_with_a_hint(message):
    with pytest.raises(UsageError, match=message) as caught:
        find_multiboot(BAD[message], name="file")
    assert str(caught.value).startswith("file ")
    assert caught.value.hint


@given(st.sampled_from([elf_kernel(), flat_kernel()]), st.data())
def test_a_damaged_file_is_a_kernel_or_not_or_refused_and_nothing_else(image, data):
    image = bytearray(image)
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(0, min(len(image), 128) - 1))] = data.draw(st.integers(0, 255))
    del image[data.draw(st.integers(0, len(image))) :]
    try:
        kernel = find_multiboot(bytes(image), name="fuzz")
    except UsageError:
        return
    assert kernel is None or all(len(part.data) <= part.size_bytes for part in kernel.parts)


def information(vm):
    return vm.memory.read(vm.first.rbx, 4096)


def module(vm):
    at = number(information(vm), 24, 4)
    start, end, text, _ = struct.unpack("<4I", vm.memory.read(at, 16))
    return vm.memory.read(start, end - start), vm.string(text)


def test_a_kernel_is_told_of_the_machine_in_a_module():
    vm = BootedVm(64 * MIB, cpus=2)
    boot_multiboot(vm, find_multiboot(elf_kernel(), name="dir/k"), command_line="smp 3")
    info = information(vm)
    assert number(info, 0, 4) & 0b1001101 == 0b1001101
    assert (number(info, 4, 4), number(info, 8, 4)) == (639, 63 * 1024)
    assert vm.string(number(info, 16, 4)) == b"dir/k smp 3"
    assert number(info, 20, 4) == 1
    assert module(vm)[0] == b"NR_CPUS=2\nMEMSIZE=64\nTEST_DEVICE=0\n"


def test_or_gets_the_module_that_it_was_given():
    vm = BootedVm()
    boot_multiboot(vm, find_multiboot(elf_kernel(), name="k"), initrd=b"mine" * 2000)
    assert module(vm)[0] == b"mine" * 2000


def test_what_looks_for_a_bios_finds_where_low_memory_ends():
    vm = BootedVm()
    boot_multiboot(vm, find_multiboot(elf_kernel(), name="k"))
    com1, extended_data, low_kib = (number(vm.memory.read(at, 2), 0, 2) for at in (0x400, 0x40E, 0x413))
    assert (com1, extended_data << 4, low_kib << 10) == (0x3F8, 0x9FC00, 0x9FC00)


def test_the_memory_map_goes_on_above_the_hole():
    vm = BootedVm(5 * GIB)
    boot_multiboot(vm, find_multiboot(elf_kernel(), name="k"))
    info = information(vm)
    size, at = number(info, 44, 4), number(info, 48, 4)
    entries = [struct.unpack("<IQQI", vm.memory.read(at + 24 * index, 24)) for index in range(size // 24)]
    assert {entry_bytes for entry_bytes, *_ in entries} == {20}
    assert [(a, a + s) for _, a, s, kind in entries if kind == 1] == [(0, 0x9FC00), (MIB, 3 * GIB), (4 * GIB, 6 * GIB)]


def test_it_is_entered_in_protected_mode_without_paging():
    vm = BootedVm(cpus=2)
    boot_multiboot(vm, find_multiboot(elf_kernel(), name="k"))
    assert vm.first.rax == 0x2BADB002
    vm.expect_protected_mode(GPA + 12)


def test_it_needs_a_pc_with_room():
    with pytest.raises(UsageError, match="needs a PC"):
        boot_multiboot(BootedVm(machine=MachineModel.PLAIN), find_multiboot(elf_kernel(), name="k"))
    with pytest.raises(UsageError, match="does not fit"):
        boot_multiboot(BootedVm(4 * MIB), find_multiboot(elf_kernel(), name="k"))
