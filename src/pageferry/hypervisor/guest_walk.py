"""The guest's own page tables: gva -> gfn, with the rights that the guest grants.

Long mode, four levels, pages of 4 KiB, 2 MiB and 1 GiB. Accessed bits are set on the way, the dirty bit at the first
write. Under nested paging every access of the walker to a guest table counts as a *write* at the nested level (AMD
APM volume 2, nested paging): a guest whose tables are log-dirty takes a nested fault for each table it uses, and
those pages are dirty again in every cycle. FACTS: the same guest reports its PML4, PDPT and PD each round.

A page-walk cache keeps what a walk found for each 2 MiB of virtual address space, as hardware does. It lives and dies
with the TLB: it is flushed whenever the P2M took rights away, so the first walk after CLEAN touches, and so dirties,
the tables anew.

Simplified against hardware: CPL is that of the loaded state (3 by the guest ABI), so SMEP and SMAP never decide.
"""

from collections.abc import Callable

import numpy as np

from pageferry.core.frames import PAGE_SHIFT
from pageferry.core.hostmem import atomic_or_u32

_PRESENT, _WRITE, _USER = 1 << 0, 1 << 1, 1 << 2
_ACCESSED, _DIRTY, _PSE, _NX = 1 << 5, 1 << 6, 1 << 7, 1 << 63
_ADDRESS = 0x000F_FFFF_FFFF_F000

#: Error code bits of #PF.
PF_PRESENT, PF_WRITE, PF_USER, PF_FETCH = 1, 2, 4, 16

_CANONICAL_LOW = 1 << 47
_CANONICAL_HIGH = (1 << 64) - (1 << 47)


class GuestPageFault(Exception):
    """The guest's tables refuse an access: #PF, or #GP for a non-canonical address.

    ``gva`` is the first of the page (Unicorn tells no more); ``error_code`` is that of #PF, None for #GP.
    """

    def __init__(self, gva: int, access: str, error_code: int | None) -> None:
        super().__init__()
        self.gva = gva
        self.access = access
        self.error_code = error_code

    def describe(self) -> str:
        """Return one line for the crash message."""
        if self.error_code is None:
            return f"general protection fault ({self.access}, non-canonical address near {self.gva:#x})"
        why = "not allowed" if self.error_code & PF_PRESENT else "not present"
        return f"page fault ({self.access}, {why}, error code {self.error_code:#x}) cr2={self.gva:#x}"


class GuestWalker:
    """Walks one vCPU's page tables.

    Args:
        words: machine memory as u64s.
        nested_write: gfn -> mfn for the walker's own accesses; resolves nested faults (raises when it cannot).
    """

    def __init__(self, words: memoryview, nested_write: Callable[[int], int]) -> None:
        self._words = words
        self._hva = np.frombuffer(words, np.uint64).ctypes.data  # of word 0; words keeps it mapped
        self._nested_write = nested_write
        self.cr3 = 0
        self.user = True
        self.write_protect = True
        self.no_execute = False
        # gva >> 21 -> (word index of the leaf's level, base gfn or -1, writable, user, nx)
        self._cache: dict[int, tuple[int, int, bool, bool, bool]] = {}

    def flush(self) -> None:
        """Forget the page-walk cache; with every TLB flush."""
        self._cache.clear()

    def translate(self, gva: int, *, write: bool, fetch: bool) -> tuple[int, bool, bool]:
        """Return ``(gfn, writable, executable)`` for one access.

        ``writable`` is False while the page's dirty bit is clear, so that the first write comes here again.

        Raises:
            GuestPageFault: the guest's tables refuse.
        """
        cached = self._cache.get(gva >> 21)
        if cached is None:
            cached = self._walk(gva, write, fetch)
        at, base, writable, user, nx = cached
        if base < 0:  # the walk ends in a table of 4 KiB pages
            at += gva >> PAGE_SHIFT & 511
        entry = self._words[at]
        if not entry & _PRESENT:
            raise self._fault(gva, write, fetch, present=False)
        if base < 0:
            writable, user, nx = writable and bool(entry & _WRITE), user and bool(entry & _USER), nx or entry >= _NX
            gfn = (entry & _ADDRESS) >> PAGE_SHIFT
        else:
            gfn = base + (gva >> PAGE_SHIFT & 511)
        if not self.no_execute:
            nx = False
        may_write = writable or not (self.user or self.write_protect)
        if (self.user and not user) or (write and not may_write) or (fetch and nx):
            raise self._fault(gva, write, fetch, present=True)
        wanted = _ACCESSED | _DIRTY if write else _ACCESSED
        if entry & wanted != wanted:
            self._set(at, wanted)
            entry |= wanted
        return gfn, may_write and bool(entry & _DIRTY), not nx

    def _walk(self, gva: int, write: bool, fetch: bool) -> tuple[int, int, bool, bool, bool]:
        if _CANONICAL_LOW <= gva < _CANONICAL_HIGH:
            raise GuestPageFault(gva, _access_name(write, fetch), None)
        table_gfn = (self.cr3 & _ADDRESS) >> PAGE_SHIFT
        writable, user, nx = True, True, False
        for shift in (39, 30, 21):
            at = (self._nested_write(table_gfn) << 9) + (gva >> shift & 511)
            entry = self._words[at]
            if not entry & _PRESENT:
                raise self._fault(gva, write, fetch, present=False)
            writable, user, nx = writable and bool(entry & _WRITE), user and bool(entry & _USER), nx or entry >= _NX
            gfn = (entry & _ADDRESS) >> PAGE_SHIFT
            if entry & _PSE and shift != 39:
                in_page = gva >> PAGE_SHIFT & ((1 << (shift - PAGE_SHIFT)) - 512)  # which 2 MiB of a 1 GiB page
                found = at, (gfn & -(1 << (shift - PAGE_SHIFT))) + in_page, writable, user, nx
                break
            if not entry & _ACCESSED:
                self._set(at, _ACCESSED)
            table_gfn = gfn
        else:
            found = self._nested_write(table_gfn) << 9, -1, writable, user, nx
        self._cache[gva >> 21] = found
        return found

    def _set(self, at: int, bits: int) -> None:
        # As one step: another vCPU's walker may be setting the other bit, and the guest changing the entry, right now.
        atomic_or_u32(self._hva + (at << 3), bits)

    def _fault(self, gva: int, write: bool, fetch: bool, *, present: bool) -> GuestPageFault:
        error_code = PF_PRESENT if present else 0
        error_code |= PF_WRITE if write else 0
        error_code |= PF_USER if self.user else 0
        error_code |= PF_FETCH if fetch and self.no_execute else 0
        return GuestPageFault(gva, _access_name(write, fetch), error_code)


def _access_name(write: bool, fetch: bool) -> str:
    return "fetch" if fetch else "write" if write else "read"
