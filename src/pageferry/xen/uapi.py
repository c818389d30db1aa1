"""Xen's interface as it is: ioctls, hypercalls, constants and structures. Transcription only; names are Xen's.

Source: Linux ``include/uapi/xen/privcmd.h``; Xen ``xen/include/public``: ``xen.h``, ``domctl.h``, ``memory.h``,
``sched.h``, ``version.h``, ``hvm/hvm_op.h``, ``hvm/params.h``.
"""

import ctypes
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

IOCTL_PRIVCMD_HYPERCALL = 0x0030_5000
IOCTL_PRIVCMD_MMAPBATCH_V2 = 0x0020_5004

IOCTL_NAMES = {
    IOCTL_PRIVCMD_HYPERCALL: "hypercall",
    IOCTL_PRIVCMD_MMAPBATCH_V2: "PRIVCMD_MMAPBATCH_V2",
}

# hypercalls
HYPERVISOR_memory_op = 12
HYPERVISOR_xen_version = 17
HYPERVISOR_sched_op = 29
HYPERVISOR_hvm_op = 34
HYPERVISOR_domctl = 36

XENVER_version = 0
XENMEM_maximum_gpfn = 14
SCHEDOP_remote_shutdown = 4
SHUTDOWN_suspend = 2
HVMOP_get_param = 1

#: What a domctl's ``interface_version`` was in the releases that are known: 4.14 and 4.15, 4.16, 4.17, 4.18, 4.19 on,
#: and in 2026.
XEN_DOMCTL_INTERFACE_VERSIONS = (0x13, 0x14, 0x15, 0x16, 0x17, 0x18)

XEN_DOMCTL_pausedomain = 3
XEN_DOMCTL_unpausedomain = 4
XEN_DOMCTL_getdomaininfo = 5
XEN_DOMCTL_shadow_op = 10
XEN_DOMCTL_setvcpucontext = 12
XEN_DOMCTL_getvcpucontext = 13
XEN_DOMCTL_resumedomain = 27
XEN_DOMCTL_gethvmcontext = 33
XEN_DOMCTL_sethvmcontext = 34
XEN_DOMCTL_gettscinfo = 59
XEN_DOMCTL_getpageframeinfo3 = 61
XEN_DOMCTL_get_cpu_policy = 82

DOMCTL_NAMES = {
    XEN_DOMCTL_pausedomain: "pausedomain",
    XEN_DOMCTL_unpausedomain: "unpausedomain",
    XEN_DOMCTL_getdomaininfo: "getdomaininfo",
    XEN_DOMCTL_shadow_op: "shadow_op",
    XEN_DOMCTL_setvcpucontext: "setvcpucontext",
    XEN_DOMCTL_getvcpucontext: "getvcpucontext",
    XEN_DOMCTL_resumedomain: "resumedomain",
    XEN_DOMCTL_gethvmcontext: "gethvmcontext",
    XEN_DOMCTL_sethvmcontext: "sethvmcontext",
    XEN_DOMCTL_gettscinfo: "gettscinfo",
    XEN_DOMCTL_getpageframeinfo3: "getpageframeinfo3",
    XEN_DOMCTL_get_cpu_policy: "get_cpu_policy",
}

XEN_DOMINF_dying = 1 << 0
XEN_DOMINF_hvm_guest = 1 << 1
XEN_DOMINF_shutdown = 1 << 2
XEN_DOMINF_paused = 1 << 3
XEN_DOMINF_hap = 1 << 8
XEN_DOMINF_shutdownshift = 16
XEN_DOMINF_shutdownmask = 255

XEN_DOMCTL_SHADOW_OP_OFF = 0
XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY = 2
XEN_DOMCTL_SHADOW_OP_CLEAN = 11
XEN_DOMCTL_SHADOW_OP_PEEK = 12
XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL = 1 << 0
SHADOW_OP_NAMES = {
    XEN_DOMCTL_SHADOW_OP_OFF: "OFF",
    XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY: "ENABLE_LOGDIRTY",
    XEN_DOMCTL_SHADOW_OP_CLEAN: "CLEAN",
    XEN_DOMCTL_SHADOW_OP_PEEK: "PEEK",
}

#: The type of a frame in ``getpageframeinfo3``: bits 31 to 28.
XEN_DOMCTL_PFINFO_LTAB_MASK = 0xF << 28
XEN_DOMCTL_PFINFO_XTAB = 0xF << 28
XEN_DOMCTL_PFINFO_XALLOC = 0xE << 28
XEN_DOMCTL_PFINFO_BROKEN = 0xD << 28
#: Most frames that one ``getpageframeinfo3`` takes.
MAX_PAGEFRAMEINFO = 1024

HVM_PARAM_CALLBACK_IRQ = 0
HVM_PARAM_STORE_PFN = 1
HVM_PARAM_IOREQ_PFN = 5
HVM_PARAM_BUFIOREQ_PFN = 6
HVM_PARAM_VIRIDIAN = 9
HVM_PARAM_IDENT_PT = 12
HVM_PARAM_CONSOLE_PFN = 17
HVM_PARAM_ACPI_IOPORTS_LOCATION = 19
HVM_PARAM_PAGING_RING_PFN = 27
HVM_PARAM_MONITOR_RING_PFN = 28
HVM_PARAM_SHARING_RING_PFN = 29
HVM_PARAM_IOREQ_SERVER_PFN = 32
HVM_PARAM_NR_IOREQ_SERVER_PAGES = 33
HVM_PARAM_VM_GENERATION_ID_ADDR = 34
HVM_PARAM_X87_FIP_WIDTH = 36
HVM_PARAM_VM86_TSS_SIZED = 37
HVM_PARAM_MCA_CAP = 38


class PrivcmdHypercall(ctypes.Structure):
    """``struct privcmd_hypercall``."""

    _fields_ = (("op", u64), ("arg", u64 * 5))


class PrivcmdMmapbatchV2(ctypes.Structure):
    """``struct privcmd_mmapbatch_v2``."""

    _fields_ = (("num", u32), ("dom", u16), ("addr", u64), ("arr", u64), ("err", u64))


class XenDomctlGetdomaininfo(ctypes.Structure):
    """``struct xen_domctl_getdomaininfo``, as far as it is the same in all known versions."""

    _fields_ = (
        ("domain", u16),
        ("pad1", u16),
        ("flags", u32),
        ("tot_pages", u64),
        ("max_pages", u64),
        ("outstanding_pages", u64),
        ("shr_pages", u64),
        ("paged_pages", u64),
        ("shared_info_frame", u64),
        ("cpu_time", u64),
        ("nr_online_vcpus", u32),
        ("max_vcpu_id", u32),
        ("ssidref", u32),
        ("handle", u8 * 16),
    )


class XenDomctlShadowOp(ctypes.Structure):
    """``struct xen_domctl_shadow_op``."""

    _fields_ = (
        ("op", u32),
        ("mode", u32),
        ("mb", u32),
        ("dirty_bitmap", u64),
        ("pages", u64),
        ("fault_count", u32),
        ("dirty_count", u32),
    )


class XenDomctlVcpucontext(ctypes.Structure):
    """``struct xen_domctl_vcpucontext``."""

    _fields_ = (("vcpu", u32), ("ctxt", u64))


class XenDomctlHvmcontext(ctypes.Structure):
    """``struct xen_domctl_hvmcontext``."""

    _fields_ = (("size", u32), ("buffer", u64))


class XenDomctlTscInfo(ctypes.Structure):
    """``struct xen_domctl_tsc_info``."""

    _fields_ = (("tsc_mode", u32), ("gtsc_khz", u32), ("incarnation", u32), ("pad", u32), ("elapsed_nsec", u64))


class XenDomctlGetpageframeinfo3(ctypes.Structure):
    """``struct xen_domctl_getpageframeinfo3``."""

    _fields_ = (("num", u64), ("array", u64))


class XenDomctlCpuPolicy(ctypes.Structure):
    """``struct xen_domctl_cpu_policy``."""

    _fields_ = (
        ("nr_leaves", u32),
        ("nr_msrs", u32),
        ("leaves", u64),
        ("msrs", u64),
        ("err_leaf", u32),
        ("err_subleaf", u32),
        ("err_msr", u32),
    )


class XenDomctlU(ctypes.Union):
    """The union ``u`` of ``struct xen_domctl``."""

    _fields_ = (
        ("getdomaininfo", XenDomctlGetdomaininfo),
        ("shadow_op", XenDomctlShadowOp),
        ("vcpucontext", XenDomctlVcpucontext),
        ("hvmcontext", XenDomctlHvmcontext),
        ("tsc_info", XenDomctlTscInfo),
        ("getpageframeinfo3", XenDomctlGetpageframeinfo3),
        ("cpu_policy", XenDomctlCpuPolicy),
        ("pad", u8 * 128),
    )


class XenDomctl(ctypes.Structure):
    """``struct xen_domctl``."""

    _fields_ = (("cmd", u32), ("interface_version", u32), ("domain", u16), ("_pad", u16 * 3), ("u", XenDomctlU))


class XenHvmParam(ctypes.Structure):
    """``struct xen_hvm_param``."""

    _fields_ = (("domid", u16), ("pad", u16), ("index", u32), ("value", u64))


class SchedRemoteShutdown(ctypes.Structure):
    """``struct sched_remote_shutdown``."""

    _fields_ = (("domain_id", u16), ("reason", u32))


#: ``struct vcpu_guest_context`` of x86-64: its size, and where ``user_regs.rax`` is.
VCPU_GUEST_CONTEXT_BYTES = 5168
VCPU_GUEST_CONTEXT_RAX = 600
