"""Trial guests: a few instructions on a real vCPU, by which :mod:`.probe` finds out what a KVM does.

A trial's memory: page tables at ``_TABLES_GPA``, which map the first 2 MiB to themselves, its program at
``PROGRAM_GPA``, and from ``DATA_GPA`` up what it writes; its stack is below that.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager

from pageferry.core.errors import VmError
from pageferry.core.frames import PAGE_SHIFT
from pageferry.core.ram import MIN_MEMORY_BYTES
from pageferry.core.state import MachineState, VcpuState, ring_3_state
from pageferry.core.vm import VmConfig, VmStatus
from pageferry.devices.platform import EXIT_PORT
from pageferry.kvm.vm import KvmVm

PROGRAM_GPA, DATA_GPA = 0x10_0000, 0x18_0000
_TABLES_GPA = 0x1_0000
_TIMEOUT_S = 10.0
_EXIT_CODE = 0x5A
# mov al, _EXIT_CODE; out EXIT_PORT, al; jmp $
_EXIT = bytes((0xB0, _EXIT_CODE, 0xE6, EXIT_PORT, 0xEB, 0xFE))


def trial_state() -> VcpuState:
    """Return a vCPU in ring 3 at the start of the program."""
    return ring_3_state(rip=PROGRAM_GPA, rsp=DATA_GPA, cr3=_TABLES_GPA)


@contextmanager
def trial_guest(state: VcpuState) -> Iterator[KvmVm]:
    """Make a guest without a program, to begin in ``state``; close it afterwards.

    Raises:
        VmError: this KVM makes no such machine.
    """
    vm = KvmVm(VmConfig(memory_bytes=MIN_MEMORY_BYTES))
    try:
        for level in range(2):  # PML4, PDPT: one entry each, to the next table
            vm.memory.write(_TABLES_GPA + (level << PAGE_SHIFT), struct.pack("<Q", _TABLES_GPA + (level + 1 << 12) | 7))
        vm.memory.write(_TABLES_GPA + (2 << PAGE_SHIFT), struct.pack("<Q", 0x87))  # the first 2 MiB, as one page
        vm.load_state(MachineState(vcpus=(state,), devices=vm.platform.bus.save()))
        yield vm
    finally:
        vm.close()


def run_trial(vm: KvmVm, program: bytes) -> None:
    """Run a trial guest's program and its end.

    Raises:
        VmError: it did not come to its end; says what it did.
    """
    if (crash := crash_of_trial(vm, program)) is not None:
        raise VmError(crash)


def crash_of_trial(vm: KvmVm, program: bytes) -> str | None:
    """Run a trial guest's program and its end; return why it crashed, None if it came to its end.

    Raises:
        VmError: it did nothing, or ended in another way.
    """
    vm.memory.write(PROGRAM_GPA, program + _EXIT)
    vm.resume()
    if vm.wait(_TIMEOUT_S) is VmStatus.RUNNING:
        raise VmError("it did nothing for too long")
    end = vm.end
    if end is None or (end.crash is None and end.exit_code != _EXIT_CODE):
        raise VmError("it ended in an unexpected way")
    return end.crash
