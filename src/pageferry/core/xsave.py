"""XSAVE's components: their names, and where a guest's CPUID table puts them.

In the standard form the area is 512 bytes of FXSAVE, a header of 64 (XSTATE_BV, XCOMP_BV, reserved), and then the
components at the offsets that CPUID leaf 0xD gives, which are not the same on all CPUs. Only AVX, the first, has one
place everywhere.

Source: Intel SDM volume 1, 13.1 to 13.5 (Managing State Using the XSAVE Feature Set); AMD APM volume 2, 11.5.
"""

from pageferry.core.cpuid import XSAVE, Leaves, find

FXSAVE_BYTES, HEADER_BYTES = 512, 64
EXTENDED_OFFSET = FXSAVE_BYTES + HEADER_BYTES
#: x87 and SSE: what FXSAVE holds.
FP_SSE = 3

XSAVE_LEAF = 0xD
_AVX = 2
_AVX_PLACE = range(576, 832)
_MAX_COMPONENT = 62
_SUPERVISOR = 1 << 0
#: Components by number.
COMPONENTS = {0: "x87", 1: "SSE", _AVX: "AVX", 3: "MPX bounds", 4: "MPX configuration"} | {
    5: "AVX-512 masks",
    6: "AVX-512 (ZMM0-15)",
    7: "AVX-512 (ZMM16-31)",
    9: "PKRU",
    17: "AMX configuration",
    18: "AMX tiles",
    19: "APX",
}


def component_names(mask: int) -> str:
    """Return the names of the components whose bits are set, in one line."""
    numbers = (number for number in range(64) if mask >> number & 1)
    return ", ".join(COMPONENTS.get(number, f"XSAVE component {number}") for number in numbers)


def component_places(leaves: Leaves) -> dict[int, range]:
    """Return component -> its bytes in the area's standard form, for each one that a table tells the place of.

    AVX is always among them. Only components of user mode count: those of the supervisor are in no such area.
    """
    places = {_AVX: _AVX_PLACE}
    mask = enabled_components(leaves)
    for number in range(_AVX, _MAX_COMPONENT + 1):
        size, offset, flags, _ = find(leaves, XSAVE_LEAF, number)
        if mask >> number & 1 and size and not flags & _SUPERVISOR:
            places[number] = range(offset, offset + size)
    return places


def enabled_components(leaves: Leaves) -> int:
    """Return the bits that a guest with this table may set in XCR0; 0: it has no XSAVE."""
    if not find(leaves, 1)[2] & XSAVE:
        return 0
    low, _, _, high = find(leaves, XSAVE_LEAF)
    return high << 32 | low
