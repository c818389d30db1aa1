"""A KVM vCPU's model-specific registers: which of them travel, and one call for all.

**The rule.** Every MSR that the kernel lists travels, if the vCPU can read it and its value is not the one that a new
vCPU with the same CPUID has; PAT travels always. Loading sets each one that the state names, gives every other its
value in a new vCPU, and reads all back: an MSR that KVM refuses, or takes and forgets, fails with its number.

Not by this rule:

- what has a field of its own in ``VcpuState`` (SYSCALL, SYSENTER, GS base of the kernel, TSC, TSC_AUX), belongs to the
  local APIC (TSC deadline), or is in KVM's special registers (EFER, the bases of FS and GS, the APIC's base);
- paravirtual ones (KVM's steal time and asynchronous faults; Hyper-V's): no CPUID leaf of ours shows those interfaces,
  and their values are guest addresses that this KVM would write to. Of KVM's clock, where each vCPU has it travels;
  where the wall clock was asked for does not: KVM would write it there at once, into memory that is proven already. A
  PC has not even the clock: KVM withholds it (:func:`pageferry.kvm.cpuid.withhold_paravirtual`);
- what describes the host, not the guest: microcode, platform, capabilities, VMX, firmware switches, count of SMIs.

Source: kernel ``api.rst``: KVM_GET_MSR_INDEX_LIST, KVM_GET_MSRS, KVM_SET_MSRS; ``x86/msr.rst``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from pageferry.core.errors import VmError
from pageferry.kvm import uapi
from pageferry.kvm.fds import SystemFd, VcpuFd

MSR_IA32_TSC = 0x10
MSR_IA32_CR_PAT = 0x277
MSR_IA32_TSC_DEADLINE = 0x6E0
MSR_KVM_SYSTEM_TIME = 0x4B56_4D01
MSR_TSC_AUX = 0xC000_0103
DEFAULT_PAT = 0x0007_0406_0007_0406

#: Index -> field of ``VcpuState``; the TSC, which needs more care, is not among them.
MSR_FIELDS = {
    0x174: "sysenter_cs",
    0x175: "sysenter_esp",
    0x176: "sysenter_eip",
    0xC000_0081: "star",
    0xC000_0082: "lstar",
    0xC000_0083: "cstar",
    0xC000_0084: "syscall_mask",
    0xC000_0102: "shadow_gs",
    MSR_TSC_AUX: "tsc_aux",
}

_SPECIAL_REGISTERS = {0x1B, 0xC000_0080, 0xC000_0100, 0xC000_0101}  # APIC base, EFER, FS base, GS base
_PARAVIRTUAL = (
    range(0x11, 0x13),
    range(0x4B56_4D00, MSR_KVM_SYSTEM_TIME),
    range(MSR_KVM_SYSTEM_TIME + 1, 0x4B56_4E00),
    range(0x4000_0000, 0x4000_0200),
)
_OF_THE_HOST = (
    range(0x34, 0x35),  # SMI count
    range(0x3A, 0x3B),  # feature control: firmware's switches
    range(0x8B, 0x8C),  # microcode revision
    range(0xCE, 0xCF),  # platform information
    range(0xCF, 0xD0),  # core capabilities
    range(0x10A, 0x10B),  # architectural capabilities
    range(0x345, 0x346),  # performance capabilities
    range(0x480, 0x494),  # VMX capabilities
    range(0xC001_1029, 0xC001_102A),  # DE_CFG: how the host serialises
)


def travels(index: int) -> bool:
    """Tell whether an MSR that the kernel lists belongs into ``VcpuState.msrs``."""
    if index in (MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE) or index in MSR_FIELDS or index in _SPECIAL_REGISTERS:
        return False
    return not any(index in left_out for left_out in _PARAVIRTUAL + _OF_THE_HOST)


def listed_msrs(system: SystemFd) -> tuple[int, ...]:
    """Return the indices that this KVM lists, ascending.

    Raises:
        KvmError: the kernel refused.
    """
    table = uapi.KvmMsrList(nmsrs=uapi.KVM_MAX_MSR_INDICES)
    system.ioctl(uapi.KVM_GET_MSR_INDEX_LIST, table)
    return tuple(sorted(table.indices[: table.nmsrs]))


def _table(entries: Iterable[tuple[int, int]]) -> uapi.KvmMsrs:
    table = uapi.KvmMsrs()
    for entry, (index, value) in zip(table.entries, entries, strict=False):
        entry.index, entry.data = index, value
        table.nmsrs += 1
    return table


def read_msrs(fd: VcpuFd, indices: Iterable[int]) -> dict[int, int]:
    """Return MSRs by index, without those that this vCPU has not.

    One call for each KVM_MAX_MSR_ENTRIES of them, and one more for each that is missing: the kernel stops at it.
    """
    left, found = list(indices), dict[int, int]()
    while left:
        table = _table((index, 0) for index in left)
        done = fd.ioctl(uapi.KVM_GET_MSRS, table)
        found |= {entry.index: entry.data for entry in table.entries[:done]}
        missing = done < table.nmsrs
        left = left[done + missing :]
    return found


def write_msrs(fd: VcpuFd, values: Mapping[int, int]) -> None:
    """Set MSRs in the order given, in one call; at most KVM_MAX_MSR_ENTRIES of them.

    Raises:
        VmError: this KVM has one of them not, or refuses its value; the ones before it are set.
    """
    if len(values) > uapi.KVM_MAX_MSR_ENTRIES:
        raise VmError(f"{len(values)} MSRs are more than KVM takes ({uapi.KVM_MAX_MSR_ENTRIES})")
    done = fd.ioctl(uapi.KVM_SET_MSRS, _table(values.items()))
    if done < len(values):
        index, value = list(values.items())[done]
        raise VmError(f"this KVM refuses MSR {index:#x} = {value:#x}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherMsrs:
    """The MSRs of one vCPU that travel in ``VcpuState.msrs``: ``new`` has each one's value in a new vCPU."""

    new: dict[int, int]

    @classmethod
    def of(cls, fd: VcpuFd, listed: Iterable[int]) -> Self:
        """Find out which they are; the vCPU has its CPUID, and nothing was loaded yet.

        Raises:
            KvmError: the kernel refused.
        """
        return cls(new=read_msrs(fd, filter(travels, listed)))

    def save(self, fd: VcpuFd) -> tuple[tuple[int, int], ...]:
        """Return (index, value) of PAT and of each one that is not as in a new vCPU, ascending."""
        now = read_msrs(fd, self.new)
        return tuple(
            (index, value)
            for index, value in sorted(now.items())
            if index == MSR_IA32_CR_PAT or value != self.new[index]
        )

    def load(self, fd: VcpuFd, msrs: tuple[tuple[int, int], ...]) -> None:
        """Set what ``msrs`` names and give every other its value in a new vCPU.

        Raises:
            VmError: this KVM refuses one of them, or does not keep its value.
        """
        wanted = self.new | {MSR_IA32_CR_PAT: DEFAULT_PAT} | dict(msrs)
        before = read_msrs(fd, wanted)
        write_msrs(fd, {index: value for index, value in wanted.items() if before.get(index) != value})
        after = read_msrs(fd, wanted)
        for index, value in wanted.items():
            if after.get(index) != value:
                raise VmError(f"this KVM does not keep MSR {index:#x} = {value:#x}")
