"""CPUID policies: what a guest is told about its CPU, as one table for the whole guest.

A guest keeps its table for life: it is made when the guest is started and moves with it, so that every machine shows
the same CPU. What differs between vCPUs, the APIC id and their number in leaf 1, is 0 in the table and filled in for
each vCPU by :func:`of_vcpu`.

CPUID tells a guest what it may use; it takes nothing away from a guest that does not ask.

Source: AMD APM volume 3, appendix E; Intel SDM volume 2, CPUID; x86-64 psABI, micro-architecture levels.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

from pageferry.core.errors import UsageError

#: ``subleaf`` of a leaf that does not look at ECX, as in Xen's streams.
NO_SUBLEAF = 0xFFFF_FFFF
#: Most leaves of a guest's table; KVM takes no more.
MAX_LEAVES = 256

Registers = tuple[int, int, int, int]
"""EAX, EBX, ECX and EDX, each a u32."""

XSAVE = 1 << 26  # leaf 1 ECX
TSC_DEADLINE = 1 << 24  # leaf 1 ECX: the local APIC's timer can wait for a value of the TSC
APIC = 1 << 9  # leaf 1 EDX: there is a local APIC
HYPERVISOR = 1 << 31  # leaf 1 ECX: this is a virtual machine
EXTENDED = 0x8000_0000
#: The vendors whose CPUs answer a leaf out of range with zeros; on the others it is the highest basic leaf.
_ZERO_VENDORS = frozenset({b"AuthenticAMD", b"HygonGenuine"})
_PER_VCPU_EBX = 0xFFFF_0000  # leaf 1: APIC id 31..24, logical processors 23..16

# Leaf 1 EDX, bit numbers; the baseline of x86-64 and what every such CPU has besides.
_FPU, _VME, _DE, _PSE, _TSC, _MSR, _PAE, _MCE, _CX8, _APIC = range(10)
_SEP, _MTRR, _PGE, _MCA, _CMOV, _PAT, _PSE36 = range(11, 18)
_CLFSH, _MMX, _FXSR, _SSE, _SSE2 = 19, 23, 24, 25, 26
# Leaf 8000_0001h EDX.
_SYSCALL, _NX, _LM = 11, 20, 29
# Leaf 8000_0007h EDX, leaf 7 EBX.
_CONSTANT_TSC, _TSC_ADJUST = 8, 1
# Of a local APIC: leaf 1 ECX, leaf 8000_0001h ECX.
_X2APIC, _EXTAPIC = 21, 3


def _mask(*bits: int) -> int:
    return sum(1 << bit for bit in bits)


#: Bits of leaf 1 EDX that AMD repeats in leaf 8000_0001h EDX, where Intel has zeros.
REPEATED_EDX = _mask(
    _FPU, _VME, _DE, _PSE, _TSC, _MSR, _PAE, _MCE, _CX8, _APIC, _MTRR, _PGE, _MCA, _CMOV, _PAT, _PSE36, _MMX, _FXSR
)
_LEAF_1_EDX = REPEATED_EDX | _mask(_SEP, _CLFSH, _SSE, _SSE2)
_LEAF_80000001_EDX = REPEATED_EDX | _mask(_SYSCALL, _NX, _LM)
_REQUIRED_EDX = _mask(_FPU, _TSC, _MSR, _PAE, _CX8, _CMOV, _FXSR, _SSE, _SSE2)
_REQUIRED_EXTENDED_EDX = _mask(_LM)
_CLFLUSH_EBX = 8 << 8  # a cache line of 64 bytes
_ADDRESS_BITS = 48 << 8 | 40  # linear, physical


class CpuidLeaf(NamedTuple):
    """One CPUID leaf that the guest may see; every field is a u32."""

    leaf: int
    subleaf: int
    eax: int
    ebx: int
    ecx: int
    edx: int

    @property
    def registers(self) -> Registers:
        """The answer of CPUID."""
        return self[2:]


Leaves = tuple[CpuidLeaf, ...]
"""A table: leaves ascending by leaf and sub-leaf, each once."""


class CpuModel(StrEnum):
    """The CPU models that a new guest can be given.

    BASELINE: x86-64 with SSE2, which every host has and the software machine too. HOST: all that this machine offers.
    """

    BASELINE = "baseline"
    HOST = "host"


def _place(leaf: CpuidLeaf) -> tuple[int, int]:
    return leaf.leaf, leaf.subleaf


def check_leaves(leaves: Sequence[CpuidLeaf]) -> None:
    """Check that a table can be a guest's.

    Raises:
        UsageError: it is empty, too long, not ascending, or a field is not a u32.
    """
    if not 1 <= len(leaves) <= MAX_LEAVES:
        raise UsageError(f"a table of {len(leaves)} CPUID leaves, not 1 to {MAX_LEAVES}")
    if any(not 0 <= field <= 0xFFFF_FFFF for leaf in leaves for field in leaf):
        raise UsageError("a field of a CPUID leaf has more than 32 bits")
    if any(_place(after) <= _place(before) for before, after in pairwise(leaves)):
        raise UsageError("the CPUID leaves do not ascend")


def find(leaves: Leaves, leaf: int, subleaf: int = 0) -> Registers:
    """Return what the table has for a leaf, zeros where it has nothing."""
    return _entry(leaves, leaf, subleaf) or (0, 0, 0, 0)


def _entry(leaves: Leaves, leaf: int, subleaf: int) -> Registers | None:
    for key in ((leaf, subleaf), (leaf, NO_SUBLEAF)):
        at = bisect_left(leaves, key, key=_place)
        if at < len(leaves) and _place(leaves[at]) == key:
            return leaves[at].registers
    return None


def answer(leaves: Leaves, leaf: int, subleaf: int) -> Registers:
    """Return what the CPUID instruction answers for EAX = ``leaf`` and ECX = ``subleaf``, on every machine.

    What the table does not have is zeros, except a leaf above the highest of its range (basic, or extended from
    8000_0000h) on the CPUs of most vendors: there it is the highest basic leaf. Ranges that the table does not have at
    all, as the hypervisors' at 4000_0000h, are above the highest.
    """
    entry = _entry(leaves, leaf, subleaf)
    if entry is not None:
        return entry
    highest, *vendor = find(leaves, 0)
    start = leaf & (0xFFFF_FF00 if 0x4000_0000 <= leaf <= 0x4FFF_FFFF else EXTENDED)
    name = b"".join(vendor[i].to_bytes(4, "little") for i in (0, 2, 1))
    if leaf <= find(leaves, start)[0] or name in _ZERO_VENDORS:
        return 0, 0, 0, 0
    return find(leaves, highest, subleaf)


def of_vcpu(leaves: Leaves, *, index: int, cpus: int) -> Leaves:
    """Return the table of vCPU ``index`` of ``cpus``: with its APIC id and their number."""
    own = (index & 0xFF) << 24 | min(cpus, 0xFF) << 16
    return tuple(leaf._replace(ebx=leaf.ebx & ~_PER_VCPU_EBX | own) if leaf.leaf == 1 else leaf for leaf in leaves)


def baseline(offered: Leaves) -> Leaves | None:
    """Return the table of a baseline x86-64 CPU of the vendor and model in ``offered``; None if that lacks a part.

    It has no feature outside x86-64's first level, and of those only what is offered.
    """
    _, *vendor = find(offered, 0)
    signature, _, _, edx = find(offered, 1)
    extended_edx = find(offered, EXTENDED + 1)[3]
    if _REQUIRED_EDX & ~edx or _REQUIRED_EXTENDED_EDX & ~extended_edx:
        return None
    return (
        CpuidLeaf(0, NO_SUBLEAF, 1, *vendor),
        CpuidLeaf(1, NO_SUBLEAF, signature, _CLFLUSH_EBX, HYPERVISOR, edx & _LEAF_1_EDX),
        CpuidLeaf(EXTENDED, NO_SUBLEAF, EXTENDED + 8, *vendor),
        CpuidLeaf(EXTENDED + 1, NO_SUBLEAF, signature, 0, 0, extended_edx & _LEAF_80000001_EDX),
        CpuidLeaf(EXTENDED + 8, NO_SUBLEAF, _ADDRESS_BITS, 0, 0, 0),
    )


#: Leaf -> bits of ECX and of EDX that the CPU of a PC lacks: memory types by ranges, and machine checks, since KVM has
#: registers for both and lists none of them, so what a guest wrote there would not travel; and the extensions of
#: virtual-8086 mode, which no emulated CPU has, nor a 64-bit system a use for.
_NOT_IN_A_PC = {leaf: (0, _mask(_VME, _MTRR, _MCE, _MCA)) for leaf in (1, EXTENDED + 1)}
#: What says that there is a local APIC, in the same way.
_OF_THE_APIC = {1: (_mask(_X2APIC) | TSC_DEADLINE, APIC), EXTENDED + 1: (_mask(_EXTAPIC), APIC)}


def pc_table(leaves: Leaves, offered: Leaves, *, cpus: int, tsc_khz: int | None) -> Leaves:
    """Return the table of a PC's guest.

    With one CPU the guest sees no local APIC: interrupts come from the PIC, which every machine has. Leaves 15h and 16h
    then tell the rates of the TSC and of the CPU, which spares an operating system its measuring. With several CPUs
    there are no such leaves, since systems take the rate of the local APIC's timer from there as well.

    A TSC that always counts at one rate, and one that tells whether it was set, are shown where they are offered.
    Linux trusts no other: it compares it with its ticks or the ACPI timer, and on a loaded host, or after a move, it
    finds the TSC to be the one that is wrong.

    Args:
        leaves: as a CPU model makes them.
        offered: all that the machine can give.
        cpus: how many vCPUs the guest has.
        tsc_khz: the rate of their TSC; None: not known.
    """
    table = _with_trusted_tsc(_without(leaves, _NOT_IN_A_PC), offered)
    if cpus > 1:
        return table
    table = _without(table, _OF_THE_APIC)
    return table if tsc_khz is None else _with(_with(table, _tsc_leaf(tsc_khz)), _speed_leaf(tsc_khz))


def _with_trusted_tsc(leaves: Leaves, offered: Leaves) -> Leaves:
    if constant := find(offered, EXTENDED + 7)[3] & _mask(_CONSTANT_TSC):
        leaves = _with(leaves, CpuidLeaf(EXTENDED + 7, NO_SUBLEAF, 0, 0, 0, constant))
    if adjust := find(offered, 7)[1] & ~find(leaves, 7)[1] & _mask(_TSC_ADJUST):
        leaves = _with(leaves, CpuidLeaf(7, 0, 0, adjust, 0, 0))  # of the baseline, which has no such leaf
    return leaves


def _without(leaves: Leaves, bits: Mapping[int, tuple[int, int]]) -> Leaves:
    return tuple(
        leaf._replace(ecx=leaf.ecx & ~bits[leaf.leaf][0], edx=leaf.edx & ~bits[leaf.leaf][1])
        if leaf.leaf in bits
        else leaf
        for leaf in leaves
    )


def _with(leaves: Leaves, new: CpuidLeaf) -> Leaves:
    # The highest leaf of a range is in its first one.
    start = new.leaf & EXTENDED
    others = (
        leaf._replace(eax=max(leaf.eax, new.leaf)) if leaf.leaf == start else leaf
        for leaf in leaves
        if leaf.leaf != new.leaf
    )
    return tuple(sorted((*others, new)))


def _tsc_leaf(tsc_khz: int) -> CpuidLeaf:
    # The TSC counts EBX / EAX times as fast as a crystal of ECX Hz. A factor of 1 as long as ECX can hold the rate:
    # systems multiply in 32 bits.
    factor = -(-tsc_khz * 1000 // 0xFFFF_FFFF)
    return CpuidLeaf(0x15, NO_SUBLEAF, 1, factor, tsc_khz * 1000 // factor, 0)


def _speed_leaf(tsc_khz: int) -> CpuidLeaf:
    # MHz: base, maximum, bus.
    mhz = min(tsc_khz // 1000, 0xFFFF)
    return CpuidLeaf(0x16, NO_SUBLEAF, mhz, mhz, 100, 0)


def cpu_name(leaves: Leaves) -> str:
    """Return the CPU's name as a table has it: what its maker calls it, or else who its maker is."""
    brand = [register for leaf in range(EXTENDED + 2, EXTENDED + 5) for register in find(leaves, leaf)]
    _, ebx, ecx, edx = find(leaves, 0)
    for registers in (brand, (ebx, edx, ecx)):
        text = b"".join(register.to_bytes(4, "little") for register in registers).decode("ascii", "replace")
        if name := " ".join("".join(c if c.isprintable() else " " for c in text).split()):
            return name
    return "no name"


#: What the software machine has: the whole baseline as Intel's CPUs show it, with the model that the emulator names;
#: and a TSC at the host's rate. (Its register of adjustments reads 0 and ignores writes.)
SOFT_CPU: Leaves = (
    CpuidLeaf(0, NO_SUBLEAF, 7, 0x756E_6547, 0x6C65_746E, 0x4965_6E69),  # GenuineIntel
    CpuidLeaf(1, NO_SUBLEAF, 0x0003_06C4, _CLFLUSH_EBX, HYPERVISOR, _LEAF_1_EDX),
    CpuidLeaf(7, 0, 0, _mask(_TSC_ADJUST), 0, 0),
    CpuidLeaf(EXTENDED, NO_SUBLEAF, EXTENDED + 8, 0x756E_6547, 0x6C65_746E, 0x4965_6E69),
    CpuidLeaf(EXTENDED + 1, NO_SUBLEAF, 0x0003_06C4, 0, 0, _mask(_SYSCALL, _NX, _LM)),
    CpuidLeaf(EXTENDED + 7, NO_SUBLEAF, 0, 0, 0, _mask(_CONSTANT_TSC)),
    CpuidLeaf(EXTENDED + 8, NO_SUBLEAF, _ADDRESS_BITS, 0, 0, 0),
)
