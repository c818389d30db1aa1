"""Domain: a machine in software, with the RFC's nested paging.

Memory has two faces. The *machine* face is one mapping of the memfd in machine order: Unicorn, the P2M and the page
walkers use it. The *guest* face is :class:`GuestMemory`: the same frames mapped once more, at their gpa. It is a
foreign mapping in Xen's sense: writable, outside the P2M's reach, so whoever writes through it marks (law 4).
"""

from pageferry.core.errors import UnsupportedError
from pageferry.core.frames import PAGE_SHIFT, PAGES_PER_2M
from pageferry.core.hostmem import HostMapping
from pageferry.core.memory import GuestMemory, ram_layout
from pageferry.core.state import VcpuState
from pageferry.core.vm import VmConfig
from pageferry.devices.machine import Machine
from pageferry.hypervisor.cpu import SoftVcpu
from pageferry.hypervisor.hap import hap_log_dirty_ops
from pageferry.hypervisor.locks import DomainLocks
from pageferry.hypervisor.machine import MachineMemory
from pageferry.hypervisor.p2m import P2M, P2MType
from pageferry.hypervisor.paging import LogDirtyOps, Paging
from pageferry.hypervisor.shadow import ShadowPaging

_PAGES_PER_L2 = 512 * PAGES_PER_2M
_SPARE_POOL_FRAMES = 8
_SPARE_SHADOW_FRAMES = 64


class Domain(Machine):
    """One guest on the software hypervisor; implements :class:`pageferry.core.vm.Vm`.

    Args:
        config: memory and vCPUs.
        paging_mode: ``hap`` or ``shadow``.

    Raises:
        UsageError: the memory size is impossible.
        UnsupportedError: no such paging mode.
    """

    def __init__(self, config: VmConfig, *, paging_mode: str = "hap") -> None:
        _check_mode(paging_mode)
        regions = ram_layout(config.memory_bytes)
        extents_2m = sum(-(-region.pages // PAGES_PER_2M) for region in regions)
        gfn_limit = regions[-1].first_gfn + regions[-1].pages
        # Enough tables to split everything: the root, L3, an L2 per GiB, an L1 per 2 MiB.
        pool_frames = 2 + -(-gfn_limit // _PAGES_PER_L2) + extents_2m + _SPARE_POOL_FRAMES
        # And shadows of it all, at 4 KiB, by tables of which each maps half of what it could.
        shadow_frames = _SPARE_SHADOW_FRAMES + 2 * extents_2m
        pool_frames += shadow_frames
        self.locks = DomainLocks()
        self.machine = MachineMemory(extents_2m=extents_2m, pool_frames=pool_frames, paging_lock=self.locks.paging)
        self.p2m = P2M(self.machine, self.locks.p2m)
        mapping = HostMapping(gfn_limit << PAGE_SHIFT)
        for region in regions:
            self._populate(mapping, region.first_gfn, region.pages)
        super().__init__(config, GuestMemory(regions, mapping, self.machine.populated))
        self.shadow = ShadowPaging(self.machine, self.p2m, self.locks.shadow, budget=shadow_frames)
        self.vcpus = tuple(SoftVcpu(self.machine, self.p2m, self.platform.bus, self.shadow) for _ in range(config.cpus))
        self.shadow.mmus = tuple(vcpu.shadow_mmu for vcpu in self.vcpus)
        self.paging = Paging(
            tracker=paging_mode,
            ops=self._ops(paging_mode),
            p2m=self.p2m,
            memory=self.memory,
            locks=self.locks,
            hold=lambda: self.run_control.stopped(),
            flush_tlbs=self._flush_tlbs,
        )
        for vcpu in self.vcpus:
            vcpu.paging = vcpu.shadow_mmu.paging = self.paging
            vcpu.use_shadow(paging_mode == "shadow")
        self._attach(self.vcpus, self.paging)

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
        """
        _check_mode(mode)
        with self.locks.domain, self.run_control.stopped(), self.locks.p2m:
            self.paging.set_mode(mode, self._ops(mode))
            self.shadow.blow()
            for vcpu in self.vcpus:
                vcpu.use_shadow(mode == "shadow")

    def _populate(self, mapping: HostMapping, first_gfn: int, pages: int) -> None:
        """Give a region its frames, extent by extent, in the P2M, the reverse map and the guest's face."""
        step = self.machine.extent_pages
        with self.locks.p2m:
            for gfn in range(first_gfn, first_gfn + pages, step):
                count = min(step, first_gfn + pages - gfn)
                mfn = self.machine.allocate_extent(count)
                self.p2m.map_extent(gfn, mfn, count, P2MType.RAM_RW)
                self.machine.m2p.set_extent(mfn, gfn, count)
                mapping.map_fd(self.machine.memfd, mfn << PAGE_SHIFT, gfn << PAGE_SHIFT, count << PAGE_SHIFT)

    @property
    def accel(self) -> str:
        """``soft``."""
        return "soft"

    def _flush_tlbs(self) -> None:
        for vcpu in self.vcpus:
            vcpu.request_tlb_flush()

    def _save_vcpus(self) -> tuple[VcpuState, ...]:
        return tuple(vcpu.save() for vcpu in self.vcpus)

    def _load_vcpus(self, vcpus: tuple[VcpuState, ...]) -> None:
        self.shadow.blow()  # the guest's tables may be others now
        for vcpu, state in zip(self.vcpus, vcpus, strict=True):
            vcpu.load(state)

    def _free(self) -> None:
        for vcpu in self.vcpus:
            vcpu.close()
        self.machine.close()


def _check_mode(mode: str) -> None:
    if mode not in ("hap", "shadow"):
        raise UnsupportedError("paging-mode", f"there is no paging mode {mode!r}", hint="use hap or shadow")
