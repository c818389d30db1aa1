"""KVM's doorbells: it signals an eventfd for a store to device space, and the vCPU stays inside the kernel.

Source: kernel ``api.rst``: KVM_IOEVENTFD, KVM_CAP_IOEVENTFD_ANY_LENGTH.
"""

from dataclasses import dataclass

from pageferry.core.errors import KvmError
from pageferry.kvm import uapi
from pageferry.kvm.fds import VmFd


def doorbells_of(vm: VmFd) -> "KvmDoorbells | None":
    """Return the doorbells of a machine; None: this KVM has none for stores of any size."""
    offered = map(vm.check_extension, (uapi.KVM_CAP_IOEVENTFD, uapi.KVM_CAP_IOEVENTFD_ANY_LENGTH))
    return KvmDoorbells(vm) if all(offered) else None


@dataclass(frozen=True, slots=True)
class KvmDoorbells:
    """Implements :class:`pageferry.devices.doorbells.Doorbells`.

    Args:
        vm: the machine.
    """

    vm: VmFd

    def install(self, gpa: int, event: int) -> bool:
        """Have KVM take stores at ``gpa``; False: it has no room for more, or something else is there."""
        try:
            self.vm.ioctl(uapi.KVM_IOEVENTFD, uapi.KvmIoeventfd(addr=gpa, fd=event))
        except KvmError:
            return False
        return True

    def remove(self, gpa: int, event: int) -> None:
        """Let stores at ``gpa`` leave the kernel again.

        Raises:
            KvmError: the kernel refused.
        """
        flags = uapi.KVM_IOEVENTFD_FLAG_DEASSIGN
        self.vm.ioctl(uapi.KVM_IOEVENTFD, uapi.KvmIoeventfd(addr=gpa, fd=event, flags=flags))
