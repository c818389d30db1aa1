import numpy as np
import pytest
from soft import access

from pageferry.core.errors import GuestCrash, LogDirtyError, UnsupportedError
from pageferry.core.vm import VmConfig
from pageferry.hypervisor import invariants
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.npf import Resolution, nested_page_fault
from pageferry.hypervisor.p2m_types import READABLE, P2MType

MiB = 1 << 20


@pytest.fixture
def domain():
    made = Domain(VmConfig(memory_bytes=6 * MiB + 4096))
    yield made
    made.close()


def write(domain, *gfns):
    for gfn in gfns:
        access(domain, gfn, write=True)


def marks(*gfns):
    return np.array(gfns, np.uint64)


def types(domain, *gfns):
    return [P2MType(domain.p2m.lookup(gfn)[1]).name for gfn in gfns]


def test_a_cycle(domain):
    paging = domain.paging
    paging.enable()
    assert paging.stats().dirty_count == 0
    assert types(domain, 0, 1536) == ["RAM_LOGDIRTY"] * 2
    write(domain, 5, 700, 1536)
    invariants.check(domain)
    assert types(domain, 5, 6, 700, 1536) == ["RAM_RW", "RAM_LOGDIRTY", "RAM_RW", "RAM_RW"]
    assert paging.peek().gfns().tolist() == [5, 700, 1536]
    assert paging.clean().gfns().tolist() == [5, 700, 1536]
    invariants.check(domain)
    assert types(domain, 5, 6, 700, 1536) == ["RAM_LOGDIRTY"] * 4
    assert paging.clean().gfns().tolist() == []
    paging.off()
    assert types(domain, 5, 6, 700, 1536) == ["RAM_RW"] * 4


def test_the_cycle_of_a_range_ends_and_that_of_the_others_goes_on(domain):
    paging = domain.paging
    paging.enable()
    write(domain, 5, 63, 64, 700, 1536)
    paging.mark(marks(6, 65))
    assert paging.clean_range(range(64, 704)).gfns().tolist() == [64, 65, 700]
    invariants.check(domain)
    assert types(domain, 5, 63, 64, 700, 1536) == ["RAM_RW", "RAM_RW", "RAM_LOGDIRTY", "RAM_LOGDIRTY", "RAM_RW"]
    assert paging.journal().tolist() == [5, 63, 1536]
    write(domain, 64)
    assert paging.clean_range(range(64)).gfns().tolist() == [5, 6, 63]
    assert paging.clean_range(range(1536, 1 << 40)).gfns().tolist() == [1536]
    assert paging.clean().gfns().tolist() == [64]
    assert paging.journal().size == 0
    invariants.check(domain)


def test_frames_that_others_write_are_set_again_only_in_the_range(domain):
    paging = domain.paging
    paging.enable()
    paging.hold_writable(marks(3, 70))
    assert paging.clean_range(range(64)).gfns().tolist() == [3]
    assert paging.peek().gfns().tolist() == [3, 70]
    paging.let_go(marks(3, 70))
    assert paging.clean_range(range(64, 128)).gfns().tolist() == [70]
    assert paging.clean_range(range(64, 128)).gfns().tolist() == []
    assert paging.clean().gfns().tolist() == [3]


def test_a_range_of_no_whole_words_is_refused_and_takes_nothing(domain):
    domain.paging.enable()
    write(domain, 5, 70)
    for gfns in (range(1, 128), range(100), range(0, 128, 2)):
        with pytest.raises(ValueError, match="whole words"):
            domain.paging.clean_range(gfns)
    invariants.check(domain)
    assert domain.paging.clean().gfns().tolist() == [5, 70]


def test_one_fault_per_page_per_cycle(domain):
    domain.paging.enable()
    write(domain, 5, 5, 6, 5)
    assert domain.paging.stats().fault_count == 2  # the second write to 5 does not fault: the page is writable
    domain.paging.clean()
    write(domain, 5)
    assert domain.paging.stats().fault_count == 3


def test_reads_and_spurious_faults_change_nothing(domain):
    assert access(domain, 5, write=True) is None
    domain.paging.enable()
    assert access(domain, 5, write=False) is None
    assert domain.paging.stats().fault_count == 0
    assert types(domain, 5) == ["RAM_LOGDIRTY"]
    for _ in range(2):  # two vCPUs that have both found the page log-dirty
        assert nested_page_fault(domain.paging, 5, P2MType.RAM_LOGDIRTY, write=True) is Resolution.RETRY
    assert domain.paging.stats().fault_count == 1
    assert domain.paging.journal().tolist() == [5]


EMULATE, RETRY, DISCARD, ALLOWED = Resolution.EMULATE, Resolution.RETRY, Resolution.DISCARD, None
CRASH = "crash"


@pytest.mark.parametrize(
    ("p2m_type", "read", "write"),
    [
        (P2MType.RAM_RW, ALLOWED, ALLOWED),
        (P2MType.RAM_LOGDIRTY, ALLOWED, RETRY),
        (P2MType.RAM_RO, ALLOWED, DISCARD),
        (P2MType.MMIO_DM, EMULATE, EMULATE),
        (P2MType.MMIO_DIRECT, CRASH, CRASH),
        (P2MType.GRANT_MAP_RW, ALLOWED, ALLOWED),
        (P2MType.GRANT_MAP_RO, ALLOWED, CRASH),
        (P2MType.INVALID, CRASH, CRASH),
    ],
)
@pytest.mark.spoils_the_table
def test_each_type_has_its_answer_to_a_fault(domain, p2m_type, read, write):
    domain.paging.enable()
    with domain.p2m.lock:
        domain.p2m.set_pages(marks(5), marks(domain.p2m.lookup(5)[0]) if p2m_type in READABLE else 0, p2m_type)
    for is_write, expected in ((False, read), (True, write)):
        if expected is CRASH:
            verb = "write to" if is_write else "access to"
            with pytest.raises(GuestCrash, match=f"^{verb} gfn 0x5, which is {p2m_type.name.lower()}$"):
                access(domain, 5, write=is_write)
        else:
            assert access(domain, 5, write=is_write) is expected
    assert domain.paging.stats().fault_count == (p2m_type is P2MType.RAM_LOGDIRTY)
    assert domain.p2m.lookup(5)[1] == (P2MType.RAM_RW if p2m_type is P2MType.RAM_LOGDIRTY else p2m_type)


def test_marks_set_bits_but_give_no_right(domain):
    domain.paging.mark(marks(1))
    domain.paging.enable()
    domain.paging.mark(marks(9, 9, 10, 1537, 1 << 20, 1 << 40))
    domain.memory.write(0x20FFF, b"ab")
    assert domain.paging.peek().gfns().tolist() == [9, 10, 0x20, 0x21]
    assert types(domain, 9, 0x20) == ["RAM_LOGDIRTY"] * 2
    assert domain.paging.stats().fault_count == 0
    write(domain, 9)
    assert domain.paging.stats().fault_count == 1
    assert domain.paging.clean().count() == 4


def test_state_errors(domain):
    paging = domain.paging
    for operator in (paging.peek, paging.clean, paging.stats):
        with pytest.raises(LogDirtyError, match="off"):
            operator()
    paging.off()
    paging.enable()
    write(domain, 3)
    with pytest.raises(LogDirtyError, match="on already"):
        paging.enable()
    assert paging.peek().gfns().tolist() == [3]
    paging.off()
    paging.off()
    assert not paging.enabled


def test_bitmaps_are_the_callers_own(domain):
    domain.paging.enable()
    write(domain, 3)
    domain.paging.peek().set(7)
    domain.paging.clean().set(8)
    assert domain.paging.peek().count() == 0


def test_an_exhausted_pool_loses_nothing_silently(domain):
    domain.paging.enable()
    pool = domain.machine.pool
    pool.allocation = pool.used
    write(domain, 600)
    assert types(domain, 512, 1023, 1024) == ["RAM_RW", "RAM_RW", "RAM_LOGDIRTY"]
    assert bool(domain.paging.are_dirty(np.arange(512, 1024, dtype=np.uint64)).all())
    assert domain.paging.stats().failed_allocations == 1
    invariants.check(domain)
    for operator in (domain.paging.peek, domain.paging.clean):
        with pytest.raises(LogDirtyError, match="incomplete"):
            operator()
    assert domain.paging.stats().dirty_count == 512
    domain.paging.off()
    pool.allocation = len(pool.tables)
    domain.paging.enable()
    write(domain, 600)
    assert domain.paging.clean().gfns().tolist() == [600]


@pytest.mark.parametrize("cycles", [1, 3])
def test_log_dirty_on_a_table_that_was_split_before(domain, cycles):
    for _ in range(cycles):
        domain.paging.enable()
        write(domain, 0, 511, 512)
        assert domain.paging.clean().gfns().tolist() == [0, 511, 512]
        write(domain, 1, 512)
        invariants.check(domain)
        domain.paging.off()
        invariants.check(domain)
    domain.paging.enable()
    assert types(domain, 0, 1, 2, 512, 1100) == ["RAM_LOGDIRTY"] * 5


def test_the_audit_finds_a_page_that_is_writable_and_clean(domain):
    domain.paging.enable()
    with domain.p2m.lock:
        domain.p2m.change_type(7, P2MType.RAM_LOGDIRTY, P2MType.RAM_RW)
    with pytest.raises(invariants.InvariantError, match="gfn 0x7: law 1"):
        invariants.check(domain)
    domain.paging.mark(marks(7))
    with pytest.raises(invariants.InvariantError, match="CLEAN would not protect"):
        invariants.check(domain)
    domain.paging.off()


def test_more_than_3_gib_has_a_hole_that_is_never_dirty():
    domain = Domain(VmConfig(memory_bytes=(3 << 30) + 3 * 4096))
    domain.paging.enable()
    end = domain.memory.gfn_limit
    assert end == (1 << 20) + 3
    write(domain, (3 << 18) - 1, 1 << 20, end - 1)
    domain.paging.mark(np.arange(3 << 18, 1 << 20, dtype=np.uint64))
    assert access(domain, 3 << 18, write=True) is Resolution.EMULATE
    invariants.check(domain)
    assert domain.paging.clean().gfns().tolist() == [(3 << 18) - 1, 1 << 20, end - 1]
    domain.close()


def test_there_is_no_third_paging_mode(domain):
    with pytest.raises(UnsupportedError, match="'pv'"):
        Domain(VmConfig(memory_bytes=4 * MiB), paging_mode="pv")
    with pytest.raises(UnsupportedError, match="'pv'"):
        domain.set_paging_mode("pv")
