"""CPUID tables: what is in them, what they answer, and what a machine lacks for one, by name."""

import struct

import pytest

from pageferry.core.cpu_features import FEATURES, bit_name, guest_table, host, missing_features, model_of, table_for
from pageferry.core.cpuid import (
    MAX_LEAVES,
    NO_SUBLEAF,
    SOFT_CPU,
    CpuidLeaf,
    CpuModel,
    answer,
    baseline,
    check_leaves,
    cpu_name,
    find,
    of_vcpu,
)
from pageferry.core.errors import UnsupportedError, UsageError
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.core.xsave import component_places, enabled_components

AMD = (0x6874_7541, 0x444D_4163, 0x6974_6E65)  # ebx, ecx, edx of "AuthenticAMD"
RICH = (
    CpuidLeaf(0, NO_SUBLEAF, 0xD, 0x756E_6547, 0x6C65_746E, 0x4965_6E69),
    CpuidLeaf(1, NO_SUBLEAF, 0x306C4, 0x0305_0800, 1 << 20 | 1 << 5 | 1 << 26 | 1 << 27 | 1 << 28, 0xFFFF_FFFF),
    CpuidLeaf(4, 0, 0x1C00_4121, 1, 2, 3),
    CpuidLeaf(4, 1, 0x1C00_4122, 4, 5, 6),
    CpuidLeaf(7, 0, 1, 1 << 5, 1 << 3 | 1 << 4, 1 << 10),
    CpuidLeaf(7, 1, 1 << 4, 0, 0, 1 << 14),
    CpuidLeaf(0xA, NO_SUBLEAF, 4, 5, 6, 7),
    CpuidLeaf(0xB, 0, 1, 2, 3, 4),
    CpuidLeaf(0xD, 0, 7, 0x240, 0x340, 0),
    CpuidLeaf(0xD, 2, 0x100, 0x240, 0, 0),
    CpuidLeaf(0x4000_0000, NO_SUBLEAF, 0x4000_0001, 1, 2, 3),
    CpuidLeaf(0x8000_0000, NO_SUBLEAF, 0x8000_000A, 0, 0, 0),
    CpuidLeaf(0x8000_0001, NO_SUBLEAF, 0, 0, 1 << 2 | 1, 1 << 29 | 1 << 20 | 1 << 11),
    CpuidLeaf(0x8000_0008, NO_SUBLEAF, 48 << 8 | 46, 0, 0, 0),
    CpuidLeaf(0x8000_000A, NO_SUBLEAF, 1, 2, 3, 4),
)


def changed(leaves, leaf, subleaf=NO_SUBLEAF, **registers):
    return tuple(each._replace(**registers) if each[:2] == (leaf, subleaf) else each for each in leaves)


def without(leaves, leaf, register, bit):
    return tuple(
        each._replace(**{register: getattr(each, register) & ~(1 << bit)}) if each.leaf == leaf else each
        for each in leaves
    )


# -- what a table answers ----------------------------------------------------------------------------------------------


def test_what_is_in_the_table_is_answered():
    assert answer(RICH, 4, 1) == (0x1C00_4122, 4, 5, 6)
    assert answer(RICH, 0xA, 99) == (4, 5, 6, 7)  # it does not look at ECX
    assert answer(RICH, 0x4000_0000, 0) == (0x4000_0001, 1, 2, 3)


@pytest.mark.parametrize(("leaf", "subleaf"), [(2, 0), (4, 2), (7, 9), (0xC, 0), (0x8000_0002, 0), (0x4000_0001, 0)])
def test_what_a_range_lacks_is_zeros(leaf, subleaf):
    assert answer(RICH, leaf, subleaf) == (0, 0, 0, 0)


@pytest.mark.parametrize("leaf", [0xE, 0x7FFF_FFFF, 0x4000_0002, 0x4000_0100, 0x8000_000B, 0xC000_0000, 0xFFFF_FFFF])
def test_beyond_a_range_it_is_the_highest_basic_leaf_or_zeros(leaf):
    assert answer(RICH, leaf, 2) == (0x100, 0x240, 0, 0)
    amd = changed(RICH, 0, ebx=AMD[0], ecx=AMD[1], edx=AMD[2])
    assert answer(amd, leaf, 2) == (0, 0, 0, 0)


def test_each_vcpu_has_its_apic_id_and_their_number():
    for index, cpus in ((0, 1), (3, 4), (254, 255)):
        own = of_vcpu(RICH, index=index, cpus=cpus)
        assert find(own, 1)[1] == index << 24 | cpus << 16 | 0x0800
        assert changed(own, 1, ebx=0x0305_0800) == RICH


# -- making a table ----------------------------------------------------------------------------------------------------


def test_the_baseline_has_no_more_than_the_first_level_of_x86_64():
    table = baseline(RICH)
    check_leaves(table)
    assert [each.leaf for each in table] == [0, 1, 0x8000_0000, 0x8000_0001, 0x8000_0008]
    assert find(table, 0) == (1, 0x756E_6547, 0x6C65_746E, 0x4965_6E69)
    assert find(table, 1) == (0x306C4, 0x0800, 1 << 31, 0x078B_FBFF)
    assert find(table, 0x8000_0001) == (0x306C4, 0, 0, 1 << 29 | 1 << 20 | 1 << 11)
    assert not missing_features(table, RICH)
    assert not missing_features(table, SOFT_CPU)


def test_the_baseline_takes_only_what_is_offered():
    assert not find(baseline(without(RICH, 1, "edx", 1)), 1)[3] & 1 << 1
    for leaf, bit in ((1, 26), (1, 8), (0x8000_0001, 29)):
        assert baseline(without(RICH, leaf, "edx", bit)) is None
        with pytest.raises(UnsupportedError, match="here has no 64-bit CPU with SSE2"):
            table_for(CpuModel.BASELINE, without(RICH, leaf, "edx", bit), where="here")


def test_all_of_the_host_is_all_but_what_does_not_travel():
    table = host(RICH)
    check_leaves(table)
    assert find(table, 1) == (
        0x306C4,
        0x0800,
        1 << 31 | 1 << 28 | 1 << 26 | 1 << 20,
        0xFFFF_FFFF,
    )  # no VMX, OSXSAVE
    assert find(table, 4, 1) == (0x0122, 4, 5, 6)
    assert find(table, 7) == (1, 1 << 5, 1 << 3, 1 << 10)  # no OSPKE
    assert find(table, 0x8000_0001)[2] == 1  # no SVM
    for gone in (0xB, 0x4000_0000, 0x8000_000A):
        assert find(table, gone) == (0, 0, 0, 0)
    for same in ((0, 0), (7, 1), (0xA, 0), (0xD, 0), (0xD, 2), (0x8000_0008, 0)):
        assert find(table, *same) == find(RICH, *same)
    assert not missing_features(table, RICH)


# -- of a PC -----------------------------------------------------------------------------------------------------------

APIC_EDX, OTHERS_EDX = 1 << 9, 1 << 1 | 1 << 7 | 1 << 12 | 1 << 14  # VME, MCE, MTRR, MCA
APIC_ECX = 1 << 21 | 1 << 24  # x2apic, TSC deadline
PLENTIFUL = (
    *changed(
        changed(changed(RICH, 1, ecx=APIC_ECX), 7, 0, ebx=1 << 5 | 1 << 1), 0x8000_0001, ecx=1 << 3, edx=0xFFFF_FFFF
    )[:-2],
    CpuidLeaf(0x8000_0007, NO_SUBLEAF, 1, 2, 3, 1 << 8),
    *RICH[-2:],
)


def pc(cpus, cpu=CpuModel.HOST, **options):
    config = VmConfig(memory_bytes=1 << 20, cpus=cpus, cpu=cpu, machine=MachineModel.PC)
    return guest_table(config, PLENTIFUL, where="here", **options)


@pytest.mark.parametrize("cpu", CpuModel)
def test_a_pc_with_one_cpu_has_no_local_apic(cpu):
    table = pc(1, cpu, tsc_khz=2_600_000)
    check_leaves(table)
    for leaf in (1, 0x8000_0001):
        ecx, edx = find(table, leaf)[2:]
        assert not ecx & (APIC_ECX if leaf == 1 else 1 << 3)
        assert edx == find(table_for(cpu, PLENTIFUL, where="here"), leaf)[3] & ~(APIC_EDX | OTHERS_EDX)
    assert not missing_features(table, PLENTIFUL)
    assert model_of(table) is cpu


def test_a_pc_with_several_cpus_has_local_apics_and_knows_that_its_tscs_keep_step():
    for cpu in CpuModel:
        table = pc(2, cpu, tsc_khz=2_600_000)
        check_leaves(table)
        assert find(table, 1)[3] & (APIC_EDX | OTHERS_EDX) == APIC_EDX
        assert find(table, 0x8000_0007)[3] == 1 << 8
        assert find(table, 0x15) == (0, 0, 0, 0)
        assert not missing_features(table, PLENTIFUL)
        assert model_of(table) is cpu
    assert find(pc(2), 1)[2] & APIC_ECX == APIC_ECX


@pytest.mark.parametrize("khz", [1, 1_000_000, 2_596_128, 4_294_967, 4_294_968, 6_000_001])
def test_the_rate_of_the_tsc_is_told_in_a_way_that_32_bits_can_multiply(khz):
    table = pc(1, CpuModel.BASELINE, tsc_khz=khz)
    check_leaves(table)
    denominator, numerator, crystal_hz, _ = answer(table, 0x15, 0)
    assert abs(crystal_hz * numerator / denominator - 1000 * khz) <= numerator
    assert crystal_hz // 1000 * numerator < 1 << 32
    assert answer(table, 0x16, 0) == (khz // 1000, khz // 1000, 100, 0)
    assert find(pc(1, CpuModel.BASELINE), 0)[0] == 7  # no rate known: no leaf


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_pc_trusts_its_tsc_where_it_can(cpus):
    for cpu in CpuModel:
        table = pc(cpus, cpu)
        assert find(table, 0x8000_0007)[3] == 1 << 8
        assert find(table, 7)[1] & 2
        assert find(table, 7, 1) == ((0, 0, 0, 0) if cpu is CpuModel.BASELINE else find(RICH, 7, 1))
        assert model_of(table) is cpu
    config = VmConfig(memory_bytes=1 << 20, cpus=cpus, machine=MachineModel.PC)
    poor = changed(without(PLENTIFUL, 7, "ebx", 1), 0x8000_0007, edx=0)
    assert find(guest_table(config, poor, where="here"), 0)[0] == 1


def test_a_table_that_a_guest_has_is_left_as_it_is():
    assert pc(1, baseline(PLENTIFUL), tsc_khz=1_000_000) == baseline(PLENTIFUL)
    plain = VmConfig(memory_bytes=1 << 20)
    assert guest_table(plain, PLENTIFUL, where="here", tsc_khz=1_000_000) == baseline(PLENTIFUL)


@pytest.mark.parametrize(
    ("leaves", "says"),
    [
        ((), "0 CPUID leaves"),
        (tuple(CpuidLeaf(leaf, 0, 0, 0, 0, 0) for leaf in range(MAX_LEAVES + 1)), "257 CPUID leaves"),
        ((CpuidLeaf(1, 0, 0, 0, 0, 1 << 32),), "more than 32 bits"),
        ((CpuidLeaf(1, 0, 0, -1, 0, 0),), "more than 32 bits"),
        ((CpuidLeaf(1, 0, 0, 0, 0, 0), CpuidLeaf(1, 0, 1, 0, 0, 0)), "do not ascend"),
        ((CpuidLeaf(1, 1, 0, 0, 0, 0), CpuidLeaf(1, 0, 0, 0, 0, 0)), "do not ascend"),
    ],
)
def test_what_is_not_a_table(leaves, says):
    with pytest.raises(UsageError, match=says):
        table_for(leaves, RICH, where="here")
    check_leaves(tuple(CpuidLeaf(leaf, 0, 0, 0, 0, 0xFFFF_FFFF) for leaf in range(MAX_LEAVES)))


# -- what a machine lacks ----------------------------------------------------------------------------------------------


XSAVE_LEAVES = (
    CpuidLeaf(0xD, 0, 7, 0x340, 0x340, 0),
    CpuidLeaf(0xD, 1, 0xF, 0x400, 1 << 11, 1),
    CpuidLeaf(0xD, 2, 0x100, 0x240, 0, 0),
    CpuidLeaf(0xD, 9, 8, 0xA80, 0, 0),  # is not in sub-leaf 0
    CpuidLeaf(0xD, 11, 0x10, 0, 1, 0),  # of the supervisor
)


def with_leaf_0xd(leaves):
    return tuple(sorted((*(leaf for leaf in RICH if leaf.leaf != 0xD), *leaves)))


def test_leaf_0xd_tells_of_what_the_guest_may_enable_and_of_nothing_else():
    table = host(with_leaf_0xd(XSAVE_LEAVES))
    assert [leaf for leaf in table if leaf.leaf == 0xD] == [
        CpuidLeaf(0xD, 0, 7, 0x240, 0x340, 0),
        CpuidLeaf(0xD, 1, 0xF, 0, 0, 0),
        CpuidLeaf(0xD, 2, 0x100, 0x240, 0, 0),
    ]
    assert enabled_components(table) == 7
    assert component_places(table) == {2: range(0x240, 0x340)}
    assert not missing_features(table, with_leaf_0xd(XSAVE_LEAVES))


def test_without_xsave_there_is_no_leaf_0xd():
    offered = without(with_leaf_0xd(XSAVE_LEAVES), 1, "ecx", 26)
    assert not [leaf for leaf in host(offered) if leaf.leaf == 0xD]
    assert enabled_components(offered) == 0


def test_a_component_that_a_machine_lacks_is_named():
    poorer = with_leaf_0xd((XSAVE_LEAVES[0]._replace(eax=3), *XSAVE_LEAVES[1:]))
    assert missing_features(host(with_leaf_0xd(XSAVE_LEAVES)), poorer) == ("XSAVE of AVX",)


@pytest.mark.parametrize(
    ("leaf", "register", "bit", "name"),
    [
        (1, "ecx", 20, "sse4_2"),
        (1, "ecx", 28, "avx"),
        (1, "edx", 26, "sse2"),
        (7, "ebx", 5, "avx2"),
        (7, "edx", 10, "md_clear"),
        (0x8000_0001, "ecx", 0, "lahf_lm"),
        (0x8000_0001, "edx", 20, "nx"),
    ],
)
def test_a_missing_feature_is_named(leaf, register, bit, name):
    offered = without(RICH, leaf, register, bit)
    assert missing_features(host(RICH), offered) == (name,)
    with pytest.raises(UnsupportedError, match=f"this host lacks {name}, which the guest was given") as caught:
        table_for(host(RICH), offered, where="this host")
    assert "--cpu baseline" in caught.value.hint
    assert not missing_features(host(offered), RICH)  # more than was given does no harm


def test_a_feature_without_a_name_is_named_by_its_place():
    offered = changed(RICH, 7, 1, edx=0)
    assert missing_features(host(RICH), offered) == ("CPUID 0x7.1 edx bit 14",)


def test_many_missing_features_are_counted():
    poor = changed(RICH, 1, edx=0)
    with pytest.raises(UnsupportedError, match="this host lacks fpu, vme, de, pse, tsc, msr, pae, mce and 24 more, wh"):
        table_for((CpuidLeaf(1, NO_SUBLEAF, 0, 0, 0, 0xFFFF_FFFF),), poor, where="this host")


def test_the_bits_that_only_amd_repeats_are_not_features_of_their_own():
    amd = changed(SOFT_CPU, 0x8000_0001, edx=find(SOFT_CPU, 1)[3] & 0x0183_FBFF | 1 << 29 | 1 << 20 | 1 << 11)
    assert find(baseline(amd), 0x8000_0001)[3] == find(amd, 0x8000_0001)[3]
    assert not missing_features(baseline(amd), SOFT_CPU)
    assert missing_features(baseline(amd), without(SOFT_CPU, 1, "edx", 23)) == ("mmx", "CPUID 0x80000001.0 edx bit 23")


def test_what_describes_the_cpu_may_differ_and_all_else_may_not():
    table = host(RICH)
    other = changed(changed(RICH, 4, 1, ebx=99), 0, ebx=AMD[0], ecx=AMD[1], edx=AMD[2])
    assert not missing_features(table, changed(other, 0xB, 0, edx=9))
    assert missing_features(table, changed(RICH, 0xA, eax=3)) == ("CPUID 0xa.0 as the guest knows it",)
    assert missing_features(table, changed(RICH, 0xD, 2, ebx=0x340)) == ("CPUID 0xd.2 as the guest knows it",)
    assert missing_features(table, changed(RICH, 0x8000_0008, eax=48 << 8 | 39)) == ("46 bits of physical address",)
    assert not missing_features(baseline(RICH), changed(RICH, 0x8000_0008, eax=48 << 8 | 39))


def test_a_table_tells_which_model_it_is_and_whose_cpu():
    assert model_of(SOFT_CPU) is model_of(baseline(RICH)) is CpuModel.BASELINE
    assert model_of(host(RICH)) is CpuModel.HOST
    assert cpu_name(SOFT_CPU) == "GenuineIntel"
    text = b"  Fast\0CPU  9000 ".ljust(48, b"\0")
    brand = [
        CpuidLeaf(0x8000_0002 + at // 16, NO_SUBLEAF, *struct.unpack_from("<4I", text, at)) for at in range(0, 48, 16)
    ]
    assert cpu_name((*SOFT_CPU[:2], *brand)) == "Fast CPU 9000"
    assert cpu_name((CpuidLeaf(1, NO_SUBLEAF, 0, 0, 0, 0),)) == "no name"


def test_every_name_is_there_once_and_fits_a_line():
    names = [name for word in FEATURES.values() for name in word.values()]
    assert len(names) == len(set(names))
    assert all(bit < 32 for word in FEATURES.values() for bit in word)
    assert bit_name((7, 0, 1), 5) == "avx2"
