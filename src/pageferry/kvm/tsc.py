"""A KVM vCPU's time stamp counter: its value, and how fast it counts.

**The value** goes on from the saved one. Some KVMs (seen: ``kvm_pvm``) accept that and go on showing the host's;
``KvmSupport.tsc_offset`` tells, and loading does not fail for it: a guest that needs monotonic time has the clock port.

**The rate** is the host's when a guest is started, and stays (:mod:`pageferry.core.host_tsc` says why): KVM scales the
TSC where the processor can. Where it cannot, the host's rate has to be about the guest's.

Source: kernel ``api.rst``: KVM_GET_TSC_KHZ, KVM_SET_TSC_KHZ; ``devices/vcpu.rst``, KVM_VCPU_TSC_CTRL.
"""

import ctypes

from pageferry.core.errors import KvmError
from pageferry.core.host_tsc import expect_rate
from pageferry.kvm import uapi
from pageferry.kvm.fds import VcpuFd, VmFd
from pageferry.kvm.msrs import MSR_IA32_TSC, read_msrs, write_msrs

_U64 = (1 << 64) - 1


def read(fd: VcpuFd, host_tsc_now: int | None) -> int:
    """Return a vCPU's TSC.

    Args:
        fd: the vCPU.
        host_tsc_now: from :func:`host_tsc`, the instant that counts; None: now.

    Raises:
        KvmError: the kernel refused.
    """
    if host_tsc_now is None:
        return _shown(fd)
    return (host_tsc_now + _offset(fd, uapi.KVM_GET_DEVICE_ATTR)) & _U64


def write(fd: VcpuFd, value: int, host_tsc_now: int | None) -> None:
    """Let a vCPU's TSC go on from ``value``, which it has at the instant ``host_tsc_now``; None: now.

    Raises:
        KvmError: the kernel refused.
    """
    if host_tsc_now is None:
        write_msrs(fd, {MSR_IA32_TSC: value & _U64})
    else:
        _offset(fd, uapi.KVM_SET_DEVICE_ATTR, (value - host_tsc_now) & _U64)


def host_tsc(fd: VcpuFd) -> int | None:
    """Return the host's TSC now (scaled as the guest's), or None when KVM does not tell the vCPU's offset.

    One reading serves all vCPUs of a guest, so that their counters keep their distances.
    """
    try:
        offset = _offset(fd, uapi.KVM_GET_DEVICE_ATTR)
    except KvmError:
        return None
    return (_shown(fd) - offset) & _U64


def can_offset_tsc(fd: VcpuFd) -> bool:
    """Tell, by setting it to something else, whether a vCPU's TSC can be set at all."""
    before, wanted = _shown(fd), 1 << 60
    write_msrs(fd, {MSR_IA32_TSC: wanted})
    after = _shown(fd)
    write_msrs(fd, {MSR_IA32_TSC: before})
    return after >= wanted > before


def rate_khz(fd: VcpuFd) -> int | None:
    """Return how fast a vCPU's TSC counts; None: this KVM does not know, as where the host's own is not steady."""
    try:
        return fd.ioctl(uapi.KVM_GET_TSC_KHZ) or None
    except KvmError:
        return None


def set_rate(vm: VmFd, fd: VcpuFd, khz: int) -> None:
    """Let a vCPU of ``vm`` have its TSC count at the rate of a saved one; before the value is written.

    Raises:
        UnsupportedError: the host's TSC counts at too different a rate, and this KVM cannot scale it.
        KvmError: the kernel refused.
    """
    own_khz = rate_khz(fd)
    if own_khz == khz:
        return
    if not vm.check_extension(uapi.KVM_CAP_TSC_CONTROL):
        expect_rate(khz, own_khz)
    fd.ioctl(uapi.KVM_SET_TSC_KHZ, khz)


def _shown(fd: VcpuFd) -> int:
    return read_msrs(fd, (MSR_IA32_TSC,)).get(MSR_IA32_TSC, 0)


def _offset(fd: VcpuFd, request: int, value: int = 0) -> int:
    # SAFETY: the kernel reads or writes `cell` during the call only; this frame holds it.
    cell = ctypes.c_uint64(value)
    attribute = uapi.KvmDeviceAttr(
        group=uapi.KVM_VCPU_TSC_CTRL, attr=uapi.KVM_VCPU_TSC_OFFSET, addr=ctypes.addressof(cell)
    )
    fd.ioctl(request, attribute)
    return cell.value
