"""What is particular to asynchronous write protection and PAGEMAP_SCAN; the promises are the conformance kit's."""

import errno
from functools import partial

import pytest
from altered import alter

from pageferry.core import pagemap
from pageferry.core.errors import UffdError, UnsupportedError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.vm import VmConfig
from pageferry.kvm.vm import KvmVm
from pageferry.uffd import fds
from pageferry.uffd.pagemap_log import PagemapScanLog
from pageferry.uffd.view import SPAN_GAP_WORDS

GiB = 1 << 30
FIRST_ABOVE = 4 * GiB >> 12

pytestmark = pytest.mark.kvm


@pytest.fixture
def made(make_uffd_log):
    return partial(make_uffd_log, PagemapScanLog)


def test_more_regions_than_fit_into_one_scan(made, by_vcpu, monkeypatch):
    monkeypatch.setattr(pagemap, "_REGIONS", 3)
    log = made()
    log.enable()
    gfns = [*range(0, 40, 2), 700, 701, 2047]
    by_vcpu(log, *gfns)
    assert log.peek().gfns().tolist() == gfns
    assert log.clean().gfns().tolist() == gfns
    assert not log.peek().any()


def test_only_spans_around_what_was_written_are_protected_again(made, by_vcpu):
    log = made()
    log.enable()
    near = SPAN_GAP_WORDS * 64
    by_vcpu(log, 100, 100 + near, 2000)
    scans, scan = [], log._scan

    def noted(part, bitmap, *, protect):
        scans.append((part, protect))
        scan(part, bitmap, protect=protect)

    alter(log, "_scan", lambda _: noted)
    assert log.clean().gfns().tolist() == [100, 100 + near, 2000]
    assert scans == [(range(2048), False), (range(64, 128 + near), True), (range(1984, 2048), True)]


def test_a_page_written_between_the_look_and_the_protection_is_in_this_bitmap_or_the_next(made, by_vcpu):
    log = made()
    log.enable()
    by_vcpu(log, 10, 12)
    scan, late = log._scan, [11, 500]

    def scan_and_write(part, bitmap, *, protect):
        scan(part, bitmap, protect=protect)
        if not protect and late:
            by_vcpu(log, *late)
            late.clear()

    alter(log, "_scan", lambda _: scan_and_write)
    assert log.clean().gfns().tolist() == [10, 11, 12]
    assert log.clean().gfns().tolist() == [500]


def test_a_clean_that_fails_half_way_loses_no_bit(made, by_vcpu, monkeypatch):
    log = made(3 * GiB + 3 * PAGE_SIZE)
    log.enable()
    gfns = {3, 9, 2000, FIRST_ABOVE}
    by_vcpu(log, *gfns)
    ioctl = log._pagemap.ioctl
    for passed in range(5):
        calls = []

        def refuse(request, argument, passed=passed, calls=calls):
            calls.append(argument.flags)
            result = ioctl(request, argument)
            if len(calls) > passed and argument.flags & pagemap.PM_SCAN_WP_MATCHING:
                raise UffdError("PAGEMAP_SCAN", errno.ENOMEM)  # after the work: as it is when the copy to us fails
            return result

        with monkeypatch.context() as patch:
            patch.setattr(log._pagemap, "ioctl", refuse)
            with pytest.raises(UffdError, match="PAGEMAP_SCAN"):
                log.clean()
        found = log.peek()
        assert (
            gfns
            <= set(found.gfns().tolist())
            <= set(range(64)) | set(range(1984, 2048)) | {FIRST_ABOVE, FIRST_ABOVE + 1, FIRST_ABOVE + 2}
        )
        log.mark(found.gfns())
        by_vcpu(log, *gfns)
    assert gfns <= set(log.clean().gfns().tolist())
    assert not log.clean().any()


def test_what_is_missing_is_named(made, monkeypatch):
    made()
    with monkeypatch.context() as patch:
        patch.setattr(pagemap, "PAGEMAP_SCAN", 0xC0606611)
        patch.setitem(pagemap.IOCTL_NAMES, 0xC0606611, "PAGEMAP_SCAN")
        with pytest.raises(UnsupportedError, match="no PAGEMAP_SCAN") as missing:
            KvmVm(VmConfig(memory_bytes=4 << 20), tracker="pagemap-scan")
        assert missing.value.capability == "PAGEMAP_SCAN"
    with monkeypatch.context() as patch:
        patch.setattr(pagemap, "PAGEMAP", "/nonexistent/pagemap")
        with pytest.raises(UnsupportedError, match="cannot be opened: No such file") as missing:
            fds.check_pagemap_scan()
        assert missing.value.capability == "pagemap"
