"""Which CPU a guest sees: baseline x86-64 (SSE2, no AVX), whatever the host has.

A guest that may move between hosts, and to the software hypervisor, must not come to depend on more than all of them
have. The feature words are an intersection: the baseline, and what this KVM supports. The vendor and the model stay
the host's: the two vendors differ in SYSCALL and SYSENTER, and a guest told the wrong one takes the slow path.

Source: kernel ``api.rst``, KVM_GET_SUPPORTED_CPUID and KVM_SET_CPUID2; x86-64 psABI, micro-architecture levels.
"""

import ctypes

from pageferry.core.errors import UnsupportedError
from pageferry.kvm import uapi
from pageferry.kvm.fds import SystemFd, VcpuFd

# Leaf 1 EDX, bit numbers.
_FPU, _VME, _DE, _PSE, _TSC, _MSR, _PAE, _MCE, _CX8, _APIC = range(10)
_SEP, _MTRR, _PGE, _MCA, _CMOV, _PAT, _PSE36 = range(11, 18)
_CLFSH, _MMX, _FXSR, _SSE, _SSE2 = 19, 23, 24, 25, 26
# Leaf 8000_0001h EDX.
_SYSCALL, _NX, _LM = 11, 20, 29
_HYPERVISOR = 31  # leaf 1 ECX


def _mask(*bits: int) -> int:
    return sum(1 << bit for bit in bits)


_SHARED_EDX = _mask(_FPU, _VME, _DE, _PSE, _TSC, _MSR, _PAE, _MCE, _CX8, _APIC, _MTRR, _PGE, _MCA, _CMOV, _PAT, _PSE36)
LEAF_1_EDX = _SHARED_EDX | _mask(_SEP, _CLFSH, _MMX, _FXSR, _SSE, _SSE2)
LEAF_80000001_EDX = _SHARED_EDX | _mask(_SYSCALL, _NX, _LM, _MMX, _FXSR)
_REQUIRED_EDX = _mask(_FPU, _TSC, _MSR, _PAE, _CX8, _CMOV, _FXSR, _SSE, _SSE2)
_REQUIRED_EXTENDED_EDX = _mask(_LM)
_ADDRESS_BITS = 48 << 8 | 40  # linear, physical

Leaves = dict[int, tuple[int, int, int, int]]
"""CPUID function (index 0) -> (eax, ebx, ecx, edx)."""


def supported_cpuid(system: SystemFd) -> Leaves:
    """Return what this KVM can give to a guest, first index of each function.

    Raises:
        KvmError: the kernel refused.
    """
    table = uapi.KvmCpuid2(nent=uapi.KVM_MAX_CPUID_ENTRIES)
    system.ioctl(uapi.KVM_GET_SUPPORTED_CPUID, table)
    leaves: Leaves = {}
    for entry in table.entries[: table.nent]:
        leaves.setdefault(entry.function, (entry.eax, entry.ebx, entry.ecx, entry.edx))
    return leaves


def baseline(supported: Leaves, *, index: int, cpus: int) -> Leaves:
    """Return the leaves of vCPU ``index`` of ``cpus``.

    Raises:
        UnsupportedError: this KVM lacks a part of the baseline.
    """
    none = (0, 0, 0, 0)
    _, ebx_0, ecx_0, edx_0 = supported.get(0, none)
    eax_1, _, _, edx_1 = supported.get(1, none)
    edx_extended = supported.get(0x8000_0001, none)[3]
    if _REQUIRED_EDX & ~edx_1 or _REQUIRED_EXTENDED_EDX & ~edx_extended:
        raise UnsupportedError(
            "cpuid-baseline", "this KVM does not offer a 64-bit CPU with SSE2", hint="use --accel soft"
        )
    return {
        0: (1, ebx_0, ecx_0, edx_0),
        1: (eax_1, index << 24 | cpus << 16 | 8 << 8, _mask(_HYPERVISOR), edx_1 & LEAF_1_EDX),
        0x8000_0000: (0x8000_0008, ebx_0, ecx_0, edx_0),
        0x8000_0001: (eax_1, 0, 0, edx_extended & LEAF_80000001_EDX),
        0x8000_0008: (_ADDRESS_BITS, 0, 0, 0),
    }


def set_cpuid(vcpu: VcpuFd, leaves: Leaves) -> None:
    """Give a vCPU its CPUID; before its first run (KVM refuses a change afterwards).

    Raises:
        KvmError: the kernel refused.
    """
    table = uapi.KvmCpuid2(nent=len(leaves))
    for entry, (function, (eax, ebx, ecx, edx)) in zip(table.entries, sorted(leaves.items()), strict=False):
        entry.function, entry.eax, entry.ebx, entry.ecx, entry.edx = function, eax, ebx, ecx, edx
    assert ctypes.sizeof(table) > len(leaves) * ctypes.sizeof(uapi.KvmCpuidEntry2)
    vcpu.ioctl(uapi.KVM_SET_CPUID2, table)
