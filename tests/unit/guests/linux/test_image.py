import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernels import INIT_SIZE, PREFERRED_GPA, bzimage, elf, vmlinux

from pageferry.core.errors import UsageError
from pageferry.guests.linux.image import load_kernel, parse_kernel


def parts(kernel):
    return [(part.gpa, part.data, part.size_bytes) for part in kernel.parts]


PROPER = [(PREFERRED_GPA, b"code" * 1024, 0x1000), (PREFERRED_GPA + 0x1000, b"data", 0x2000)]


def test_a_bzimage_is_unpacked_and_keeps_its_header():
    image = bzimage(initrd_max=0x37FF_FFFF)
    kernel = parse_kernel(image, name="k")
    assert parts(kernel) == PROPER
    assert kernel.entry == PREFERRED_GPA
    assert kernel.header == image[0x1F1:0x26C]
    assert (kernel.initrd_max_gpa, kernel.command_line_max_bytes) == (0x37FF_FFFF, 2047)
    assert not kernel.unpacks_itself


def test_a_vmlinux_goes_to_its_physical_addresses_and_gets_a_header():
    kernel = parse_kernel(vmlinux(), name="k")
    assert parts(kernel) == PROPER
    assert kernel.entry == PREFERRED_GPA
    assert kernel.header[0x202 - 0x1F1 :][:4] == b"HdrS"


def test_what_cannot_be_unpacked_here_unpacks_itself():
    image = bzimage(b"\x89LZO" + bytes(60))
    kernel = parse_kernel(image, name="k")
    assert kernel.unpacks_itself
    assert parts(kernel) == [(PREFERRED_GPA, image[1024:], INIT_SIZE)]
    assert kernel.entry == PREFERRED_GPA + 0x200


def test_the_last_paragraph_of_a_bzimage_need_not_be_whole():
    image = bzimage(kernel_bytes=len(bzimage()) - 1024 + 16)
    assert parts(parse_kernel(image + b"0", name="k")) == PROPER
    with pytest.raises(UsageError, match="truncated"):
        parse_kernel(image, name="k")


BAD = {
    "is not a Linux kernel": b"#!/bin/sh\n",
    "is not a Linux kernel: it has no physical entry point": elf((0x10_0000, b"x", 1), entry=0),
    "it has no physical entry point$": elf((PREFERRED_GPA, b"x", 1), kind=3),
    "ends inside the setup header": bzimage()[:0x210],
    "speaks boot protocol 2.04": bzimage(version=0x204),
    "is a 32-bit kernel": bzimage(flags=0),
    "is truncated: it has": bzimage()[:-16],
    "is truncated: .*header says": bzimage(kernel_bytes=1 << 30),
    "payload reaches beyond its end": bzimage(kernel_bytes=128),
    "is damaged: gzip cannot": bzimage(b"\x1f\x8bxxxxxxxxxxxxxx\1\0\0\0"),
    "is damaged: it says": bzimage(gzip.compress(vmlinux())[:-4] + b"\xff" * 4),
    "is not an ELF file": bzimage(gzip.compress(b"something else")),
    r"is not a kernel for x86-64 \(32 bits, machine 3\)": elf((PREFERRED_GPA, b"x", 1), bits=32),
    r"is not a kernel for x86-64 \(64 bits, machine 183\)": elf((PREFERRED_GPA, b"x", 1), machine=183),
    "ends inside the segment": vmlinux()[:-1],
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_file_is_one_clear_error_with_a_hint(message):
    with pytest.raises(UsageError, match=message) as caught:
        parse_kernel(BAD[message], name="file")
    assert str(caught.value).startswith("file ")
    assert caught.value.hint
    assert "\n" not in str(caught.value) + caught.value.hint


@given(st.sampled_from([vmlinux(), bzimage(), bzimage(b"\x89LZO" + bytes(60))]), st.data())
def test_a_damaged_file_is_a_kernel_or_is_refused_and_nothing_else(image, data):
    image = bytearray(image)
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(0, min(len(image) - 1, 0x480)))] = data.draw(st.integers(0, 255))
    del image[data.draw(st.integers(len(image) // 2, len(image))) :]
    try:
        kernel = parse_kernel(bytes(image), name="fuzz")
    except UsageError:
        return
    assert sum(len(part.data) for part in kernel.parts) <= 256 << 20


def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        load_kernel(tmp_path / "none")
