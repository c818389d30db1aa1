"""Hypercalls of dom0 through the kernel's privcmd device, and memory that Xen can read and write meanwhile.

A hypercall's structures must be in memory that the kernel does not move or write-protect during the call: pages of
``/dev/xen/hypercall`` are so. Where a kernel has no such device the memory is anonymous and locked.

Source: Linux ``drivers/xen/privcmd.c``, ``drivers/xen/privcmd-buf.c``.
"""

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pageferry.core.errors import UnsupportedError, XenError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.libc import Fd, libc
from pageferry.xen import uapi

DEV_XEN = Path("/dev/xen")
CAPABILITIES = Path("/proc/xen/capabilities")
_MAP_LOCKED = 0x2000
HYPERVISOR_TYPE = Path("/sys/hypervisor/type")


class Buffer:
    """Memory that a hypercall may be given; it lives as long as this object or a view of it.

    Args:
        device: ``/dev/xen/hypercall``, or -1: anonymous and locked memory.
        size_bytes: at least 1; zeros at first.
    """

    def __init__(self, device: int, size_bytes: int) -> None:
        whole = -(-size_bytes // PAGE_SIZE) * PAGE_SIZE
        if device < 0:
            self._map = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_LOCKED)
        else:
            self._map = mmap.mmap(device, whole, flags=mmap.MAP_SHARED)
        #: uint8[size_bytes]
        self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8, size_bytes)

    @property
    def hva(self) -> int:
        """Where it lies."""
        return int(self.bytes.__array_interface__["data"][0])

    def holding(self, structure: "type[Any]") -> Any:  # noqa: ANN401  # an instance of whatever type is given
        """Return a structure that lies at its beginning."""
        return structure.from_buffer(self._map)


class Privcmd(Fd):
    """``/dev/xen/privcmd``: hypercalls, foreign mappings.

    Args:
        directory: where the devices are.

    Raises:
        UnsupportedError: this is no dom0 of Xen, or its devices may not be opened; ``capability`` says which.
    """

    def __init__(self, directory: Path = DEV_XEN) -> None:
        path = directory / "privcmd"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except PermissionError as error:
            raise UnsupportedError(
                "xen-permission", f"{path} may not be opened by this user", hint="only root of dom0 may; use sudo"
            ) from error
        except OSError as error:
            raise _no_xen(error.errno) from error
        super().__init__(fd, XenError, uapi.IOCTL_NAMES)
        try:
            self._memory = os.open(directory / "hypercall", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            self._memory = -1

    def buffer(self, size_bytes: int) -> Buffer:
        """Return new memory for a hypercall."""
        try:
            return Buffer(self._memory, size_bytes)
        except OSError as error:
            raise XenError("memory for a hypercall", error.errno or errno.ENOMEM) from error

    def hypercall(self, what: str, op: int, *arguments: int) -> int:
        """Make one hypercall; return its value (not negative).

        Args:
            what: its name, for an error.
            op: its number.
            arguments: at most five.

        Raises:
            XenError: it failed.
        """
        request = uapi.PrivcmdHypercall(op=op)
        for at, argument in enumerate(arguments):
            request.arg[at] = argument
        # SAFETY: the kernel reads the structure during the call; this frame holds it. What the arguments point to is
        # a Buffer that the caller holds.
        result: int = libc.ioctl(self.fileno(), uapi.IOCTL_PRIVCMD_HYPERCALL, ctypes.addressof(request))
        if result < 0:
            raise XenError(what, ctypes.get_errno())
        return result

    def close(self) -> None:
        """Close the devices. May be called twice."""
        super().close()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1


def expect_dom0(capabilities: Path = CAPABILITIES) -> None:
    """Check that this is a domain that may control others.

    Raises:
        UnsupportedError: it is not.
    """
    try:
        found = capabilities.read_text()
    except OSError:
        return  # xenfs is not mounted: the first hypercall tells
    if "control_d" not in found:
        raise UnsupportedError(
            "xen-dom0", "this is a guest of Xen, and no dom0", hint="domains are controlled from dom0: run it there"
        )


def _no_xen(code: int | None) -> UnsupportedError:
    try:
        on_xen = HYPERVISOR_TYPE.read_text().strip() == "xen"
    except OSError:
        on_xen = False
    if on_xen:
        return UnsupportedError(
            "xen-dom0",
            f"{DEV_XEN / 'privcmd'} cannot be opened: {os.strerror(code or errno.ENOENT)}",
            hint="this must be dom0, with the kernel's module loaded: modprobe xen-privcmd",
        )
    return UnsupportedError(
        "xen", "this host does not run on Xen", hint="boot it as dom0 of Xen (Debian: xen-system-amd64)"
    )
