"""The CPU that a guest was given: the same on every machine, wherever it goes, or it does not go there."""

import dataclasses
import functools
import struct
import time

import numpy as np
import pytest
from altered import AlteredSource

from pageferry.core.cpu_features import missing_features
from pageferry.core.cpuid import NO_SUBLEAF, SOFT_CPU, CpuidLeaf, CpuModel, answer, of_vcpu
from pageferry.core.errors import GuestAt, MigrationError, PeerError, UnsupportedError, UsageError
from pageferry.core.state import MachineState, ring_3_state
from pageferry.core.vm import VmConfig
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.cpuid import shown_cpuid, supported_cpuid
from pageferry.kvm.fds import SystemFd
from pageferry.kvm.probe import probe
from pageferry.kvm.vm import KvmVm
from pageferry.stream.encoder import Encoder
from pageferry.stream.records import CpuidPolicy

TABLES_GPA, PROGRAM_GPA, QUERIES_GPA, ANSWERS_GPA = 0x1_0000, 0x10_0000, 0x18_0000, 0x20_0000
AREA_BYTES = 0x1_0000

# for ever: for each of the r12 (leaf, sub-leaf) from rdi: CPUID, 16 bytes of answer from rsi; then inc qword [rsi - 8]
PROGRAM = bytes.fromhex(
    "4989f8 4989f1 4d89e2"
    "418b00 418b4804 0fa2 418901 41895904 41894908 4189510c 4983c008 4983c110 49ffca 75db"
    "48ff46f8 ebcc"
)
QUERIES = [
    *((leaf, subleaf) for leaf in range(0x26) for subleaf in range(3)),
    *((leaf, 1) for leaf in (0x3FFF_FFFF, 0x4000_0000, 0x4000_0001, 0x4000_0100, 0x7FFF_FFFF, 0xC000_0000)),
    *((0x8000_0000 + leaf, 0) for leaf in range(0x23)),
    (0x8FFF_FFFF, 0),
    (0xFFFF_FFFF, 7),
]


def make_asker(make_vm, *, cpus=2, cpu=CpuModel.BASELINE):
    """Return a paused guest whose vCPUs ask for every one of ``QUERIES``, over and over."""
    vm = make_vm(VmConfig(memory_bytes=8 << 20, cpus=cpus, cpu=cpu))
    for level in range(2):
        vm.memory.write(TABLES_GPA + 0x1000 * level, struct.pack("<Q", TABLES_GPA + 0x1000 * (level + 1) + 7))
    pages = np.arange(4, dtype=np.uint64) * np.uint64(2 << 20) | np.uint64(0x87)
    vm.memory.write(TABLES_GPA + 0x2000, pages.tobytes())
    vm.memory.write(PROGRAM_GPA, PROGRAM)
    vm.memory.write(QUERIES_GPA, np.array(QUERIES, np.uint32).tobytes())
    state = ring_3_state(rip=PROGRAM_GPA, rsp=0xF_F000, cr3=TABLES_GPA, rdi=QUERIES_GPA)
    vcpus = tuple(
        dataclasses.replace(state, rsi=ANSWERS_GPA + AREA_BYTES * index, r12=len(QUERIES)) for index in range(cpus)
    )
    vm.load_state(MachineState(vcpus=vcpus, devices=vm.platform.bus.save()))
    return vm


def rounds(vm, index):
    return int.from_bytes(vm.memory.read(ANSWERS_GPA + AREA_BYTES * index - 8, 8), "little")


def asked(vm):
    """Return what CPUID answers to each vCPU now, at this machine."""
    found = []
    for index in range(vm.config.cpus):
        at = ANSWERS_GPA + AREA_BYTES * index
        vm.memory.write(at, b"\xee" * 16 * len(QUERIES))
        began, patience_s = rounds(vm, index), time.monotonic() + 30
        while rounds(vm, index) < began + 2:
            assert vm.end is None, vm.end
            assert time.monotonic() < patience_s, "the guest does not run"
            vm.wait(0.001)
        values = np.frombuffer(vm.memory.read(at, 16 * len(QUERIES)), np.uint32).reshape(-1, 4)
        found.append([tuple(row) for row in values.tolist()])
    return found


@functools.cache
def kvm_keeps_tables():
    """Whether CPUID answers a guest of this KVM by its table (``doctor``: kvm-cpuid)."""
    return probe().exact_cpuid


def keeps_its_table(vm):
    """Whether CPUID answers this guest by its table."""
    return isinstance(vm, Domain) or kvm_keeps_tables()


def by_its_table(vm):
    """Return what CPUID must answer to each vCPU of a machine that keeps its table."""
    cpus = vm.config.cpus
    tables = [of_vcpu(vm.cpuid, index=index, cpus=cpus) for index in range(cpus)]
    if isinstance(vm, KvmVm) and any(leaf.leaf == 0xD for leaf in vm.cpuid):  # a part of which follows XCR0
        vm.freeze()  # the kernel answers when the vCPU is outside
        tables = [shown_cpuid(vcpu.fd) for vcpu in vm.vcpus]
        vm.thaw()
    return [[answer(table, *query) for query in QUERIES] for table in tables]


def runs_on_the_cpu_it_was_given(vm):
    """The guest asks on, and is answered by its table if this machine keeps it; if not, nothing is promised."""
    seen = asked(vm)
    return seen == by_its_table(vm) or not keeps_its_table(vm)


@pytest.fixture
def askers():
    """Makes askers, and closes them and whatever they have become."""
    made = []

    def make(make_vm, **options):
        made.append(make_asker(make_vm, **options))
        return made[-1]

    make.made = made
    yield make
    for vm in made:
        vm.close()


def test_a_guest_sees_its_table_and_nothing_else(make_vm, askers):
    vm = askers(make_vm)
    vm.resume()
    expected = by_its_table(vm)
    assert (asked(vm) == expected) is keeps_its_table(vm)
    ebx = [answers[QUERIES.index((1, 0))][1] for answers in expected]
    assert [value >> 24 for value in ebx] == [0, 1]
    assert [value >> 16 & 0xFF for value in ebx] == [2, 2]


@pytest.mark.kvm
def test_kvm_and_soft_answer_alike_by_the_rules_of_the_vendor(kvm_support, askers):
    for vendor in (b"GenuineIntel", b"AuthenticAMD", b"HygonGenuine"):
        ebx, edx, ecx = struct.unpack("<III", vendor)
        table = tuple(
            leaf._replace(ebx=ebx, ecx=ecx, edx=edx) if leaf.leaf in (0, 0x8000_0000) else leaf for leaf in SOFT_CPU
        )
        seen = []
        for kind in (KvmVm, Domain):
            vm = askers(kind, cpus=1, cpu=table)
            vm.resume()
            seen.append(asked(vm))
            assert seen[-1] == by_its_table(vm) or not keeps_its_table(vm)
        assert seen[0] == seen[1] or not kvm_keeps_tables()


@pytest.mark.kvm
@pytest.mark.parametrize("first", [KvmVm, Domain], ids=["kvm-soft-kvm", "soft-kvm-soft"])
def test_a_guest_sees_the_same_cpu_all_the_way(kvm_support, askers, first, journey):
    other = Domain if first is KvmVm else KvmVm
    vm = askers(first)
    vm.resume()
    assert runs_on_the_cpu_it_was_given(vm)
    table = vm.cpuid
    for make_vm in (other, first):
        trip = journey(vm, make_vm)
        assert trip.run().verified
        vm = trip.there
        askers.made.append(vm)
        assert vm.cpuid == table
        assert runs_on_the_cpu_it_was_given(vm)


def lacking(leaves, leaf, register, bit):
    return tuple(
        entry._replace(**{register: getattr(entry, register) & ~(1 << bit)}) if entry.leaf == leaf else entry
        for entry in leaves
    )


def without_mmx(leaves):
    return lacking(leaves, 1, "edx", 23)


@pytest.mark.kvm
def test_a_host_without_a_feature_refuses_before_the_first_page(kvm_support, askers, monkeypatch, journey):
    vm = askers(KvmVm)
    vm.resume()
    monkeypatch.setattr("pageferry.kvm.vm.supported_cpuid", lambda *a, **kw: without_mmx(supported_cpuid(*a, **kw)))
    arrived = []

    def make_vm(config):
        arrived.append(config)
        return KvmVm(config)

    trip = journey(vm, make_vm)
    with pytest.raises(PeerError, match="this host lacks mmx, which the guest was given") as caught:
        trip.run()
    assert caught.value.guest_at is GuestAt.SOURCE
    assert caught.value.phase == "hello"
    assert "choose a host that has it" in caught.value.hint
    assert isinstance(trip.there, MigrationError)
    assert [config.cpu for config in arrived] == [vm.cpuid]
    assert trip.source.job.report.rounds == ()
    assert not vm.log_dirty.enabled
    assert runs_on_the_cpu_it_was_given(vm)
    monkeypatch.undo()
    second = journey(vm, KvmVm)
    assert second.run().verified
    askers.made.append(second.there)


def test_a_stream_with_another_cpu_than_the_hello_is_refused(make_vm, askers, journey):
    class Lies(Encoder):
        def record(self, record):
            if isinstance(record, CpuidPolicy):
                record = CpuidPolicy(leaves=without_mmx(record.leaves))
            return super().record(record)

    vm = askers(make_vm)
    vm.resume()
    with pytest.raises(MigrationError, match="not the CPU of the hello"):
        journey(vm, make_vm).run(kind=AlteredSource.having({"source.Encoder": Lies}))
    assert asked(vm)


@pytest.mark.kvm
def test_a_guest_with_all_of_the_host_moves_to_its_like_only(kvm_support, askers, journey):
    vm = askers(KvmVm, cpu=CpuModel.HOST)
    with SystemFd() as system:
        offered = supported_cpuid(system, lapic=False)
    assert not missing_features(vm.cpuid, offered)
    assert missing_features(vm.cpuid, SOFT_CPU)
    kept = [[leaf for leaf in table if leaf.leaf == 4] for table in (vm.cpuid, shown_cpuid(vm.vcpus[0].fd))]
    assert kept[0] == kept[1]  # sub-leaf by sub-leaf
    vm.resume()
    assert runs_on_the_cpu_it_was_given(vm)
    trip = journey(vm, Domain)
    with pytest.raises(PeerError, match=r"the software machine lacks .*, which the guest was given"):
        trip.run()
    assert runs_on_the_cpu_it_was_given(vm)
    trip = journey(vm, KvmVm)
    assert trip.run().verified
    askers.made.append(trip.there)
    assert runs_on_the_cpu_it_was_given(trip.there)


def test_the_software_machine_has_no_other_cpu():
    with pytest.raises(UnsupportedError, match="baseline CPU only") as caught:
        Domain(VmConfig(memory_bytes=8 << 20, cpu=CpuModel.HOST))
    assert "--accel kvm" in caught.value.hint


def test_a_table_that_is_none(make_vm):
    with pytest.raises(UsageError, match="do not ascend"):
        make_vm(VmConfig(memory_bytes=8 << 20, cpu=(CpuidLeaf(1, NO_SUBLEAF, 0, 0, 0, 0),) * 2))
