"""The host that numbers were measured on, in one line."""

import os
from pathlib import Path

from pageferry.core.host_cpu import host_cpu

#: What says by a Y or 1 that a KVM module uses nested paging.
_NESTED = {"kvm_intel": "ept", "kvm_amd": "npt"}


def host_line(modules: Path = Path("/sys/module")) -> str:
    """Return CPU, number of CPUs, kernel, and which KVM it is.

    Args:
        modules: where the kernel tells of its modules.
    """
    cpu = host_cpu(keeps_cpuid=True)
    kvm = ", ".join(_kvm(each) for each in sorted(modules.glob("kvm_*")))
    return f"{cpu or 'unknown CPU'}; {os.cpu_count()} CPUs; Linux {os.uname().release}; {kvm or 'no KVM module'}"


def _kvm(module: Path) -> str:
    switch = module / "parameters" / _NESTED.get(module.name, "")
    nested = switch.is_file() and switch.read_text().strip() in ("Y", "1")
    return f"{module.name} with {'nested' if nested else 'shadow'} paging"
