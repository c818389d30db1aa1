"""Domain: a machine in software, with the RFC's nested paging.

Memory has two faces. The *machine* face is one mapping of the memfd in machine order: Unicorn, the P2M and the page
walkers use it. The *guest* face is :class:`GuestMemory`: the same frames mapped once more, at their gpa. It is a
foreign mapping in Xen's sense: writable, outside the P2M's reach, so a writer through it marks (law 4).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.cpu_features import guest_table
from pageferry.core.cpuid import SOFT_CPU, CpuModel, Leaves, of_vcpu
from pageferry.core.errors import UnsupportedError
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_1G, PAGES_PER_2M, GfnArray
from pageferry.core.host_tsc import expect_rate, host_tsc_khz
from pageferry.core.hostmem import HostMapping
from pageferry.core.hugepages import HugePages
from pageferry.core.memory import GuestMemory
from pageferry.core.ram import RamRegion, ram_layout
from pageferry.core.state import VcpuState
from pageferry.core.vm import AbsentPages, MachineModel, VmConfig
from pageferry.devices.pc.chips import PcChips
from pageferry.devices.standard_machine import StandardMachine
from pageferry.hypervisor.absent_pages import P2MAbsentPages
from pageferry.hypervisor.cpu import SoftVcpu
from pageferry.hypervisor.locks import DomainLocks
from pageferry.hypervisor.machine_memory import MachineMemory
from pageferry.hypervisor.p2m import P2M
from pageferry.hypervisor.p2m_types import P2MType
from pageferry.hypervisor.paging import PAGING_MODES, LogDirtyOps, Paging, Tlb, hap_log_dirty_ops
from pageferry.hypervisor.physmap import PhysMap
from pageferry.hypervisor.shadow import ShadowPaging
from pageferry.hypervisor.translated_code import CodeSharing

_SPARE_POOL_FRAMES = 8
_SPARE_SHADOW_FRAMES = 64
#: One walk's shadows are four; the rest makes it rarer that they are blown.
_PROMISED_SHADOW_FRAMES = 16
_USE_KVM = "use --accel kvm"
#: Machine memory that a large guest leaves unused, so that no gfn is its own mfn: 2 GiB.
_GAP_2M = 2 * PAGES_PER_1G // PAGES_PER_2M


class Domain(StandardMachine):
    """One guest on the software hypervisor; implements :class:`pageferry.core.machine.Machine`.

    Args:
        config: memory and 1 to 8 vCPUs.
        paging_mode: ``hap`` or ``shadow``.
        thp: whether to ask the host for transparent huge pages. (Pages of a hugetlb pool are not possible:
            single frames of 4 KiB come and go in a domain.)

    Raises:
        UsageError: the memory size or the CPUID table is impossible.
        UnsupportedError: no such paging mode, too many vCPUs, or a CPU with more than the baseline.
    """

    MAX_VCPUS = 8
    """More would only wait for each other."""

    def __init__(self, config: VmConfig, *, paging_mode: str = PAGING_MODES[0], thp: bool = False) -> None:
        _check_mode(paging_mode)
        if not 1 <= config.cpus <= self.MAX_VCPUS:
            raise UnsupportedError("vcpus", f"the software machine runs 1 to {self.MAX_VCPUS} vCPUs, not {config.cpus}")
        if config.machine is MachineModel.PC and config.cpus > 1:
            raise UnsupportedError("vcpus", f"the software machine's PC has 1 vCPU, not {config.cpus}", hint=_USE_KVM)
        if config.storage is not None:
            raise UnsupportedError("shared-memory", "the soft machine has its frames in an order of its own")
        self._rate_khz = host_tsc_khz() if config.machine is MachineModel.PC else None
        cpuid = _cpuid_table(config, self._rate_khz)
        regions = ram_layout(config.memory_bytes)
        extents_2m, pool_frames, shadow_frames = _frames_needed(regions)
        self.locks = DomainLocks()
        self.machine = MachineMemory(
            extents_2m=extents_2m, pool_frames=pool_frames, paging_lock=self.locks.paging, thp=thp
        )
        with ExitStack() as undo:  # what was made is given back if a later step fails
            undo.callback(self.machine.close)
            self.p2m = P2M(self.machine, self.locks.p2m)
            super().__init__(config, self._make_memory(regions, thp=thp), cpuid)
            undo.callback(self.virtio.close)
            tlbs = tuple(Tlb() for _ in range(config.cpus))
            self.shadow = ShadowPaging(
                self.machine,
                self.p2m,
                self.locks.shadow,
                tlbs=tlbs,
                budget=shadow_frames,
                gfns=self.memory.gfn_limit,
            )
            self.paging = Paging(
                tracker=paging_mode,
                ops=self._ops(paging_mode),
                p2m=self.p2m,
                pool=self.machine.pool,
                memory=self.memory,
                locks=self.locks,
                hold=self._hold,
                tlbs=tlbs,
            )
            self.physmap = PhysMap(
                machine=self.machine,
                p2m=self.p2m,
                shadow=self.shadow,
                paging=self.paging,
                memory=self.memory,
                locks=self.locks,
                hold=self._hold,
            )
            bus = self.platform.bus
            interrupts = PcChips(bus, self.platform.clock) if config.machine is MachineModel.PC else None
            sharing = CodeSharing()
            self.vcpus = tuple(
                SoftVcpu(
                    self.machine,
                    self.p2m,
                    bus,
                    self.shadow,
                    paging=self.paging,
                    tlb=tlb,
                    cpuid=of_vcpu(cpuid, index=index, cpus=config.cpus),
                    sharing=sharing,
                    interrupts=interrupts,
                )
                for index, tlb in enumerate(tlbs)
            )
            for vcpu in self.vcpus:
                vcpu.use_shadow(paging_mode == "shadow")
            self.machine.pool.promise(_PROMISED_SHADOW_FRAMES if paging_mode == "shadow" else 0)
            bus.use_lock(self.locks.devices)
            self._kvm_clock_ns: int | None = None
            self._attach(self.vcpus, self.paging)
            undo.pop_all()

    def _ops(self, mode: str) -> LogDirtyOps:
        return self.shadow.log_dirty_ops() if mode == "shadow" else hap_log_dirty_ops(self.p2m)

    @property
    def paging_mode(self) -> str:
        """``hap`` or ``shadow``."""
        return self.paging.tracker

    def set_paging_mode(self, mode: str) -> None:
        """Switch between ``hap`` and ``shadow``, while log-dirty is off; the guest runs on and notices nothing.

        Raises:
            UnsupportedError: there is no such mode.
            LogDirtyError: log-dirty is on; nothing changed.
            VmError: the paging pool has no room for shadow tables; nothing changed.
        """
        _check_mode(mode)
        with self.locks.domain, self.run_control.stopped(), self.locks.p2m:
            if not self.paging.enabled:
                self.machine.pool.promise(_PROMISED_SHADOW_FRAMES if mode == "shadow" else 0)
            self.paging.set_mode(mode, self._ops(mode))
            self.shadow.blow()
            for vcpu in self.vcpus:
                vcpu.use_shadow(mode == "shadow")

    def _populate(self, mapping: HostMapping, regions: tuple[RamRegion, ...]) -> None:
        """Give RAM its frames, extent by extent, in the P2M, the reverse map and the guest's face.

        Whole GiBs get one 1 GiB frame each. From the last gfn down and with 2 GiB of machine memory left unused at the
        bottom, none of them can be the identity, hole or no hole.
        """
        with self.locks.p2m:
            for region in reversed(regions):
                whole = region.first_gfn + (region.pages & -PAGES_PER_1G)
                end, step = region.first_gfn + region.pages, self.machine.extent_pages
                for gfn in range(whole, end, step):
                    self._enter(mapping, gfn, min(step, end - gfn))
                for gfn in range(whole - PAGES_PER_1G, region.first_gfn - 1, -PAGES_PER_1G):
                    self._enter(mapping, gfn, PAGES_PER_1G)

    def _make_memory(self, regions: tuple[RamRegion, ...], *, thp: bool) -> GuestMemory:
        """Give RAM its frames, and return the guest's face of them."""
        mapping = HostMapping(_gfn_limit(regions) << PAGE_SHIFT)
        self._populate(mapping, regions)
        if not thp:
            return GuestMemory(regions, mapping, self._stored_runs)
        memory = GuestMemory(
            regions,
            mapping,
            self._stored_runs,
            huge_pages=HugePages.THP,
            vcpu_mapping=self.machine.mapping,
        )
        memory.advice.everywhere()
        return memory

    def _stored_runs(self) -> tuple[GfnArray, GfnArray]:
        return self.physmap.populated()

    def _hold(self) -> AbstractContextManager[None]:
        return self.run_control.stopped()

    def _enter(self, mapping: HostMapping, gfn: int, pages: int) -> None:
        mfn = self.machine.allocate_extent(pages)
        self.p2m.map_extent(gfn, mfn, pages, P2MType.RAM_RW)
        self.machine.m2p.set_extent(mfn, gfn, pages)
        mapping.map_fd(self.machine.memfd, mfn << PAGE_SHIFT, gfn << PAGE_SHIFT, pages << PAGE_SHIFT)

    @property
    def accel(self) -> str:
        """``soft``."""
        return "soft"

    @property
    def closed(self) -> bool:
        """Whether the domain was destroyed."""
        return self._closed

    def set_allocation(self, frames: int) -> None:
        """Decide how many frames of tables and bitmap the domain may use; see :meth:`PagingPool.set_allocation`.

        Raises:
            VmError: fewer than are in use, or more than the paging pool has; nothing changed.
        """
        self.machine.pool.set_allocation(frames)

    def get_allocation(self) -> int:
        """Return how many frames of tables and bitmap the domain may use."""
        return self.machine.pool.allocation

    def await_memory(self, fetch: Callable[[GfnArray], None], absent: DirtyBitmap) -> AbsentPages:
        """Let frames be absent: not present to the nested walk, which every access of a vCPU begins with."""
        return P2MAbsentPages(self.memory, self.p2m, fetch)

    def remove_pages(self, gfns: GfnArray) -> None:
        """Take frames away from the guest, as its balloon would."""
        self.physmap.decrease_reservation(gfns)

    def _save_vcpus(self) -> tuple[VcpuState, ...]:
        return tuple(vcpu.save() for vcpu in self.vcpus)

    def _load_vcpus(self, vcpus: tuple[VcpuState, ...], tsc_khz: int | None) -> None:
        if tsc_khz is not None:
            expect_rate(tsc_khz, host_tsc_khz())
            self._rate_khz = tsc_khz
        self.shadow.blow()  # the guest's tables may be others now
        for vcpu, state in zip(self.vcpus, vcpus, strict=True):
            vcpu.load(state)

    def _tsc_khz(self) -> int | None:
        return self._rate_khz

    def _set_tsc_back(self, ticks: int) -> None:
        for vcpu in self.vcpus:
            vcpu.set_tsc_back(ticks)

    def _save_kvm_clock(self) -> int | None:
        return self._kvm_clock_ns  # a guest here cannot read it: it stands still, and so never goes back

    def _load_kvm_clock(self, clock_ns: int) -> None:
        self._kvm_clock_ns = clock_ns

    def _free(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.machine.close()


def _gfn_limit(regions: tuple[RamRegion, ...]) -> int:
    return regions[-1].first_gfn + regions[-1].pages


def _frames_needed(regions: tuple[RamRegion, ...]) -> tuple[int, int, int]:
    """Return how many frames of 2 MiB RAM needs, how many frames the paging pool, and how many of these for shadows."""
    gfn_limit = _gfn_limit(regions)
    extents_2m = sum(-(-region.pages // PAGES_PER_2M) for region in regions)
    # Enough to split everything: the root, L3, an L2 per GiB, an L1 per 2 MiB; and the log-dirty bitmap.
    pool_frames = 2 + -(-gfn_limit // PAGES_PER_1G) + extents_2m + -(-gfn_limit // (8 * PAGE_SIZE)) + _SPARE_POOL_FRAMES
    # And shadows of it all, at 4 KiB, by tables of which each maps half of what it could.
    shadow_frames = _SPARE_SHADOW_FRAMES + 2 * extents_2m
    if regions[0].pages >= PAGES_PER_1G:
        extents_2m += _GAP_2M
    return extents_2m, pool_frames + shadow_frames, shadow_frames


def _cpuid_table(config: VmConfig, tsc_khz: int | None) -> Leaves:
    if config.cpu is CpuModel.HOST:
        raise UnsupportedError(
            "cpu", "the software machine has the baseline CPU only", hint="use --cpu baseline, or --accel kvm"
        )
    return guest_table(config, SOFT_CPU, where="the software machine", tsc_khz=tsc_khz)


def _check_mode(mode: str) -> None:
    if mode not in PAGING_MODES:
        raise UnsupportedError(
            "paging-mode", f"there is no paging mode {mode!r}", hint=f"one of {', '.join(PAGING_MODES)}"
        )
