"""What a P2M entry is made of: the hardware's bits, and the types that software keeps beside them.

An entry is a nested-page-table entry of the AMD manual; the type is in bits the hardware leaves to software::

    63..58 0 | 57..52 type | 51..12 mfn | 7 PSE | 2 USER | 1 WRITE | 0 PRESENT

=============  =======  =======  ==========================================================================
type           read     write    a write that the table refuses
=============  =======  =======  ==========================================================================
ram_rw         yes      yes
ram_logdirty   yes      no       is logged; the page becomes ram_rw (see :mod:`.npf`)
ram_ro         yes      no       is discarded: the guest goes on, as with a ROM
grant_map_rw   yes      yes
grant_map_ro   yes      no       is refused: the guest's end
mmio_dm        no       no       goes to the device model, as reads do
mmio_direct    no       no       is the guest's end, as reads are: reserved, there is no pass-through here
invalid        no       no       is the guest's end, as reads are
=============  =======  =======  ==========================================================================

Source: AMD APM volume 2, nested paging; Xen's ``p2m_type_t``.
"""

from enum import IntEnum

PRESENT = 1 << 0
WRITE = 1 << 1
USER = 1 << 2  # clear in a present entry: recalculate what is below
PSE = 1 << 7
ADDRESS = 0x000F_FFFF_FFFF_F000
TYPE_SHIFT = 52
TYPE_MASK = 0x3F

#: An entry that points to a table.
TABLE = PRESENT | WRITE | USER

#: gfns are 36 bits: four levels of nine.
MAX_GFN = 1 << 36


class P2MType(IntEnum):
    """What a guest frame is (Xen's ``p2m_type_t``); the values are ours."""

    MMIO_DM = 0
    """Not RAM: the device model (ours: the bus) emulates accesses."""
    RAM_RW = 1
    RAM_LOGDIRTY = 2
    """RAM under log-dirty that was not written in this cycle: NOT WRITABLE."""
    RAM_RO = 3
    """RAM that the guest may only read; its writes are discarded."""
    MMIO_DIRECT = 4
    """A real device's space; reserved."""
    GRANT_MAP_RW = 5
    """A page of another owner, who granted it."""
    GRANT_MAP_RO = 6
    INVALID = 7
    """Nothing at all (a page that was ballooned out): an access is the guest's end."""


_FLAGS_OF = {
    P2MType.MMIO_DM: 0,
    P2MType.RAM_RW: PRESENT | WRITE | USER,
    P2MType.RAM_LOGDIRTY: PRESENT | USER,
    P2MType.RAM_RO: PRESENT | USER,
    P2MType.MMIO_DIRECT: 0,
    P2MType.GRANT_MAP_RW: PRESENT | WRITE | USER,
    P2MType.GRANT_MAP_RO: PRESENT | USER,
    P2MType.INVALID: 0,
}

#: Types whose frames may be read.
READABLE = frozenset(t.value for t, flags in _FLAGS_OF.items() if flags & PRESENT)
#: Types whose frames may be written without a fault.
WRITABLE = frozenset(t.value for t, flags in _FLAGS_OF.items() if flags & WRITE)
#: Types of the domain's own RAM.
RAM_TYPES = frozenset({P2MType.RAM_RW.value, P2MType.RAM_LOGDIRTY.value, P2MType.RAM_RO.value})
#: Types of other owners' pages.
GRANT_TYPES = frozenset({P2MType.GRANT_MAP_RW.value, P2MType.GRANT_MAP_RO.value})


def leaf_bits(p2m_type: P2MType) -> int:
    """Return an entry's bits for a type: everything but the mfn and PSE."""
    return p2m_type << TYPE_SHIFT | _FLAGS_OF[p2m_type]


#: ``leaf_bits`` of every type, by value.
BITS = tuple(leaf_bits(t) for t in P2MType)
