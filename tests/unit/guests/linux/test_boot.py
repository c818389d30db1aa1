import struct

import pytest
from kernels import PREFERRED_GPA, BootedVm, bzimage, elf, number, vmlinux

from pageferry.core.errors import UsageError
from pageferry.core.state import MpState
from pageferry.core.vm import MachineModel
from pageferry.guests.linux.boot import boot_linux
from pageferry.guests.linux.image import parse_kernel

MIB, GIB = 1 << 20, 1 << 30


def params(vm):
    """The page that the kernel is told of by RSI."""
    return vm.memory.read(vm.first.rsi, 4096)


def e820(page):
    return [struct.unpack_from("<QQI", page, 0x2D0 + 20 * index) for index in range(page[0x1E8])]


def translate(vm, gva):
    entry = vm.first.cr3
    for shift in (39, 30, 21):
        entry = vm.memory.read_u64((entry & ~0xFFF) + 8 * ((gva >> shift) & 511))
        assert entry & 3 == 3, f"{gva:#x} is not mapped"
    assert entry & 0x80
    return (entry & ~0x1FFFFF) + (gva & 0x1FFFFF)


@pytest.mark.parametrize("image", [vmlinux, bzimage])
def test_kernel_command_line_and_initrd_are_where_the_kernel_is_told(image):
    vm = BootedVm()
    boot_linux(vm, parse_kernel(image(), name="k"), initrd=b"initrd" * 1000, command_line="console=ttyS0 quiet")
    assert vm.memory.read(PREFERRED_GPA, 8) == b"codecode"
    assert vm.memory.read(PREFERRED_GPA + 0x1000, 8) == b"data\0\0\0\0"
    page = params(vm)
    assert page[0x202:0x206] == b"HdrS"
    assert number(page, 0x1FE, 2) == 0xAA55
    assert page[0x210] == 0xFF
    assert page[0x211] & 1
    assert vm.string(number(page, 0x228, 4)) == b"console=ttyS0 quiet"
    initrd_gpa, initrd_bytes = number(page, 0x218, 4), number(page, 0x21C, 4)
    assert initrd_bytes == 6000
    assert initrd_gpa % 4096 == 0
    assert vm.memory.read(initrd_gpa, 6000) == b"initrd" * 1000
    assert vm.loaded.devices == vm.devices


def test_the_acpi_tables_are_where_the_kernel_is_told_and_where_it_may_look():
    vm = BootedVm()
    boot_linux(vm, parse_kernel(vmlinux(), name="k"))
    gpa = number(params(vm), 0x70, 8)
    assert 0xE0000 <= gpa < 0x100000
    assert gpa % 16 == 0
    assert vm.memory.read(gpa, 8) == b"RSD PTR "


def test_without_an_initrd_there_is_none():
    vm = BootedVm()
    boot_linux(vm, parse_kernel(vmlinux(), name="k"))
    assert number(params(vm), 0x218, 8) == 0


def test_the_first_vcpu_enters_in_long_mode_and_what_it_uses_is_mapped():
    vm = BootedVm()
    boot_linux(vm, parse_kernel(vmlinux(), name="k"), command_line="x")
    first = vm.first
    assert first.rip == PREFERRED_GPA
    assert first.rflags & 0x200 == 0
    assert first.cr0 & 0x8000_0001 == 0x8000_0001
    assert first.cr4 & 0x20
    assert first.efer & 0x500 == 0x500
    assert (first.cs.selector, first.ds.selector) == (0x10, 0x18)
    for segment in (first.cs, first.ds, first.es, first.ss):
        assert vm.descriptor(segment.selector) == (segment.base, segment.limit, segment.attributes)
    assert first.cs.attributes & 0x600 == 0x200  # 64-bit: L, and not D
    for gpa in (first.rip, PREFERRED_GPA + 0x2FFF, first.rsi, 0x20000, 0xB_F00, 3 * GIB, 4 * GIB - 1):
        assert translate(vm, gpa) == gpa


@pytest.mark.parametrize("memory_bytes", [64 * MIB, 3 * GIB, 5 * GIB])
def test_the_memory_map_is_the_machines_without_what_a_pc_reserves(memory_bytes):
    vm = BootedVm(memory_bytes)
    boot_linux(vm, parse_kernel(vmlinux(), name="k"))
    ram = [(gpa, gpa + size) for gpa, size, kind in e820(params(vm)) if kind == 1]
    assert ram[:2] == [(0, 0x9FC00), (MIB, min(memory_bytes, 3 * GIB))]
    assert ram[2:] == ([(4 * GIB, 6 * GIB)] if memory_bytes == 5 * GIB else [])


def test_an_initrd_stays_below_what_the_kernel_can_reach():
    vm = BootedVm(5 * GIB)
    boot_linux(vm, parse_kernel(bzimage(initrd_max=0x37FF_FFFF), name="k"), initrd=b"x" * 5000)
    assert number(params(vm), 0x218, 4) == 0x3800_0000 - 8192


def test_an_initrd_that_has_no_room_above_the_kernel_goes_below_it():
    vm = BootedVm(17 * MIB)
    boot_linux(vm, parse_kernel(vmlinux(), name="k"), initrd=b"x" * (15 * MIB))
    assert number(params(vm), 0x218, 4) == MIB


def test_the_other_vcpus_wait_to_be_started():
    vm = BootedVm(cpus=3)
    boot_linux(vm, parse_kernel(vmlinux(), name="k"))
    assert [vcpu.mp_state for vcpu in vm.loaded.vcpus] == [
        MpState.RUNNABLE,
        MpState.UNINITIALIZED,
        MpState.UNINITIALIZED,
    ]


REFUSED = {
    "needs a PC": ({"machine": MachineModel.PLAIN}, {}),
    "the kernel k does not fit": ({"memory_bytes": 16 * MIB}, {}),
    "the initrd of 48 MiB does not fit": ({}, {"initrd": bytes(48 * MIB)}),
    "the command line has 2048 bytes, the kernel takes 2047": ({}, {"command_line": "x" * 2048}),
    "has a NUL": ({}, {"command_line": "a\0b"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(message):
    machine, options = REFUSED[message]
    vm = BootedVm(**machine)
    with pytest.raises(UsageError, match=message):
        boot_linux(vm, parse_kernel(vmlinux(), name="k"), **options)
    assert vm.loaded is None
    assert not vm.memory.populated()[0].size


def test_a_kernel_that_lies_over_what_the_boot_needs_is_refused():
    vm = BootedVm()
    with pytest.raises(UsageError, match=r"lies over the kernel k at 0x7000"):
        boot_linux(vm, parse_kernel(elf((0x7000, b"code", 4), entry=0x7000), name="k"))
