"""Kernels made up for tests, files of the right form with nothing to run in them, and what a boot did with them."""

import gzip
import struct

from pageferry.core.memory import GuestMemory
from pageferry.core.state import DeviceState, MachineState, MpState
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.guests.linux.payload import unpack

PREFERRED_GPA = 0x100_0000
INIT_SIZE = 0x40_0000


def elf(*segments, bits=64, kind=2, machine=None, entry=PREFERRED_GPA, notes=b""):
    """An ELF file; a segment is (paddr, content, bytes in memory), ``notes`` the content of a note segment."""
    headers, body, at = [], b"", 0x1000
    loads = [(1, *segment) for segment in segments] + ([(4, 0, notes, len(notes))] if notes else [])
    for segment_kind, paddr, content, in_memory in loads:
        vaddr = paddr + (0xFFFF_FFFF_8000_0000 if bits == 64 else 0xC000_0000)
        if bits == 64:
            fields = struct.pack("<IIQQQQQQ", segment_kind, 7, at, vaddr, paddr, len(content), in_memory, 0x1000)
        else:
            vaddr &= 0xFFFF_FFFF
            fields = struct.pack("<8I", segment_kind, at, vaddr, paddr, len(content), in_memory, 7, 0x1000)
        headers.append(fields)
        body += content
        at += len(content)
    ident = b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9)
    machine = machine or (62 if bits == 64 else 3)
    if bits == 64:
        head = struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, entry, 64, 0, 0, 64, 56, len(loads), 64, 0, 0)
    else:
        head = struct.pack("<HHIIIIIHHHHHH", kind, machine, 1, entry, 52, 0, 0, 52, 32, len(loads), 40, 0, 0)
    return (ident + head + b"".join(headers)).ljust(0x1000, b"\0") + body


def note(owner, kind, content):
    """One ELF note."""
    return b"".join(
        (
            struct.pack("<III", len(owner) + 1, len(content), kind),
            (owner + b"\0").ljust((len(owner) + 4) // 4 * 4, b"\0"),
            content.ljust((len(content) + 3) // 4 * 4, b"\0"),
        )
    )


def vmlinux():
    """A kernel proper: code, and data with a page of zeros after it."""
    return elf((PREFERRED_GPA, b"code" * 1024, 0x1000), (PREFERRED_GPA + 0x1000, b"data", 0x2000))


def bzimage(payload=None, *, version=0x20F, flags=1, kernel_bytes=None, payload_at=0x40, initrd_max=0x7FFF_FFFF):
    """A bzImage of one sector of setup, with gzip's ``vmlinux()`` in it unless told otherwise."""
    payload = gzip.compress(vmlinux()) if payload is None else payload
    kernel = bytes(payload_at) + payload
    kernel += bytes(-len(kernel) % 16)
    setup = bytearray(1024)
    setup[0x1F1] = 1
    struct.pack_into("<I", setup, 0x1F4, (kernel_bytes or len(kernel)) // 16)
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    setup[0x200:0x202] = b"\xeb\x6a"
    struct.pack_into("<4sH", setup, 0x202, b"HdrS", version)
    struct.pack_into("<I", setup, 0x22C, initrd_max)
    struct.pack_into("<H", setup, 0x236, flags)
    struct.pack_into("<I", setup, 0x238, 2047)
    struct.pack_into("<II", setup, 0x248, payload_at, len(payload))
    struct.pack_into("<QI", setup, 0x258, PREFERRED_GPA, INIT_SIZE)
    return bytes(setup) + kernel


def vmlinux_of(image):
    """The kernel proper in a real bzImage."""
    setup_bytes = (image[0x1F1] + 1) * 512
    at, size = struct.unpack_from("<II", image, 0x248)
    return unpack(image[setup_bytes + at :][:size], limit_bytes=256 << 20)


def with_size(packed, unpacked):
    """A payload that does not end with its unpacked size by itself, as the kernel's build makes it."""
    return packed + struct.pack("<I", len(unpacked))


def number(data, at, size):
    """A field of a structure."""
    return int.from_bytes(data[at : at + size], "little")


class BootedVm:
    """The part of a Vm that booting uses."""

    devices = (DeviceState(name="a", data=b"fresh"),)

    def __init__(self, memory_bytes=64 << 20, cpus=1, machine=MachineModel.PC):
        self.config = VmConfig(memory_bytes=memory_bytes, cpus=cpus, machine=machine)
        self.memory = GuestMemory.linear(memory_bytes)
        self.loaded = None

    def save_state(self):
        return MachineState(vcpus=(), devices=self.devices)

    def load_state(self, state):
        self.loaded = state

    @property
    def first(self):
        """The state of the vCPU that enters the kernel."""
        return self.loaded.vcpus[0]

    def string(self, gpa):
        """Text that ends with a NUL."""
        return self.memory.read(gpa, 4096).partition(b"\0")[0]

    def descriptor(self, selector):
        """A segment as the CPU would load it: base, limit, attributes as `core.state.Segment` packs them."""
        low, high = struct.unpack("<II", self.memory.read(self.first.gdtr.base + selector, 8))
        limit = (low & 0xFFFF | high & 0xF0000) << 12 | 0xFFF
        return (low >> 16 | (high & 0xFF) << 16 | high & 0xFF000000), limit, high >> 8 & 0xFF | high >> 12 & 0xF00

    def expect_protected_mode(self, entry):
        """The first vCPU enters at ``entry`` with flat segments, no paging, no interrupts; the others wait."""
        first, *others = self.loaded.vcpus
        assert first.rip == entry
        assert (first.rflags & 0x200, first.cr0 & 0x8000_0001, first.efer) == (0, 1, 0)
        for segment in (first.cs, first.ds, first.es, first.ss):
            assert self.descriptor(segment.selector) == (segment.base, segment.limit, segment.attributes)
            assert (segment.base, segment.limit, segment.attributes & 0x400) == (0, 0xFFFF_FFFF, 0x400)
        assert [vcpu.mp_state for vcpu in others] == [MpState.UNINITIALIZED] * (self.config.cpus - 1)
