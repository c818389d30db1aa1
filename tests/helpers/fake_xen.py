"""A boundary to Xen for unit tests: answers hypercalls as scripted, in Xen's layouts. What Xen really does is proven on
real Xen (tests/xen)."""

import ctypes
import errno

import numpy as np

from pageferry.core.errors import XenError
from pageferry.xen import uapi
from pageferry.xen.hypercall import Buffer

HANDLE = bytes(range(16))


class XenCpuidLeaf(ctypes.Structure):
    """``xen_cpuid_leaf_t``."""

    _fields_ = (*((name, ctypes.c_uint32) for name in ("leaf", "subleaf", "a", "b", "c", "d")),)


class XenMsrEntry(ctypes.Structure):
    """``xen_msr_entry_t``."""

    _fields_ = (("idx", ctypes.c_uint32), ("flags", ctypes.c_uint32), ("val", ctypes.c_uint64))


class FakePrivcmd:
    """Answers as a Xen with one HVM domain, number 5, of ``pages`` frames.

    ``refuse`` maps a domctl, ``"suspend"`` or a log-dirty operator as ``("op", number)`` to the errno it fails with.
    """

    def __init__(self, *, version=0x15, release=(4, 17), pages=200):
        self.version, self.release, self.pages = version, release, pages
        self.refuse, self.calls = {}, []
        self.dirty, self.log_dirty = set(), False
        self.paused, self.shutdown_reason, self.hvm, self.hap, self.dying = 0, None, True, True, False
        self.params, self.closed = {}, False

    def buffer(self, size_bytes):
        return Buffer(-1, size_bytes)

    def close(self):
        self.closed = True

    def hypercall(self, what, op, *arguments):
        if op == uapi.HYPERVISOR_xen_version:
            return self.release[0] << 16 | self.release[1]
        if op == uapi.HYPERVISOR_memory_op:
            return self.pages - 1
        if op == uapi.HYPERVISOR_sched_op:
            if (code := self.refuse.get("suspend")) is not None:
                raise XenError(what, code)
            self.calls.append("suspend")
            self.shutdown_reason = uapi.SHUTDOWN_suspend
            return 0
        if op == uapi.HYPERVISOR_hvm_op:
            asked = uapi.XenHvmParam.from_address(arguments[1])
            asked.value = self.params.get(asked.index, 0)
            return 0
        return self._domctl(what, uapi.XenDomctl.from_address(arguments[0]))

    def _domctl(self, what, request):
        if request.interface_version != self.version:
            raise XenError(what, errno.EACCES)
        if (code := self.refuse.get(request.cmd)) is not None:
            raise XenError(what, code)
        if request.domain not in (0, 5):
            raise XenError(what, errno.ESRCH)
        if request.cmd != uapi.XEN_DOMCTL_getdomaininfo:
            self.calls.append(uapi.DOMCTL_NAMES[request.cmd])
        getattr(self, f"_{uapi.DOMCTL_NAMES[request.cmd]}")(request, request.u)
        return 0

    def _getdomaininfo(self, request, u):
        info = u.getdomaininfo
        info.domain, info.tot_pages, info.nr_online_vcpus = request.domain, self.pages, 1
        hvm = self.hvm and request.domain == 5
        info.flags = hvm * uapi.XEN_DOMINF_hvm_guest | self.hap * uapi.XEN_DOMINF_hap
        info.flags |= (self.paused > 0) * uapi.XEN_DOMINF_paused | self.dying * uapi.XEN_DOMINF_dying
        if self.shutdown_reason is not None:
            info.flags |= uapi.XEN_DOMINF_shutdown | self.shutdown_reason << uapi.XEN_DOMINF_shutdownshift
        info.handle[:] = HANDLE

    def _pausedomain(self, request, u):
        self.paused += 1

    def _unpausedomain(self, request, u):
        if not self.paused:
            raise XenError("unpausedomain", errno.EINVAL)
        self.paused -= 1

    def _resumedomain(self, request, u):
        self.shutdown_reason = None

    def _shadow_op(self, request, u):
        op = u.shadow_op
        self.calls[-1] = uapi.SHADOW_OP_NAMES[op.op]
        if (code := self.refuse.get(("op", op.op))) is not None:
            raise XenError("shadow_op", code)
        if op.op == uapi.XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY:
            if self.log_dirty:
                raise XenError("shadow_op", errno.EINVAL)
            self.log_dirty, self.dirty = True, set()
        elif op.op == uapi.XEN_DOMCTL_SHADOW_OP_OFF:
            self.log_dirty, self.dirty = False, set()
        else:
            self._bitmap(op)

    def _bitmap(self, op):
        if op.dirty_bitmap:
            size_bytes = -(-op.pages // 8)
            bits = np.zeros(size_bytes * 8, np.uint8)
            bits[sorted(self.dirty)] = 1
            ctypes.memmove(op.dirty_bitmap, np.packbits(bits, bitorder="little").tobytes(), size_bytes)
        op.dirty_count, op.fault_count = len(self.dirty), 7
        if op.op == uapi.XEN_DOMCTL_SHADOW_OP_CLEAN:
            self.dirty = set()

    def _getpageframeinfo3(self, request, u):
        asked = u.getpageframeinfo3
        array = (ctypes.c_uint64 * asked.num).from_address(asked.array)
        for at in range(asked.num):
            if array[at] % 10 == 9:
                array[at] |= uapi.XEN_DOMCTL_PFINFO_XTAB

    def _gethvmcontext(self, request, u):
        if u.hvmcontext.buffer:
            ctypes.memmove(u.hvmcontext.buffer, b"context", 7)
        u.hvmcontext.size = 7

    def _gettscinfo(self, request, u):
        u.tsc_info.tsc_mode, u.tsc_info.gtsc_khz, u.tsc_info.elapsed_nsec = 1, 2000, 3

    def _get_cpu_policy(self, request, u):
        leaf = (XenCpuidLeaf * 1).from_address(u.cpu_policy.leaves)[0]
        leaf.leaf, leaf.subleaf, leaf.a, leaf.d = 1, 0xFFFFFFFF, 2, 3
        msr = (XenMsrEntry * 1).from_address(u.cpu_policy.msrs)[0]
        msr.idx, msr.val = 0xCE, 1 << 31
        u.cpu_policy.nr_leaves = u.cpu_policy.nr_msrs = 1
