import errno

import numpy as np
import pytest

from pageferry.core.vm import VmConfig
from pageferry.hypervisor import domctl
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.domctl import ShadowOp, ShadowOpArguments, shadow_op

MiB = 1 << 20
PAGES = 6 * 256 + 3


@pytest.fixture
def domain():
    made = Domain(VmConfig(memory_bytes=PAGES << 12))
    yield made
    made.close()


def call(domain, op, **arguments):
    given = ShadowOpArguments(**arguments)
    return shadow_op(domain, op, given), given


def report(domain, op, pages=PAGES, **arguments):
    buffer = bytearray(-(-PAGES // 8) + 4)
    buffer[:] = b"\xee" * len(buffer)
    code, given = call(domain, op, dirty_bitmap=buffer, pages=pages, **arguments)
    assert code == 0
    written = -(-pages // 8)
    assert buffer[written:] == b"\xee" * (len(buffer) - written)  # only ceil(pages/8) bytes are written
    return np.flatnonzero(np.unpackbits(np.frombuffer(buffer[:written], np.uint8), bitorder="little")).tolist(), given


def test_the_numbers_are_xens():
    assert {op.name: op.value for op in ShadowOp} == {
        "OFF": 0,
        "ENABLE_TEST": 1,
        "ENABLE_LOGDIRTY": 2,
        "CLEAN": 11,
        "PEEK": 12,
        "GET_ALLOCATION": 30,
        "SET_ALLOCATION": 31,
        "ENABLE": 32,
    }
    assert (domctl.LOGDIRTY_FINAL, domctl.ENABLE_LOG_DIRTY) == (1, 4)


def test_a_migration_through_the_hypercall(domain):
    assert shadow_op(domain, ShadowOp.ENABLE_LOGDIRTY) == 0
    for gfn in (3, 700, PAGES - 1):
        domain.paging.fix_and_mark(gfn)
    found, given = report(domain, ShadowOp.PEEK)
    assert (found, given.dirty_count, given.fault_count, given.pages) == ([3, 700, PAGES - 1], 3, 3, PAGES)
    assert report(domain, ShadowOp.CLEAN, mode=domctl.LOGDIRTY_FINAL)[0] == [3, 700, PAGES - 1]
    assert report(domain, ShadowOp.CLEAN)[0] == []
    assert shadow_op(domain, ShadowOp.OFF) == shadow_op(domain, ShadowOp.OFF) == 0
    assert not domain.paging.enabled


def test_without_a_buffer_only_the_counts_come_and_clean_still_clears(domain):
    call(domain, ShadowOp.ENABLE, mode=domctl.ENABLE_LOG_DIRTY)
    domain.paging.fix_and_mark(3)
    for op in (ShadowOp.PEEK, ShadowOp.CLEAN):
        code, given = call(domain, op, pages=PAGES)
        assert (code, given.dirty_count) == (0, 1)
    assert report(domain, ShadowOp.PEEK)[0] == []


def test_a_short_clean_leaves_the_bits_beyond_it(domain):
    shadow_op(domain, ShadowOp.ENABLE_LOGDIRTY)
    for gfn in (3, 12, 13, 700):
        domain.paging.fix_and_mark(gfn)
    found, given = report(domain, ShadowOp.CLEAN, pages=13)
    assert (found, given.pages, given.dirty_count) == ([3, 12], 13, 4)
    assert report(domain, ShadowOp.CLEAN)[0] == [13, 700]


def test_while_off_the_bitmap_is_empty_and_not_an_error(domain):
    for op in (ShadowOp.PEEK, ShadowOp.CLEAN):
        found, given = report(domain, op)
        assert (found, given.dirty_count) == ([], 0)


def test_what_is_refused(domain):
    assert shadow_op(None, ShadowOp.PEEK) == -errno.ESRCH
    for op in (3, 10, 99, ShadowOp.ENABLE_TEST, ShadowOp.ENABLE):
        assert shadow_op(domain, op) == -errno.EINVAL
    assert call(domain, ShadowOp.CLEAN, mode=2)[0] == -errno.EINVAL
    assert shadow_op(domain, ShadowOp.ENABLE_LOGDIRTY) == 0
    assert shadow_op(domain, ShadowOp.ENABLE_LOGDIRTY) == -errno.EINVAL
    domain.paging.fix_and_mark(3)
    for buffer in (bytearray(PAGES // 8), memoryview(bytes(PAGES))):
        assert call(domain, ShadowOp.CLEAN, dirty_bitmap=buffer, pages=PAGES)[0] == -errno.EFAULT
    assert domain.paging.peek().count() == 1
    domain.close()
    assert shadow_op(domain, ShadowOp.PEEK) == -errno.ESRCH


def test_the_allocation_in_mib_and_what_happens_without(domain):
    code, given = call(domain, ShadowOp.GET_ALLOCATION)
    assert (code, given.mb) == (0, 1)
    assert call(domain, ShadowOp.SET_ALLOCATION, mb=0)[0] == -errno.ENOMEM
    assert call(domain, ShadowOp.SET_ALLOCATION, mb=1000)[0] == -errno.ENOMEM
    domain.set_allocation(domain.machine.pool.used)
    assert shadow_op(domain, ShadowOp.ENABLE_LOGDIRTY) == -errno.ENOMEM
    domain.set_allocation(domain.machine.pool.used + 1)
    assert shadow_op(domain, ShadowOp.ENABLE_LOGDIRTY) == 0
    domain.paging.fix_and_mark(3)
    for op in (ShadowOp.PEEK, ShadowOp.CLEAN):
        assert shadow_op(domain, op) == -errno.ENOMEM
    assert domain.paging.stats().dirty_count == 512
