"""The guest's own page tables: gva -> gfn, with the rights that the guest grants.

Long mode, four levels, pages of 4 KiB, 2 MiB and 1 GiB::

    gva 63..48 sign | 47..39 PML4 | 38..30 PDPT | 29..21 PD | 20..12 PT | 11..0 offset
                                     PS: 1 GiB    PS: 2 MiB    4 KiB

    entry 63 NX | 51..12 frame | 7 PS | 6 D | 5 A | 2 U | 1 W | 0 P

A right must be given at every level: W, U, and the absence of NX. What they mean depends on who asks (user or
supervisor) and on CR0.WP, CR4.SMEP, CR4.SMAP, RFLAGS.AC and EFER.NXE. Reserved bits that are set in a present entry
are a page fault of their own. Accessed bits are set on the way down, the dirty bit at the first write.

Under nested paging every access of the walker to a guest table counts as a *write* at the nested level: a guest whose
tables are log-dirty takes a nested fault for each table it uses, and those pages are dirty again in every cycle.
Measured on AMD: the same guest reports its PML4, PDPT and PD each round. Under shadow paging it is the hypervisor that
walks, and only an entry that really changes is a write: the two modes differ in what the walker is given, not in how.

A page-walk cache keeps what a walk found for each 2 MiB of virtual address space, as hardware does. The guest's own
flushes (MOV to CR3, INVLPG) are the emulator's, and are not seen here: so a cached walk is used only if every entry
that it went through still reads the same. What it spares is to look the tables up in the P2M. It is flushed with the
TLB whenever the P2M took rights away, so the first walk after CLEAN touches, and so dirties, the tables anew. Shadow
paging does without (its shadow tables are that cache) and asks for the path instead.

Without paging (a vCPU that is not in long mode yet) a gva is a gpa of 32 bits.

Simplified against hardware: bit 8 of a table's entry is ignored, as Intel does (AMD reserves it in the PML4).

Source: AMD APM volume 2, "Long-Mode Page Translation", "Page-Translation-Table Entry Fields", "Page-Protection
Checks", "Page-Fault Exception" and "Nested Paging".
"""

from collections.abc import Callable

import numpy as np

from pageferry.core.frames import PAGE_SHIFT
from pageferry.core.hostmem import atomic_or_u32

_PRESENT, _WRITE, _USER = 1 << 0, 1 << 1, 1 << 2
_ACCESSED, _DIRTY, _PSE, _NX = 1 << 5, 1 << 6, 1 << 7, 1 << 63
_ADDRESS = 0x000F_FFFF_FFFF_F000

#: Physical addresses have 48 bits: as many as the P2M's four levels cover.
_BEYOND_PHYSICAL = 0x000F_0000_0000_0000
# What must be zero in an entry with PS, by the shift of its level. Bit 12 of a large page is PAT.
_RESERVED_IN_LARGE = {39: _PSE, 30: 0x3FFF_E000, 21: 0x001F_E000}

#: Error code bits of #PF.
PF_PRESENT, PF_WRITE, PF_USER, PF_RESERVED, PF_FETCH = 1, 2, 4, 8, 16

#: What a walk found: for three levels where the entry is and what it was (a level that a large page lacks repeats the
#: one above); the word index of the leaf's level, base gfn or -1, writable, user, nx, gfn of the leaf's table.
_Walk = tuple[int, int, int, int, int, int, int, int, bool, bool, bool, int]
_Cache = dict[int, _Walk]  # by gva >> 21
#: Address spaces whose walks are kept.
_MAX_CACHES = 64

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
        """Return what the guest did, where, and why it may not, for the crash message."""
        writes = self.error_code is not None and self.error_code & PF_WRITE  # a read of an instruction that also writes
        did = _DONE["write" if writes else self.access]
        if self.error_code is None:
            return f"it {did} {self.gva:#x}, which is not a canonical address (general protection fault)"
        why = "forbid" if self.error_code & PF_PRESENT else "do not map"
        if self.error_code & PF_RESERVED:
            why = "map by an entry with a reserved bit set"
        return f"it {did} {self.gva:#x}, which its page tables {why} (page fault, error code {self.error_code:#x})"


class GuestWalker:
    """Walks one vCPU's page tables.

    ``path`` is what the last whole walk went through: for each level from the PML4 on, the gfn of the table and the
    word index of the entry used; two of them for a 1 GiB page, three for 2 MiB, four for 4 KiB. ``nested_update`` is
    told the gfn of a table before the walker changes an entry; None where ``nested_access`` has made it writable.

    Args:
        words: machine memory as u64s.
        nested_access: gfn -> mfn for the walker's own accesses; resolves nested faults (raises when it cannot).
            Under nested paging it makes the page writable: the walker writes.
    """

    def __init__(self, words: memoryview, nested_access: Callable[[int], int]) -> None:
        self._words = words
        self._hva = np.frombuffer(words, np.uint64).ctypes.data  # of word 0; words keeps it mapped
        self.nested_access = nested_access
        self.nested_update: Callable[[int], None] | None = None
        self.paging = True
        self.user = True
        self.write_protect = True
        self.no_execute = False
        self.smep = False
        self.smap = False
        self.alignment_check = False
        """RFLAGS.AC, which lifts SMAP."""
        self.path: list[tuple[int, int]] = []
        self.passed: tuple[int, ...] | None = None
        """What the last translation rests on: where each of four entries is, and what it was; None: it changed one."""
        self._caches: dict[int, _Cache] = {}  # one for each CR3
        self.cr3 = 0

    @property
    def cr3(self) -> int:
        """The guest's CR3."""
        return self._cr3

    @cr3.setter
    def cr3(self, value: int) -> None:
        self._cr3 = value
        if len(self._caches) > _MAX_CACHES:
            self._caches.clear()
        self._cache = self._caches.setdefault(value, {})

    def flush(self) -> None:
        """Forget the page-walk cache; with every TLB flush of the P2M's, or before a walk whose path matters."""
        self._caches.clear()
        self._cache = self._caches.setdefault(self._cr3, {})

    def translate(self, gva: int, *, write: bool, fetch: bool) -> tuple[int, bool, bool]:
        """Return ``(gfn, writable, executable)`` for one access.

        ``writable`` is False while the page's dirty bit is clear, so that the first write comes here again.

        Raises:
            GuestPageFault: the guest's tables refuse.
        """
        if not self.paging:
            self.passed = None
            return (gva & 0xFFFF_FFFF) >> PAGE_SHIFT, True, True
        words = self._words
        cached = self._cache.get(gva >> 21)
        if (
            cached is None
            or words[cached[0]] != cached[1]
            or words[cached[2]] != cached[3]
            or words[cached[4]] != cached[5]
        ):
            cached = self._walk(gva, write, fetch)
        _, _, _, _, _, entry, at, base, writable, user, nx, table_gfn = cached
        if base < 0:  # the walk ends in a table of 4 KiB pages
            at += gva >> PAGE_SHIFT & 511
            entry = words[at]
            if not entry & _PRESENT:
                raise self._fault(gva, write, fetch, 0)
            if entry & _BEYOND_PHYSICAL or (entry >= _NX and not self.no_execute):
                raise self._fault(gva, write, fetch, PF_PRESENT | PF_RESERVED)
            writable, user, nx = writable and bool(entry & _WRITE), user and bool(entry & _USER), nx or entry >= _NX
            gfn = (entry & _ADDRESS) >> PAGE_SHIFT
        else:
            gfn = base + (gva >> PAGE_SHIFT & 511)
        may_write = writable or not (self.user or self.write_protect)
        if not self.user and user and self.smep:
            nx = True
        if self._refuses(user, write and not may_write, fetch, nx):
            raise self._fault(gva, write, fetch, PF_PRESENT)
        wanted = _ACCESSED | _DIRTY if write else _ACCESSED
        if entry & wanted != wanted:
            self._set(table_gfn, at, wanted)
            entry |= wanted
            self.passed = None
        else:
            self.passed = (*cached[:6], at, entry)
        return gfn, may_write and bool(entry & _DIRTY), not nx

    def _refuses(self, user: bool, unwritable: bool, fetch: bool, nx: bool) -> bool:
        """Apply the page-protection checks to the combined rights of all levels."""
        if unwritable or (fetch and nx):
            return True
        if self.user:
            return not user
        return user and self.smap and not fetch and not self.alignment_check

    def _walk(self, gva: int, write: bool, fetch: bool) -> _Walk:
        if _CANONICAL_LOW <= gva < _CANONICAL_HIGH:
            raise GuestPageFault(gva, _access_name(write, fetch), None)
        table_gfn = (self._cr3 & _ADDRESS) >> PAGE_SHIFT
        writable, user, nx = True, True, False
        path: list[tuple[int, int]] = []
        seen: tuple[int, ...] = ()  # where each entry is, and what it was
        for shift in (39, 30, 21):
            at = (self.nested_access(table_gfn) << 9) + (gva >> shift & 511)
            path.append((table_gfn, at))
            entry = self._words[at]
            if not entry & _PRESENT:
                raise self._fault(gva, write, fetch, 0)
            if self._has_reserved_bits(entry, shift):
                raise self._fault(gva, write, fetch, PF_PRESENT | PF_RESERVED)
            writable, user, nx = writable and bool(entry & _WRITE), user and bool(entry & _USER), nx or entry >= _NX
            gfn = (entry & _ADDRESS) >> PAGE_SHIFT
            if entry & _PSE:
                in_page = gva >> PAGE_SHIFT & ((1 << (shift - PAGE_SHIFT)) - 512)  # which 2 MiB of a 1 GiB page
                base = (gfn & -(1 << (shift - PAGE_SHIFT))) + in_page
                seen += (at, entry) * (1 if shift == 21 else 2)
                break
            if not entry & _ACCESSED:
                self._set(table_gfn, at, _ACCESSED)
                entry |= _ACCESSED
            seen += at, entry
            table_gfn = gfn
        else:
            at = self.nested_access(table_gfn) << 9
            path.append((table_gfn, at + (gva >> PAGE_SHIFT & 511)))
            base = -1
        self.path = path
        found: _Walk = (*seen, at, base, writable, user, nx, table_gfn)  # type: ignore[assignment]  # seen has six
        self._cache[gva >> 21] = found
        return found

    def _has_reserved_bits(self, entry: int, shift: int) -> bool:
        if entry & _BEYOND_PHYSICAL or (entry >= _NX and not self.no_execute):
            return True
        return bool(entry & _PSE and entry & _RESERVED_IN_LARGE[shift])

    def _set(self, table_gfn: int, at: int, bits: int) -> None:
        if self.nested_update is not None:
            self.nested_update(table_gfn)
        # As one step: another vCPU's walker may be setting the other bit, and the guest changing the entry, right now.
        atomic_or_u32(self._hva + (at << 3), bits)

    def _fault(self, gva: int, write: bool, fetch: bool, error_code: int) -> GuestPageFault:
        error_code |= PF_WRITE if write else 0
        error_code |= PF_USER if self.user else 0
        error_code |= PF_FETCH if fetch and (self.no_execute or self.smep) else 0
        return GuestPageFault(gva, _access_name(write, fetch), error_code)


#: What a guest did, by the name of the access.
_DONE = {"read": "read from", "write": "wrote to", "fetch": "jumped to"}


def _access_name(write: bool, fetch: bool) -> str:
    return "fetch" if fetch else "write" if write else "read"
