import dataclasses
import re
import struct

import pytest

from pageferry.core.errors import UsageError
from pageferry.core.memory import GuestMemory
from pageferry.core.state import DeviceState, MachineState
from pageferry.core.vm import VmConfig
from pageferry.devices import clock, dma, platform, rtc, uart
from pageferry.guests import abi
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.build import SOURCES
from pageferry.guests.elf import LoadSegment, Program
from pageferry.guests.workloads import load_workload

MIB = 1 << 20
GIB = 1 << 30
DEVICES = (DeviceState(name="a", data=b"fresh"),)


class BareVm:
    """The part of a Vm that booting uses."""

    def __init__(self, memory_bytes, cpus=1):
        self.config = VmConfig(memory_bytes=memory_bytes, cpus=cpus)
        self.memory = GuestMemory.linear(memory_bytes)
        self.loaded = None

    def save_state(self):
        return MachineState(vcpus=(), devices=DEVICES)

    def load_state(self, state):
        self.loaded = state


def translate(memory, gva):
    entry, flags = 0x10000, 7
    for shift in (39, 30, 21):
        entry = memory.read_u64((entry & ~0xFFF) + 8 * ((gva >> shift) & 511))
        flags &= entry
        assert entry & 1, f"{gva:#x} is not mapped"
    assert entry & 0x80
    assert flags == 7
    return (entry & ~0x1FFFFF) + (gva & 0x1FFFFF)


def is_mapped(memory, gva):
    try:
        translate(memory, gva)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("memory_bytes", [2 * MIB, 64 * MIB, 3 * GIB, 5 * GIB + 4096, 127 * GIB])
def test_the_identity_map_covers_ram_and_devices_and_ends_there(memory_bytes):
    vm = BareVm(memory_bytes)
    boot(vm, load_workload("idle"))
    end = vm.memory.gfn_limit << 12
    for gva in (0, 0x1234, 0x200000, end - 1, dma.DMA_MMIO, 4 * GIB - 1):
        assert translate(vm.memory, gva) == gva
    limit = max(4 * GIB, -(-end // GIB) * GIB)
    assert is_mapped(vm.memory, limit - 1)
    assert not is_mapped(vm.memory, limit)
    assert abi.page_tables_end(end) <= abi.PAGE_TABLES_LIMIT
    assert vm.memory.read(abi.page_tables_end(end), 4096) == bytes(4096)


def test_the_information_page_says_what_was_asked():
    vm = BareVm(3 * GIB + 8 * MIB, cpus=2)
    params = GuestParams(
        working_set_bytes=5000, working_set_gpa=3 * GIB - 4096, rate=1000, seed=7, arguments=(11, (1 << 64) - 1)
    )
    info = boot(vm, load_workload("sweep"), params=params)
    fields = struct.unpack("<28Q", vm.memory.read(0x1000, 28 * 8))
    assert fields[0] == int.from_bytes(b"PFGUEST1", "little")
    assert fields[1:12] == (1, 3 * GIB + 8 * MIB, 2, 3 * GIB - 4096, 8192, 1000, 7, 0x2000, 2, 2, 0)
    assert fields[12:20] == (0, 3 * GIB, 4 * GIB, 8 * MIB, 0, 0, 0, 0)
    assert fields[20:28] == (11, (1 << 64) - 1, 0, 0, 0, 0, 0, 0)
    assert (info.working_set_gpa, info.working_set_bytes) == (3 * GIB - 4096, 8192)


def test_vcpus_and_devices_are_loaded_in_the_entry_state():
    vm = BareVm(8 * MIB, cpus=2)
    program = load_workload("kv")
    boot(vm, program)
    assert vm.loaded.devices == DEVICES
    first, second = vm.loaded.vcpus
    assert (first.rip, first.rdi, first.rsi, first.rsp) == (program.entry, 0x1000, 0, 0xFFFF8)
    assert dataclasses.replace(first, rsi=1, rsp=0xF7FF8) == second
    assert (first.cr0, first.cr3, first.cr4, first.efer) == (0x80050033, 0x10000, 0x620, 0x500)
    assert (first.cs.selector, first.ss.selector, first.rflags) == (0x33, 0x2B, 0x202)
    assert first.cs.attributes & 0xF == 11
    assert (first.cs.attributes >> 5) & 3 == (first.ss.attributes >> 5) & 3 == 3
    assert (first.cs.attributes >> 9) & 1


def test_segments_are_in_memory():
    vm = BareVm(8 * MIB)
    program = load_workload("kv")
    boot(vm, program)
    for segment in program.segments:
        assert vm.memory.read(segment.gpa, len(segment.data)) == segment.data


def program_of(*segments, minimum=0, default=None):
    return Program(
        name="p",
        entry=segments[0].gpa,
        segments=segments,
        end_gpa=(segments[-1].end_gpa + 4095) & -4096,
        default_working_set_bytes=default,
        min_working_set_bytes=minimum,
    )


def at(gpa, size_bytes=4096):
    return LoadSegment(gpa=gpa, data=b"\x90", size_bytes=size_bytes, writable=False)


SMALL = program_of(at(MIB), minimum=8192, default=64 * MIB)


@pytest.mark.parametrize(
    ("memory_bytes", "program", "params", "expected"),
    [
        (2 * MIB, SMALL, {}, MIB - 4096),  # the default, bounded by memory
        (128 * MIB, SMALL, {}, 64 * MIB),
        (3 * MIB, program_of(at(MIB)), {}, MIB - 4096),  # half of what is free, in whole pages (2 MiB less one page)
        (2 * MIB, SMALL, {"working_set_bytes": MIB - 4096}, MIB - 4096),
        (2 * MIB, SMALL, {"working_set_bytes": 8191}, 8192),
        (3 * GIB + 4096, SMALL, {"working_set_bytes": 8192, "working_set_gpa": 3 * GIB - 4096}, 8192),
    ],
)
def test_the_working_set_is_bounded_by_memory(memory_bytes, program, params, expected):
    assert boot(BareVm(memory_bytes), program, params=GuestParams(**params)).working_set_bytes == expected


@pytest.mark.parametrize(
    ("memory_bytes", "program", "params", "message"),
    [
        (2 * MIB, SMALL, {"working_set_bytes": MIB}, "memory too small: .*needs 3 MiB"),
        (2 * MIB, program_of(at(MIB, MIB), minimum=4096), {}, "memory too small: .*needs 3 MiB"),
        (2 * MIB, program_of(at(MIB, MIB + 1)), {}, "memory too small for p"),
        (2 * MIB, program_of(at(MIB), at(5 * GIB)), {}, "memory too small for p"),
        (4 * GIB, program_of(at(3 * GIB)), {}, "a segment at 0xc0000000, which is not RAM"),
        (4 * GIB, program_of(at(3 * GIB - 4096, 8192)), {}, "a segment at 0xbffff000, which is not RAM"),
        (8 * MIB, SMALL, {"working_set_bytes": 4096}, "too small for p"),
        (8 * MIB, SMALL, {"working_set_bytes": -1}, "not possible"),
        (8 * MIB, SMALL, {"working_set_gpa": MIB + 4097}, "page boundary"),
        (8 * MIB, SMALL, {"working_set_gpa": MIB}, "cannot begin"),
        (8 * MIB, SMALL, {"working_set_gpa": 9 * MIB}, "cannot begin"),
        (4 * GIB, SMALL, {"working_set_gpa": 3 * GIB + MIB}, "cannot begin"),
        (8 * MIB, SMALL, {"rate": -1}, "rate cannot be -1"),
        (8 * MIB, SMALL, {"seed": 1 << 64}, "seed cannot be"),
        (8 * MIB, SMALL, {"arguments": (0,) * 9}, "too many"),
        (8 * MIB, SMALL, {"arguments": (-5,)}, "argument cannot be -5"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(memory_bytes, program, params, message):
    vm = BareVm(memory_bytes)
    with pytest.raises(UsageError) as caught:
        boot(vm, program, params=GuestParams(**params))
    assert re.search(message, f"{caught.value} {caught.value.hint}")
    assert vm.loaded is None
    assert vm.memory.populated()[0].size == 0


@pytest.mark.parametrize("cpus", [0, 13])
def test_a_guest_has_a_stack_for_each_vcpu(cpus):
    with pytest.raises(UsageError, match="vCPUs"):
        boot(BareVm(8 * MIB, cpus=cpus), SMALL)


def test_the_lowest_stack_is_above_the_largest_page_tables():
    assert abi.page_tables_end(128 * GIB) <= abi.STACKS_TOP - abi.MAX_CPUS * abi.STACK_BYTES
    assert abi.MAX_CPUS * abi.STATUS_SLOT_BYTES <= 4096


def test_the_status_page_is_read_slot_by_slot():
    memory = GuestMemory.linear(2 * MIB)
    memory.write(0x2080, struct.pack("<16Q", *range(1, 17)))
    first, second = abi.read_status(memory, 2)
    assert (first.work, first.error) == (0, 0)
    assert (second.work, second.checks, second.state, second.error) == (1, 2, 3, 4)
    assert (second.detail, second.values) == ((5, 6, 7, 8), tuple(range(9, 17)))


def test_the_c_header_says_what_python_says():
    text = (SOURCES / "guest.h").read_text()
    defines = {name: int(value, 0) for name, value in re.findall(r"#define (\w+) (0x[0-9a-f]+|\d+)", text)}
    assert defines == {
        "ABI_VERSION": abi.ABI_VERSION,
        "INFO_MAGIC": abi.INFO_MAGIC,
        "PAGE_SIZE": 4096,
        "MAX_RAM_REGIONS": abi.MAX_RAM_REGIONS,
        "MAX_ARGUMENTS": abi.MAX_ARGUMENTS,
        "CONSOLE_PORT": uart.CONSOLE_PORT,
        "EXIT_PORT": platform.EXIT_PORT,
        "CLOCK_PORT": clock.CLOCK_PORT,
        "TIMER_PORT": clock.TIMER_PORT,
        "RTC_PORT": rtc.RTC_PORT,
        "SYNC_PORT": platform.SYNC_PORT,
        "INVALIDATE_PORT": platform.INVALIDATE_PORT,
        "DMA_MMIO": dma.DMA_MMIO,
        "STATE_RUNNING": abi.STATE_RUNNING,
        "STATE_ENDED": abi.STATE_ENDED,
    }
