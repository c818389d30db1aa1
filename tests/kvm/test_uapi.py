"""Layouts and numbers as a C compiler finds them in the kernel's headers (x86-64; Linux 6.1, PAGEMAP_SCAN 6.7)."""

import ctypes

import pytest

from pageferry.core import pagemap
from pageferry.kvm import uapi, vcpu
from pageferry.uffd import uapi as uffd_uapi

SIZES = {
    "KvmUserspaceMemoryRegion": 32,
    "KvmEnableCap": 104,
    "KvmDirtyLog": 16,
    "KvmClearDirtyLog": 24,
    "KvmDeviceAttr": 24,
    "KvmIrqLevel": 8,
    "KvmIoeventfd": 64,
    "KvmCpuidEntry2": 40,
    "KvmMsrEntry": 16,
    "KvmRegs": 144,
    "KvmSegment": 24,
    "KvmDtable": 16,
    "KvmSregs": 312,
    "KvmTranslation": 24,
    "KvmDebugregs": 128,
    "KvmXsave": 4096,
    "KvmVcpuEvents": 64,
    "KvmXcrs": 392,
    "KvmMpState": 4,
    "KvmClockData": 48,
    "KvmLapicState": 1024,
    "KvmIrqchip": 520,
    "KvmPitConfig": 64,
    "KvmPitState2": 112,
}
NUMBERS = {
    "KVM_GET_API_VERSION": 0xAE00,
    "KVM_CREATE_VM": 0xAE01,
    "KVM_GET_MSR_INDEX_LIST": 0xC004AE02,
    "KVM_CHECK_EXTENSION": 0xAE03,
    "KVM_GET_VCPU_MMAP_SIZE": 0xAE04,
    "KVM_GET_SUPPORTED_CPUID": 0xC008AE05,
    "KVM_CREATE_VCPU": 0xAE41,
    "KVM_GET_DIRTY_LOG": 0x4010AE42,
    "KVM_SET_USER_MEMORY_REGION": 0x4020AE46,
    "KVM_SET_TSS_ADDR": 0xAE47,
    "KVM_SET_IDENTITY_MAP_ADDR": 0x4008AE48,
    "KVM_CREATE_IRQCHIP": 0xAE60,
    "KVM_GET_IRQCHIP": 0xC208AE62,
    "KVM_IRQ_LINE": 0x4008AE61,
    "KVM_SET_IRQCHIP": 0x8208AE63,
    "KVM_CREATE_PIT2": 0x4040AE77,
    "KVM_IOEVENTFD": 0x4040AE79,
    "KVM_SET_CLOCK": 0x4030AE7B,
    "KVM_GET_CLOCK": 0x8030AE7C,
    "KVM_RUN": 0xAE80,
    "KVM_GET_REGS": 0x8090AE81,
    "KVM_SET_REGS": 0x4090AE82,
    "KVM_GET_SREGS": 0x8138AE83,
    "KVM_SET_SREGS": 0x4138AE84,
    "KVM_TRANSLATE": 0xC018AE85,
    "KVM_GET_MSRS": 0xC008AE88,
    "KVM_SET_MSRS": 0x4008AE89,
    "KVM_GET_LAPIC": 0x8400AE8E,
    "KVM_SET_LAPIC": 0x4400AE8F,
    "KVM_GET_MP_STATE": 0x8004AE98,
    "KVM_SET_MP_STATE": 0x4004AE99,
    "KVM_GET_PIT2": 0x8070AE9F,
    "KVM_SET_PIT2": 0x4070AEA0,
    "KVM_GET_CPUID2": 0xC008AE91,
    "KVM_SET_CPUID2": 0x4008AE90,
    "KVM_GET_VCPU_EVENTS": 0x8040AE9F,
    "KVM_SET_VCPU_EVENTS": 0x4040AEA0,
    "KVM_GET_DEBUGREGS": 0x8080AEA1,
    "KVM_SET_DEBUGREGS": 0x4080AEA2,
    "KVM_SET_TSC_KHZ": 0xAEA2,
    "KVM_GET_TSC_KHZ": 0xAEA3,
    "KVM_ENABLE_CAP": 0x4068AEA3,
    "KVM_GET_XSAVE": 0x9000AEA4,
    "KVM_SET_XSAVE": 0x5000AEA5,
    "KVM_GET_XCRS": 0x8188AEA6,
    "KVM_SET_XCRS": 0x4188AEA7,
    "KVM_GET_XSAVE2": 0x9000AECF,
    "KVM_CLEAR_DIRTY_LOG": 0xC018AEC0,
    "KVM_RESET_DIRTY_RINGS": 0xAEC7,
    "KVM_SET_DEVICE_ATTR": 0x4018AEE1,
    "KVM_GET_DEVICE_ATTR": 0x4018AEE2,
    "KVM_HAS_DEVICE_ATTR": 0x4018AEE3,
}


UFFD_SIZES = {
    "UffdioApi": 24,
    "UffdioRange": 16,
    "UffdioRegister": 32,
    "UffdioCopy": 40,
    "UffdioWriteprotect": 24,
}
PAGEMAP_SIZES = {"PmScanArg": 96}
UFFD_NUMBERS = {
    "UFFDIO_API": 0xC018AA3F,
    "UFFDIO_REGISTER": 0xC020AA00,
    "UFFDIO_UNREGISTER": 0x8010AA01,
    "UFFDIO_WAKE": 0x8010AA02,
    "UFFDIO_COPY": 0xC028AA03,
    "UFFDIO_WRITEPROTECT": 0xC018AA06,
    "USERFAULTFD_IOC_NEW": 0xAA00,
}
PAGEMAP_NUMBERS = {"PAGEMAP_SCAN": 0xC0606610}
MODULES = ((uapi, SIZES, NUMBERS), (uffd_uapi, UFFD_SIZES, UFFD_NUMBERS), (pagemap, PAGEMAP_SIZES, PAGEMAP_NUMBERS))


@pytest.mark.parametrize(
    ("module", "name", "size_bytes"), [(module, *size) for module, sizes, _ in MODULES for size in sizes.items()]
)
def test_structure_size(module, name, size_bytes):
    assert ctypes.sizeof(getattr(module, name)) == size_bytes


@pytest.mark.parametrize(
    ("module", "name", "number"), [(module, *each) for module, _, numbers in MODULES for each in numbers.items()]
)
def test_ioctl_number(module, name, number):
    assert getattr(module, name) == number
    assert module.IOCTL_NAMES[number] == name


@pytest.mark.parametrize(("module", "numbers"), [(module, numbers) for module, _, numbers in MODULES])
def test_every_ioctl_number_is_checked(module, numbers):
    assert set(module.IOCTL_NAMES.values()) == set(numbers)


def test_offsets_inside_kvm_run_and_variable_length_heads():
    assert uapi.KvmRun.exit_reason.offset == 8
    assert uapi.KvmRun.exit.offset == 0x20
    assert uapi.KvmRunIo.data_offset.offset == 8
    assert uapi.KvmRunMmio.len.offset == 16
    assert uapi.KvmRunInternal.data.offset == 8
    assert uapi.KvmVcpuEvents.flags.offset == 0x14
    assert (uapi.KvmVcpuEvents.smi.offset, uapi.KvmVcpuEvents.triple_fault.offset) == (0x18, 0x1C)
    assert (uapi.KvmIrqchip.chip.offset, uapi.KvmXcrs.xcrs.offset) == (8, 8)
    assert uapi.KvmPitState2.flags.offset == 72
    assert uapi.KvmVcpuEvents.exception_has_payload.offset == 0x37
    assert uapi.KvmCpuid2.entries.offset == uapi.KvmMsrs.entries.offset == 8
    assert uapi.KvmMsrList.indices.offset == 4


def test_every_structure_of_userfaultfd_is_checked():
    found = {name for name, value in vars(uffd_uapi).items() if isinstance(value, type(ctypes.Structure))}
    assert found == set(UFFD_SIZES)


def test_arrays_of_userfaultfd_have_the_kernels_layout():
    assert pagemap.PAGE_REGION.itemsize == 24
    assert uffd_uapi.UFFD_MSG.itemsize == 32
    assert {name: field[1] for name, field in uffd_uapi.UFFD_MSG.fields.items()} == {
        "event": 0,
        "flags": 8,
        "address": 16,
        "ptid": 24,
    }


def test_features_of_userfaultfd_have_the_kernels_names():
    assert uffd_uapi.FEATURE_NAMES[1 << 12] == "UFFD_FEATURE_WP_HUGETLBFS_SHMEM"
    assert uffd_uapi.FEATURE_NAMES[1 << 15] == "UFFD_FEATURE_WP_ASYNC"


def test_the_plain_bytes_of_an_exit_are_the_structures():
    mmio = uapi.KvmRunMmio(phys_addr=0x1_2345_6789, data=(1, 2, 3, 4, 5, 6, 7, 8), len=4, is_write=1)
    assert vcpu._MMIO.unpack_from(bytes(mmio)) == (0x1_2345_6789, bytes(range(1, 9)), 4, 1)
    io = uapi.KvmRunIo(direction=1, size=2, port=0x3F8, count=9, data_offset=0x1000)
    assert vcpu._IO.unpack(bytes(io)) == (1, 2, 0x3F8, 9, 0x1000)
