"""Streams that must stay readable for ever: a real Xen's, and one of ours per format version."""

import dataclasses
import lzma
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pageferry.core.cpuid import CpuidLeaf
from pageferry.core.errors import RecordError
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
from pageferry.stream.decoder import Decoder
from pageferry.stream.encoder import Encoder
from pageferry.stream.format import PageType, carries_data
from pageferry.stream.hvm_context import decode_cpu, decode_machine_state, encode_cpu, encode_machine_state
from pageferry.stream.hvm_entries import Typecode, join_entries, split_entries
from pageferry.stream.intake import NEED_DATA
from pageferry.stream.records import (
    CpuidPolicy,
    End,
    HvmContext,
    HvmParams,
    MsrEntry,
    MsrPolicy,
    PageData,
    StaticDataEnd,
    StreamHeader,
    TscInfo,
)

GOLDEN = Path(__file__).parents[2] / "golden"


def decode(data):
    decoder = Decoder()
    decoder.feed(data)
    events = []
    while (event := decoder.next_event()) is not NEED_DATA:
        events.append(event)
    decoder.eof()
    assert decoder.ended
    assert decoder.offset == len(data)
    assert decoder.trailing_data == b""
    return events


def encode(events):
    encoder = Encoder()
    pieces = []
    for event in events:
        if isinstance(event, StreamHeader):
            pieces.append(encoder.header(event))
        elif isinstance(event, PageData):
            pieces += [encoder.page_data(event.pfns, event.types), event.payload]
        else:
            pieces.append(encoder.record(event))
    data = b"".join(pieces)
    assert encoder.offset == len(data)
    return data


@pytest.fixture(scope="module")
def xen_bytes():
    return lzma.decompress((GOLDEN / "xen-4.17-libxc-live.bin.xz").read_bytes())


@pytest.fixture(scope="module")
def xen_events(xen_bytes):
    return decode(xen_bytes)


def test_xen_stream_has_the_records_that_xen_wrote(xen_events):
    assert xen_events[0] == StreamHeader(version=3, xen_major=4, xen_minor=17)
    assert Counter(type(event) for event in xen_events) == {
        StreamHeader: 1,
        CpuidPolicy: 1,
        MsrPolicy: 1,
        StaticDataEnd: 1,
        PageData: 1023,
        TscInfo: 1,
        HvmContext: 1,
        HvmParams: 1,
        End: 1,
    }
    assert [type(event) for event in xen_events[-4:]] == [TscInfo, HvmContext, HvmParams, End]
    _, cpuid, msr, *_ = xen_events
    assert len(cpuid.leaves) == 59
    assert len(msr.entries) == 2
    tsc, context, params = xen_events[-4:-1]
    assert tsc == TscInfo(mode=0, khz=2_596_128, nsec=0x4_C471_F37D, incarnation=1)
    assert len(context.data) == 2504
    assert len(params.params) == 8
    assert params.params[0] == (1, 0xFEFFC)


def test_xen_stream_has_the_pages_that_xen_sent(xen_events):
    pages = [event for event in xen_events if isinstance(event, PageData)]
    types = np.concatenate([event.types for event in pages])
    pfns = np.concatenate([event.pfns for event in pages])
    assert dict(zip(*np.unique(types, return_counts=True), strict=True)) == {
        PageType.NOTAB: 4196,
        PageType.XTAB: 1040367,
    }
    sent, times = np.unique(pfns[carries_data(types)], return_counts=True)
    assert sent.size == 4113
    assert np.count_nonzero(times > 1) == 75
    assert all(len(event.payload) == 4096 * np.count_nonzero(event.types == PageType.NOTAB) for event in pages)
    assert Counter(event.pfns.size for event in pages) == {1024: 1020, 72: 1, 6: 1, 5: 1}


def test_xen_stream_encodes_to_the_same_bytes(xen_bytes, xen_events):
    assert encode(xen_events) == xen_bytes


def test_xen_hvm_context_goes_there_and_back(xen_events):
    data = xen_events[-3].data
    entries = split_entries(data)
    assert [entry.typecode for entry in entries] == [1, 2, 5, 6, 7, 8, 9, 14, 18, 19, 0]
    assert join_entries(entries) == data
    cpu = entries[1]
    assert cpu.typecode == Typecode.CPU
    assert len(cpu.body) == 1032
    vcpu = decode_cpu(cpu)
    assert (vcpu.rip, vcpu.rflags, vcpu.cr0) == (0x1013A8, 0x6, 0x11)
    assert vcpu.cs == Segment(selector=0, base=0, limit=0xFFFFFFFF, attributes=0xC9B)
    assert vcpu.tr.attributes == 0x8B
    assert encode_cpu(vcpu) == cpu.body


def test_xen_hvm_context_is_refused_whole_since_no_machine_here_holds_its_devices(xen_events):
    with pytest.raises(
        RecordError, match=r"no machine here can hold this state \(in HVM_CONTEXT PCI_IRQ 0 at byte 2136\)"
    ):
        decode_machine_state(xen_events[-3].data)


# -- our own stream ----------------------------------------------------------------------------------------------------


def flat(selector, attributes):
    return Segment(selector=selector, base=0, limit=0xFFFFFFFF, attributes=attributes)


def golden_vcpu(number):
    return VcpuState(
        rax=0x1122334455667788 + number,
        r15=15,
        rip=0x100000 + number,
        rflags=0x3202,
        cr0=0x80050033,
        cr2=0xDEAD000,
        cr3=0x1000,
        cr4=0x620,
        cs=flat(0x33, 0xAFB),
        **{name: flat(0x2B, 0xCF3) for name in ("ds", "es", "fs", "gs", "ss")},
        tr=Segment(selector=0x40, base=0x3000, limit=0x67, attributes=0x8B),
        ldtr=Segment(selector=0, base=0, limit=0, attributes=0x82),
        gdtr=DescriptorTable(base=0x2000, limit=0x4F),
        idtr=DescriptorTable(base=0x4000, limit=0xFFF),
        sysenter_cs=1,
        shadow_gs=0xFFFF800000000000,
        lstar=2,
        star=3,
        cstar=4,
        syscall_mask=5,
        efer=0x500,
        tsc_aux=number,
        tsc=123456789,
        pending_event=0x80000020,
        error_code=6,
        fpu_regs=INITIAL_FPU_REGS,
        msrs=((0x10, 7), (0x277, 0x7040600070406)) if number else (),
    )


GOLDEN_STATE = MachineState(
    vcpus=(golden_vcpu(0), golden_vcpu(1)),
    devices=(DeviceState(name="com1", data=b"\x01\x02\x03"), DeviceState(name="exit-port", data=b"")),
)


def golden_page(number):
    return bytes((number + index) & 0xFF for index in range(4096))


EVENTS_STATE = MachineState(
    vcpus=(
        golden_vcpu(0),
        dataclasses.replace(golden_vcpu(1), interrupt_shadow=2, nmi_pending=True, nmi_masked=True),
    ),
    devices=GOLDEN_STATE.devices,
)


ALL_STATE = MachineState(
    vcpus=(
        dataclasses.replace(
            golden_vcpu(0),
            triple_fault_pending=True,
            pending_exception=PendingException(vector=14, error_code=2, payload=0xDEAD000),
            mp_state=MpState.HALTED,
            extended=ExtendedState(xcr0=7, in_use=4, area=bytes(range(1, 129)) * 2),
            lapic=LapicState(base=0xFEE00900, registers=bytes(range(256)) * 4, tsc_deadline=1 << 40),
        ),
        dataclasses.replace(
            golden_vcpu(1),
            extended=ExtendedState(xcr0=3),
            lapic=LapicState(base=0xFEE00800, registers=bytes(1024)),
        ),
    ),
    devices=GOLDEN_STATE.devices,
    kvm_clock_ns=1 << 50,
)


def golden_events(state):
    """The records of our streams: each was written once and is never written again."""

    def pages(pfns, types, numbers):
        payload = b"".join(golden_page(number) for number in numbers)
        return PageData(pfns=np.array(pfns, np.uint64), types=np.array(types, np.uint8), payload=payload, offset=0)

    return [
        StreamHeader(),
        CpuidPolicy(
            leaves=(
                CpuidLeaf(leaf=0, subleaf=0, eax=0xD, ebx=0x68747541, ecx=0x444D4163, edx=0x69746E65),
                CpuidLeaf(leaf=7, subleaf=1, eax=1, ebx=2, ecx=3, edx=4),
            )
        ),
        MsrPolicy(entries=(MsrEntry(index=0xCE, value=0x8000000000000001),)),
        StaticDataEnd(),
        pages([0, 1, 0x100000, 5], [0x0, 0xE, 0xF, 0x0], [10, 20]),
        pages([0, 7], [0x0, 0xD], [30]),
        TscInfo(mode=2, khz=2_000_000, nsec=1 << 40, incarnation=1),
        HvmParams(params=((1, 0xFEFFC), (0x11, 0xFEFFF))),
        HvmContext(data=encode_machine_state(state)),
        End(),
    ]


def same(left, right):
    if isinstance(left, PageData) and isinstance(right, PageData):
        return (
            np.array_equal(left.pfns, right.pfns)
            and np.array_equal(left.types, right.types)
            and left.payload == right.payload
        )
    return left == right


OURS = pytest.mark.parametrize(
    ("name", "state"),
    [
        ("pageferry-v3-1.bin", GOLDEN_STATE),
        ("pageferry-v3-2-cpu-events.bin", EVENTS_STATE),
        ("pageferry-v3-3-all-state.bin", ALL_STATE),
    ],
)


@OURS
def test_our_stream_reads_as_it_was_written(name, state):
    read, written = decode((GOLDEN / name).read_bytes()), golden_events(state)
    assert len(read) == len(written)
    assert all(same(left, right) for left, right in zip(read, written, strict=True))
    assert decode_machine_state(read[-2].data) == state


@OURS
def test_our_stream_is_still_written_so(name, state):
    assert encode(golden_events(state)) == (GOLDEN / name).read_bytes()
