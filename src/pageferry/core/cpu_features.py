"""CPU features by name, and whether a machine can provide a guest's CPUID table.

Names are those of Linux's ``/proc/cpuinfo``; a bit without a name here is named by its place.

Source: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E.
"""

from collections.abc import Iterator

from pageferry.core.cpuid import (
    EXTENDED,
    HYPERVISOR,
    NO_SUBLEAF,
    REPEATED_EDX,
    CpuidLeaf,
    CpuModel,
    Leaves,
    baseline,
    check_leaves,
    find,
    pc_table,
)
from pageferry.core.errors import UnsupportedError
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.core.xsave import COMPONENTS, EXTENDED_OFFSET, XSAVE_LEAF, enabled_components

_REGISTERS = ("eax", "ebx", "ecx", "edx")
_EAX, _EBX, _ECX, _EDX = range(4)
_CONSTANT_TSC = "constant_tsc"
#: What a PC of the model BASELINE may have besides.
_OF_A_PC = {_CONSTANT_TSC, "tsc_adjust"}

Word = tuple[int, int, int]
"""A register full of feature bits: leaf, sub-leaf, register (0 to 3)."""


def _names(words: str) -> dict[int, str]:
    """Return bit number -> name; ``-`` is a bit without a name."""
    return {bit: name for bit, name in enumerate(words.split()) if name != "-"}


#: Every register that holds feature bits. A CPU provides another's features if it has all of its bits here.
FEATURES: dict[Word, dict[int, str]] = {
    (1, 0, _ECX): _names(
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 sse4_2"
        " x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor"
    ),
    (1, 0, _EDX): _names(
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse"
        " sse2 ss ht tm ia64 pbe"
    ),
    (6, 0, _EAX): {2: "arat"},
    (7, 0, _EBX): _names(
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a"
        " avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni"
        " avx512bw avx512vl"
    ),
    (7, 0, _ECX): _names(
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni"
        " avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b"
    ),
    (7, 0, _EDX): _names(
        "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect - md_clear - - - serialize - tsxldtrk -"
        " pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d"
        " arch_capabilities core_capabilities ssbd"
    ),
    (7, 1, _EAX): _names("- - - - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc"),
    (7, 1, _EBX): {},
    (7, 1, _ECX): {},
    (7, 1, _EDX): {},
    (7, 2, _EDX): {},
    (0xD, 0, _EAX): {bit: f"XSAVE of {name}" for bit, name in COMPONENTS.items()},
    (0xD, 0, _EDX): {},
    (0xD, 1, _EAX): _names("xsaveopt xsavec xgetbv1 xsaves"),
    (0xD, 1, _ECX): {},
    (0xD, 1, _EDX): {},
    (EXTENDED + 1, 0, _ECX): _names(
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp"
        " fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx"
    ),
    (EXTENDED + 1, 0, _EDX): {11: "syscall", 19: "mp", 20: "nx", 22: "mmxext", 25: "fxsr_opt", 26: "pdpe1gb"}
    | {27: "rdtscp", 29: "lm", 30: "3dnowext", 31: "3dnow"},
    (EXTENDED + 7, 0, _EDX): {8: _CONSTANT_TSC},
    (EXTENDED + 8, 0, _EBX): {0: "clzero", 2: "xsaveerptr", 4: "rdpru", 9: "wbnoinvd", 12: "ibpb", 14: "ibrs"}
    | {15: "amd_stibp", 24: "amd_ssbd", 25: "virt_ssbd", 28: "amd_psfd"},
    (EXTENDED + 0x21, 0, _EAX): {},
}
_FEATURE_LEAVES = frozenset(leaf for leaf, _, _ in FEATURES) - {0xD}
#: Leaves that describe the CPU (names, caches, topology, clocks): a guest may see them wherever it is.
_DESCRIPTIONS = frozenset({0, 2, 3, 4, 0xB, 0x15, 0x16, 0x18, 0x1A, 0x1F, *range(EXTENDED, EXTENDED + 8)}) | {
    EXTENDED + 0x19,
    EXTENDED + 0x1D,
    EXTENDED + 0x1E,
}

# Of leaf 1 ECX and leaf 7 ECX: bits that follow the guest's own CR4, on every machine; never in a table.
_OSXSAVE, _OSPKE = 1 << 27, 1 << 4
#: Nested virtualisation has state inside the kernel that we do not move.
_VMX, _SVM = 1 << 5, 1 << 2
_PHYSICAL_BITS = 0xFF
_BASELINE_PHYSICAL_BITS = 40
_MAX_NAMED = 8
_FIRST_COMPONENT = 2  # sub-leaves 0 and 1 of leaf 0xD are about all of them


def bit_name(word: Word, bit: int) -> str:
    """Return what to call a feature bit."""
    leaf, subleaf, register = word
    return FEATURES[word].get(bit, f"CPUID {leaf:#x}.{subleaf} {_REGISTERS[register]} bit {bit}")


def missing_features(leaves: Leaves, offered: Leaves) -> tuple[str, ...]:
    """Return the names of what a table promises and a machine that offers ``offered`` does not have."""
    return tuple(_missing(leaves, offered))


def _missing(leaves: Leaves, offered: Leaves) -> Iterator[str]:
    for word in FEATURES:
        leaf, subleaf, register = word
        lacking = find(leaves, leaf, subleaf)[register] & ~_provided(offered, word)
        yield from (bit_name(word, bit) for bit in range(32) if lacking >> bit & 1)
    physical_bits = find(leaves, EXTENDED + 8)[_EAX] & _PHYSICAL_BITS
    if physical_bits > max(find(offered, EXTENDED + 8)[_EAX] & _PHYSICAL_BITS, _BASELINE_PHYSICAL_BITS):
        yield f"{physical_bits} bits of physical address"
    for entry in leaves:
        if entry.leaf in _DESCRIPTIONS | _FEATURE_LEAVES or entry[:2] in ((0xD, 0), (0xD, 1)):
            continue  # some of their words are not feature bits but describe, too
        subleaf = 0 if entry.subleaf == NO_SUBLEAF else entry.subleaf
        if any(entry.registers) and entry.registers != find(offered, entry.leaf, subleaf):
            yield f"CPUID {entry.leaf:#x}.{subleaf} as the guest knows it"


def _provided(offered: Leaves, word: Word) -> int:
    leaf, subleaf, register = word
    bits = find(offered, leaf, subleaf)[register]
    if word == (1, 0, _ECX):
        return bits | HYPERVISOR  # true of every machine of ours
    if word == (EXTENDED + 1, 0, _EDX):
        return bits | find(offered, 1)[_EDX] & REPEATED_EDX
    return bits


def model_of(leaves: Leaves) -> CpuModel:
    """Return which model a guest's table was made by, whatever machine it was made for."""
    plain = baseline(leaves)
    if plain is None or set(missing_features(leaves, plain)) - _OF_A_PC:
        return CpuModel.HOST
    return CpuModel.BASELINE


def host(offered: Leaves) -> Leaves:
    """Return the table of a guest that is to have everything in ``offered``, so far as its state can be moved.

    Left out: the hypervisor's own leaves and nested virtualisation, whose state does not travel; the bits that mirror
    CR4; and where the host's CPUs are in their package, which is not the guest's business. Leaf 0xD tells of the
    components that the guest may enable in XCR0, and of no other: of none without XSAVE, never of the supervisor's.
    """
    components = enabled_components(offered)
    return tuple(
        _hosted(leaf)
        for leaf in offered
        if not 0x4000_0000 <= leaf.leaf <= 0x4FFF_FFFF and (leaf.leaf != XSAVE_LEAF or _describes(leaf, components))
    )


def _describes(entry: CpuidLeaf, components: int) -> bool:
    """Tell whether a sub-leaf of 0xD is of use to a guest that may enable these components."""
    return bool(components) and (entry.subleaf < _FIRST_COMPONENT or bool(components >> entry.subleaf & 1))


def _hosted(entry: CpuidLeaf) -> CpuidLeaf:
    match entry.leaf, entry.subleaf:
        case 1, _:
            ecx = entry.ecx & ~(_OSXSAVE | _VMX) | HYPERVISOR
            return entry._replace(ebx=entry.ebx & 0xFF00, ecx=ecx)  # EBX: the size of CLFLUSH's line
        case 4, _:
            return entry._replace(eax=entry.eax & 0x3FFF)  # 31..14: how many share the cache
        case 7, 0:
            return entry._replace(ecx=entry.ecx & ~_OSPKE)
        case 0xD, 0:
            return entry._replace(ebx=EXTENDED_OFFSET)  # what XCR0 enables after reset
        case 0xD, 1:
            return entry._replace(ebx=0, ecx=0, edx=0)  # ECX, EDX: the supervisor's components
        case ((0xB | 0x1F), _):
            return entry._replace(eax=0, ebx=0, ecx=0, edx=0)
        case 0x8000_0001, _:
            return entry._replace(ecx=entry.ecx & ~_SVM)
        case ((0x8000_000A | 0x8000_001E), _):  # nested virtualisation, topology
            return entry._replace(eax=0, ebx=0, ecx=0, edx=0)
    return entry


def guest_table(config: VmConfig, offered: Leaves, *, where: str, tsc_khz: int | None = None) -> Leaves:
    """Return the table of a guest, made for its model of machine if it has none yet.

    Args:
        config: what the machine is asked for.
        offered: all that this machine can give.
        where: what to call this machine in an error.
        tsc_khz: how fast a vCPU's TSC counts here; None: not known.

    Raises:
        UnsupportedError: as :func:`table_for`.
        UsageError: as :func:`table_for`.
    """
    table = table_for(config.cpu, offered, where=where)
    if config.machine is MachineModel.PLAIN or not isinstance(config.cpu, CpuModel):
        return table
    return pc_table(table, offered, cpus=config.cpus, tsc_khz=tsc_khz)


def table_for(cpu: CpuModel | Leaves, offered: Leaves, *, where: str) -> Leaves:
    """Return the table of a guest on a machine that offers ``offered``.

    Args:
        cpu: the model to be made of it, or the table that the guest has already.
        offered: all that this machine can give.
        where: what to call this machine in an error.

    Raises:
        UnsupportedError: the machine cannot provide it; names each feature that it lacks.
        UsageError: it is not a table.
    """
    if isinstance(cpu, CpuModel):
        table = host(offered) if cpu is CpuModel.HOST else baseline(offered)
        if table is None:
            raise UnsupportedError("cpuid-baseline", f"{where} has no 64-bit CPU with SSE2", hint="use --accel soft")
        return table
    check_leaves(cpu)
    missing = missing_features(cpu, offered)
    if missing:
        names = ", ".join(missing[:_MAX_NAMED])
        if len(missing) > _MAX_NAMED:
            names += f" and {len(missing) - _MAX_NAMED} more"
        raise UnsupportedError(
            "cpuid",
            f"{where} lacks {names}, which the guest was given",
            hint="choose a host that has it; a guest started with --cpu baseline goes anywhere",
        )
    return cpu
