"""A KVM vCPU's XCR0 and XSAVE area.

A vCPU holds a component if CPUID shows it to the vCPU, as this KVM has made it, and its place in the area is known: by
the guest's own table, which every machine of the guest provides, or because it is AVX, whose place is the same
everywhere. One that is in use and cannot be held is refused by name, when saving and when loading. A component whose
bytes are all zero is in its initial state, whatever XSTATE_BV says: where the host has protection keys, some KVMs set
the bit of PKRU for guests that have none.

A component that the guest has not enabled in XCR0 may be in use: it was enabled before, or this KVM does not look.

Source: kernel ``api.rst``: KVM_GET_XSAVE2, KVM_SET_XSAVE, KVM_SET_XCRS.
"""

import ctypes
from dataclasses import dataclass
from typing import Self

from pageferry.core.cpuid import Leaves
from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.state import ExtendedState
from pageferry.core.xsave import (
    EXTENDED_OFFSET,
    FP_SSE,
    FXSAVE_BYTES,
    component_names,
    component_places,
    enabled_components,
)
from pageferry.kvm import uapi
from pageferry.kvm.cpuid import shown_cpuid
from pageferry.kvm.fds import VcpuFd, VmFd

_MXCSR_MASK = (0xFFFF).to_bytes(4, "little")
_FXSAVE_USED = 416  # the rest is reserved, and free for software
_U64_BYTES = 8
_XSTATE_BV = FXSAVE_BYTES // _U64_BYTES
_RESET_XCR0 = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Xsave:
    """What one vCPU can hold, and how its kernel hands it over.

    ``places``: component -> its bytes in the area. ``area_bytes``: the kernel's area. ``get``: the ioctl that reads it.
    """

    places: dict[int, range]
    area_bytes: int
    get: int
    has_xcrs: bool

    @property
    def _mask(self) -> int:
        return sum(1 << number for number in self.places)

    @classmethod
    def of(cls, vm: VmFd, vcpu: VcpuFd, table: Leaves) -> Self:
        """Find out; the vCPU has its CPUID.

        Args:
            vm: the machine.
            vcpu: one of its vCPUs.
            table: the guest's CPUID table.

        Raises:
            KvmError: the kernel refused.
        """
        shown = enabled_components(shown_cpuid(vcpu))
        area_bytes = vm.check_extension(uapi.KVM_CAP_XSAVE2)
        return cls(
            places={number: place for number, place in component_places(table).items() if shown >> number & 1},
            area_bytes=max(area_bytes, ctypes.sizeof(uapi.KvmXsave)),
            get=uapi.KVM_GET_XSAVE2 if area_bytes else uapi.KVM_GET_XSAVE,
            has_xcrs=bool(vm.check_extension(uapi.KVM_CAP_XCRS)),
        )

    def save(self, fd: VcpuFd) -> tuple[bytes, ExtendedState | None]:
        """Return the FXSAVE image, and the rest where there is any.

        Raises:
            UnsupportedError: a component is in use that cannot be held.
            KvmError: the kernel refused.
        """
        area = self._area()
        fd.ioctl(self.get, area)
        data = bytes(area)
        in_use = area[_XSTATE_BV] & ~FP_SSE
        unplaced = in_use & ~self._mask
        if unplaced and self._holds_more(data):
            raise UnsupportedError(
                "xsave",
                f"the vCPU uses {component_names(unplaced)}, which its CPUID table does not have",
                hint="a guest that uses it must be started with a table that has it (--cpu host)",
            )
        image = data[:28] + _MXCSR_MASK + data[32:_FXSAVE_USED] + bytes(FXSAVE_BYTES - _FXSAVE_USED)
        used = {n: place for n, place in self.places.items() if in_use >> n & 1 and any(data[place.start : place.stop])}
        xcr0 = self._xcr0(fd)
        if not used and xcr0 == _RESET_XCR0:
            return image, None
        rest = bytearray(max((place.stop for place in used.values()), default=EXTENDED_OFFSET))
        for place in used.values():
            rest[place.start : place.stop] = data[place.start : place.stop]
        return image, ExtendedState(xcr0=xcr0, in_use=sum(1 << n for n in used), area=bytes(rest[EXTENDED_OFFSET:]))

    def _holds_more(self, data: bytes) -> bool:
        """Whether an area has anything but zeros behind its header and outside the known places."""
        rest = bytearray(data)
        for place in (range(EXTENDED_OFFSET), *self.places.values()):
            rest[place.start : place.stop] = bytes(len(place))
        return any(rest)

    def expect_fit(self, image: bytes, extended: ExtendedState | None) -> None:
        """Check that the vCPU can hold a state.

        Raises:
            UnsupportedError: a component is in use or enabled that it has not.
            VmError: the image or the area has another size than it must have.
        """
        if len(image) != FXSAVE_BYTES:
            raise VmError(f"the FPU state has {len(image)} bytes, not {FXSAVE_BYTES}")
        if extended is None:
            return
        lacking = (extended.xcr0 | extended.in_use) & ~(self._mask | FP_SSE)
        if lacking or not (self.has_xcrs or extended.xcr0 == _RESET_XCR0):
            raise UnsupportedError(
                "xsave",
                f"a vCPU here has no {component_names(lacking) or 'XCR0'}, which the guest uses",
                hint="choose a host whose KVM offers it",
            )
        ends = [place.stop for number, place in self.places.items() if extended.in_use >> number & 1]
        expected = max(ends, default=EXTENDED_OFFSET) - EXTENDED_OFFSET
        if len(extended.area) != expected:
            raise VmError(f"the XSAVE components have {len(extended.area)} bytes, not {expected}")

    def load(self, fd: VcpuFd, image: bytes, extended: ExtendedState | None) -> None:
        """Replace XCR0 and then the area, with what fits; what is not in use becomes initial.

        Raises:
            KvmError: the kernel refused.
        """
        extended = extended or ExtendedState(xcr0=_RESET_XCR0)
        if self.has_xcrs:
            xcrs = uapi.KvmXcrs(nr_xcrs=1)
            xcrs.xcrs[0].value = extended.xcr0
            fd.ioctl(uapi.KVM_SET_XCRS, xcrs)
        data = image[:_FXSAVE_USED] + bytes(FXSAVE_BYTES - _FXSAVE_USED)
        data += (FP_SSE | extended.in_use).to_bytes(_U64_BYTES, "little")
        data += bytes(EXTENDED_OFFSET - len(data)) + extended.area
        fd.ioctl(uapi.KVM_SET_XSAVE, self._area(data))

    def _area(self, data: bytes = b"") -> "ctypes.Array[ctypes.c_uint64]":
        # SAFETY: the caller holds the array until its ioctl returns; it is as large as the kernel says.
        return (ctypes.c_uint64 * (self.area_bytes // _U64_BYTES)).from_buffer_copy(data.ljust(self.area_bytes, b"\0"))

    def _xcr0(self, fd: VcpuFd) -> int:
        if not self.has_xcrs:
            return _RESET_XCR0
        xcrs = uapi.KvmXcrs()
        fd.ioctl(uapi.KVM_GET_XCRS, xcrs)
        found: list[int] = [xcr.value for xcr in xcrs.xcrs[: xcrs.nr_xcrs] if xcr.xcr == 0]
        return found[0] if found else _RESET_XCR0  # a CPU without XSAVE has none
