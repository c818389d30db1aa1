"""The task state segment by which a guest in ring 3 does port I/O: which kind this KVM takes, found out by doing.

The processor wants a busy one, and VMX enters no guest with another. QEMU's emulation of SVM takes only an available
one for a TSS, and refuses every port to a guest that has a busy one.

Source: AMD APM volume 2, 12.2.4 (I/O-Permission Bitmap), 4.8.3 (types of system segments).
"""

import errno
from contextlib import ExitStack
from functools import cache

from pageferry.core.frames import PAGE_SHIFT
from pageferry.core.memory import GuestMemory
from pageferry.core.ram import MIN_MEMORY_BYTES
from pageferry.core.state import ring_3_state
from pageferry.devices.platform import EXIT_PORT
from pageferry.kvm import uapi, vcpu_state
from pageferry.kvm.cpuid import set_cpuid, supported_cpuid
from pageferry.kvm.fds import SystemFd
from pageferry.kvm.slots import slots_of

_BUSY, _AVAILABLE = 0x8B, 0x89  # present, system, type 11 or 9
_TABLES_GPA, _PROGRAM_GPA, _STACK_GPA = 0x1_0000, 0x10_0000, 0x18_0000


@cache
def tss_attributes() -> int:
    """Return the attributes of a TSS with which a guest in ring 3 without I/O privilege may use a port here."""
    return _AVAILABLE if not does_port_io(_BUSY) and does_port_io(_AVAILABLE) else _BUSY


def does_port_io(attributes: int) -> bool:
    """Run a guest in ring 3 whose TSS has these attributes; tell whether its access to a port comes out."""
    with ExitStack() as stack:
        system = stack.enter_context(SystemFd())
        memory = GuestMemory.linear(MIN_MEMORY_BYTES)
        stack.callback(memory.close)
        vm = stack.enter_context(system.create_vm())
        fd = stack.enter_context(vm.create_vcpu(0))
        for slot in slots_of(memory.regions, memory.mapping):
            slot.set(vm)
        for level, entry in enumerate((_TABLES_GPA + 0x1007, _TABLES_GPA + 0x2007, 0x87)):
            memory.write(_TABLES_GPA + (level << PAGE_SHIFT), entry.to_bytes(8, "little"))
        memory.write(_PROGRAM_GPA, bytes((0xE6, EXIT_PORT)))  # out EXIT_PORT, al
        set_cpuid(fd, supported_cpuid(system, lapic=False))  # newer kernels put no vCPU without one into long mode
        vcpu_state.begin(fd, ring_3_state(rip=_PROGRAM_GPA, rsp=_STACK_GPA, cr3=_TABLES_GPA), tss=attributes)
        while (code := fd.try_run()) in (errno.EINTR, errno.EAGAIN):
            pass
        return code == 0 and fd.run.exit_reason == uapi.KVM_EXIT_IO
