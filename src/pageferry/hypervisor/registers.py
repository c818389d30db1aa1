"""VcpuState into and out of the emulator's CPU.

Every field is written where it lies (:mod:`.unicorn_cpu`), except what the emulator keeps in a form of its own: the
arithmetic flags, x87 and SSE registers, MSRs that it only stores. What decides how code is translated is repeated in
the CPU's ``hflags``, which :func:`mode_flags` makes of the state as the emulator's own instructions would.

What this CPU is: 64-bit long mode and its compatibility mode in ring 0 and 3, and 32-bit protected mode without paging,
from where a kernel goes on to long mode. Real and virtual-8086 mode and 32-bit paging are refused by name. It has
neither a local APIC nor AVX; the state of a local APIC that was never used is accepted and dropped.

What it does less strictly than hardware, because the emulator does: RDMSR of an unknown MSR gives 0 and WRMSR to one is
ignored; unmasked SSE exceptions are never raised; breakpoints on data never hit (those on code do); alignment is not
checked; MOV to a control register takes reserved bits; CR8 does nothing, since the machine has no local APIC. The
instruction pointer, operand and selector of the last x87 instruction stay as they were loaded.

Source: AMD APM volume 2, chapters 3 (system registers), 4 (segment attributes), 11 (FXSAVE).
"""

import struct
from collections.abc import Iterable

from unicorn import x86_const as x86

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.state import DescriptorTable, LapicState, MpState, Segment, VcpuState
from pageferry.core.xsave import FP_SSE, component_names
from pageferry.hypervisor.unicorn_api import Engine
from pageferry.hypervisor.unicorn_cpu import CpuFields, SegmentFields

_GENERAL = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *(f"r{number}" for number in range(8, 16)),
)
RAX, RCX, RDX, RBX, RSP = range(5)
R11 = 11

#: Segments by their numbers in ``CpuFields.segs``.
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
ES, CS, SS, DS, FS, GS = range(6)

CR0_PE, CR0_WP, CR0_PG = 1 << 0, 1 << 16, 1 << 31
CR4_TSD, CR4_PGE, CR4_OSFXSR, CR4_SMEP, CR4_SMAP = 1 << 2, 1 << 7, 1 << 9, 1 << 20, 1 << 21
EFER_SCE, EFER_LMA, EFER_NXE = 1 << 0, 1 << 10, 1 << 11
RFLAGS_TF, RFLAGS_IF, RFLAGS_NT, RFLAGS_RF, RFLAGS_VM, RFLAGS_AC = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 17, 1 << 18

# The emulator's hflags: how code is translated.
CPL_MASK = 3
HFLAG_INHIBIT_IRQ, HFLAG_CS32, HFLAG_SS32, HFLAG_ADDSEG, HFLAG_PE = 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7
HFLAG_LMA, HFLAG_CS64, HFLAG_OSFXSR, HFLAG_SMAP, HFLAG_IOBPT = 1 << 14, 1 << 15, 1 << 22, 1 << 23, 1 << 24
_CR0_TO_HFLAGS, _CR0_SHIFT = 0b1110, 8  # MP EM TS
#: hflags2: an NMI is being served, until IRET.
HFLAG2_NMI = 1 << 2

# Bits of a segment's flags, as they are in the second word of a descriptor.
FLAG_PRESENT, FLAG_CODE_OR_DATA, FLAG_LONG, FLAG_BIG = 1 << 15, 1 << 12, 1 << 21, 1 << 22
DPL_SHIFT = 13

_SHADOW_STI = 2
_PAT_MSR, _DEFAULT_PAT = 0x277, 0x0007_0406_0007_0406
#: MSRs that the CPU stores for the guest (PAT, memory types, IA32_MISC_ENABLE, MCG_STATUS), with their values at reset.
_STORED_MSRS = (
    {_PAT_MSR: _DEFAULT_PAT, 0x2FF: 0, 0x1A0: 1, 0x17A: 0}
    | dict.fromkeys(range(0x200, 0x210), 0)
    | dict.fromkeys((0x250, 0x258, 0x259, *range(0x268, 0x270)), 0)
)

_DR7_ENABLES = 0xFF
#: A page of the emulator's own, where no frame is: mov dr7, rax; hlt.
_PRIVATE_MADDR, _SET_DR7 = 1 << 46, bytes.fromhex("0f23f8f4")
_FEW_BLOCKS = 8

# A local APIC's registers, at 16 bytes each: what is not 0 after reset, or does not matter.
_APIC_ID, _APIC_VERSION, _APIC_DFR, _APIC_SVR = 0x02, 0x03, 0x0E, 0x0F
_APIC_LVTS, _APIC_LVT_LINT0 = range(0x32, 0x38), 0x35
_APIC_MASKED, _APIC_EXTINT, _APIC_SOFTWARE_ENABLED = 0x1_0000, 0x700, 0x100


def check_supported(state: VcpuState) -> None:
    """Check that this machine can run a state.

    Raises:
        UnsupportedError: it is in a mode that is not run here, or has an MSR, a local APIC or registers that would be
            lost.
    """
    _check_mode(state)
    if len(state.fpu_regs) != 512:
        raise VmError(f"the FPU state has {len(state.fpu_regs)} bytes, not 512")
    for index, value in state.msrs:
        if index not in _STORED_MSRS:
            raise UnsupportedError(
                "msr", f"the software machine has no MSR {index:#x} (the guest's is {value:#x})", hint="use --accel kvm"
            )
    if state.extended is not None:
        used = component_names((state.extended.xcr0 | state.extended.in_use) & ~FP_SSE) or "XCR0"
        raise UnsupportedError(
            "xsave", f"the software machine has no {used}, which the guest uses", hint="use --accel kvm"
        )
    if state.lapic is not None and not _is_unused(state.lapic):
        raise UnsupportedError(
            "lapic", "the software machine has no local APIC, and the guest uses one", hint="use --accel kvm"
        )
    if state.mp_state not in (MpState.RUNNABLE, MpState.HALTED):
        raise UnsupportedError("mp-state", f"the software machine cannot hold a vCPU that is {state.mp_state.name}")


def _check_mode(state: VcpuState) -> None:
    mode = None
    if not state.cr0 & CR0_PE:
        mode = "real mode"
    elif state.rflags & RFLAGS_VM:
        mode = "virtual-8086 mode"
    elif state.cr0 & CR0_PG and not state.efer & EFER_LMA:
        mode = "32-bit paging"
    elif _cpl(state) not in (0, 3):
        mode = f"ring {_cpl(state)}"
    if mode is not None:
        raise UnsupportedError(
            "cpu-mode",
            f"the software machine cannot run a vCPU in {mode}",
            hint="use --accel kvm for this guest",
        )


def _is_unused(lapic: LapicState) -> bool:
    """Tell whether a local APIC is as after reset: at most passing the PIC's interrupts through, as a PC begins."""
    words = struct.unpack(f"<{len(lapic.registers) // 4}I", lapic.registers)[::4]
    if lapic.tsc_deadline or (words[_APIC_SVR] & _APIC_SOFTWARE_ENABLED and words[_APIC_LVT_LINT0] != _APIC_EXTINT):
        return False
    for number, value in enumerate(words):
        if number in (_APIC_ID, _APIC_VERSION, _APIC_DFR, _APIC_SVR):
            continue
        if value and not (number in _APIC_LVTS and value & (_APIC_MASKED | _APIC_EXTINT)):
            return False
    return True


def _cpl(state: VcpuState) -> int:
    return state.ss.attributes >> 5 & 3


def arm_breakpoints(engine: Engine, state: VcpuState) -> None:
    """Give a fresh engine a state's debug registers; breakpoints that are on it must be told by its own instruction.

    Precondition: its TLB maps each gva to the same maddr; the caller flushes it afterwards.
    """
    dr = engine.cpu.events.dr
    for number in range(4):
        dr[number] = getattr(state, f"dr{number}")
    dr[6] = state.dr6
    if not state.dr7 & _DR7_ENABLES:
        dr[7] = state.dr7
        return
    engine.map_private(_PRIVATE_MADDR, _SET_DR7)
    engine.cpu.fields.regs[RAX], engine.cpu.fields.eip = state.dr7, _PRIVATE_MADDR
    error = engine.run(_FEW_BLOCKS)
    if error or dr[7] != state.dr7:
        raise VmError(f"the CPU emulator did not take DR7 {state.dr7:#x} (error {error})")


def load_registers(engine: Engine, state: VcpuState) -> None:
    """Give an engine the rest of a state; the caller flushes its TLB, and gives it what is pending."""
    fields, msrs = engine.cpu.fields, engine.cpu.msrs
    for number, name in enumerate(_GENERAL):
        fields.regs[number] = getattr(state, name)
    fields.eip = state.rip
    for number, name in enumerate(_SEGMENTS):
        _load_segment(fields.segs[number], getattr(state, name))
    _load_segment(fields.ldt, state.ldtr)
    _load_segment(fields.tr, state.tr)
    for table, value in ((fields.gdt, state.gdtr), (fields.idt, state.idtr)):
        table.base, table.limit = value.base, value.limit
    fields.cr[0], fields.cr[2], fields.cr[3], fields.cr[4] = state.cr0, state.cr2, state.cr3, state.cr4
    fields.efer = state.efer
    engine.rflags = state.rflags
    fields.hflags = mode_flags(fields, _cpl(state)) | (HFLAG_INHIBIT_IRQ if state.interrupt_shadow else 0)
    fields.hflags2 = fields.hflags2 & ~HFLAG2_NMI | (HFLAG2_NMI if state.nmi_masked else 0)
    msrs.sysenter_cs, msrs.sysenter_esp, msrs.sysenter_eip = state.sysenter_cs, state.sysenter_esp, state.sysenter_eip
    msrs.star, msrs.lstar, msrs.cstar, msrs.fmask = state.star, state.lstar, state.cstar, state.syscall_mask
    msrs.kernel_gs_base, msrs.tsc_aux = state.shadow_gs, state.tsc_aux
    for index, value in (_STORED_MSRS | dict(state.msrs)).items():
        engine.set(x86.UC_X86_REG_MSR, (index, value))
    _load_fpu(engine, state.fpu_regs)


def save_registers(engine: Engine, loaded: VcpuState, *, tsc: int) -> VcpuState:
    """Return the state of an engine's CPU; nothing pending is in it.

    Args:
        engine: the engine, outside the guest.
        loaded: the state that it was given: its MSRs are told even where they are as after reset.
        tsc: the guest's time-stamp counter now.
    """
    fields, msrs, events = engine.cpu.fields, engine.cpu.msrs, engine.cpu.events
    segments = {name: _save_segment(fields.segs[number]) for number, name in enumerate(_SEGMENTS)}
    shadow = fields.hflags & HFLAG_INHIBIT_IRQ
    return VcpuState(
        **{name: fields.regs[number] for number, name in enumerate(_GENERAL)},
        rip=fields.eip,
        rflags=engine.rflags,
        es=segments["es"],
        cs=segments["cs"],
        ss=segments["ss"],
        ds=segments["ds"],
        fs=segments["fs"],
        gs=segments["gs"],
        ldtr=_save_segment(fields.ldt),
        tr=_save_segment(fields.tr),
        gdtr=DescriptorTable(base=fields.gdt.base, limit=fields.gdt.limit),
        idtr=DescriptorTable(base=fields.idt.base, limit=fields.idt.limit),
        cr0=fields.cr[0],
        cr2=fields.cr[2],
        cr3=fields.cr[3],
        cr4=fields.cr[4],
        efer=fields.efer,
        **{f"dr{number}": events.dr[number] for number in (0, 1, 2, 3, 6, 7)},
        sysenter_cs=msrs.sysenter_cs,
        sysenter_esp=msrs.sysenter_esp,
        sysenter_eip=msrs.sysenter_eip,
        star=msrs.star,
        lstar=msrs.lstar,
        cstar=msrs.cstar,
        syscall_mask=msrs.fmask,
        shadow_gs=msrs.kernel_gs_base,
        tsc_aux=msrs.tsc_aux,
        tsc=tsc,
        interrupt_shadow=(loaded.interrupt_shadow or _SHADOW_STI) if shadow else 0,
        nmi_masked=bool(fields.hflags2 & HFLAG2_NMI),
        fpu_regs=_save_fpu(engine, loaded.fpu_regs),
        msrs=_save_msrs(engine, (index for index, _ in loaded.msrs)),
    )


def _save_msrs(engine: Engine, told: Iterable[int]) -> tuple[tuple[int, int], ...]:
    always = frozenset(told)
    now = ((index, engine.read_msr(index)) for index in sorted(_STORED_MSRS))
    return tuple((index, value) for index, value in now if index in always or value != _STORED_MSRS[index])


def mode_flags(fields: CpuFields, cpl: int) -> int:
    """Return the hflags that control registers, EFER and segments ask for; no interrupt shadow.

    I/O breakpoints are always looked for (:mod:`.port_io`). SS counts as 32 bits wide in 64-bit code, where that means
    nothing: so code is translated once, whatever a kernel's SS is.
    """
    cr0, cr4, code, stack = fields.cr[0], fields.cr[4], fields.segs[CS].flags, fields.segs[SS].flags
    flags: int = cpl | HFLAG_IOBPT | (cr0 & _CR0_TO_HFLAGS) << _CR0_SHIFT
    flags |= HFLAG_PE if cr0 & CR0_PE else 0
    flags |= HFLAG_OSFXSR if cr4 & CR4_OSFXSR else 0
    flags |= HFLAG_SMAP if cr4 & CR4_SMAP else 0
    if fields.efer & EFER_LMA:
        flags |= HFLAG_LMA
        if code & FLAG_LONG:
            return flags | HFLAG_CS64 | HFLAG_CS32 | HFLAG_SS32
    flags |= HFLAG_CS32 if code & FLAG_BIG else 0
    flags |= HFLAG_SS32 if stack & FLAG_BIG else 0
    flat = code & FLAG_BIG and not any(fields.segs[number].base for number in (DS, ES, SS))
    return flags if flat else flags | HFLAG_ADDSEG


def enter_64_bit_code(fields: CpuFields, cpl: int) -> None:
    """Have the CPU translate code as 64-bit code at a privilege level, after its segments; long mode is active."""
    kept = fields.hflags & ~(CPL_MASK | HFLAG_ADDSEG | HFLAG_INHIBIT_IRQ)
    fields.hflags = kept | HFLAG_CS64 | HFLAG_CS32 | HFLAG_SS32 | cpl


def set_segment(segment: SegmentFields, selector: int, base: int, limit: int, flags: int) -> None:
    """Replace a segment register with its hidden part."""
    segment.selector, segment.base, segment.limit, segment.flags = selector, base, limit, flags


def _load_segment(segment: SegmentFields, value: Segment) -> None:
    flags = (value.attributes & 0xFF) << 8 | (value.attributes & 0xF00) << 12
    set_segment(segment, value.selector, value.base, value.limit, flags)


def _save_segment(segment: SegmentFields) -> Segment:
    return Segment(
        selector=segment.selector,
        base=segment.base,
        limit=segment.limit,
        attributes=segment.flags >> 8 & 0xFF | segment.flags >> 12 & 0xF00,
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
