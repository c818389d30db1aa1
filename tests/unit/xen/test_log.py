"""XenLogDirty where it does more, or something else, than pass an operator on."""

import errno

import numpy as np
import pytest
from fake_xen import FakePrivcmd

from pageferry.core.errors import LogDirtyError
from pageferry.core.memory import GuestMemory
from pageferry.xen import uapi
from pageferry.xen.domctl import Control
from pageferry.xen.log import XenLogDirty

PAGES = 600


@pytest.fixture
def xen():
    return FakePrivcmd(pages=PAGES)


@pytest.fixture
def notes():
    return []


@pytest.fixture
def log(xen, notes):
    memory = GuestMemory.linear(PAGES << 12)
    return XenLogDirty(Control(xen), 5, memory, hap=True, note=notes.append)


def test_each_operator_is_xens(xen, log):
    log.enable()
    log.peek()
    log.clean()
    log.off()
    assert xen.calls == ["ENABLE_LOGDIRTY", "PEEK", "CLEAN", "OFF"]


def test_what_is_off_is_refused_here_although_xen_answers(xen, log):
    for call in (log.peek, log.clean, log.stats, lambda: log.clean_range(range(64))):
        with pytest.raises(LogDirtyError, match="log-dirty is off"):
            call()
    log.off()
    assert xen.calls == []


def test_a_log_that_someone_else_has_on_is_left_alone(xen, log, notes):
    xen.log_dirty = True
    with pytest.raises(LogDirtyError, match="on already, or the domain has a passed-through device"):
        log.enable()
    log.off()
    assert (xen.log_dirty, log.enabled, notes) == (True, False, [1, 0])


def test_it_is_written_down_before_it_is_on_and_after_it_is_off(xen, log, notes):
    log.enable()
    assert notes == [1]
    xen.refuse[("op", uapi.XEN_DOMCTL_SHADOW_OP_OFF)] = errno.EIO
    with pytest.raises(Exception, match="OFF: EIO"):
        log.off()
    assert notes == [1]  # it may be on still: whoever comes next is to know


def test_a_clean_of_a_part_keeps_the_bits_of_all_others(xen, log):
    log.enable()
    xen.dirty = {1, 70, 500}
    assert log.clean_range(range(64, 128)).gfns().tolist() == [70]
    assert xen.dirty == set()
    xen.dirty = {2}
    assert log.peek().gfns().tolist() == [1, 2, 500]
    assert log.stats().dirty_count == 3
    assert log.clean().gfns().tolist() == [1, 2, 500]
    assert log.clean().gfns().tolist() == []


def test_frames_that_are_no_memory_here_are_left_out(xen, log):
    log.enable()
    log._memory.remove(np.array([3], np.uint64))
    xen.dirty = {3, 4}
    assert log.clean().gfns().tolist() == [4]


def test_marks_are_kept_here_for_xen_does_not_see_such_writes(xen, log):
    log.enable()
    log.mark(np.array([9, PAGES + 7], np.uint64))
    assert log.peek().gfns().tolist() == log.clean().gfns().tolist() == [9]
    assert xen.dirty == set()


def test_the_last_bitmap_asks_for_what_the_hypervisor_has_mapped(xen, log):
    modes = []
    xen._bitmap = lambda op: modes.append(op.mode)
    log.enable()
    log.peek_final()
    log.peek()
    assert modes == [uapi.XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL, 0]


@pytest.mark.parametrize(("hap", "faults"), [(True, [None, None]), (False, [7, 14])])
def test_faults_are_counted_under_shadow_paging_only(xen, hap, faults):
    log = XenLogDirty(Control(xen), 5, GuestMemory.linear(PAGES << 12), hap=hap)
    log.enable()
    before = log.stats().fault_count
    log.clean()
    assert [before, log.stats().fault_count] == faults
