"""The state of a machine besides memory, in a format that is the same for all machines.

``kvm`` and ``hypervisor`` produce and accept these records; ``stream.hvm_context`` turns them into bytes. Register
names and the packed segment attributes are those of Xen's HVM context (AMD's VMCB).
"""

from dataclasses import dataclass, field
from enum import IntEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A segment register with its hidden part.

    ``attributes`` packs the descriptor's bits: type 3..0, S 4, DPL 6..5, P 7, AVL 8, L 9, D/B 10, G 11.
    ``limit`` is in bytes (already scaled by G).
    """

    selector: int
    base: int
    limit: int
    attributes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DescriptorTable:
    """GDTR or IDTR."""

    base: int
    limit: int


class MpState(IntEnum):
    """What a vCPU of a machine with interrupt controllers is doing; anywhere else it is RUNNABLE. KVM's numbers."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendedState:
    """XCR0, and the XSAVE components other than x87 and SSE.

    ``in_use``: bit n is component n, set if it is not in its initial state. ``area`` is the XSAVE area in its standard
    form from byte 576 on, up to the end of the last component in use; bytes that belong to none in use are 0.
    """

    xcr0: int
    in_use: int = 0
    area: bytes = field(repr=False, default=b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingException:
    """An exception that was raised and is not injected yet: ``payload`` (CR2 or DR6 to be) has not taken effect.

    ``error_code``, ``payload``: None where the exception has none.
    """

    vector: int
    error_code: int | None = None
    payload: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LapicState:
    """A vCPU's local APIC: its base MSR, its registers (1,024 bytes, 16 for each), and the TSC deadline MSR."""

    base: int
    registers: bytes = field(repr=False)
    tsc_deadline: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VcpuState:
    """One vCPU at an instruction boundary with no I/O under way.

    ``fpu_regs`` is the 512-byte FXSAVE image. ``msrs`` are further (index, value) pairs, ascending. ``tsc`` is the
    guest's counter at the moment of saving. ``interrupt_shadow`` holds off interrupts for one instruction: bit 0 after
    MOV SS, bit 1 after STI. ``nmi_masked``: a handler of an NMI has not returned yet. ``pending_event`` was begun to be
    delivered, ``pending_exception`` not yet. ``extended`` None: XCR0 is 1, and only x87 and SSE are in use.
    ``lapic`` None: the machine has no interrupt controllers, or was just made.
    """

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rbp: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int
    rflags: int
    cr0: int
    cr2: int = 0
    cr3: int
    cr4: int
    dr0: int = 0
    dr1: int = 0
    dr2: int = 0
    dr3: int = 0
    dr6: int = 0xFFFF_0FF0
    dr7: int = 0x400
    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldtr: Segment
    gdtr: DescriptorTable
    idtr: DescriptorTable
    sysenter_cs: int = 0
    sysenter_esp: int = 0
    sysenter_eip: int = 0
    shadow_gs: int = 0
    lstar: int = 0
    star: int = 0
    cstar: int = 0
    syscall_mask: int = 0
    efer: int
    tsc_aux: int = 0
    tsc: int = 0
    pending_event: int = 0
    error_code: int = 0
    interrupt_shadow: int = 0
    nmi_pending: bool = False
    nmi_masked: bool = False
    triple_fault_pending: bool = False
    pending_exception: PendingException | None = None
    mp_state: MpState = MpState.RUNNABLE
    lapic: LapicState | None = None
    fpu_regs: bytes
    extended: ExtendedState | None = None
    msrs: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceState:
    """One device's state: ``name`` is its key on the bus; the device alone knows what ``data`` means.

    ``save_ns``: how long saving it took, None where it was not measured; no part of the state.
    """

    name: str
    data: bytes
    save_ns: int | None = field(default=None, compare=False)


#: The key of the first interrupt controller of a PC; a machine whose state has it is one.
PIC_NAME = "pic0"


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineState:
    """A whole machine without its memory.

    ``tsc_khz``: how fast the vCPUs' TSCs count; None: not known, or the guest was never to rely on it.
    ``kvm_clock_ns``: what KVM's paravirtual clock shows, the same to all vCPUs; None: the machine has never had one.
    ``paused``: whether its user had paused the guest; machines neither set nor heed it.
    """

    vcpus: tuple[VcpuState, ...]
    devices: tuple[DeviceState, ...]
    tsc_khz: int | None = None
    kvm_clock_ns: int | None = None
    paused: bool = False


#: FXSAVE image after FNINIT with all vector registers zero: FCW 0x37F, MXCSR 0x1F80, MXCSR mask 0xFFFF.
INITIAL_FPU_REGS = (0x37F).to_bytes(24, "little") + (0x1F80).to_bytes(4, "little") + (0xFFFF).to_bytes(484, "little")


def reset_state() -> VcpuState:
    """Return a vCPU as it is after reset, in real mode.

    Source: AMD APM volume 2, "Processor initialization state".
    """
    data = Segment(selector=0, base=0, limit=0xFFFF, attributes=0x93)
    table = DescriptorTable(base=0, limit=0xFFFF)
    return VcpuState(
        rip=0xFFF0,
        rflags=2,
        cr0=0x6000_0010,
        cr3=0,
        cr4=0,
        efer=0,
        cs=Segment(selector=0xF000, base=0xFFFF_0000, limit=0xFFFF, attributes=0x9B),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=Segment(selector=0, base=0, limit=0xFFFF, attributes=0x8B),
        ldtr=Segment(selector=0, base=0, limit=0xFFFF, attributes=0x82),
        gdtr=table,
        idtr=table,
        fpu_regs=INITIAL_FPU_REGS,
    )


NO_KERNEL_GVA = 0xFFFF_FFFF_FFFF_F000
"""Where the kernel's entry would be in a guest that has none; not mapped."""


def ring_3_state(*, rip: int, rsp: int, cr3: int, rdi: int = 0, rsi: int = 0) -> VcpuState:
    """Return a vCPU in 64-bit ring 3 with IOPL 0, paging on, flat segments, no descriptor tables and no handlers.

    It is how every guest of the guest ABI starts (docs/reference/guest-abi.md); general registers not named are 0. The
    task state segment lies at linear address 0: zeros there permit every port below 0x8000. SYSCALL is off, and where a
    machine takes it nevertheless it goes to an address that is not mapped.
    """
    data = Segment(selector=0x2B, base=0, limit=0xFFFF_FFFF, attributes=0xCF3)
    nothing = DescriptorTable(base=0, limit=0)
    return VcpuState(
        rip=rip,
        rsp=rsp,
        rdi=rdi,
        rsi=rsi,
        rflags=0x202,
        cr0=0x8005_0033,
        cr3=cr3,
        cr4=0x620,
        efer=0x500,
        cs=Segment(selector=0x33, base=0, limit=0xFFFF_FFFF, attributes=0xAFB),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=Segment(selector=0, base=0, limit=0xFFFF, attributes=0x8B),
        ldtr=Segment(selector=0, base=0, limit=0, attributes=0),
        gdtr=nothing,
        idtr=nothing,
        lstar=NO_KERNEL_GVA,
        fpu_regs=INITIAL_FPU_REGS,
    )
