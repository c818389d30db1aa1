"""DirtyRings: the rings of all vCPUs together: what is new in them as frames, and their reset.

**A reset that is cut short.** From Linux 6.16 on KVM leaves a reset when a signal is pending, and then the last pages,
whose entries it has freed already, are *not* protected. So signals are blocked on the thread that resets. What cannot
be blocked (a stop, a freezer, a debugger) shows by entries that were not reset. It does not show when it comes after
the very last entry: a window of some nanoseconds that is left.

Not safe for threads, as :mod:`pageferry.kvm.dirty_ring`.

Source: kernel ``api.rst``, KVM_CAP_DIRTY_LOG_RING; ``virt/kvm/dirty_ring.c``, kvm_dirty_ring_reset.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pageferry.core.errors import VmError
from pageferry.core.frames import GfnArray
from pageferry.kvm import uapi
from pageferry.kvm.dirty_ring import DirtyRing
from pageferry.kvm.fds import VmFd
from pageferry.kvm.kick import signals_blocked
from pageferry.kvm.slots import MemorySlot

#: A write fault takes a microsecond at the very least: a quarter of the time in which a ring fills up.
_PERIOD_S_PER_ENTRY = 0.25e-6
#: However small the ring: whoever looks in this period must not eat a CPU.
_MIN_PERIOD_S = 0.005
#: Calls that do not reset everything, one after the other, before we give up.
_RESET_ATTEMPTS = 100


class DirtyRings:
    """The rings of a machine's vCPUs.

    ``unknown`` says, in words, which entry did not name a page of RAM; "" when all did.

    Args:
        vm: the machine.
        slots: the RAM as KVM knows it.
        rings: one for each vCPU; taken over.
    """

    def __init__(self, vm: VmFd, slots: tuple[MemorySlot, ...], rings: tuple[DirtyRing, ...]) -> None:
        self.unknown = ""
        self._vm = vm
        self._rings = rings
        self._first_gfns = np.array([slot.region.first_gfn for slot in slots], np.uint64)
        self._pages = np.array([slot.region.pages for slot in slots], np.uint64)

    @property
    def period_s(self) -> float:
        """How often to look, in seconds, so that a ring seldom fills up between two looks."""
        return max(_MIN_PERIOD_S, self._rings[0].capacity * _PERIOD_S_PER_ENTRY)

    @property
    def half_full(self) -> bool:
        """Whether what is harvested and not reset takes up half of a ring."""
        return any(ring.kept * 2 >= ring.capacity for ring in self._rings)

    def harvest(self, keep: Callable[[GfnArray], None]) -> None:
        """Take the new entries of every ring.

        Args:
            keep: called with the frames of some entries, in no order and with repeats. Only when it has returned do
                these entries count as harvested.
        """
        for vcpu, ring in enumerate(self._rings):
            while True:
                slots, offsets = ring.look()
                if not slots.size:
                    break
                keep(self._gfns_of(vcpu, slots, offsets))
                ring.harvested(slots.size)

    def _gfns_of(self, vcpu: int, slots: NDArray[np.uint32], offsets: NDArray[np.uint64]) -> GfnArray:
        """Return the frames of the entries that name one; of the others take note."""
        known = slots < self._pages.size  # an address space other than 0, in the high bits, makes it far more
        known[known] = offsets[known] < self._pages[slots[known]]
        if not known.all():
            slot, offset = int(slots[~known][0]), int(offsets[~known][0])
            self.unknown = self.unknown or (
                f"vcpu {vcpu}: KVM reports a write to page {offset:#x} of slot {slot & 0xFFFF} in address space "
                f"{slot >> 16}, which is no RAM of this guest: what was written is not known"
            )
        gfns: GfnArray = self._first_gfns[slots[known]] + offsets[known]
        return gfns

    def reset(self) -> bool:
        """Let KVM protect the pages of all that is harvested again, and free the entries.

        When this returns no vCPU holds a stale writable translation of such a page.

        Returns:
            True; or False: the reset was cut short, and some of those pages are still writable.

        Raises:
            VmError: the kernel refused, or did not do it; what it did not reset stays harvested.
        """
        if not sum([ring.release() for ring in self._rings]):
            return True
        with signals_blocked():
            for earlier_attempts in range(_RESET_ATTEMPTS):
                self._vm.ioctl(uapi.KVM_RESET_DIRTY_RINGS)
                left = sum([ring.settle() for ring in self._rings])
                if not left:
                    return not earlier_attempts
        raise VmError(f"KVM does not reset the dirty rings: {left} entries are left, and stay")

    def close(self) -> None:
        """Unmap the rings: there are none afterwards."""
        for ring in self._rings:
            ring.close()
        self._rings = ()
