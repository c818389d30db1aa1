"""DirtyRing: the ring of one vCPU in which KVM lists the pages that it let this vCPU write.

An entry is (flags, slot, offset in the slot), and its flags go round with it::

    0 (free) --KVM pushes--> DIRTY --we harvest, then set--> RESET --KVM_RESET_DIRTY_RINGS protects the page--> 0

KVM pushes at its own index, which it does not show; the entries after the last one harvested that say DIRTY, without a
gap, are the new ones. It resets from its own index too, as far as entries say RESET, so entries are reset in the order
they were harvested in. Room is what is free: an entry that is harvested and not reset still takes up its place.

**Order of loads and stores.** KVM writes an entry and then its flags, with a release; so the flags must be loaded
before the rest, and the rest be done with before RESET is stored. On x86 loads are done in order, stores are done in
order, and no store is done before an older load; the interpreter keeps the order of the calls into numpy that do them.
Nothing else runs this code: the machine is x86-64.

Not safe for threads: :class:`pageferry.kvm.ring_log.KvmRingLog` holds its lock around each call.

Source: kernel ``api.rst``, KVM_CAP_DIRTY_LOG_RING.
"""

import mmap

import numpy as np
from numpy.typing import NDArray

from pageferry.kvm import uapi

_ENTRY = np.dtype([("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")])
ENTRY_BYTES = _ENTRY.itemsize
#: Entries looked at by one call: enough to make a call's cost small, and few enough that an idle ring is a short look.
_LOOK_ENTRIES = 4096

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
        """Return the next new entries, up to the end of the mapping at the most; none: there are no new ones.

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
