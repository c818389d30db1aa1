"""The kernel's interface as it is: ioctl numbers, constants and structures. Transcription only; names are the kernel's.

Source: ``include/uapi/linux/kvm.h`` and ``arch/x86/include/uapi/asm/kvm.h``.
"""

import ctypes
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from pageferry.kvm.uapi_state import KVM_APIC_REG_SIZE as KVM_APIC_REG_SIZE
from pageferry.kvm.uapi_state import KVM_MAX_CPUID_ENTRIES as KVM_MAX_CPUID_ENTRIES
from pageferry.kvm.uapi_state import KVM_MAX_MSR_ENTRIES as KVM_MAX_MSR_ENTRIES
from pageferry.kvm.uapi_state import KVM_MAX_MSR_INDICES as KVM_MAX_MSR_INDICES
from pageferry.kvm.uapi_state import KvmClockData as KvmClockData
from pageferry.kvm.uapi_state import KvmCpuid2 as KvmCpuid2
from pageferry.kvm.uapi_state import KvmCpuidEntry2 as KvmCpuidEntry2
from pageferry.kvm.uapi_state import KvmDebugregs as KvmDebugregs
from pageferry.kvm.uapi_state import KvmDtable as KvmDtable
from pageferry.kvm.uapi_state import KvmIrqchip as KvmIrqchip
from pageferry.kvm.uapi_state import KvmLapicState as KvmLapicState
from pageferry.kvm.uapi_state import KvmMpState as KvmMpState
from pageferry.kvm.uapi_state import KvmMsrEntry as KvmMsrEntry
from pageferry.kvm.uapi_state import KvmMsrList as KvmMsrList
from pageferry.kvm.uapi_state import KvmMsrs as KvmMsrs
from pageferry.kvm.uapi_state import KvmPitConfig as KvmPitConfig
from pageferry.kvm.uapi_state import KvmPitState2 as KvmPitState2
from pageferry.kvm.uapi_state import KvmRegs as KvmRegs
from pageferry.kvm.uapi_state import KvmSegment as KvmSegment
from pageferry.kvm.uapi_state import KvmSregs as KvmSregs
from pageferry.kvm.uapi_state import KvmTranslation as KvmTranslation
from pageferry.kvm.uapi_state import KvmVcpuEvents as KvmVcpuEvents
from pageferry.kvm.uapi_state import KvmXcrs as KvmXcrs
from pageferry.kvm.uapi_state import KvmXsave as KvmXsave

KVM_API_VERSION = 12

# capabilities
KVM_CAP_IRQCHIP = 0
KVM_CAP_USER_MEMORY = 3
KVM_CAP_SET_TSS_ADDR = 4
KVM_CAP_EXT_CPUID = 7
KVM_CAP_MP_STATE = 14
KVM_CAP_SYNC_MMU = 16
KVM_CAP_PIT2 = 33
KVM_CAP_PIT_STATE2 = 35
KVM_CAP_IOEVENTFD = 36
KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
KVM_CAP_ADJUST_CLOCK = 39
KVM_CAP_VCPU_EVENTS = 41
KVM_CAP_DEBUGREGS = 50
KVM_CAP_XSAVE = 55
KVM_CAP_XCRS = 56
KVM_CAP_TSC_CONTROL = 60
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_IOEVENTFD_ANY_LENGTH = 122
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_EXCEPTION_PAYLOAD = 164
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
KVM_CAP_ENFORCE_PV_FEATURE_CPUID = 190
KVM_CAP_DIRTY_LOG_RING = 192
KVM_CAP_XSAVE2 = 208
KVM_CAP_X86_TRIPLE_FAULT_EVENT = 218
KVM_CAP_DIRTY_LOG_RING_ACQ_REL = 223
KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP = 225

KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1 << 0
KVM_DIRTY_LOG_INITIALLY_SET = 1 << 1
KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_DIRTY_LOG_PAGE_OFFSET = 64
KVM_DIRTY_GFN_F_DIRTY = 1 << 0
KVM_DIRTY_GFN_F_RESET = 1 << 1
KVM_DIRTY_GFN_F_MASK = 0x3
KVM_VCPU_TSC_CTRL = 0
KVM_VCPU_TSC_OFFSET = 0
KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1 << 0

KVM_VCPUEVENT_VALID_NMI_PENDING = 1 << 0
KVM_VCPUEVENT_VALID_SHADOW = 1 << 2
KVM_VCPUEVENT_VALID_PAYLOAD = 1 << 4
KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 1 << 5

KVM_IRQCHIP_PIC_MASTER = 0
KVM_IRQCHIP_PIC_SLAVE = 1
KVM_IRQCHIP_IOAPIC = 2
KVM_PIT_SPEAKER_DUMMY = 1

KVM_EXIT_IO = 2
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_DIRTY_RING_FULL = 31
KVM_EXIT_IO_OUT = 1

KVM_IOEVENTFD_FLAG_DEASSIGN = 4

KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4


class KvmUserspaceMemoryRegion(ctypes.Structure):
    """``struct kvm_userspace_memory_region``."""

    _fields_ = (
        ("slot", u32),
        ("flags", u32),
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("userspace_addr", u64),
    )


class KvmEnableCap(ctypes.Structure):
    """``struct kvm_enable_cap``."""

    _fields_ = (("cap", u32), ("flags", u32), ("args", u64 * 4), ("pad", u8 * 64))


class KvmDirtyLog(ctypes.Structure):
    """``struct kvm_dirty_log``; ``dirty_bitmap`` is a user address."""

    _fields_ = (("slot", u32), ("padding1", u32), ("dirty_bitmap", u64))


class KvmClearDirtyLog(ctypes.Structure):
    """``struct kvm_clear_dirty_log``; ``dirty_bitmap`` is a user address."""

    _fields_ = (("slot", u32), ("num_pages", u32), ("first_page", u64), ("dirty_bitmap", u64))


class KvmIrqLevel(ctypes.Structure):
    """``struct kvm_irq_level``."""

    _fields_ = (("irq", u32), ("level", u32))


class KvmIoeventfd(ctypes.Structure):
    """``struct kvm_ioeventfd``; a ``len`` of 0 stands for any."""

    _fields_ = (
        ("datamatch", u64),
        ("addr", u64),
        ("len", u32),
        ("fd", ctypes.c_int32),
        ("flags", u32),
        ("pad", u8 * 36),
    )


class KvmDeviceAttr(ctypes.Structure):
    """``struct kvm_device_attr``; ``addr`` is a user address."""

    _fields_ = (("flags", u32), ("group", u32), ("attr", u64), ("addr", u64))


class KvmRunIo(ctypes.Structure):
    """``struct kvm_run``, member ``io``."""

    _fields_ = (("direction", u8), ("size", u8), ("port", u16), ("count", u32), ("data_offset", u64))


class KvmRunMmio(ctypes.Structure):
    """``struct kvm_run``, member ``mmio``."""

    _fields_ = (("phys_addr", u64), ("data", u8 * 8), ("len", u32), ("is_write", u8))


class KvmRunFailEntry(ctypes.Structure):
    """``struct kvm_run``, member ``fail_entry``."""

    _fields_ = (("hardware_entry_failure_reason", u64), ("cpu", u32))


class KvmRunInternal(ctypes.Structure):
    """``struct kvm_run``, member ``internal``."""

    _fields_ = (("suberror", u32), ("ndata", u32), ("data", u64 * 16))


class KvmRunExit(ctypes.Union):
    """The union of ``struct kvm_run``; which member counts is said by ``exit_reason``."""

    _fields_ = (
        ("io", KvmRunIo),
        ("mmio", KvmRunMmio),
        ("fail_entry", KvmRunFailEntry),
        ("internal", KvmRunInternal),
        ("padding", u8 * 256),
    )


class KvmRun(ctypes.Structure):
    """``struct kvm_run`` up to the end of its union: shared with the kernel by ``mmap`` of the vCPU descriptor."""

    _anonymous_ = ("exit",)
    _fields_ = (
        ("request_interrupt_window", u8),
        ("immediate_exit", u8),
        ("padding1", u8 * 6),
        ("exit_reason", u32),
        ("ready_for_interrupt_injection", u8),
        ("if_flag", u8),
        ("flags", u16),
        ("cr8", u64),
        ("apic_base", u64),
        ("exit", KvmRunExit),
    )


def _ioc(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | 0xAE << 8 | number  # 0xAE: KVMIO


def _io(number: int) -> int:
    return _ioc(0, number, 0)


def _iow(number: int, size: int) -> int:
    return _ioc(1, number, size)


def _ior(number: int, size: int) -> int:
    return _ioc(2, number, size)


def _iowr(number: int, size: int) -> int:
    return _ioc(3, number, size)


KVM_GET_API_VERSION = _io(0x00)
KVM_CREATE_VM = _io(0x01)
KVM_GET_MSR_INDEX_LIST = _iowr(0x02, 4)
KVM_CHECK_EXTENSION = _io(0x03)
KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
KVM_GET_SUPPORTED_CPUID = _iowr(0x05, 8)
KVM_CREATE_VCPU = _io(0x41)
KVM_GET_DIRTY_LOG = _iow(0x42, ctypes.sizeof(KvmDirtyLog))
KVM_SET_USER_MEMORY_REGION = _iow(0x46, ctypes.sizeof(KvmUserspaceMemoryRegion))
KVM_SET_TSS_ADDR = _io(0x47)
KVM_SET_IDENTITY_MAP_ADDR = _iow(0x48, 8)
KVM_CREATE_IRQCHIP = _io(0x60)
KVM_IRQ_LINE = _iow(0x61, ctypes.sizeof(KvmIrqLevel))
KVM_GET_IRQCHIP = _iowr(0x62, ctypes.sizeof(KvmIrqchip))
KVM_SET_IRQCHIP = _ior(0x63, ctypes.sizeof(KvmIrqchip))  # the kernel's numbers, wrong direction and all
KVM_CREATE_PIT2 = _iow(0x77, ctypes.sizeof(KvmPitConfig))
KVM_IOEVENTFD = _iow(0x79, ctypes.sizeof(KvmIoeventfd))
KVM_SET_CLOCK = _iow(0x7B, ctypes.sizeof(KvmClockData))
KVM_GET_CLOCK = _ior(0x7C, ctypes.sizeof(KvmClockData))
KVM_RUN = _io(0x80)
KVM_GET_REGS = _ior(0x81, ctypes.sizeof(KvmRegs))
KVM_SET_REGS = _iow(0x82, ctypes.sizeof(KvmRegs))
KVM_GET_SREGS = _ior(0x83, ctypes.sizeof(KvmSregs))
KVM_SET_SREGS = _iow(0x84, ctypes.sizeof(KvmSregs))
KVM_TRANSLATE = _iowr(0x85, ctypes.sizeof(KvmTranslation))
KVM_GET_MSRS = _iowr(0x88, 8)
KVM_SET_MSRS = _iow(0x89, 8)
KVM_GET_LAPIC = _ior(0x8E, ctypes.sizeof(KvmLapicState))
KVM_SET_LAPIC = _iow(0x8F, ctypes.sizeof(KvmLapicState))
KVM_SET_CPUID2 = _iow(0x90, 8)
KVM_GET_CPUID2 = _iowr(0x91, 8)
KVM_GET_MP_STATE = _ior(0x98, ctypes.sizeof(KvmMpState))
KVM_SET_MP_STATE = _iow(0x99, ctypes.sizeof(KvmMpState))
KVM_GET_PIT2 = _ior(0x9F, ctypes.sizeof(KvmPitState2))
KVM_SET_PIT2 = _iow(0xA0, ctypes.sizeof(KvmPitState2))
KVM_GET_VCPU_EVENTS = _ior(0x9F, ctypes.sizeof(KvmVcpuEvents))
KVM_SET_VCPU_EVENTS = _iow(0xA0, ctypes.sizeof(KvmVcpuEvents))
KVM_GET_DEBUGREGS = _ior(0xA1, ctypes.sizeof(KvmDebugregs))
KVM_SET_DEBUGREGS = _iow(0xA2, ctypes.sizeof(KvmDebugregs))
KVM_SET_TSC_KHZ = _io(0xA2)
KVM_GET_TSC_KHZ = _io(0xA3)
KVM_ENABLE_CAP = _iow(0xA3, ctypes.sizeof(KvmEnableCap))
KVM_GET_XSAVE = _ior(0xA4, ctypes.sizeof(KvmXsave))
KVM_SET_XSAVE = _iow(0xA5, ctypes.sizeof(KvmXsave))
KVM_GET_XCRS = _ior(0xA6, ctypes.sizeof(KvmXcrs))
KVM_SET_XCRS = _iow(0xA7, ctypes.sizeof(KvmXcrs))
KVM_CLEAR_DIRTY_LOG = _iowr(0xC0, ctypes.sizeof(KvmClearDirtyLog))
KVM_GET_XSAVE2 = _ior(0xCF, ctypes.sizeof(KvmXsave))
KVM_RESET_DIRTY_RINGS = _io(0xC7)
KVM_SET_DEVICE_ATTR = _iow(0xE1, ctypes.sizeof(KvmDeviceAttr))
KVM_GET_DEVICE_ATTR = _iow(0xE2, ctypes.sizeof(KvmDeviceAttr))
KVM_HAS_DEVICE_ATTR = _iow(0xE3, ctypes.sizeof(KvmDeviceAttr))

#: ioctl number -> the kernel's name, for error messages.
IOCTL_NAMES = {
    value: name
    for name, value in list(globals().items())
    if name.startswith("KVM_") and isinstance(value, int) and value >> 8 & 0xFF == 0xAE
}
