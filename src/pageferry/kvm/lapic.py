"""A KVM vCPU's local APIC and multiprocessing state, in a machine with interrupt controllers inside the kernel.

The APIC's base is among KVM's special registers, and its task priority among its own registers (CR8 mirrors it).

A guest whose CPUID table has no local APIC gets one that is switched off: KVM shows in CPUID whether it is on, whatever
the table says, and one that is off lets the PIC's interrupts through. While the guest leaves it alone it is not part of
the state, so that such a guest can live on a machine that has none.

Source: kernel ``api.rst``: KVM_GET_LAPIC, KVM_SET_LAPIC, KVM_GET_MP_STATE, KVM_SET_MP_STATE; Intel SDM volume 3, 11.5.4
(APIC Timer).
"""

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.state import LapicState, MpState, VcpuState
from pageferry.kvm import uapi
from pageferry.kvm.fds import VcpuFd
from pageferry.kvm.msrs import MSR_IA32_TSC_DEADLINE, read_msrs, write_msrs

_ENABLED = 1 << 11  # of the base
_NO_IRQCHIP = "this machine has no interrupt controllers"


def switch_off(fd: VcpuFd) -> None:
    """Switch a new vCPU's local APIC off, as if the vCPU had none.

    Raises:
        KvmError: the kernel refused.
    """
    sregs = uapi.KvmSregs()
    fd.ioctl(uapi.KVM_GET_SREGS, sregs)
    sregs.apic_base &= ~_ENABLED
    fd.ioctl(uapi.KVM_SET_SREGS, sregs)


def read_mp_state(fd: VcpuFd) -> MpState:
    """Return what the vCPU is doing. KVM settles a pending INIT or SIPI first, so this is read before anything else.

    Raises:
        VmError: it is a state that x86 has not.
        KvmError: the kernel refused.
    """
    cell = uapi.KvmMpState()
    fd.ioctl(uapi.KVM_GET_MP_STATE, cell)
    try:
        return MpState(cell.mp_state)
    except ValueError as error:
        raise VmError(f"the vCPU is in the unknown multiprocessing state {cell.mp_state}") from error


def write_mp_state(fd: VcpuFd, state: MpState) -> None:
    """Replace what the vCPU is doing.

    Raises:
        KvmError: the kernel refused.
    """
    fd.ioctl(uapi.KVM_SET_MP_STATE, uapi.KvmMpState(mp_state=state))


def saved_lapic(fd: VcpuFd, base: int, new: LapicState) -> LapicState | None:
    """Return the local APIC, whose base is ``base``; None for one that is switched off, and as it was when it was new.

    Raises:
        KvmError: the kernel refused.
    """
    found = read_lapic(fd, base)
    return None if found == new and not base & _ENABLED else found


def read_lapic(fd: VcpuFd, base: int) -> LapicState:
    """Return the local APIC, whose base is ``base``.

    Raises:
        KvmError: the kernel refused.
    """
    page = uapi.KvmLapicState()
    fd.ioctl(uapi.KVM_GET_LAPIC, page)
    deadline = read_msrs(fd, (MSR_IA32_TSC_DEADLINE,)).get(MSR_IA32_TSC_DEADLINE, 0)
    return LapicState(base=base, registers=bytes(page.regs), tsc_deadline=deadline)


def write_registers(fd: VcpuFd, lapic: LapicState) -> None:
    """Replace the registers, after the base, which says how they are laid out; a timer goes on from its count.

    Raises:
        KvmError: the kernel refused.
    """
    fd.ioctl(uapi.KVM_SET_LAPIC, uapi.KvmLapicState(regs=tuple(lapic.registers)))


def write_deadline(fd: VcpuFd, lapic: LapicState) -> None:
    """Arm the timer in its deadline mode: after the registers, which have the mode, and after the TSC.

    Raises:
        VmError: this KVM has no such timer.
        KvmError: the kernel refused.
    """
    if lapic.tsc_deadline:
        write_msrs(fd, {MSR_IA32_TSC_DEADLINE: lapic.tsc_deadline})


def expect_fit(state: VcpuState, *, irqchip: bool) -> None:
    """Check that a vCPU of this machine can hold a state's local APIC and what it is doing.

    Raises:
        UnsupportedError: it needs interrupt controllers, and there are none.
        VmError: the registers are not as many as there are.
    """
    if state.lapic is not None and not irqchip:
        raise UnsupportedError("machine", f"{_NO_IRQCHIP}, and the state has a local APIC")
    if state.mp_state is not MpState.RUNNABLE and not irqchip:
        raise UnsupportedError("machine", f"{_NO_IRQCHIP}, and the vCPU is {state.mp_state.name}")
    if state.lapic is not None and len(state.lapic.registers) != uapi.KVM_APIC_REG_SIZE:
        raise VmError(f"the local APIC has {len(state.lapic.registers)} bytes, not {uapi.KVM_APIC_REG_SIZE}")
