"""The host's CPU, and whether a machine's guests see it in place of the CPU of their own CPUID table.

A KVM that does not keep a guest's table shows the guest what the host's CPU has. The guest may then use features that
its table lacks, and fail on a host without them. So two ends tell each other their CPUs and compare.

Source: Intel SDM volume 2 and AMD APM volume 3, CPUID.
"""

import ctypes
import struct
from dataclasses import dataclass
from functools import cache

from xxhash import xxh3_64_hexdigest

from pageferry.core.cpuid import EXTENDED, CpuidLeaf, Leaves, cpu_name, find

# uint32_t out[4] = CPUID of EAX, ECX: push rbx; mov eax, edi; mov ecx, esi; mov r8, rdx; cpuid; mov [r8], eax;
# mov [r8+4], ebx; mov [r8+8], ecx; mov [r8+12], edx; pop rbx; ret
_CODE = bytes.fromhex("53 89f8 89f1 4989d0 0fa2 418900 41895804 41894808 4189500c 5b c3")
_BRAND = (EXTENDED + 2, EXTENDED + 3, EXTENDED + 4)
#: (leaf, sub-leaf, which of EAX, EBX, ECX and EDX): where CPUID tells features, the same on each core of a host.
_FEATURES = (
    (0x1, 0, "cd"),
    (0x7, 0, "bcd"),
    (0x7, 1, "abcd"),
    (0x7, 2, "d"),
    (0xD, 0, "ad"),
    (0xD, 1, "a"),
    (EXTENDED + 0x1, 0, "cd"),
    (EXTENDED + 0x7, 0, "d"),
    (EXTENDED + 0x8, 0, "b"),
    (EXTENDED + 0x21, 0, "a"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCpu:
    """The CPU under one kind of machine.

    ``features`` is a digest of the CPU's feature leaves, 16 hex digits. ``keeps_cpuid``: the machine's guests see their
    own CPUID table; if not, they see what this CPU has.
    """

    name: str
    family: int
    model: int
    stepping: int
    features: str
    keeps_cpuid: bool

    def __str__(self) -> str:
        return f"{self.name}, family {self.family}, model {self.model}, stepping {self.stepping}"

    @property
    def warning(self) -> str | None:
        """The danger to a guest that runs here, in one line; None: none known."""
        if self.keeps_cpuid:
            return None
        return f"the guest sees its host's CPU ({self}) and not its CPUID table (doctor: kvm-cpuid)"


def host_cpu(*, keeps_cpuid: bool) -> HostCpu | None:
    """Return this host's CPU, under a machine that keeps its guests' CPUID tables or does not.

    None if it is not an x86-64, or if the host does not let a process run code that it made.
    """
    leaves = host_leaves()
    return None if leaves is None else described(leaves, keeps_cpuid=keeps_cpuid)


def described(leaves: Leaves, *, keeps_cpuid: bool) -> HostCpu:
    """Return the CPU whose CPUID answers are ``leaves``; what is not there counts as zeros."""
    signature = find(leaves, 1)[0]
    family, model = signature >> 8 & 0xF, signature >> 4 & 0xF
    if family in (0x6, 0xF):
        model |= signature >> 12 & 0xF0
    if family == 0xF:
        family += signature >> 20 & 0xFF
    words = [find(leaves, leaf, subleaf)["abcd".index(which)] for leaf, subleaf, of in _FEATURES for which in of]
    return HostCpu(
        name=cpu_name(leaves),
        family=family,
        model=model,
        stepping=signature & 0xF,
        features=xxh3_64_hexdigest(struct.pack(f"<{len(words)}I", *words)),
        keeps_cpuid=keeps_cpuid,
    )


def cpu_warning(source: HostCpu | None, destination: HostCpu | None) -> str | None:
    """Return what a guest that moves between two machines may trip over, in one line; None: nothing known.

    Two machines that keep their guests' tables show a guest the same CPU, whatever the hosts'.

    Args:
        source: where the guest runs; None: not known, and taken to keep its table.
        destination: where it goes; None: it did not say.
    """
    if source is not None and source.warning is not None:
        if destination is None:
            return f"{source.warning}; the destination may lack features that the guest uses"
        if destination.keeps_cpuid or _numbers(destination) != _numbers(source):
            return f"{source.warning}; the destination ({destination}) may lack features that the guest uses"
        return f"{source.warning}; the destination's CPU is the same"
    if destination is not None and not destination.keeps_cpuid:
        return f"at the destination the guest will see that host's CPU ({destination}) and not its CPUID table"
    return None


def _numbers(cpu: HostCpu) -> tuple[int, int, int, str]:
    return cpu.family, cpu.model, cpu.stepping, cpu.features


@cache
def host_leaves() -> Leaves | None:
    """Return what CPUID answers here in user mode, feature leaves and names; None: see :func:`host_cpu`."""
    from pageferry.core.machine_code import executable  # imports numpy, which is not needed just to show a CPU

    code = executable(_CODE)
    if code is None:
        return None
    # SAFETY: `code` keeps the mapping until the last call has returned; `out` is 16 bytes, which the code fills.
    cpuid = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(code.ctypes.data)
    out = (ctypes.c_uint32 * 4)()

    def ask(leaf: int, subleaf: int) -> CpuidLeaf:
        cpuid(leaf, subleaf, ctypes.addressof(out))
        return CpuidLeaf(leaf, subleaf, *out)

    highest = {0: ask(0, 0).eax, EXTENDED: ask(EXTENDED, 0).eax}
    places = {(leaf, subleaf) for leaf, subleaf, _ in _FEATURES} | {(leaf, 0) for leaf in (0, EXTENDED, *_BRAND)}
    return tuple(ask(leaf, subleaf) for leaf, subleaf in sorted(places) if leaf <= highest[leaf & EXTENDED])
