"""CPUID of KVM's vCPUs: what this KVM can give, and giving it.

The vendor stays the host's in a guest that is started here. A guest that comes from elsewhere keeps its own, whatever
the host's: vendors differ in what SYSCALL and SYSENTER do outside 64-bit code, which KVM then emulates slowly. That
concerns 32-bit programs under a 64-bit operating system.

Some KVMs change every table to what their CPU really does: their guests see more features than they were given, and may
lack some that the same KVM offered. Some cannot intercept CPUID in ring 3 (``kvm_pvm`` on AMD): their guests see the
host's own answers, whatever KVM_GET_CPUID2 says. Nothing here can prevent that; the probe asks a guest
(``KvmSupport.exact_cpuid``), and ``doctor`` tells.

Source: kernel ``api.rst``, KVM_GET_SUPPORTED_CPUID, KVM_SET_CPUID2 and KVM_GET_CPUID2.
"""

from pageferry.core.cpuid import NO_SUBLEAF, TSC_DEADLINE, CpuidLeaf, Leaves
from pageferry.kvm import uapi
from pageferry.kvm.fds import SystemFd, VcpuFd, VmFd


def supported_cpuid(system: SystemFd, *, lapic: bool) -> Leaves:
    """Return what this KVM can give to a guest.

    Args:
        system: the kernel's KVM.
        lapic: whether the guest's local APICs are KVM's, which then have a timer with a deadline mode: KVM tells of
            that by a capability only.

    Raises:
        KvmError: the kernel refused.
    """
    leaves = _read(system, uapi.KVM_GET_SUPPORTED_CPUID)
    if not lapic or not system.check_extension(uapi.KVM_CAP_TSC_DEADLINE_TIMER):
        return leaves
    return tuple(leaf._replace(ecx=leaf.ecx | TSC_DEADLINE) if leaf.leaf == 1 else leaf for leaf in leaves)


def shown_cpuid(vcpu: VcpuFd) -> Leaves:
    """Return what CPUID answers to a vCPU, which is outside: what it was given, as this KVM has changed it.

    Raises:
        KvmError: the kernel refused.
    """
    return _read(vcpu, uapi.KVM_GET_CPUID2)


def set_cpuid(vcpu: VcpuFd, leaves: Leaves) -> None:
    """Give a vCPU its CPUID; before its first run (KVM refuses a change afterwards).

    Args:
        vcpu: which.
        leaves: its table, at most ``MAX_LEAVES`` long.

    Raises:
        KvmError: the kernel refused.
    """
    table = uapi.KvmCpuid2(nent=len(leaves))
    for i, leaf in enumerate(leaves):
        entry = table.entries[i]
        entry.function, entry.eax, entry.ebx, entry.ecx, entry.edx = leaf.leaf, *leaf.registers
        if leaf.subleaf != NO_SUBLEAF:
            entry.index, entry.flags = leaf.subleaf, uapi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    vcpu.ioctl(uapi.KVM_SET_CPUID2, table)


def withhold_paravirtual(vm: VmFd, vcpu: VcpuFd) -> None:
    """Have KVM refuse a vCPU its paravirtual interfaces (steal time, clock, end of interrupt): no table has them.

    By itself KVM gives them to a guest that writes their MSRs, and then writes into the guest's memory.

    Raises:
        KvmError: the kernel refused.
    """
    if vm.check_extension(uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID):
        vcpu.enable_cap(uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)


def _read(fd: SystemFd | VcpuFd, request: int) -> Leaves:
    table = uapi.KvmCpuid2(nent=uapi.KVM_MAX_CPUID_ENTRIES)
    fd.ioctl(request, table)
    leaves: dict[tuple[int, int], CpuidLeaf] = {}
    for entry in table.entries[: table.nent]:
        subleaf = entry.index if entry.flags & uapi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX else NO_SUBLEAF
        leaf = CpuidLeaf(entry.function, subleaf, entry.eax, entry.ebx, entry.ecx, entry.edx)
        leaves.setdefault(leaf[:2], leaf)
    return tuple(sorted(leaves.values()))
