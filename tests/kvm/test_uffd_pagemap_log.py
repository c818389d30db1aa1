"""What is particular to asynchronous write protection and PAGEMAP_SCAN; the promises are the conformance kit's."""

import contextlib
import errno
import gc
import os

import numpy as np
import pytest

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import UffdError, UnsupportedError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import VmConfig
from pageferry.kvm import KvmVm
from pageferry.uffd import PagemapScanLog, VcpuView, fds, pagemap_log, uapi

GiB = 1 << 30
FIRST_ABOVE = 4 * GiB >> 12

pytestmark = pytest.mark.kvm


@pytest.fixture(autouse=True)
def pagemap_scan(kvm_support):
    try:
        fds.check_pagemap_scan()
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.fixture
def made():
    """Makes a log over memory without a machine; the test's own writes to the vCPUs' mapping stand for a vCPU's."""
    logs = []

    def make(memory_bytes=8 << 20):
        memory = GuestMemory.linear(memory_bytes)
        log = PagemapScanLog(VcpuView(memory=memory, mapping=memory.map_again()))
        memory.on_write(log.mark)
        logs.append(log)
        return log

    yield make
    for log in logs:
        log.close()


def write(log, *gfns):
    for gfn in gfns:
        log._view.mapping.view[gfn * PAGE_SIZE] = 1


def open_descriptors():
    """Return what is open of userfaultfd, pagemap and KVM."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(name for name in names if any(ours in name for ours in ("userfaultfd", "pagemap", "kvm")))


def test_the_hosts_writes_are_marked_and_protect_and_unprotect_nothing(made):
    log = made()
    log.enable()
    log._view.memory.write(5 * PAGE_SIZE, b"host")
    assert not log._look().any()
    assert log.clean().gfns().tolist() == [5]
    write(log, 5)
    assert log._look().gfns().tolist() == [5]
    log._view.memory.write(5 * PAGE_SIZE, b"host")
    assert log.clean().gfns().tolist() == [5]
    assert not log.clean().any()


def test_more_regions_than_fit_into_one_scan(made, monkeypatch):
    monkeypatch.setattr(fds, "_REGIONS", 3)
    log = made()
    log.enable()
    gfns = [*range(0, 40, 2), 700, 701, 2047]
    write(log, *gfns)
    assert log.peek().gfns().tolist() == gfns
    assert log.clean().gfns().tolist() == gfns
    assert not log.peek().any()


def test_regions_on_both_sides_of_the_pci_hole(made):
    log = made(3 * GiB + 3 * PAGE_SIZE)
    log.enable()
    gfns = [0, FIRST_ABOVE - (1 << 18) - 1, FIRST_ABOVE, FIRST_ABOVE + 2]
    write(log, *gfns)
    assert log.clean_range(range(64, FIRST_ABOVE)).gfns().tolist() == gfns[1:2]
    assert log.peek().gfns().tolist() == [gfns[0], *gfns[2:]]
    assert log.clean().gfns().tolist() == [gfns[0], *gfns[2:]]
    write(log, *gfns)
    assert log.clean().gfns().tolist() == gfns


def test_only_spans_around_what_was_written_are_protected_again(made, monkeypatch):
    log = made()
    log.enable()
    near = pagemap_log._SCAN_GAP_PAGES
    write(log, 100, 100 + near, 1000)
    scans = []
    scan = log._scan
    monkeypatch.setattr(
        log,
        "_scan",
        lambda part, bitmap, *, protect: scans.append((part, protect)) or scan(part, bitmap, protect=protect),
    )
    assert log.clean().gfns().tolist() == [100, 100 + near, 1000]
    assert scans == [(range(2048), False), (range(100, 101 + near), True), (range(1000, 1001), True)]


def test_a_page_written_between_the_look_and_the_protection_is_in_this_bitmap_or_the_next(made, monkeypatch):
    log = made()
    log.enable()
    write(log, 10, 12)
    scan = log._scan

    def scan_and_write(part, bitmap, *, protect):
        scan(part, bitmap, protect=protect)
        if not protect:
            write(log, 11, 500)

    monkeypatch.setattr(log, "_scan", scan_and_write)
    assert log.clean().gfns().tolist() == [10, 11, 12]
    monkeypatch.undo()
    assert log.clean().gfns().tolist() == [500]


def test_a_clean_that_fails_half_way_loses_no_bit(made, monkeypatch):
    log = made(3 * GiB + 3 * PAGE_SIZE)
    log.enable()
    gfns = {3, 9, 1000, FIRST_ABOVE}
    write(log, *gfns)
    ioctl = log._pagemap.ioctl
    for passed in range(5):
        calls = []

        def refuse(request, argument, passed=passed, calls=calls):
            calls.append(argument.flags)
            result = ioctl(request, argument)
            if len(calls) > passed and argument.flags & uapi.PM_SCAN_WP_MATCHING:
                raise UffdError("PAGEMAP_SCAN", errno.ENOMEM)  # after the work: as it is when the copy to us fails
            return result

        with monkeypatch.context() as patch:
            patch.setattr(log._pagemap, "ioctl", refuse)
            with pytest.raises(UffdError, match="PAGEMAP_SCAN"):
                log.clean()
        found = log.peek()
        assert gfns <= set(found.gfns().tolist()) <= set(range(3, 10)) | gfns
        log.give_back(found)
        write(log, *gfns)
    assert gfns <= set(log.clean().gfns().tolist())
    assert not log.clean().any()


def test_an_enable_that_fails_half_way_is_off_and_leaves_nothing_behind(made, monkeypatch):
    log = made(3 * GiB + 3 * PAGE_SIZE)
    before = open_descriptors()
    for step in ("register", "protect"):
        real = getattr(fds.UffdFd, step)

        def refuse(uffd, hva, size_bytes, real=real):
            if hva != log._view.mapping.hva:  # the second region
                raise UffdError("UFFDIO", errno.ENOMEM)
            real(uffd, hva, size_bytes)

        with monkeypatch.context() as patch:
            patch.setattr(fds.UffdFd, step, refuse)
            with pytest.raises(UffdError, match="ENOMEM"):
                log.enable()
        assert not log.enabled
        assert open_descriptors() == before
        write(log, 1, FIRST_ABOVE)
    log.enable()
    assert not log.peek().any()


def test_close_gives_every_descriptor_and_mapping_back():
    def maps():
        with open("/proc/self/maps") as file:
            return file.read().count("pageferry-ram")

    gc.collect()
    before, mapped = open_descriptors(), maps()
    vm = KvmVm(VmConfig(memory_bytes=4 << 20), tracker="pagemap-scan")
    vm.log_dirty.enable()
    assert maps() == mapped + 2
    vm.close()
    assert open_descriptors() == before
    del vm
    gc.collect()
    assert maps() == mapped


def test_descriptors_are_closed_on_exec(made):
    log = made()
    log.enable()
    assert not os.get_inheritable(log._uffd.fileno())
    assert not os.get_inheritable(log._pagemap.fileno())


def test_what_is_missing_is_named(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(uapi, "PAGEMAP_SCAN", 0xC0606611)
        patch.setitem(uapi.IOCTL_NAMES, 0xC0606611, "PAGEMAP_SCAN")
        with pytest.raises(UnsupportedError, match="no PAGEMAP_SCAN") as missing:
            KvmVm(VmConfig(memory_bytes=4 << 20), tracker="pagemap-scan")
        assert missing.value.capability == "PAGEMAP_SCAN"
    with monkeypatch.context() as patch:
        patch.setattr(fds, "PAGEMAP", "/nonexistent/pagemap")
        with pytest.raises(UnsupportedError, match="cannot be opened: No such file") as missing:
            fds.check_pagemap_scan()
        assert missing.value.capability == "pagemap"


def test_marks_race_with_nothing_while_off(made):
    log = made()
    log.mark(np.array([1], np.uint64))
    log.enable()
    assert log.clean() == DirtyBitmap(2048)
