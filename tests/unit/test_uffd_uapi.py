"""The transcription: sizes and numbers as the kernel's headers have them on x86-64 and arm64."""

import ctypes

import pytest

from pageferry.uffd import uapi

SIZES = {"UffdioApi": 24, "UffdioRange": 16, "UffdioRegister": 32, "UffdioWriteprotect": 24, "PmScanArg": 96}
NUMBERS = {
    "UFFDIO_API": 0xC018AA3F,
    "UFFDIO_REGISTER": 0xC020AA00,
    "UFFDIO_UNREGISTER": 0x8010AA01,
    "UFFDIO_WAKE": 0x8010AA02,
    "UFFDIO_WRITEPROTECT": 0xC018AA06,
    "USERFAULTFD_IOC_NEW": 0xAA00,
    "PAGEMAP_SCAN": 0xC0606610,
}


@pytest.mark.parametrize("name", SIZES)
def test_structure_size(name):
    assert ctypes.sizeof(getattr(uapi, name)) == SIZES[name]


@pytest.mark.parametrize("name", NUMBERS)
def test_ioctl_number(name):
    assert getattr(uapi, name) == NUMBERS[name]
    assert uapi.IOCTL_NAMES[NUMBERS[name]] == name


def test_every_ioctl_number_and_structure_is_checked():
    assert set(uapi.IOCTL_NAMES.values()) == set(NUMBERS)
    assert {name for name, value in vars(uapi).items() if isinstance(value, type(ctypes.Structure))} == set(SIZES)


def test_arrays_have_the_kernels_layout():
    assert uapi.PAGE_REGION.itemsize == 24
    assert uapi.UFFD_MSG.itemsize == 32
    assert {name: field[1] for name, field in uapi.UFFD_MSG.fields.items()} == {
        "event": 0,
        "flags": 8,
        "address": 16,
        "ptid": 24,
    }


def test_features_have_the_kernels_names():
    assert uapi.FEATURE_NAMES[1 << 12] == "UFFD_FEATURE_WP_HUGETLBFS_SHMEM"
    assert uapi.FEATURE_NAMES[1 << 15] == "UFFD_FEATURE_WP_ASYNC"
