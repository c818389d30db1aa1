"""Memory slots: RAM as KVM knows it, in pieces of 1 GiB, ascending.

KVM_GET_DIRTY_LOG copies the bitmap of a whole slot. A large guest is cleaned in ranges, so with one slot for all of its
RAM the cost of a round would grow with the square of the guest's size. (KVM has room for 509 slots at least. A guest
here has 127 GiB at most.)

Source: kernel ``api.rst``, KVM_SET_USER_MEMORY_REGION.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pageferry.core.frames import PAGE_SHIFT, SIZE_1G, Gpa
from pageferry.core.hostmem import HostMapping
from pageferry.core.ram import RamRegion
from pageferry.kvm import uapi
from pageferry.kvm.fds import VmFd


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySlot:
    """One piece of RAM in KVM's slot ``index``; ``userspace_addr`` is the host address of its first byte."""

    index: int
    region: RamRegion
    userspace_addr: int

    @property
    def words(self) -> slice:
        """Where this slot's bits lie in a bitmap of the whole guest: KVM numbers bits from the slot's start.

        A slot starts at a multiple of 64 frames, so no word is shared by two.
        """
        first, pages = self.region.first_gfn, self.region.pages
        assert first % 64 == 0, f"slot {self.index} starts at gfn {first:#x}"
        return slice(first // 64, (first + pages + 63) // 64)

    def set(self, vm: VmFd, flags: int = 0) -> None:
        """Tell KVM of the slot: make it, or change its flags while the guest runs.

        Raises:
            KvmError: the kernel refused.
        """
        # SAFETY: the addresses belong to the mapping that KvmVm holds from before the slot is made until after the
        # VM is closed; if they went away earlier, KVM would only see unmapped memory (it follows the host's tables).
        region = uapi.KvmUserspaceMemoryRegion(
            slot=self.index,
            flags=flags,
            guest_phys_addr=self.region.gpa,
            memory_size=self.region.pages << PAGE_SHIFT,
            userspace_addr=self.userspace_addr,
        )
        vm.ioctl(uapi.KVM_SET_USER_MEMORY_REGION, region)


def slots_of(regions: Sequence[RamRegion], mapping: HostMapping) -> tuple[MemorySlot, ...]:
    """Return the slots for a guest's RAM, which ``mapping`` has at offset gpa."""
    pieces = (
        RamRegion(gpa=Gpa(gpa), size_bytes=min(SIZE_1G, region.gpa + region.size_bytes - gpa))
        for region in regions
        for gpa in range(region.gpa, region.gpa + region.size_bytes, SIZE_1G)
    )
    return tuple(
        MemorySlot(index=index, region=piece, userspace_addr=mapping.hva + piece.gpa)
        for index, piece in enumerate(pieces)
    )
