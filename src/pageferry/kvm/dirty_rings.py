"""Dirty rings: each vCPU's list of the pages that KVM let it write, and all of them together.

An entry is (flags, slot, offset in the slot), and its flags go round with it::

    0 (free) --KVM pushes--> DIRTY --we harvest, then set--> RESET --KVM_RESET_DIRTY_RINGS protects the page--> 0

KVM pushes at its own index, which it does not show; the entries after the last one harvested that say DIRTY, without a
gap, are the new ones. It resets from its own index too, as far as entries say RESET, so entries are reset in the order
they were harvested in. Room is what is free: an entry that is harvested and not reset still takes up its place.

**Order of loads and stores.** KVM writes an entry and then its flags, with a release; so the flags must be loaded
before the rest, and the rest be done with before RESET is stored. On x86 loads are done in order, stores are done in
order, and no store is done before an older load; the interpreter keeps the order of the calls into numpy that do them.
Nothing else runs this code: the machine is x86-64.

**A reset that is cut short.** From Linux 6.16 on KVM leaves a reset when a signal is pending, and then the last pages,
whose entries it has freed already, are *not* protected. So signals are blocked on the thread that resets. What cannot
be blocked (a stop, a freezer, a debugger) shows by entries that were not reset. It does not show when it comes after
the very last entry: a window of some nanoseconds that is left.

Nothing here is safe for threads: :class:`pageferry.kvm.ring_log.KvmRingLog` holds its lock around each call.

Source: kernel ``api.rst``, KVM_CAP_DIRTY_LOG_RING; ``virt/kvm/dirty_ring.c``, kvm_dirty_ring_reset.
"""

import mmap
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pageferry.core.errors import VmError
from pageferry.core.frames import GfnArray
from pageferry.kvm import uapi
from pageferry.kvm.fds import VmFd
from pageferry.kvm.kick import signals_blocked
from pageferry.kvm.slots import MemorySlot

_ENTRY = np.dtype([("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")])
ENTRY_BYTES = _ENTRY.itemsize
#: Entries looked at by one call: enough to make a call's cost small, and few enough that an idle ring is a short look.
_LOOK_ENTRIES = 4096
#: A write fault takes a microsecond at the very least: a quarter of the time in which a ring fills up.
_PERIOD_S_PER_ENTRY = 0.25e-6
#: However small the ring: looking must not eat a CPU.
_MIN_PERIOD_S = 0.005
#: Calls that do not reset everything, one after the other, before we give up.
_RESET_ATTEMPTS = 100

Entries = tuple[NDArray[np.uint32], NDArray[np.uint64]]


class DirtyRing:
    """One vCPU's ring, mapped.

    Args:
        mapping: taken over; a power of two of entries.
    """

    def __init__(self, mapping: mmap.mmap) -> None:
        # SAFETY: the views borrow the mapping through the buffer protocol and keep it mapped; close() drops them first.
        entries = np.frombuffer(mapping, _ENTRY)
        self._mapping = mapping
        self._flags: NDArray[np.uint32] = entries["flags"]
        self._slots: NDArray[np.uint32] = entries["slot"]
        self._offsets: NDArray[np.uint64] = entries["offset"]
        self.capacity = entries.size
        self._next = 0  # where the next entry to harvest will be
        self._kept = 0  # harvested and not reset: the entries just before _next

    @property
    def kept(self) -> int:
        """How many entries are harvested and not reset."""
        return self._kept

    def look(self) -> Entries:
        """Return the next new entries, up to the end of the mapping at the most; empty if nothing is new.

        They stay new until :meth:`harvested`.

        Returns:
            ``(slots, offsets)``, uint32[n] and uint64[n], copies.
        """
        room = min(self.capacity - self._next, self.capacity - self._kept, _LOOK_ENTRIES)
        flags = self._flags[self._next : self._next + room] & uapi.KVM_DIRTY_GFN_F_MASK
        old = np.flatnonzero(flags != uapi.KVM_DIRTY_GFN_F_DIRTY)
        new = slice(self._next, self._next + (int(old[0]) if old.size else room))
        return self._slots[new].copy(), self._offsets[new].copy()

    def harvested(self, count: int) -> None:
        """Count the first ``count`` new entries as harvested: what they say is kept elsewhere."""
        self._next = (self._next + count) % self.capacity
        self._kept += count

    def release(self) -> int:
        """Set RESET in every entry that is harvested and not reset; return how many there are."""
        for part in self._kept_parts():
            self._flags[part] = uapi.KVM_DIRTY_GFN_F_RESET
        return self._kept

    def settle(self) -> int:
        """After KVM_RESET_DIRTY_RINGS: return how many released entries it has not reset; those stay harvested."""
        left = (self._flags[part] & uapi.KVM_DIRTY_GFN_F_RESET for part in self._kept_parts())
        self._kept = sum([int(np.count_nonzero(flags)) for flags in left])  # it goes from the oldest on: the newest
        return self._kept

    def _kept_parts(self) -> tuple[slice, slice]:
        first = self._next - self._kept  # negative: at the end of the mapping, before the wrap
        before_wrap = slice(first + self.capacity, self.capacity) if first < 0 else slice(0)
        return before_wrap, slice(max(first, 0), self._next)

    def close(self) -> None:
        """Unmap the ring; no other method may be called afterwards."""
        del self._flags, self._slots, self._offsets
        self._mapping.close()


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
                f"{slot >> 16}, which is not RAM of this guest: what was written is not known"
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
