"""KVM's paravirtual clock, of which a machine has one.

Like the TSC it stands still from the moment in which it is saved, and goes on from there where it is loaded: a guest
that reads it, or both, never sees them run backwards or apart. So KVM_CLOCK_REALTIME is not used, which would add the
time of the pause to one of the two. It is loaded after the TSCs: a TSC that is set makes KVM take its reference points
anew, and that may shift the clock by what the host's two clocks have drifted apart.

Source: kernel ``api.rst``: KVM_GET_CLOCK, KVM_SET_CLOCK; ``x86/timekeeping.rst``, ``x86/msr.rst``.
"""

from pageferry.kvm import uapi
from pageferry.kvm.fds import VmFd


def read_clock(vm: VmFd) -> int | None:
    """Return the clock in nanoseconds; None where KVM has no way to tell.

    Raises:
        KvmError: the kernel refused.
    """
    if not vm.check_extension(uapi.KVM_CAP_ADJUST_CLOCK):
        return None
    data = uapi.KvmClockData()
    vm.ioctl(uapi.KVM_GET_CLOCK, data)
    return int(data.clock)


def write_clock(vm: VmFd, clock_ns: int) -> None:
    """Let the clock go on from ``clock_ns``, if KVM has a way to set it.

    Raises:
        KvmError: the kernel refused.
    """
    if vm.check_extension(uapi.KVM_CAP_ADJUST_CLOCK):
        vm.ioctl(uapi.KVM_SET_CLOCK, uapi.KvmClockData(clock=clock_ns))
