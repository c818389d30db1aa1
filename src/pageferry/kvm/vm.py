"""KvmVm: a machine on the real CPU.

**Its clock** (KVM's paravirtual one, of which a machine has one) stands still from the moment in which it is saved, as
the TSC does, and goes on from there where it is loaded: a guest that reads it, or both, never sees them run backwards
or apart. So KVM_CLOCK_REALTIME is not used, which would add the time of the pause to one of the two. It is loaded after
the TSCs: a TSC that is set makes KVM take its reference points anew, and that may shift the clock by what the host's
two clocks have drifted apart.

Source: kernel ``api.rst``: KVM_CREATE_VM, KVM_SET_USER_MEMORY_REGION, KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR,
KVM_GET_CLOCK, KVM_SET_CLOCK; ``x86/timekeeping.rst``, ``x86/msr.rst``.
"""

import ctypes
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.cpu_features import guest_table
from pageferry.core.cpuid import of_vcpu
from pageferry.core.errors import UnsupportedError
from pageferry.core.frames import GfnArray
from pageferry.core.hugepages import HugePages
from pageferry.core.memory import GuestMemory
from pageferry.core.state import VcpuState
from pageferry.core.vm import AbsentPages, MachineModel, VmConfig
from pageferry.devices.standard_machine import StandardMachine
from pageferry.kvm import tsc, uapi, vcpu_state
from pageferry.kvm.cpuid import set_cpuid, supported_cpuid, withhold_paravirtual
from pageferry.kvm.device_timer import DeviceTimer
from pageferry.kvm.doorbells import doorbells_of
from pageferry.kvm.events import enable_events
from pageferry.kvm.fds import SystemFd, VcpuFd
from pageferry.kvm.irqchip import KvmInterrupts, create_irqchip
from pageferry.kvm.msrs import listed_msrs
from pageferry.kvm.slots import slots_of
from pageferry.kvm.trackers import DEFAULT_TRACKER, Closeable, Tracker, find_tracker
from pageferry.kvm.tss import tss_attributes
from pageferry.kvm.vcpu import KvmVcpu
from pageferry.uffd.absent_pages import UffdAbsentPages

#: Four pages below 4 GiB, in the PCI hole and away from every device: scratch that VMX needs on some hosts.
_IDENTITY_MAP_GPA = 0xFFFB_C000
_TSS_GPA = 0xFFFB_D000

_REQUIRED = {
    "KVM_CAP_USER_MEMORY": uapi.KVM_CAP_USER_MEMORY,
    "KVM_CAP_EXT_CPUID": uapi.KVM_CAP_EXT_CPUID,
    "KVM_CAP_SYNC_MMU": uapi.KVM_CAP_SYNC_MMU,
    "KVM_CAP_VCPU_EVENTS": uapi.KVM_CAP_VCPU_EVENTS,
    "KVM_CAP_DEBUGREGS": uapi.KVM_CAP_DEBUGREGS,
    "KVM_CAP_XSAVE": uapi.KVM_CAP_XSAVE,
    "KVM_CAP_IMMEDIATE_EXIT": uapi.KVM_CAP_IMMEDIATE_EXIT,
}


class KvmVm(StandardMachine):
    """A guest on KVM; implements :class:`pageferry.core.machine.Machine`.

    Args:
        config: what the guest needs.
        tracker: how dirty pages are found: a name out of :data:`pageferry.kvm.trackers.TRACKERS`, or one of one's own.
        huge_pages: what to ask of the host for the guest's RAM.

    Raises:
        UnsupportedError: there is no usable KVM here, it lacks something, or cannot hold such a guest, or the host has
            too few huge pages.
        UsageError: the memory size or the CPUID table is not possible.
        KvmError: the kernel refused.
    """

    def __init__(
        self,
        config: VmConfig,
        *,
        tracker: str | Tracker = DEFAULT_TRACKER,
        huge_pages: HugePages = HugePages.AUTO,
    ) -> None:
        kind = find_tracker(tracker) if isinstance(tracker, str) else tracker
        with ExitStack() as undo:  # what was opened is closed again, the last first, if a later step fails
            system = undo.enter_context(SystemFd())
            _expect_fit(system, config)
            irqchip = config.machine is MachineModel.PC
            self.vm_fd = undo.enter_context(system.create_vm())
            kind.prepare(self.vm_fd)
            self._set_up_vm()
            chips = create_irqchip(self.vm_fd) if irqchip else ()
            event_flags = enable_events(self.vm_fd)
            vcpu_fds = [undo.enter_context(self.vm_fd.create_vcpu(index)) for index in range(config.cpus)]
            cpuid = guest_table(
                config,
                supported_cpuid(system, lapic=irqchip),
                where="this host",
                tsc_khz=tsc.rate_khz(vcpu_fds[0]),
            )
            memory = GuestMemory.linear(
                config.memory_bytes, huge_pages=huge_pages, storage=config.storage, needs_file=kind.own_mapping
            )
            undo.callback(memory.close)
            super().__init__(config, memory, cpuid)
            undo.callback(self.virtio.close)
            self.platform.bus.elsewhere = chips
            if irqchip:
                self.platform.bus.lines.connect(KvmInterrupts(self.vm_fd))
            if (doorbells := doorbells_of(self.vm_fd)) is not None:
                self.virtio.use_doorbells(doorbells)
            self.vcpu_mapping = self.memory.mapping
            if kind.own_mapping:
                self.vcpu_mapping = self.memory.map_again()
                undo.callback(self.vcpu_mapping.map_private, 0, self.vcpu_mapping.size_bytes)
            self.slots = slots_of(self.memory.regions, self.vcpu_mapping)
            for slot in self.slots:
                slot.set(self.vm_fd)
            self._device_timer = DeviceTimer(self.platform.bus)
            undo.callback(self._device_timer.close)
            make_vcpu = partial(self._make_vcpu, listed_msrs(system), event_flags)
            self.vcpus = tuple(make_vcpu(fd, index) for index, fd in enumerate(vcpu_fds))
            log_dirty = kind.make(self)
            if isinstance(log_dirty, Closeable):
                undo.callback(log_dirty.close)
            self._attach(self.vcpus, log_dirty)
            self._owned = undo.pop_all()

    def _make_vcpu(self, listed: tuple[int, ...], event_flags: int, fd: VcpuFd, index: int) -> KvmVcpu:
        if self.config.machine is MachineModel.PC:
            withhold_paravirtual(self.vm_fd, fd)
        set_cpuid(fd, of_vcpu(self.cpuid, index=index, cpus=self.config.cpus))
        parts = vcpu_state.Parts.of(
            self.vm_fd,
            fd,
            table=self.cpuid,
            listed=listed,
            event_flags=event_flags,
            irqchip=self.config.machine is MachineModel.PC,
            tss=tss_attributes(),
        )
        return KvmVcpu(fd, self.platform.bus, self._device_timer, parts, memory=self.memory, index=index)

    def _set_up_vm(self) -> None:
        if self.vm_fd.check_extension(uapi.KVM_CAP_SET_IDENTITY_MAP_ADDR):
            # SAFETY: the kernel reads this one cell during the call; the array is held until it returns.
            self.vm_fd.ioctl(uapi.KVM_SET_IDENTITY_MAP_ADDR, (ctypes.c_uint64 * 1)(_IDENTITY_MAP_GPA))
        if self.vm_fd.check_extension(uapi.KVM_CAP_SET_TSS_ADDR):
            self.vm_fd.ioctl(uapi.KVM_SET_TSS_ADDR, _TSS_GPA)

    @property
    def accel(self) -> str:
        """``kvm``."""
        return "kvm"

    def await_memory(self, fetch: Callable[[GfnArray], None], absent: DirtyBitmap) -> AbsentPages:
        """Let frames be absent, by userfaultfd."""
        return UffdAbsentPages(self.memory, (self.memory.mapping, self.vcpu_mapping), fetch, absent)

    def _save_vcpus(self) -> tuple[VcpuState, ...]:
        now = tsc.host_tsc(self.vcpus[0].fd)
        return tuple(vcpu.save(now) for vcpu in self.vcpus)

    def _load_vcpus(self, vcpus: tuple[VcpuState, ...], tsc_khz: int | None) -> None:
        if tsc_khz is not None:
            for vcpu in self.vcpus:
                tsc.set_rate(self.vm_fd, vcpu.fd, tsc_khz)
        now = tsc.host_tsc(self.vcpus[0].fd)
        for vcpu, state in zip(self.vcpus, vcpus, strict=True):
            vcpu.load(state, now)

    def _tsc_khz(self) -> int | None:
        # The ABI's guests do not tell the time by it, and go to hosts of any rate.
        return tsc.rate_khz(self.vcpus[0].fd) if self.config.machine is MachineModel.PC else None

    def _set_tsc_back(self, ticks: int) -> None:
        now = tsc.host_tsc(self.vcpus[0].fd)
        for vcpu in self.vcpus:
            tsc.write(vcpu.fd, tsc.read(vcpu.fd, now) - ticks, now)

    def _save_kvm_clock(self) -> int | None:
        if not self.vm_fd.check_extension(uapi.KVM_CAP_ADJUST_CLOCK):
            return None
        data = uapi.KvmClockData()
        self.vm_fd.ioctl(uapi.KVM_GET_CLOCK, data)
        return int(data.clock)

    def _load_kvm_clock(self, clock_ns: int) -> None:
        if self.vm_fd.check_extension(uapi.KVM_CAP_ADJUST_CLOCK):
            self.vm_fd.ioctl(uapi.KVM_SET_CLOCK, uapi.KvmClockData(clock=clock_ns))

    def _free(self) -> None:
        self._owned.close()


def _expect_fit(system: SystemFd, config: VmConfig) -> None:
    for name, capability in _REQUIRED.items():
        if not system.check_extension(capability):
            raise UnsupportedError(name, f"this KVM lacks {name}", hint="use --accel soft")
    limit = system.check_extension(uapi.KVM_CAP_MAX_VCPUS)
    if not 1 <= config.cpus <= limit:
        raise UnsupportedError("vcpus", f"this KVM runs 1 to {limit} vCPUs, not {config.cpus}")
