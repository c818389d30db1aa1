"""Control: what dom0 asks Xen about its domains, and has Xen do to them. Each method is one hypercall or a few.

The interface version of domctl changes with Xen's releases and a wrong one is refused, so it is found by asking: the
newest one that Xen takes. What is used here has had the same layout in all known versions.

Source: Xen ``xen/include/public/domctl.h``, ``memory.h``, ``sched.h``, ``hvm/hvm_op.h``.
"""

import ctypes
import errno
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pageferry.core.cpuid import CpuidLeaf
from pageferry.core.errors import LogDirtyError, UnsupportedError, UsageError, XenError
from pageferry.stream.records import MsrEntry, TscInfo
from pageferry.xen import uapi
from pageferry.xen.hypercall import Buffer, Privcmd, expect_dom0

#: More CPUID leaves or MSRs than a policy has.
_MAX_LEAVES, _MAX_MSRS = 4096, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainInfo:
    """What Xen knows of a domain.

    ``shutdown_reason`` is None while it has not shut down; SHUTDOWN_suspend is what a suspended one has.
    """

    domid: int
    uuid: str
    is_hvm: bool
    hap: bool
    paused: bool
    dying: bool
    shutdown_reason: int | None
    memory_pages: int
    vcpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowStats:
    """What a log-dirty operator returns besides the bitmap; both count since the last CLEAN, over the whole domain."""

    fault_count: int
    dirty_count: int


class Control:
    """Xen, as its dom0 controls it. A context manager.

    Args:
        privcmd: the device; None: this host's.

    Raises:
        UnsupportedError: there is no Xen, this is no dom0, the user may not, or Xen is newer than what is known here.
    """

    def __init__(self, privcmd: Privcmd | None = None) -> None:
        if privcmd is None:
            privcmd = Privcmd()
            expect_dom0()
        self.privcmd = privcmd
        self._mine = threading.local()  # each thread has a request of its own
        try:
            version = self._call("xen_version", uapi.HYPERVISOR_xen_version, uapi.XENVER_version, 0)
            self.release = (version >> 16, version & 0xFFFF)
            """Xen's major and minor version."""
            self.interface_version = self._probe()
            """Of domctl."""
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Control":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the device. May be called twice."""
        self.privcmd.close()

    def _call(self, what: str, op: int, *arguments: int) -> int:
        return self.privcmd.hypercall(what, op, *arguments)

    def _probe(self) -> int:
        for version in reversed(uapi.XEN_DOMCTL_INTERFACE_VERSIONS):
            self.interface_version = version
            try:
                self._do(uapi.XEN_DOMCTL_getdomaininfo, 0)
            except XenError as error:
                if error.errno == errno.EACCES:
                    continue
                if error.errno in (errno.EPERM, errno.ENOSYS):
                    raise UnsupportedError(
                        "xen-dom0", "Xen lets this domain control no other", hint="run it in dom0, as root"
                    ) from error
                raise
            return version
        major, minor = self.release
        known = f"{uapi.XEN_DOMCTL_INTERFACE_VERSIONS[0]:#x} to {uapi.XEN_DOMCTL_INTERFACE_VERSIONS[-1]:#x}"
        raise UnsupportedError(
            "xen-interface",
            f"Xen {major}.{minor} takes none of the domctl interface versions that are known ({known})",
            hint="it is older than Xen 4.14, or newer than this pageferry",
        )

    def _do(self, cmd: int, domid: int, fill: Callable[[uapi.XenDomctlU], None] | None = None) -> uapi.XenDomctlU:
        """Perform one domctl; return its union, which the thread's next one overwrites."""
        if not hasattr(self._mine, "buffer"):
            self._mine.buffer = self.privcmd.buffer(ctypes.sizeof(uapi.XenDomctl))
        buffer: Buffer = self._mine.buffer
        request: uapi.XenDomctl = buffer.holding(uapi.XenDomctl)
        request.cmd, request.interface_version, request.domain = cmd, self.interface_version, domid
        request.u.pad[:] = bytes(128)
        if fill is not None:
            fill(request.u)
        # SAFETY: Xen reads and writes the request during the call; this frame holds it. The buffers that it points to
        # are held by the callers' frames.
        self._call(uapi.DOMCTL_NAMES[cmd], uapi.HYPERVISOR_domctl, buffer.hva)
        union: uapi.XenDomctlU = request.u
        return union

    # -- domains -----------------------------------------------------------------------------------------------------

    def info(self, domid: int) -> DomainInfo:
        """Return what Xen knows of a domain.

        Raises:
            UsageError: there is no such domain.
            XenError: Xen refused.
        """
        try:
            found = self._do(uapi.XEN_DOMCTL_getdomaininfo, domid).getdomaininfo
        except XenError as error:
            if error.errno == errno.ESRCH:
                raise _unknown(domid) from error
            raise
        if found.domain != domid:  # older Xen answers with the next one
            raise _unknown(domid)
        reason = found.flags >> uapi.XEN_DOMINF_shutdownshift & uapi.XEN_DOMINF_shutdownmask
        return DomainInfo(
            domid=domid,
            uuid=str(uuid.UUID(bytes=bytes(found.handle))),
            is_hvm=bool(found.flags & uapi.XEN_DOMINF_hvm_guest),
            hap=bool(found.flags & uapi.XEN_DOMINF_hap),
            paused=bool(found.flags & uapi.XEN_DOMINF_paused),
            dying=bool(found.flags & uapi.XEN_DOMINF_dying),
            shutdown_reason=reason if found.flags & uapi.XEN_DOMINF_shutdown else None,
            memory_pages=found.tot_pages,
            vcpus=found.nr_online_vcpus,
        )

    def pause(self, domid: int) -> None:
        """Let no vCPU run; counts. Returns when all have stopped."""
        self._do(uapi.XEN_DOMCTL_pausedomain, domid)

    def unpause(self, domid: int) -> None:
        """Undo one :meth:`pause`; of a domain that is not paused nothing happens."""
        try:
            self._do(uapi.XEN_DOMCTL_unpausedomain, domid)
        except XenError as error:
            if error.errno != errno.EINVAL:
                raise

    def suspend(self, domid: int) -> None:
        """Shut a domain down for the reason *suspend*, without asking it. Returns when no vCPU runs any more."""
        buffer = self.privcmd.buffer(8)
        argument = buffer.holding(uapi.SchedRemoteShutdown)
        argument.domain_id, argument.reason = domid, uapi.SHUTDOWN_suspend
        self._call("remote_shutdown", uapi.HYPERVISOR_sched_op, uapi.SCHEDOP_remote_shutdown, buffer.hva)

    def resume(self, domid: int) -> None:
        """Let a suspended domain run on. Nothing happens to one that is not."""
        self._do(uapi.XEN_DOMCTL_resumedomain, domid)

    # -- log-dirty ---------------------------------------------------------------------------------------------------

    def shadow_op(
        self, domid: int, op: int, *, mode: int = 0, words: NDArray[np.uint64] | None = None, pages: int = 0
    ) -> ShadowStats:
        """Perform one log-dirty operator.

        Args:
            domid: of which domain.
            op: ``XEN_DOMCTL_SHADOW_OP_*``.
            mode: ``XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL`` or 0.
            words: where the bitmap goes, uint64[ceil(pages/64)]; None: the counts only.
            pages: how many frames, from 0 on, the bitmap is of.

        Raises:
            XenError: Xen refused.
            LogDirtyError: Xen had no memory for all of the bitmap.
        """
        size_bytes = -(-pages // 8)
        bitmap = None if words is None else self.privcmd.buffer(max(size_bytes, 1))

        def fill(u: uapi.XenDomctlU) -> None:
            u.shadow_op.op, u.shadow_op.mode, u.shadow_op.pages = op, mode, pages
            u.shadow_op.dirty_bitmap = 0 if bitmap is None else bitmap.hva

        try:
            done = self._do(uapi.XEN_DOMCTL_shadow_op, domid, fill).shadow_op
        except XenError as error:
            name = uapi.SHADOW_OP_NAMES.get(op, f"shadow_op {op}")
            if error.errno == errno.ENOMEM:
                raise LogDirtyError(f"{name}: Xen had no memory for all of the domain's dirty bitmap") from error
            raise XenError(name, error.errno or errno.EIO) from error
        stats = ShadowStats(fault_count=done.fault_count, dirty_count=done.dirty_count)
        if bitmap is not None and words is not None:
            words.view(np.uint8)[:size_bytes] = bitmap.bytes[:size_bytes]
        return stats

    # -- memory ------------------------------------------------------------------------------------------------------

    def gfn_limit(self, domid: int) -> int:
        """Return one more than the domain's highest frame."""
        buffer = self.privcmd.buffer(8)
        buffer.bytes.view(np.uint16)[0] = domid
        return self._call("maximum_gpfn", uapi.HYPERVISOR_memory_op, uapi.XENMEM_maximum_gpfn, buffer.hva) + 1

    def present(self, domid: int, gfns: range) -> NDArray[np.bool_]:
        """Tell for each frame of a range, of at most 1,024, whether a page is there, as bool[n].

        Raises:
            XenError: Xen refused, or a page is broken: its content is lost.
        """
        buffer = self.privcmd.buffer(8 * len(gfns))
        array = buffer.bytes.view(np.uint64)
        array[:] = np.arange(gfns.start, gfns.stop, dtype=np.uint64)

        def fill(u: uapi.XenDomctlU) -> None:
            u.getpageframeinfo3.num, u.getpageframeinfo3.array = len(gfns), buffer.hva

        self._do(uapi.XEN_DOMCTL_getpageframeinfo3, domid, fill)
        types = array & np.uint64(uapi.XEN_DOMCTL_PFINFO_LTAB_MASK)
        if (broken := types == uapi.XEN_DOMCTL_PFINFO_BROKEN).any():
            raise XenError(f"gfn {gfns.start + int(np.argmax(broken)):#x} is broken memory", errno.EIO)
        there: NDArray[np.bool_] = types < uapi.XEN_DOMCTL_PFINFO_XALLOC
        return there

    # -- state -------------------------------------------------------------------------------------------------------

    def hvm_context(self, domid: int) -> bytes:
        """Return the state of a paused domain's vCPUs and of the devices in Xen, as an HVM context."""
        size = int(self._do(uapi.XEN_DOMCTL_gethvmcontext, domid).hvmcontext.size)
        buffer = self.privcmd.buffer(size)

        def fill(u: uapi.XenDomctlU) -> None:
            u.hvmcontext.size, u.hvmcontext.buffer = size, buffer.hva

        found = self._do(uapi.XEN_DOMCTL_gethvmcontext, domid, fill).hvmcontext.size
        return buffer.bytes[:found].tobytes()

    def hvm_param(self, domid: int, index: int) -> int:
        """Return an HVM parameter."""
        buffer = self.privcmd.buffer(16)
        argument = buffer.holding(uapi.XenHvmParam)
        argument.domid, argument.index = domid, index
        self._call("get_param", uapi.HYPERVISOR_hvm_op, uapi.HVMOP_get_param, buffer.hva)
        return int(argument.value)

    def cpu_policy(self, domid: int) -> tuple[tuple[CpuidLeaf, ...], tuple[MsrEntry, ...]]:
        """Return the CPUID leaves and the MSRs that the domain was given."""
        leaves = self.privcmd.buffer(_MAX_LEAVES * 24)
        msrs = self.privcmd.buffer(_MAX_MSRS * 16)

        def fill(u: uapi.XenDomctlU) -> None:
            u.cpu_policy.nr_leaves, u.cpu_policy.leaves = _MAX_LEAVES, leaves.hva
            u.cpu_policy.nr_msrs, u.cpu_policy.msrs = _MAX_MSRS, msrs.hva

        found = self._do(uapi.XEN_DOMCTL_get_cpu_policy, domid, fill).cpu_policy
        rows = leaves.bytes.view(np.uint32).reshape(-1, 6)[: found.nr_leaves].tolist()
        words = msrs.bytes.view(np.uint64).reshape(-1, 2)[: found.nr_msrs].tolist()
        entries = tuple(MsrEntry(index=both & 0xFFFF_FFFF, flags=both >> 32, value=value) for both, value in words)
        return tuple(CpuidLeaf(*row) for row in rows), entries

    def tsc_info(self, domid: int) -> TscInfo:
        """Return how the domain's time stamp counter is provided."""
        found = self._do(uapi.XEN_DOMCTL_gettscinfo, domid).tsc_info
        return TscInfo(mode=found.tsc_mode, khz=found.gtsc_khz, nsec=found.elapsed_nsec, incarnation=found.incarnation)

    def set_rax(self, domid: int, vcpu: int, value: int) -> None:
        """Set RAX of a vCPU of a domain that is suspended: what the hypercall by which it did so returns."""
        buffer = self.privcmd.buffer(uapi.VCPU_GUEST_CONTEXT_BYTES)

        def fill(u: uapi.XenDomctlU) -> None:
            u.vcpucontext.vcpu, u.vcpucontext.ctxt = vcpu, buffer.hva

        self._do(uapi.XEN_DOMCTL_getvcpucontext, domid, fill)
        at = uapi.VCPU_GUEST_CONTEXT_RAX
        buffer.bytes[at : at + 8].view(np.uint64)[0] = value
        self._do(uapi.XEN_DOMCTL_setvcpucontext, domid, fill)


def _unknown(domid: int) -> UsageError:
    return UsageError(f"there is no domain {domid}", hint="pageferry xen list shows the domains")
