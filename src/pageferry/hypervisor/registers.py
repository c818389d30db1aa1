"""VcpuState into and out of a Unicorn engine.

Unicorn holds what a ring-3 guest can change: general registers, RIP, RFLAGS, FS and GS bases, x87 and SSE state. All
else (segments' hidden parts, system registers, MSRs, debug registers) the guest cannot change from there; it stays as
it was loaded, so a state from a KVM machine comes out as it went in.

A new engine starts at CPL 0. Writing CS is not enough to leave it: the engine keeps the privilege level apart, so it
enters ring 3 as a kernel does, by ``iretq``, on a private page that no guest sees.
"""

import dataclasses
import struct

from unicorn import x86_const as x86

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.state import INITIAL_FPU_REGS, DescriptorTable, Segment, VcpuState
from pageferry.core.xsave import FP_SSE, component_names
from pageferry.hypervisor.traps import CR4_TSD, arm_io_breakpoints
from pageferry.hypervisor.unicorn_api import Engine

_GENERAL = (
    ("rax", x86.UC_X86_REG_RAX),
    ("rbx", x86.UC_X86_REG_RBX),
    ("rcx", x86.UC_X86_REG_RCX),
    ("rdx", x86.UC_X86_REG_RDX),
    ("rbp", x86.UC_X86_REG_RBP),
    ("rsi", x86.UC_X86_REG_RSI),
    ("rdi", x86.UC_X86_REG_RDI),
    ("rsp", x86.UC_X86_REG_RSP),
    ("r8", x86.UC_X86_REG_R8),
    ("r9", x86.UC_X86_REG_R9),
    ("r10", x86.UC_X86_REG_R10),
    ("r11", x86.UC_X86_REG_R11),
    ("r12", x86.UC_X86_REG_R12),
    ("r13", x86.UC_X86_REG_R13),
    ("r14", x86.UC_X86_REG_R14),
    ("r15", x86.UC_X86_REG_R15),
    ("rflags", x86.UC_X86_REG_EFLAGS),
)

#: What can be pending, or else than usual, where there are interrupts.
_EVENTS = (
    *("pending_event", "interrupt_shadow", "nmi_pending", "nmi_masked", "triple_fault_pending", "pending_exception"),
    *("mp_state", "lapic"),
)

CR0_WP = 1 << 16
CR4_SMEP = 1 << 20
CR4_SMAP = 1 << 21
EFER_LMA = 1 << 10
EFER_NXE = 1 << 11
_CR0 = 0x8005_0033  # PE MP ET NE WP AM PG
_CR4 = 0x620 | CR4_TSD  # PAE OSFXSR OSXMMEXCPT
_PAT_MSR = 0x277  # kept as loaded: memory has no caches here
_EFER_MSR = 0xC000_0080
_EFER = 0x500  # LME LMA: protection is our walker's business, not the engine's

#: The private page: its machine address; while it is in use every gva translates to it.
PRIVATE_MADDR = 1 << 50
_PRIVATE_GVA = 0x10000
_GDT_BYTES = 0x800
_FRAME, _CODE, _LANDING = 0xA00, 0xB00, 0xC00
_IRETQ = b"\x48\xcf"
_CODE_DESCRIPTOR = 0x00AF_FB00_0000_FFFF
_DATA_DESCRIPTOR = 0x00CF_F300_0000_FFFF


def reset_state() -> VcpuState:
    """Return a vCPU after reset: what there is to save before anything was loaded. It cannot run here (real mode)."""
    data = Segment(selector=0, base=0, limit=0xFFFF, attributes=0x93)
    system = dataclasses.replace(data, attributes=0x82)
    table = DescriptorTable(base=0, limit=0xFFFF)
    return VcpuState(
        rip=0xFFF0,
        rflags=2,
        cr0=0x6000_0010,
        cr3=0,
        cr4=0,
        cs=Segment(selector=0xF000, base=0xFFFF_0000, limit=0xFFFF, attributes=0x9B),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=dataclasses.replace(system, attributes=0x8B),
        ldtr=system,
        gdtr=table,
        idtr=table,
        efer=0,
        fpu_regs=INITIAL_FPU_REGS,
    )


def check_supported(state: VcpuState) -> None:
    """Check that this machine can run a state.

    Raises:
        UnsupportedError: it is not 64-bit long mode in ring 3, as the guest ABI has it, or has an MSR, an event
            or registers that would be lost here.
    """
    dpl = state.cs.attributes >> 5 & 3
    if not (state.efer & EFER_LMA and state.cs.attributes >> 9 & 1 and dpl == 3 and state.cs.selector & 3 == 3):
        raise UnsupportedError(
            "ring-3", "the software machine runs 64-bit guests in ring 3 only", hint="use --accel kvm for this guest"
        )
    for name in ("cs", "ss"):
        selector = getattr(state, name).selector
        if selector & 4 or not 8 <= selector < _GDT_BYTES:
            raise UnsupportedError("ring-3", f"the software machine cannot hold selector {name}={selector:#x}")
    if len(state.fpu_regs) != 512:
        raise VmError(f"the FPU state has {len(state.fpu_regs)} bytes, not 512")
    for index, value in state.msrs:
        if index != _PAT_MSR:
            raise UnsupportedError(
                "msr", f"the software machine has no MSR {index:#x} (the guest's is {value:#x})", hint="use --accel kvm"
            )
    if state.extended is not None:
        used = component_names((state.extended.xcr0 | state.extended.in_use) & ~FP_SSE) or "XCR0"
        raise UnsupportedError(
            "xsave", f"the software machine has no {used}, which the guest uses", hint="use --accel kvm"
        )
    for name in _EVENTS:
        if getattr(state, name):
            raise UnsupportedError(
                "vcpu-events", f"the software machine has no interrupts and cannot hold {name}", hint="use --accel kvm"
            )


def enter_ring_3(engine: Engine, state: VcpuState) -> None:
    """Bring a fresh engine to CPL 3, with the state's CS and SS selectors and our traps armed.

    Precondition: the engine's TLB callback maps every gva to PRIVATE_MADDR; the caller flushes the TLB afterwards.
    """
    page = bytearray(0x1000)
    struct.pack_into("<Q", page, state.cs.selector & ~7, _CODE_DESCRIPTOR)
    struct.pack_into("<Q", page, state.ss.selector & ~7, _DATA_DESCRIPTOR)
    frame = _PRIVATE_GVA + _LANDING, state.cs.selector, 0x3202, _PRIVATE_GVA + 0x1000, state.ss.selector
    struct.pack_into("<5Q", page, _FRAME, *frame)
    code = arm_io_breakpoints() + _IRETQ
    page[_CODE : _CODE + len(code)] = code
    engine.map_private(PRIVATE_MADDR, bytes(page))
    engine.set(x86.UC_X86_REG_CR0, _CR0)
    engine.set(x86.UC_X86_REG_CR4, _CR4)
    engine.set(x86.UC_X86_REG_MSR, (_EFER_MSR, _EFER))
    engine.set(x86.UC_X86_REG_GDTR, (0, _PRIVATE_GVA, _GDT_BYTES - 1, 0))
    engine.set(x86.UC_X86_REG_RSP, _PRIVATE_GVA + _FRAME)
    error = engine.start(_PRIVATE_GVA + _CODE, until=_PRIVATE_GVA + _LANDING)
    if error or engine.get(x86.UC_X86_REG_RIP) != _PRIVATE_GVA + _LANDING:
        raise VmError(f"the CPU emulator did not enter ring 3 (error {error})")
    engine.ignore_until()


def load_registers(engine: Engine, state: VcpuState) -> None:
    """Write what the engine holds of a state; it is in ring 3 already. RIP is given to ``engine.start``."""
    for name, register in _GENERAL:
        engine.set(register, getattr(state, name))
    for name, register in (("ds", x86.UC_X86_REG_DS), ("es", x86.UC_X86_REG_ES)):
        engine.set(register, getattr(state, name).selector)
    engine.set(x86.UC_X86_REG_GDTR, (0, state.gdtr.base, state.gdtr.limit, 0))
    engine.set(x86.UC_X86_REG_IDTR, (0, state.idtr.base, state.idtr.limit, 0))
    engine.set(x86.UC_X86_REG_FS_BASE, state.fs.base)
    engine.set(x86.UC_X86_REG_GS_BASE, state.gs.base)
    _load_fpu(engine, state.fpu_regs)


def save_registers(engine: Engine, loaded: VcpuState, *, rip: int, tsc: int) -> VcpuState:
    """Return the state now: ``loaded``, with what the guest may have changed since."""
    return dataclasses.replace(
        loaded,
        rip=rip,
        tsc=tsc,
        fs=dataclasses.replace(loaded.fs, base=engine.get(x86.UC_X86_REG_FS_BASE)),
        gs=dataclasses.replace(loaded.gs, base=engine.get(x86.UC_X86_REG_GS_BASE)),
        fpu_regs=_save_fpu(engine, loaded.fpu_regs),
        **{name: engine.get(register) for name, register in _GENERAL},
    )


# The FXSAVE image: FCW 0, FSW 2, abridged FTW 4, FOP 6, FIP 8, FDP 16, MXCSR 24, mask 28, ST(i) 32+16i, XMM(i) 160+16i.
# ST(i) counts from the top of the stack, FTW and the engine's registers do not. FOP, FIP and FDP stay as loaded.
_ST, _XMM = 32, 160


def _load_fpu(engine: Engine, image: bytes) -> None:
    fcw, fsw, tags, mxcsr = *struct.unpack_from("<HHB", image), struct.unpack_from("<I", image, 24)[0]
    top = fsw >> 11 & 7
    for i in range(8):
        mantissa, exponent = struct.unpack_from("<QH", image, _ST + 16 * i)
        engine.set(x86.UC_X86_REG_FP0 + (top + i & 7), (mantissa, exponent))
    engine.set(x86.UC_X86_REG_FPCW, fcw)
    engine.set(x86.UC_X86_REG_FPSW, fsw)
    engine.set(x86.UC_X86_REG_FPTAG, sum(3 << 2 * j for j in range(8) if not tags >> j & 1))
    engine.set(x86.UC_X86_REG_MXCSR, mxcsr)
    for i in range(16):
        value = int.from_bytes(image[_XMM + 16 * i : _XMM + 16 * i + 16], "little")
        engine.set(x86.UC_X86_REG_XMM0 + i, value)


def _save_fpu(engine: Engine, loaded: bytes) -> bytes:
    image = bytearray(loaded)
    fsw = engine.get(x86.UC_X86_REG_FPSW)
    tags = engine.get(x86.UC_X86_REG_FPTAG)
    abridged = sum(1 << j for j in range(8) if tags >> 2 * j & 3 != 3)
    struct.pack_into("<HHB", image, 0, engine.get(x86.UC_X86_REG_FPCW), fsw, abridged)
    struct.pack_into("<I", image, 24, engine.get(x86.UC_X86_REG_MXCSR))
    for i in range(8):
        mantissa, exponent = engine.get(x86.UC_X86_REG_FP0 + ((fsw >> 11) + i & 7))
        struct.pack_into("<QH", image, _ST + 16 * i, mantissa, exponent)
    for i in range(16):
        image[_XMM + 16 * i : _XMM + 16 * i + 16] = engine.get(x86.UC_X86_REG_XMM0 + i).to_bytes(16, "little")
    return bytes(image)
