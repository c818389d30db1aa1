"""Owners of KVM's descriptors.

A vCPU's descriptor and its mapped ``kvm_run`` keep the machine alive inside the kernel, so the owners are closed from
the vCPUs up.

Source: kernel ``api.rst``, section 1 (General description).
"""

import ctypes
import errno
import mmap
import os
from pathlib import Path

from pageferry.core.errors import KvmError, UnsupportedError
from pageferry.core.libc import Fd, libc
from pageferry.core.os_hints import device_hint
from pageferry.kvm import uapi

DEV_KVM = Path("/dev/kvm")


class KvmFd(Fd):
    """One of KVM's descriptors; its ioctls raise KvmError. ``enabled``: the capabilities that were enabled by it.

    Args:
        fd: taken over.
    """

    def __init__(self, fd: int) -> None:
        super().__init__(fd, KvmError, uapi.IOCTL_NAMES)
        self.enabled: dict[int, int] = {}

    def check_extension(self, capability: int) -> int:
        """Return what ``KVM_CHECK_EXTENSION`` says: 0 is no, anything else yes or a number of something."""
        return self.ioctl(uapi.KVM_CHECK_EXTENSION, capability)

    def enable_cap(self, capability: int, argument: int) -> None:
        """Perform ``KVM_ENABLE_CAP`` with one argument; ``enabled`` has it then."""
        self.ioctl(uapi.KVM_ENABLE_CAP, uapi.KvmEnableCap(cap=capability, args=(argument, 0, 0, 0)))
        self.enabled[capability] = argument


class SystemFd(KvmFd):
    """``/dev/kvm`` itself.

    Args:
        path: the device.

    Raises:
        UnsupportedError: it is missing, forbidden, or speaks another API; ``capability`` says which.
    """

    def __init__(self, path: Path = DEV_KVM) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except PermissionError as error:
            raise UnsupportedError(
                "kvm-permission",
                f"{path} may not be opened by this user",
                hint=f"{device_hint(path, 'kvm')}, or use --accel soft",
            ) from error
        except OSError as error:
            raise UnsupportedError(
                "kvm",
                f"{path} cannot be opened: {os.strerror(error.errno or errno.EIO)}",
                hint="enable virtualisation in the firmware and load kvm_intel or kvm_amd, or use --accel soft",
            ) from error
        super().__init__(fd)
        try:
            version = self.ioctl(uapi.KVM_GET_API_VERSION)
        except KvmError as error:
            self.close()
            raise UnsupportedError(
                "kvm-api", f"{path} is not a KVM device", hint="look at what that file is, or use --accel soft"
            ) from error
        if version != uapi.KVM_API_VERSION:
            self.close()
            raise UnsupportedError(
                "kvm-api",
                f"{path} speaks KVM API {version}, not {uapi.KVM_API_VERSION}",
                hint="use a newer kernel, or --accel soft",
            )

    def create_vm(self) -> "VmFd":
        """Return a new, empty virtual machine."""
        run_bytes = self.ioctl(uapi.KVM_GET_VCPU_MMAP_SIZE)
        return VmFd(self.ioctl(uapi.KVM_CREATE_VM), run_bytes)


class VmFd(KvmFd):
    """One virtual machine inside the kernel.

    Args:
        fd: taken over.
        run_bytes: the size of each vCPU's shared ``kvm_run``.
    """

    def __init__(self, fd: int, run_bytes: int) -> None:
        super().__init__(fd)
        self._run_bytes = run_bytes

    def create_vcpu(self, index: int) -> "VcpuFd":
        """Return a new vCPU in its reset state."""
        return VcpuFd(self.ioctl(uapi.KVM_CREATE_VCPU, index), self._run_bytes)


class VcpuFd(KvmFd):
    """One vCPU inside the kernel and its shared ``kvm_run``.

    ``run`` is the structure; ``area`` the bytes of the whole mapping, where port data lies.

    Args:
        fd: taken over.
        run_bytes: the size of ``kvm_run`` as this kernel maps it.
    """

    def __init__(self, fd: int, run_bytes: int) -> None:
        super().__init__(fd)
        mapping = mmap.mmap(fd, run_bytes)
        # SAFETY: both borrow the mapping through the buffer protocol and so keep it mapped; the kernel writes to it
        # only inside KVM_RUN on this descriptor.
        self.run = uapi.KvmRun.from_buffer(mapping)
        self.area = memoryview(mapping)

    def try_run(self) -> int:
        """Perform ``KVM_RUN``; return 0 or its errno (the one ioctl whose failing is everyday life)."""
        return 0 if libc.ioctl(self._fd, uapi.KVM_RUN, None) == 0 else ctypes.get_errno()

    def map_dirty_ring(self, size_bytes: int) -> mmap.mmap:
        """Return the vCPU's dirty ring, mapped; the machine was made to have rings of that size.

        The mapping keeps the machine alive inside the kernel, as ``kvm_run`` does, until it is closed.

        Raises:
            KvmError: the kernel refused.
        """
        try:
            # SAFETY: owned by the caller; the kernel writes to it whenever this vCPU writes a page that is logged.
            return mmap.mmap(self._fd, size_bytes, offset=uapi.KVM_DIRTY_LOG_PAGE_OFFSET * mmap.PAGESIZE)
        except OSError as error:
            raise KvmError("mmap of a dirty ring", error.errno or errno.EIO) from error

    def close(self) -> None:
        """Close the descriptor and drop the mapping (which would keep the machine alive in the kernel)."""
        super().close()
        self.area.release()
        self.run = uapi.KvmRun()  # ours alone: a late kick writes harmlessly
