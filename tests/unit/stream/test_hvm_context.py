"""Machine state as an HVM context: layout, round trip, and every way to be wrong."""

import dataclasses
import lzma
import struct
from pathlib import Path

import pytest

from pageferry.core.errors import LocalStreamError, RecordError
from pageferry.core.state import (
    INITIAL_FPU_REGS,
    DescriptorTable,
    DeviceState,
    ExtendedState,
    LapicState,
    MachineState,
    MpState,
    PendingException,
    Segment,
    VcpuState,
)
from pageferry.stream.hvm_context import (
    CPU_BODY,
    decode_cpu,
    decode_machine_state,
    encode_cpu,
    encode_machine_state,
)
from pageferry.stream.hvm_entries import Entry, Typecode, join_entries, split_entries
from pageferry.stream.hvm_vcpu import MAX_MSRS, decode_vcpu_entries

GOLDEN = Path(__file__).parents[2] / "golden"
NAMES = [field.name for field in dataclasses.fields(VcpuState)]
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldtr")
EVENTS = ("interrupt_shadow", "nmi_pending", "nmi_masked", "triple_fault_pending", "mp_state")
OPTIONAL = ("pending_exception", "extended", "lapic", "msrs")
NUMBERS = [name for name in NAMES if name not in (*SEGMENTS, *EVENTS, *OPTIONAL, "gdtr", "idtr", "fpu_regs")]


def vcpu(**changes):
    """A vCPU in which every field has a value of its own."""
    wide = [name for name in NUMBERS if name not in ("pending_event", "error_code")]
    fields = {name: 0x0101_0101_0101_0101 * (number + 1) for number, name in enumerate(wide)}
    fields |= {"pending_event": 0x8000_0B0E, "error_code": 0x1234}
    fields |= {
        name: Segment(selector=0x10 + n, base=1 << 40 | n, limit=0xFFFF_0000 | n, attributes=0xC90 + n)
        for n, name in enumerate(SEGMENTS)
    }
    fields |= {"gdtr": DescriptorTable(base=0xAAA, limit=0xBBB), "idtr": DescriptorTable(base=0xCCC, limit=0xDDD)}
    return VcpuState(**(fields | {"fpu_regs": INITIAL_FPU_REGS} | changes))


STATE = MachineState(
    vcpus=(vcpu(interrupt_shadow=2, nmi_masked=True), vcpu(rax=5, msrs=((0x10, 1 << 63), (0xC000_0080, 0)))),
    devices=(DeviceState(name="com1", data=b"\x00\xff"), DeviceState(name="timer", data=b"")),
)


def test_a_pause_by_the_user_is_an_entry_and_nothing_else_is():
    assert Typecode.PAUSED not in [entry.typecode for entry in split_entries(encode_machine_state(STATE))]
    data = encode_machine_state(dataclasses.replace(STATE, paused=True))
    entries = split_entries(data)
    assert [entry.body for entry in entries if entry.typecode == Typecode.PAUSED] == [b""]
    assert decode_machine_state(data) == dataclasses.replace(STATE, paused=True)
    for wrong in (Entry(typecode=Typecode.PAUSED, instance=1), Entry(typecode=Typecode.PAUSED, body=b"1")):
        changed = [wrong if entry.typecode == Typecode.PAUSED else entry for entry in entries]
        with pytest.raises(RecordError, match="not none, or an instance"):
            decode_machine_state(join_entries(changed))


LAPIC = LapicState(
    base=0xFEE0_0900,
    registers=bytes(0xF0) + b"\xff\1".ljust(0x2F0, b"\0") + b"\x0a".ljust(0x20, b"\0"),
    tsc_deadline=1 << 60,
)
FULL_STATE = MachineState(
    vcpus=(
        vcpu(
            triple_fault_pending=True,
            pending_exception=PendingException(vector=14, error_code=6, payload=1 << 63),
            mp_state=MpState.HALTED,
            extended=ExtendedState(xcr0=0xE7, in_use=0x24, area=bytes(range(192))),
            lapic=LAPIC,
        ),
        vcpu(
            pending_exception=PendingException(vector=3),
            extended=ExtendedState(xcr0=7),
            lapic=LapicState(base=0xFEE0_0100, registers=bytes(1024)),
        ),
    ),
    devices=(),
    tsc_khz=2_596_128,
    kvm_clock_ns=1 << 61,
)


def test_cpu_entry_has_the_size_of_xens():
    assert CPU_BODY.size == 1032
    assert len(encode_cpu(vcpu())) == 1032


PLACES = {
    512: ("rax", "rbx", "rcx", "rdx", "rbp", "rsi", "rdi", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
    640: ("rip", "rflags", "cr0", "cr2", "cr3", "cr4", "dr0", "dr1", "dr2", "dr3", "dr6", "dr7"),
    920: ("sysenter_cs", "sysenter_esp", "sysenter_eip", "shadow_gs"),
    960: ("lstar", "star", "cstar", "syscall_mask", "efer", "tsc_aux", "tsc"),
}


@pytest.mark.parametrize(
    ("name", "offset"), [(name, first + 8 * n) for first, names in PLACES.items() for n, name in enumerate(names)]
)
def test_each_register_has_its_place(name, offset):
    state = vcpu()
    assert struct.unpack_from("<Q", encode_cpu(state), offset) == (getattr(state, name),)


def test_each_segment_has_its_place():
    state, body = vcpu(), encode_cpu(vcpu())
    tables = [state.idtr, state.gdtr]
    segments = [getattr(state, name) for name in SEGMENTS]
    assert struct.unpack_from("<8I", body, 736) == tuple(s.selector for s in segments)
    assert struct.unpack_from("<10I", body, 768) == tuple(s.limit for s in segments + tables)
    assert struct.unpack_from("<10Q", body, 808) == tuple(s.base for s in segments + tables)
    assert struct.unpack_from("<8I", body, 888) == tuple(s.attributes for s in segments)
    assert struct.unpack_from("<4I", body, 1016) == (0x8000_0B0E, 0x1234, 1, 0)


def test_machine_state_goes_there_and_back():
    data = encode_machine_state(STATE)
    assert decode_machine_state(data) == STATE
    assert [(entry.typecode, entry.instance) for entry in split_entries(data)] == [
        (Typecode.HEADER, 0),
        (Typecode.CPU, 0),
        (Typecode.CPU_EVENTS, 0),
        (Typecode.CPU, 1),
        (Typecode.CPU_MSR, 1),
        (Typecode.DEVICE, 0),
        (Typecode.DEVICE, 1),
        (Typecode.END, 0),
    ]


def test_all_of_the_state_goes_there_and_back():
    data = encode_machine_state(FULL_STATE)
    assert decode_machine_state(data) == FULL_STATE
    assert [(entry.typecode, entry.instance, len(entry.body)) for entry in split_entries(data)] == [
        (Typecode.HEADER, 0, 24),
        (Typecode.CPU, 0, 1032),
        (Typecode.CPU_EVENTS, 0, 8),
        (Typecode.CPU_EXCEPTION, 0, 16),
        (Typecode.CPU_XSAVE, 0, 24 + 576 + 192),
        (Typecode.LAPIC, 0, 24),
        (Typecode.LAPIC_REGS, 0, 1024),
        (Typecode.CPU, 1, 1032),
        (Typecode.CPU_EXCEPTION, 1, 16),
        (Typecode.CPU_XSAVE, 1, 24 + 576),
        (Typecode.LAPIC, 1, 24),
        (Typecode.LAPIC_REGS, 1, 1024),
        (Typecode.KVM_CLOCK, 0, 8),
        (Typecode.END, 0, 0),
    ]


def test_what_a_vcpu_has_besides_has_its_place():
    entries = {(e.typecode, e.instance): e.body for e in split_entries(encode_machine_state(FULL_STATE))}
    assert entries[Typecode.CPU_EVENTS, 0] == bytes((0, 0, 0, 1, 3, 0, 0, 0))
    assert entries[Typecode.CPU_EXCEPTION, 0] == struct.pack("<BBHIQ", 14, 3, 0, 6, 1 << 63)
    assert entries[Typecode.CPU_EXCEPTION, 1] == struct.pack("<BBHIQ", 3, 0, 0, 0, 0)
    xsave = entries[Typecode.CPU_XSAVE, 0]
    assert struct.unpack_from("<3Q", xsave) == (0, 0xE7, 0xE7)
    assert xsave[24 : 24 + 512] == INITIAL_FPU_REGS
    assert struct.unpack_from("<8Q", xsave, 24 + 512) == (0x27, *[0] * 7)
    assert xsave[24 + 576 :] == bytes(range(192))
    assert struct.unpack("<QIIQ", entries[Typecode.LAPIC, 0]) == (0xFEE0_0900, 0, 128, 1 << 60)
    assert struct.unpack("<QIIQ", entries[Typecode.LAPIC, 1]) == (0xFEE0_0100, 3, 2, 0)
    assert entries[Typecode.LAPIC_REGS, 0] == LAPIC.registers
    assert entries[Typecode.KVM_CLOCK, 0] == struct.pack("<Q", 1 << 61)


def test_xens_own_local_apic_reads_as_ours():
    with lzma.open(GOLDEN / "xen-4.17-libxc-live.bin.xz") as file:
        data = file.read()
    at = data.index(struct.pack("<HHI", Typecode.LAPIC, 0, 24))
    lapic, registers = Entry(typecode=Typecode.LAPIC, body=data[at + 8 : at + 32]), data[at + 32 :]
    assert registers[:8] == struct.pack("<HHI", Typecode.LAPIC_REGS, 0, 1024)
    registers = Entry(typecode=Typecode.LAPIC_REGS, body=registers[8 : 8 + 1024])
    fields = decode_vcpu_entries({Typecode.LAPIC: lapic, Typecode.LAPIC_REGS: registers}, b"")
    assert fields == {"lapic": LapicState(base=0xFEE0_0900, registers=registers.body)}


def test_an_fpu_that_was_never_used_goes_there_and_back():
    state = vcpu(fpu_regs=bytes(512))
    body = encode_cpu(state)
    assert body[1024:1028] == bytes(4)
    assert decode_cpu(Entry(typecode=Typecode.CPU, body=body)) == state


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (vcpu(rax=1 << 64), "a register does not fit"),
        (vcpu(rip=-1), "a register does not fit"),
        (vcpu(error_code=1 << 32), "a register does not fit"),
        (vcpu(fpu_regs=b""), "fpu_regs has 0 bytes"),
        (vcpu(cs=Segment(selector=1 << 16, base=0, limit=0, attributes=0)), "cannot be read back"),
        (vcpu(interrupt_shadow=256), r"does not fit its width \(in HVM_CONTEXT CPU_EVENTS"),
        (vcpu(interrupt_shadow=4), "cannot be read back"),
        (vcpu(msrs=((1 << 32, 0),)), r"does not fit its width \(in HVM_CONTEXT CPU_MSR"),
        (vcpu(pending_exception=PendingException(vector=32)), "cannot be read back"),
        (vcpu(pending_exception=PendingException(vector=1, payload=1 << 64)), "does not fit its width"),
        (vcpu(extended=ExtendedState(xcr0=1 << 64)), r"does not fit its width \(in HVM_CONTEXT CPU_XSAVE"),
        (vcpu(extended=ExtendedState(xcr0=0)), "cannot be read back"),
        (vcpu(lapic=LapicState(base=0, registers=bytes(1023))), "cannot be read back"),
        (vcpu(msrs=((2, 0), (1, 0))), "cannot be read back"),
    ],
)
def test_a_vcpu_that_does_not_fit_is_refused_before_it_is_sent(state, match):
    with pytest.raises(LocalStreamError, match=match):
        encode_machine_state(MachineState(vcpus=(state,), devices=()))


@pytest.mark.parametrize(
    "devices",
    [
        [DeviceState(name="", data=b"")],
        [DeviceState(name="x" * 65, data=b"")],
        [DeviceState(name="naïve", data=b"")],
        [DeviceState(name="a b", data=b"")],
        [DeviceState(name="a", data=b""), DeviceState(name="a", data=b"")],
        [DeviceState(name="a", data=bytes(16 << 20))],
        [DeviceState(name=f"d{n}", data=b"") for n in range(1025)],
    ],
)
def test_devices_that_do_not_fit_are_refused_before_they_are_sent(devices):
    with pytest.raises(LocalStreamError, match=r"cannot be (read back|written)"):
        encode_machine_state(MachineState(vcpus=(vcpu(),), devices=tuple(devices)))


def test_a_machine_without_vcpus_is_refused():
    with pytest.raises(LocalStreamError, match="cannot be read back"):
        encode_machine_state(MachineState(vcpus=(), devices=()))


# -- decoding is strict ------------------------------------------------------------------------------------------------

ENTRIES = split_entries(encode_machine_state(STATE))
HEADER, CPU_0, EVENTS_0, CPU_1, MSR_1, DEVICE_0, DEVICE_1, END = ENTRIES
FULL = {entry.typecode: entry for entry in split_entries(encode_machine_state(FULL_STATE)) if not entry.instance}
EXCEPTION, XSAVE, CLOCK = (FULL[code] for code in (Typecode.CPU_EXCEPTION, Typecode.CPU_XSAVE, Typecode.KVM_CLOCK))
LAPIC_0, LAPIC_REGS_0 = FULL[Typecode.LAPIC], FULL[Typecode.LAPIC_REGS]


def patched(entry, offset, data):
    body = entry.body[:offset] + data + entry.body[offset + len(data) :]
    return dataclasses.replace(entry, body=body)


def replaced(entry, **changes):
    return dataclasses.replace(entry, **changes)


def u32(value):
    return struct.pack("<I", value)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ([], "first entry is not HEADER"),
        (ENTRIES[1:], "first entry is not HEADER"),
        (ENTRIES[:-1], "or the last not END"),
        ([HEADER, *ENTRIES], r"only once \(in HVM_CONTEXT HEADER 0 at byte 32\)"),
        ([HEADER, END, *ENTRIES[1:]], r"only once \(in HVM_CONTEXT END 0"),
        ([*ENTRIES[:-1], replaced(END, body=b"x")], "END a body"),
        ([*ENTRIES[:-1], replaced(END, instance=1)], "has an instance"),
        ([replaced(HEADER, instance=1), *ENTRIES[1:]], "has an instance"),
        ([replaced(HEADER, body=b""), *ENTRIES[1:]], "body of 0 bytes, not 24"),
        ([patched(HEADER, 0, u32(1)), *ENTRIES[1:]], "magic 0x1 and version 1"),
        ([patched(HEADER, 4, u32(2)), *ENTRIES[1:]], "version 2"),
        ([HEADER, END], "0 vCPUs"),
        ([HEADER, CPU_0, CPU_0, END], r"only once \(in HVM_CONTEXT CPU 0"),
        ([HEADER, CPU_1, END], r"only 1 vCPUs \(in HVM_CONTEXT CPU 1"),
        ([HEADER, CPU_0, MSR_1, END], r"only 1 vCPUs \(in HVM_CONTEXT CPU_MSR 1"),
        ([HEADER, replaced(CPU_0, body=CPU_0.body[:-1]), END], "body of 1031 bytes, not 1032"),
        ([HEADER, patched(CPU_0, 952, b"\1"), END], "msr_flags"),
        ([HEADER, patched(CPU_0, 1024, u32(3)), END], "unknown flag"),
        ([HEADER, patched(CPU_0, 1024, u32(0)), END], "FPU flag does not agree"),
        ([HEADER, patched(CPU_0, 1028, u32(1)), END], "pad"),
        ([HEADER, patched(CPU_0, 736, u32(1 << 16)), END], "does not fit 16 bits"),
        ([HEADER, patched(CPU_0, 888, u32(1 << 16)), END], "does not fit 16 bits"),
        (
            [HEADER, CPU_0, Entry(typecode=Typecode.HPET, body=b"x"), END],
            r"this state \(in HVM_CONTEXT HPET",
        ),
        ([HEADER, CPU_0, Entry(typecode=0x7F0F), END], r"can hold this state \(in HVM_CONTEXT typecode 0x7f0f"),
        ([HEADER, CPU_0, replaced(MSR_1, instance=0, body=b"1234567"), END], "head is cut"),
        ([HEADER, CPU_0, patched(replaced(MSR_1, instance=0), 0, u32(3)), END], "3 MSRs in 40 bytes"),
        ([HEADER, CPU_0, replaced(MSR_1, instance=0, body=bytes(8)), END], "0 MSRs in 8 bytes"),
        ([HEADER, CPU_0, replaced(MSR_1, instance=0, body=u32(MAX_MSRS + 1) + bytes(4)), END], "4097 MSRs"),
        ([HEADER, CPU_0, patched(replaced(MSR_1, instance=0), 4, u32(1)), END], "reserved"),
        ([HEADER, CPU_0, patched(replaced(MSR_1, instance=0), 12, u32(1)), END], "reserved"),
        ([HEADER, CPU_0, patched(replaced(MSR_1, instance=0), 8, u32(0xC000_0080)), END], "do not ascend"),
        ([HEADER, CPU_0, EVENTS_0, EVENTS_0, END], r"only once \(in HVM_CONTEXT CPU_EVENTS 0"),
        ([HEADER, CPU_0, replaced(EVENTS_0, instance=1), END], r"only 1 vCPUs \(in HVM_CONTEXT CPU_EVENTS 1"),
        ([HEADER, CPU_0, replaced(EVENTS_0, body=bytes(7)), END], "a body of 7 bytes, not 8"),
        ([HEADER, CPU_0, patched(EVENTS_0, 0, b"\4"), END], "interrupt_shadow is 4, more than 3"),
        ([HEADER, CPU_0, patched(EVENTS_0, 1, b"\2"), END], "nmi_pending is 2"),
        ([HEADER, CPU_0, patched(EVENTS_0, 2, b"\2"), END], "nmi_masked is 2"),
        ([HEADER, CPU_0, patched(EVENTS_0, 7, b"\1"), END], "reserved field"),
        ([HEADER, CPU_0, patched(EVENTS_0, 3, b"\2"), END], "triple_fault_pending is 2"),
        ([HEADER, CPU_0, patched(EVENTS_0, 4, b"\4"), END], "mp_state is 4, more than 3"),
        ([HEADER, CPU_0, patched(EVENTS_0, 5, b"\1"), END], "reserved field"),
        ([HEADER, CPU_0, replaced(EXCEPTION, instance=1), END], r"only 1 vCPUs \(in HVM_CONTEXT CPU_EXCEPTION 1"),
        ([HEADER, CPU_0, replaced(EXCEPTION, body=bytes(17)), END], "body of 17 bytes, not 16"),
        ([HEADER, CPU_0, patched(EXCEPTION, 0, b"\x20"), END], "vector 32 is not an exception"),
        ([HEADER, CPU_0, patched(EXCEPTION, 1, b"\7"), END], "reserved field"),
        ([HEADER, CPU_0, patched(EXCEPTION, 2, b"\1"), END], "reserved field"),
        ([HEADER, CPU_0, patched(EXCEPTION, 1, b"\2"), END], "its flags deny"),
        ([HEADER, CPU_0, patched(EXCEPTION, 1, b"\1"), END], "its flags deny"),
        ([HEADER, CPU_0, replaced(XSAVE, body=XSAVE.body[: 24 + 575]), END], "area of 575 bytes, not 576 to 65536"),
        ([HEADER, CPU_0, replaced(XSAVE, body=b"short"), END], "an area of 0 bytes"),
        ([HEADER, CPU_0, replaced(XSAVE, body=XSAVE.body + bytes(1 << 16)), END], "an area of 66304 bytes"),
        ([HEADER, CPU_0, replaced(XSAVE, body=XSAVE.body[: 24 + 576]), END], "576 bytes for XSTATE_BV 0x27"),
        ([HEADER, CPU_0, patched(XSAVE, 24, b"\1"), END], "not that of the CPU entry"),
        ([HEADER, CPU_0, patched(XSAVE, 24 + 512, b"\3"), END], "768 bytes for XSTATE_BV 0x3"),
        ([HEADER, CPU_0, patched(XSAVE, 24 + 512, b"\x26"), END], "do not agree"),
        ([HEADER, CPU_0, patched(XSAVE, 24 + 520, b"\1"), END], "XCOMP_BV or a reserved field"),
        ([HEADER, CPU_0, patched(XSAVE, 8, b"\xe6"), END], "XCR0 0xe6, all of it ever 0xe7, and XSTATE_BV 0x27 do not"),
        ([HEADER, CPU_0, patched(XSAVE, 16, b"\x67"), END], "do not agree"),
        ([HEADER, CPU_0, CPU_1, LAPIC_0, LAPIC_REGS_0, END], "1 local APICs and 2 vCPUs"),
        ([HEADER, CPU_0, LAPIC_0, END], r"together or not at all \(in HVM_CONTEXT LAPIC 0"),
        ([HEADER, CPU_0, LAPIC_REGS_0, END], r"together or not at all \(in HVM_CONTEXT LAPIC_REGS 0"),
        ([HEADER, CPU_0, replaced(LAPIC_0, body=bytes(32)), LAPIC_REGS_0, END], "body of 32 bytes, not 24"),
        ([HEADER, CPU_0, LAPIC_0, replaced(LAPIC_REGS_0, body=bytes(1023)), END], "body of 1023 bytes, not 1024"),
        ([HEADER, CPU_0, patched(LAPIC_0, 8, b"\1"), LAPIC_REGS_0, END], "not as the registers say"),
        ([HEADER, CPU_0, patched(LAPIC_0, 12, b"\1"), LAPIC_REGS_0, END], "not as the registers say"),
        ([HEADER, CPU_0, CLOCK, CLOCK, END], r"only once \(in HVM_CONTEXT KVM_CLOCK"),
        ([HEADER, CPU_0, replaced(CLOCK, body=bytes(9)), END], "body of 9 bytes, not 8"),
        ([HEADER, CPU_0, replaced(CLOCK, instance=1), END], "or an instance"),
        ([HEADER, CPU_0, DEVICE_1, END], "device 0 is missing"),
        ([HEADER, CPU_0, DEVICE_0, replaced(DEVICE_0, instance=1), END], "'com1' comes twice"),
        ([HEADER, CPU_0, replaced(DEVICE_0, body=b"1234567"), END], "head is cut"),
        ([HEADER, CPU_0, patched(DEVICE_0, 0, b"\5"), END], "name of 5 and data of 2 bytes in 14"),
        ([HEADER, CPU_0, patched(DEVICE_0, 4, u32(0xFFFF_FFFF)), END], "data of 4294967295 bytes"),
        ([HEADER, CPU_0, patched(DEVICE_0, 2, b"\1"), END], "name of 4"),
        ([HEADER, CPU_0, patched(DEVICE_0, 8, b"\n"), END], "not printable"),
    ],
)
def test_malformed_contexts_are_refused(entries, match):
    with pytest.raises(RecordError, match=match) as caught:
        decode_machine_state(join_entries(entries))
    assert type(caught.value) is RecordError
    assert caught.value.record.startswith("HVM_CONTEXT")


def test_a_context_cut_anywhere_is_refused():
    data = encode_machine_state(STATE)
    for length in range(len(data)):
        with pytest.raises(RecordError, match="HVM_CONTEXT"):
            decode_machine_state(data[:length])


def test_a_length_of_4_gib_is_refused():
    with pytest.raises(RecordError, match=r"4294967295 bytes goes past the end \(in HVM_CONTEXT HEADER 0 at byte 0\)"):
        decode_machine_state(struct.pack("<HHI", 1, 0, 0xFFFF_FFFF))


def test_a_context_that_is_too_long_is_refused():
    with pytest.raises(RecordError, match="are more than"):
        split_entries(bytes((16 << 20) + 1))
