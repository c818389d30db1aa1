"""What this host can do, found by doing it, and what to do about what is missing."""

import mmap
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from pageferry.core.errors import PageferryError, UnsupportedError, VmError
from pageferry.core.hugepages import HugePages, expect_offered
from pageferry.core.machine import Machine
from pageferry.core.memory import GuestMemory
from pageferry.core.units import format_size
from pageferry.core.vm import MachineModel, VmConfig, VmStatus
from pageferry.guests.boot import boot
from pageferry.guests.workloads import load_workload
from pageferry.vmm.accel import Accel, choose_machines

_TRIAL_MEMORY_BYTES = 32 << 20
_TRIAL_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One capability: whether it works here, what was seen, and what to do if it does not."""

    capability: str
    works: bool
    detail: str
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return asdict(self)


def examine() -> list[Finding]:
    """Try everything; never raises for what is missing."""
    from pageferry.kvm.trackers import DEFAULT_TRACKER, TRACKERS

    others = [name for name in TRACKERS if name != DEFAULT_TRACKER]  # accel-kvm tries the default
    return [
        _try("memfd", _memfd, "pageferry needs Linux with memfd_create"),
        _try("populate-ahead", _populate, "slower receiving without it; Linux 5.14 has it"),
        _try("hugepages-anonymous", lambda: _huge_pages(HugePages.ANONYMOUS), ""),
        _try("hugepages-thp", lambda: _huge_pages(HugePages.THP), ""),
        _try("hugepages-hugetlb", lambda: _huge_pages(HugePages.HUGETLB), ""),
        _try("accel-soft", lambda: _trial(Accel.SOFT), "the unicorn package must load on this processor"),
        _try("accel-kvm", lambda: _trial(Accel.KVM), ""),
        _try(
            "kvm-cpuid",
            _exact_cpuid,
            "use --accel soft for a guest that uses what CPUID offers and must be able to move",
        ),
        _try("kvm-ring0", _ring_0, ""),
        _try("kvm-guest-abi", _guest_abi, "a guest that uses them may not move to other hosts"),
        _try("kvm-manual-protect", _manual_protect, "use --accel soft"),
        *(_try(f"tracker-{name}", partial(_trial, Accel.KVM, name), "") for name in others),
        _try("machine-pc", partial(_trial, Accel.KVM, machine=MachineModel.PC), ""),
        _try("socket-buffers", _socket_buffers, "raise net.core.wmem_max and net.core.rmem_max to 8388608"),
    ]


def _try(capability: str, attempt: Callable[[], str], advice: str) -> Finding:
    try:
        return Finding(capability=capability, works=True, detail=attempt())
    except (PageferryError, OSError) as error:
        hint = error.hint if isinstance(error, PageferryError) and error.hint else advice
        return Finding(capability=capability, works=False, detail=str(error), advice=hint)


def _memfd() -> str:
    memory = GuestMemory.linear(_TRIAL_MEMORY_BYTES)
    memory.write(1 << 20, b"x")
    starts, lengths = memory.populated()
    if starts.tolist() != [256] or int(lengths[0]) * mmap.PAGESIZE >= _TRIAL_MEMORY_BYTES:
        raise UnsupportedError("memfd", "the kernel does not tell which pages of a memfd have storage")
    return f"sparse guest memory, extents of {format_size(int(lengths[0]) * mmap.PAGESIZE)} found"


def _populate() -> str:
    memory = GuestMemory.linear(_TRIAL_MEMORY_BYTES)
    memory.populate(np.array([16], np.uint64), np.array([16], np.uint64))
    if int(memory.populated()[1].sum()) < 16:
        raise UnsupportedError("populate-ahead", "MADV_POPULATE_WRITE did nothing")
    return "MADV_POPULATE_WRITE works"


def _huge_pages(kind: HugePages) -> str:
    expect_offered(kind)
    return f"--hugepages {kind} works"


def _trial(accel: Accel, tracker: str | None = None, machine: MachineModel = MachineModel.PLAIN) -> str:
    """Run a real guest under log-dirty and see its write in the bitmap."""
    vm = choose_machines(accel, tracker).make_vm(VmConfig(memory_bytes=_TRIAL_MEMORY_BYTES, machine=machine))
    try:
        return _observe(vm)
    finally:
        vm.close()


def _observe(vm: Machine) -> str:
    info = boot(vm, load_workload("stamp"))
    vm.attach_sync(True)
    vm.log_dirty.enable()
    vm.resume()
    if vm.wait(_TRIAL_PATIENCE_S) is not VmStatus.PAUSED or vm.sync_value() is None:
        raise VmError(f"a trial guest did not run: {vm.end.crash if vm.end else 'it never reported'}")
    vm.log_dirty.clean()
    vm.reply_sync(1)
    vm.resume()
    if vm.wait(_TRIAL_PATIENCE_S) is not VmStatus.PAUSED:
        raise VmError("a trial guest did not come back")
    dirty = vm.log_dirty.clean().gfns()
    first = info.working_set_gpa // mmap.PAGESIZE
    if not ((dirty >= first) & (dirty < first + info.working_set_bytes // mmap.PAGESIZE)).any():
        raise VmError("the writes of a trial guest are not in the dirty bitmap")
    return f"a guest ran; tracker {vm.log_dirty.tracker} saw {dirty.size} dirty pages"


def _exact_cpuid() -> str:
    from pageferry.kvm.probe import probe

    if not probe().exact_cpuid:
        raise UnsupportedError("kvm-cpuid", "a guest sees its host's CPU and not the CPUID table that it is given")
    return "a guest sees the CPUID table it is given"


def _ring_0() -> str:
    from pageferry.kvm.probe_ring_0 import expect_ring_0

    return expect_ring_0()


def _guest_abi() -> str:
    from pageferry.kvm.probe_abi import expect_forbidden

    return expect_forbidden()


def _manual_protect() -> str:
    from pageferry.kvm.probe import probe

    support = probe()
    if not support.manual_protect:
        raise UnsupportedError(
            "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
            "tracker kvm-bitmap works without it: this KVM clears its dirty bitmap whenever it is read",
            hint="nothing is lost by it, but a PEEK costs the guest as many faults as a CLEAN; Linux 5.2 has it",
        )
    if not support.initially_set:
        return "the dirty bitmap is cleared by hand; it cannot start all set (Linux 5.7 has that)"
    return "the dirty bitmap is cleared by hand, and starts all set"


def _socket_buffers() -> str:
    for name in ("wmem_max", "rmem_max"):
        with open(f"/proc/sys/net/core/{name}", encoding="ascii") as file:
            limit = int(file.read())
        if limit < 8 << 20 and os.geteuid() != 0:
            raise UnsupportedError("socket-buffers", f"net.core.{name} is {limit}: buffers of 8 MiB need more")
    return f"8 MiB buffers on {sys.platform}"
