"""The structures of the kernel's interface that hold state, a vCPU's or a machine's; :mod:`.uapi` has them, too.

Source: ``include/uapi/linux/kvm.h`` and ``arch/x86/include/uapi/asm/kvm.h``.
"""

import ctypes
from ctypes import c_int64 as s64
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

KVM_NR_INTERRUPTS = 256
KVM_MAX_XCRS = 16
KVM_APIC_REG_SIZE = 0x400
KVM_IOAPIC_NUM_PINS = 24


class KvmCpuidEntry2(ctypes.Structure):
    """``struct kvm_cpuid_entry2``."""

    _fields_ = (
        ("function", u32),
        ("index", u32),
        ("flags", u32),
        ("eax", u32),
        ("ebx", u32),
        ("ecx", u32),
        ("edx", u32),
        ("padding", u32 * 3),
    )


KVM_MAX_CPUID_ENTRIES = 256


class KvmCpuid2(ctypes.Structure):
    """``struct kvm_cpuid2`` with room for every entry; the ioctl number counts the 8-byte head only."""

    _fields_ = (("nent", u32), ("padding", u32), ("entries", KvmCpuidEntry2 * KVM_MAX_CPUID_ENTRIES))


class KvmMsrEntry(ctypes.Structure):
    """``struct kvm_msr_entry``."""

    _fields_ = (("index", u32), ("reserved", u32), ("data", u64))


KVM_MAX_MSR_ENTRIES = 255  # the kernel takes no more in one call


class KvmMsrs(ctypes.Structure):
    """``struct kvm_msrs`` with room for every entry; the ioctl number counts the 8-byte head only."""

    _fields_ = (("nmsrs", u32), ("pad", u32), ("entries", KvmMsrEntry * KVM_MAX_MSR_ENTRIES))


KVM_MAX_MSR_INDICES = 4096


class KvmMsrList(ctypes.Structure):
    """``struct kvm_msr_list`` with room; the ioctl number counts the 4-byte head only."""

    _fields_ = (("nmsrs", u32), ("indices", u32 * KVM_MAX_MSR_INDICES))


class KvmRegs(ctypes.Structure):
    """``struct kvm_regs``."""

    _fields_ = tuple(
        (name, u64)
        for name in "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags".split()  # noqa: SIM905  # the kernel's order at a glance
    )


class KvmSegment(ctypes.Structure):
    """``struct kvm_segment``."""

    _fields_ = (
        ("base", u64),
        ("limit", u32),
        ("selector", u16),
        ("type", u8),
        ("present", u8),
        ("dpl", u8),
        ("db", u8),
        ("s", u8),
        ("l", u8),
        ("g", u8),
        ("avl", u8),
        ("unusable", u8),
        ("padding", u8),
    )


class KvmDtable(ctypes.Structure):
    """``struct kvm_dtable``."""

    _fields_ = (("base", u64), ("limit", u16), ("padding", u16 * 3))


class KvmSregs(ctypes.Structure):
    """``struct kvm_sregs``."""

    _fields_ = (
        *((name, KvmSegment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", KvmDtable),
        ("idt", KvmDtable),
        *((name, u64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", u64 * (KVM_NR_INTERRUPTS // 64)),
    )


class KvmTranslation(ctypes.Structure):
    """``struct kvm_translation``."""

    _fields_ = (
        ("linear_address", u64),
        ("physical_address", u64),
        ("valid", u8),
        ("writeable", u8),
        ("usermode", u8),
        ("pad", u8 * 5),
    )


class KvmDebugregs(ctypes.Structure):
    """``struct kvm_debugregs``."""

    _fields_ = (("db", u64 * 4), ("dr6", u64), ("dr7", u64), ("flags", u64), ("reserved", u64 * 9))


class KvmXsave(ctypes.Structure):
    """``struct kvm_xsave``: the XSAVE area in its standard form; ``header`` begins with XSTATE_BV, XCOMP_BV."""

    _fields_ = (("fxsave", u8 * 512), ("header", u64 * 8), ("extended", u8 * (4096 - 576)))


class KvmVcpuEventsException(ctypes.Structure):
    """``struct kvm_vcpu_events``, member ``exception``."""

    _fields_ = (("injected", u8), ("nr", u8), ("has_error_code", u8), ("pending", u8), ("error_code", u32))


class KvmVcpuEventsInterrupt(ctypes.Structure):
    """``struct kvm_vcpu_events``, member ``interrupt``."""

    _fields_ = (("injected", u8), ("nr", u8), ("soft", u8), ("shadow", u8))


class KvmVcpuEventsNmi(ctypes.Structure):
    """``struct kvm_vcpu_events``, member ``nmi``."""

    _fields_ = (("injected", u8), ("pending", u8), ("masked", u8), ("pad", u8))


class KvmVcpuEventsSmi(ctypes.Structure):
    """``struct kvm_vcpu_events``, member ``smi``."""

    _fields_ = (("smm", u8), ("pending", u8), ("smm_inside_nmi", u8), ("latched_init", u8))


class KvmVcpuEvents(ctypes.Structure):
    """``struct kvm_vcpu_events``."""

    _fields_ = (
        ("exception", KvmVcpuEventsException),
        ("interrupt", KvmVcpuEventsInterrupt),
        ("nmi", KvmVcpuEventsNmi),
        ("sipi_vector", u32),
        ("flags", u32),
        ("smi", KvmVcpuEventsSmi),
        ("triple_fault", u8),
        ("reserved", u8 * 26),
        ("exception_has_payload", u8),
        ("exception_payload", u64),
    )


class KvmXcr(ctypes.Structure):
    """``struct kvm_xcr``."""

    _fields_ = (("xcr", u32), ("reserved", u32), ("value", u64))


class KvmXcrs(ctypes.Structure):
    """``struct kvm_xcrs``."""

    _fields_ = (("nr_xcrs", u32), ("flags", u32), ("xcrs", KvmXcr * KVM_MAX_XCRS), ("padding", u64 * 16))


class KvmMpState(ctypes.Structure):
    """``struct kvm_mp_state``."""

    _fields_ = (("mp_state", u32),)


class KvmClockData(ctypes.Structure):
    """``struct kvm_clock_data``."""

    _fields_ = (
        ("clock", u64),
        ("flags", u32),
        ("pad0", u32),
        ("realtime", u64),
        ("host_tsc", u64),
        ("pad", u32 * 4),
    )


class KvmLapicState(ctypes.Structure):
    """``struct kvm_lapic_state``."""

    _fields_ = (("regs", u8 * KVM_APIC_REG_SIZE),)


class KvmPicState(ctypes.Structure):
    """``struct kvm_pic_state``."""

    _fields_ = (
        *((name, u8) for name in ("last_irr", "irr", "imr", "isr", "priority_add", "irq_base", "read_reg_select")),
        *((name, u8) for name in ("poll", "special_mask", "init_state", "auto_eoi", "rotate_on_auto_eoi")),
        *((name, u8) for name in ("special_fully_nested_mode", "init4", "elcr", "elcr_mask")),
    )


class KvmIoapicState(ctypes.Structure):
    """``struct kvm_ioapic_state``."""

    _fields_ = (
        ("base_address", u64),
        ("ioregsel", u32),
        ("id", u32),
        ("irr", u32),
        ("pad", u32),
        ("redirtbl", u64 * KVM_IOAPIC_NUM_PINS),
    )


class KvmIrqchipChip(ctypes.Union):
    """The union of ``struct kvm_irqchip``; which member counts is said by ``chip_id``."""

    _fields_ = (("dummy", u8 * 512), ("pic", KvmPicState), ("ioapic", KvmIoapicState))


class KvmIrqchip(ctypes.Structure):
    """``struct kvm_irqchip``."""

    _fields_ = (("chip_id", u32), ("pad", u32), ("chip", KvmIrqchipChip))


class KvmPitConfig(ctypes.Structure):
    """``struct kvm_pit_config``."""

    _fields_ = (("flags", u32), ("pad", u32 * 15))


class KvmPitChannelState(ctypes.Structure):
    """``struct kvm_pit_channel_state``; ``count`` may be 65536."""

    _fields_ = (
        ("count", u32),
        ("latched_count", u16),
        *((name, u8) for name in ("count_latched", "status_latched", "status", "read_state", "write_state")),
        *((name, u8) for name in ("write_latch", "rw_mode", "mode", "bcd", "gate")),
        ("count_load_time", s64),
    )


class KvmPitState2(ctypes.Structure):
    """``struct kvm_pit_state2``."""

    _fields_ = (("channels", KvmPitChannelState * 3), ("flags", u32), ("reserved", u32 * 9))
