"""What Control asks of Xen, and what it makes of the answers and refusals."""

import errno

import numpy as np
import pytest
from fake_xen import FakePrivcmd

from pageferry.core.errors import LogDirtyError, UnsupportedError, UsageError, XenError
from pageferry.xen import uapi
from pageferry.xen.domctl import Control


@pytest.mark.parametrize("version", uapi.XEN_DOMCTL_INTERFACE_VERSIONS)
def test_the_interface_version_is_the_one_that_xen_takes(version):
    assert Control(FakePrivcmd(version=version)).interface_version == version


@pytest.mark.parametrize("version", [0x12, 0x19])
def test_a_xen_with_another_interface_is_refused_and_named(version):
    privcmd = FakePrivcmd(version=version, release=(4, 23))
    with pytest.raises(UnsupportedError, match=r"^Xen 4\.23 takes none .* known \(0x13 to 0x18\)$") as refused:
        Control(privcmd)
    assert (refused.value.capability, privcmd.closed) == ("xen-interface", True)


def test_a_domain_without_the_right_is_told_so():
    privcmd = FakePrivcmd()
    privcmd.refuse[uapi.XEN_DOMCTL_getdomaininfo] = errno.EPERM
    with pytest.raises(UnsupportedError, match="lets this domain control no other") as refused:
        Control(privcmd)
    assert refused.value.capability == "xen-dom0"


def test_a_domain_is_told_apart_by_its_flags():
    privcmd = FakePrivcmd()
    privcmd.shutdown_reason, privcmd.paused = uapi.SHUTDOWN_suspend, 1
    info = Control(privcmd).info(5)
    assert (info.uuid, info.is_hvm, info.hap, info.paused) == ("00010203-0405-0607-0809-0a0b0c0d0e0f", True, True, True)
    assert (info.shutdown_reason, info.memory_pages, info.vcpus) == (uapi.SHUTDOWN_suspend, 200, 1)


def test_an_unknown_domain_is_refused_with_a_hint():
    with pytest.raises(UsageError, match="there is no domain 7") as refused:
        Control(FakePrivcmd()).info(7)
    assert refused.value.hint == "pageferry xen list shows the domains"


def test_a_xen_that_answers_with_the_next_domain_is_not_believed():
    privcmd = FakePrivcmd()
    answer = privcmd._getdomaininfo
    privcmd._getdomaininfo = lambda request, u: (answer(request, u), setattr(u.getdomaininfo, "domain", 7))
    control = Control(privcmd)
    with pytest.raises(UsageError, match="there is no domain 5"):
        control.info(5)


def test_the_bitmap_is_copied_out_bit_for_bit():
    privcmd = FakePrivcmd(pages=200)
    privcmd.dirty = {0, 63, 64, 199}
    words = np.zeros(4, np.uint64)
    stats = Control(privcmd).shadow_op(5, uapi.XEN_DOMCTL_SHADOW_OP_PEEK, words=words, pages=200)
    assert words.tolist() == [1 | 1 << 63, 1, 0, 1 << 7]
    assert (stats.dirty_count, stats.fault_count) == (4, 7)


def test_a_refused_operator_is_named_and_no_memory_is_an_incomplete_log():
    privcmd = FakePrivcmd()
    privcmd.refuse = {
        ("op", uapi.XEN_DOMCTL_SHADOW_OP_PEEK): errno.ENOMEM,
        ("op", uapi.XEN_DOMCTL_SHADOW_OP_OFF): errno.EBUSY,
    }
    control = Control(privcmd)
    with pytest.raises(LogDirtyError, match="PEEK: Xen had no memory"):
        control.shadow_op(5, uapi.XEN_DOMCTL_SHADOW_OP_PEEK)
    with pytest.raises(XenError, match=r"^OFF: EBUSY"):
        control.shadow_op(5, uapi.XEN_DOMCTL_SHADOW_OP_OFF)


def test_unpausing_what_is_not_paused_is_no_error():
    Control(FakePrivcmd()).unpause(5)


def test_state_and_policies_come_as_records():
    control = Control(FakePrivcmd())
    leaves, msrs = control.cpu_policy(5)
    assert leaves == ((1, 0xFFFFFFFF, 2, 0, 0, 3),)
    assert (msrs[0].index, msrs[0].flags, msrs[0].value) == (0xCE, 0, 1 << 31)
    assert control.hvm_context(5) == b"context"
    assert (control.tsc_info(5).mode, control.tsc_info(5).khz, control.tsc_info(5).nsec) == (1, 2000, 3)


def test_frames_without_a_page_are_found():
    assert np.flatnonzero(~Control(FakePrivcmd()).present(5, range(5, 30))).tolist() == [4, 14, 24]
