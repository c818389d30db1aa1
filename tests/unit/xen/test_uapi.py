"""The transcription has the sizes and offsets of Xen's headers, and of the kernel's."""

import ctypes

import pytest

from pageferry.xen import uapi


@pytest.mark.parametrize(
    ("structure", "size"),
    [
        (uapi.PrivcmdHypercall, 48),
        (uapi.PrivcmdMmapbatchV2, 32),
        (uapi.XenDomctlGetdomaininfo, 96),
        (uapi.XenDomctlShadowOp, 40),
        (uapi.XenDomctlVcpucontext, 16),
        (uapi.XenDomctlHvmcontext, 16),
        (uapi.XenDomctlTscInfo, 24),
        (uapi.XenDomctlGetpageframeinfo3, 16),
        (uapi.XenDomctlCpuPolicy, 40),
        (uapi.XenDomctl, 144),
        (uapi.XenHvmParam, 16),
        (uapi.SchedRemoteShutdown, 8),
    ],
)
def test_a_structure_has_its_size(structure, size):
    assert ctypes.sizeof(structure) == size


@pytest.mark.parametrize(
    ("field", "offset"),
    [
        (uapi.XenDomctl.domain, 8),
        (uapi.XenDomctl.u, 16),
        (uapi.XenDomctlShadowOp.dirty_bitmap, 16),
        (uapi.XenDomctlShadowOp.pages, 24),
        (uapi.XenDomctlShadowOp.fault_count, 32),
        (uapi.XenDomctlGetdomaininfo.tot_pages, 8),
        (uapi.XenDomctlGetdomaininfo.cpu_time, 56),
        (uapi.XenDomctlGetdomaininfo.handle, 76),
        (uapi.XenDomctlCpuPolicy.leaves, 8),
        (uapi.PrivcmdMmapbatchV2.addr, 8),
    ],
)
def test_a_field_has_its_offset(field, offset):
    assert field.offset == offset


def test_an_ioctl_tells_its_arguments_size():
    sizes = {
        uapi.IOCTL_PRIVCMD_HYPERCALL: uapi.PrivcmdHypercall,
        uapi.IOCTL_PRIVCMD_MMAPBATCH_V2: uapi.PrivcmdMmapbatchV2,
    }
    assert {number >> 16 for number in sizes} == {ctypes.sizeof(structure) for structure in sizes.values()}
