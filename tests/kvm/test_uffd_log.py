"""What the trackers by the host's page tables have in common; the promises are the conformance kit's."""

import contextlib
import errno
import gc
import re

import numpy as np
import pytest

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import UffdError, VmError
from pageferry.core.frames import PAGE_SIZE, SIZE_2M
from pageferry.core.vm import VmConfig
from pageferry.kvm.vm import KvmVm
from pageferry.uffd import fds
from pageferry.uffd.pagemap_log import PagemapScanLog
from pageferry.uffd.view import SPAN_GAP_WORDS, VcpuView, spans_of
from pageferry.uffd.write_protect_log import WriteProtectLog

GiB = 1 << 30
MADV_COLLAPSE = 25
FIRST_ABOVE = 4 * GiB >> 12

pytestmark = pytest.mark.kvm


@pytest.fixture(params=[WriteProtectLog, PagemapScanLog])
def log(request, make_uffd_log):
    return make_uffd_log(request.param, 3 * GiB + 3 * PAGE_SIZE)


def test_the_hosts_writes_are_marked_and_never_fault(log, by_vcpu):
    log.enable()
    log._view.memory.write(5 * PAGE_SIZE, b"host")  # with the interpreter lock: a fault would stop everything
    log._view.memory.copy_within(5 * PAGE_SIZE, 7 * PAGE_SIZE, PAGE_SIZE)
    assert not log._look().any()
    assert log.clean().gfns().tolist() == [5, 7]
    by_vcpu(log, 5)
    assert log._look().gfns().tolist() == [5]
    log._view.memory.write(5 * PAGE_SIZE, b"host")
    assert log.clean().gfns().tolist() == [5]
    assert not log.clean().any()


def test_regions_on_both_sides_of_the_pci_hole(log, by_vcpu):
    log.enable()
    gfns = [0, (3 * GiB >> 12) - 1, FIRST_ABOVE, FIRST_ABOVE + 2]
    by_vcpu(log, *gfns)
    assert log.clean_range(range(64, FIRST_ABOVE)).gfns().tolist() == gfns[1:2]
    assert log.peek().gfns().tolist() == [gfns[0], *gfns[2:]]
    assert log.clean().gfns().tolist() == [gfns[0], *gfns[2:]]
    by_vcpu(log, *gfns)
    assert log.clean().gfns().tolist() == gfns


def test_marks_of_frames_in_the_pci_hole_are_ignored(log):
    log.enable()
    log.mark(np.array([3 * GiB >> 12, FIRST_ABOVE - 1, FIRST_ABOVE, 1 << 40], np.uint64))
    assert log.clean().gfns().tolist() == [FIRST_ABOVE]


def test_a_page_that_is_read_first_stays_protected(log, by_vcpu):
    log._view.memory.write(9 * PAGE_SIZE, b"x")
    log.enable()
    assert log._view.mapping.view[9 * PAGE_SIZE] == ord("x")
    assert log._view.mapping.view[10 * PAGE_SIZE] == 0  # without storage until now
    assert not log.peek().any()
    by_vcpu(log, 9, 10)
    assert log.clean().gfns().tolist() == [9, 10]


def test_an_enable_that_fails_half_way_is_off_and_leaves_nothing_behind(log, by_vcpu, open_descriptors, monkeypatch):
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
        by_vcpu(log, 1, FIRST_ABOVE)
    log.enable()
    assert not log.peek().any()


def test_an_off_that_the_kernel_refuses_is_off_all_the_same(log, by_vcpu, monkeypatch):
    log.enable()
    real, asked = fds.UffdFd.unregister, []

    def refuse(uffd, hva, size_bytes):
        asked.append(hva)
        real(uffd, hva, size_bytes)
        if len(asked) == 1:
            raise UffdError("UFFDIO_UNREGISTER", errno.ENOMEM)

    monkeypatch.setattr(fds.UffdFd, "unregister", refuse)
    with pytest.raises(UffdError, match="UFFDIO_UNREGISTER"):
        log.off()
    assert len(asked) == 2
    assert not log.enabled
    log.off()
    by_vcpu(log, 1, FIRST_ABOVE)
    log.enable()
    assert not log.peek().any()


def test_descriptors_are_closed_on_exec(log, open_descriptors):
    before = open_descriptors()
    log.enable()
    after = open_descriptors()
    assert len(after) > len(before)
    assert not any(inheritable for _, inheritable in after)


@pytest.mark.parametrize(("tracker", "kind"), [("uffd-wp", WriteProtectLog), ("pagemap-scan", PagemapScanLog)])
def test_close_gives_every_descriptor_and_mapping_back(make_uffd_log, tracker, kind, open_descriptors):
    make_uffd_log(kind)  # or it is skipped

    def maps():
        with open("/proc/self/maps") as file:
            return file.read().count("pageferry-ram")

    gc.collect()
    before, mapped = open_descriptors(), maps()
    vm = KvmVm(VmConfig(memory_bytes=4 << 20), tracker=tracker)
    vm.log_dirty.enable()
    assert maps() == mapped + 2
    assert vm.slots[0].userspace_addr == vm.vcpu_mapping.hva != vm.memory.mapping.hva
    vm.close()
    assert open_descriptors() == before
    assert maps() <= mapped + 1  # at the most everybody's: views of it may live on
    del vm
    gc.collect()
    assert maps() == mapped


def test_spans_are_whole_words_inside_the_part():
    gap = 64 * SPAN_GAP_WORDS
    bitmap = DirtyBitmap.of(4000, [3, 63, 64, 64 + gap, 2000, 2000 + gap + 64, 3999])
    assert list(spans_of(bitmap, range(4000))) == [
        range(128 + gap),
        range(1984, 2048),
        range(1984 + gap + 64, 2048 + gap + 64),
        range(3968, 4000),
    ]
    assert list(spans_of(bitmap, range(64, 128))) == [range(64, 128)]
    assert list(spans_of(bitmap, range(128, 256))) == []
    assert list(spans_of(bitmap, range(64, 4000)))[-1] == range(3968, 4000)
    assert list(spans_of(DirtyBitmap.of(4000, [700]), range(640, 704))) == [range(640, 704)]


def test_parts_are_what_of_a_range_is_ram(log):
    view = log._view
    assert isinstance(view, VcpuView)
    low, limit = 3 * GiB >> 12, view.memory.gfn_limit
    assert list(view.parts(range(limit))) == [range(low), range(FIRST_ABOVE, limit)]
    assert list(view.parts(range(64, 128))) == [range(64, 128)]
    assert list(view.parts(range(low, FIRST_ABOVE))) == []
    assert list(view.parts(range(low - 64, limit + 64))) == [range(low - 64, low), range(FIRST_ABOVE, limit)]


def huge_kib(mapping):
    """Return how much of a mapping the host maps by huge pages."""
    total, ours = 0, False
    with open("/proc/self/smaps") as file:
        for line in file:
            if found := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
                ours = mapping.hva <= int(found[1], 16) < mapping.hva + mapping.size_bytes
            elif ours and line.startswith("ShmemPmdMapped:"):
                total += int(line.split()[1])
    return total


@pytest.mark.parametrize("kind", [WriteProtectLog, PagemapScanLog])
def test_huge_pages_of_the_host_are_split_while_log_dirty_is_on_and_may_come_back(make_uffd_log, by_vcpu, kind):
    log = make_uffd_log(kind, 16 << 20)
    view = log._view
    log._view.memory.populate(np.array([0], np.uint64), np.array([4096], np.uint64))
    first = -view.mapping.hva % SIZE_2M >> 12  # of 3 huge pages in a row

    def collapse():
        view.mapping.advise(first << 12, 3 * SIZE_2M, MADV_COLLAPSE)

    try:
        collapse()
    except VmError as error:
        pytest.skip(f"no huge pages under memfds here: {error}")
    assert huge_kib(view.mapping) == 3 * SIZE_2M >> 10
    log.enable()
    assert huge_kib(view.mapping) == 0
    gfns = [first + gfn for gfn in (5, 513, 514, 1500)]
    for _ in range(2):
        by_vcpu(log, *gfns)
        assert log.clean().gfns().tolist() == gfns
    by_vcpu(log, *gfns)
    with contextlib.suppress(VmError):  # this kernel does not while pages are watched one by one
        collapse()
    assert log.clean().gfns().tolist() == gfns
    log.off()
    collapse()
    assert huge_kib(view.mapping) == 3 * SIZE_2M >> 10
