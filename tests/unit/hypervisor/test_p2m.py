import numpy as np
import pytest

from pageferry.core.errors import LogDirtyMemoryError, P2MError
from pageferry.core.vm import VmConfig
from pageferry.hypervisor import invariants
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.p2m_types import MAX_GFN, PSE, P2MType

MiB = 1 << 20
RW, LOGDIRTY = P2MType.RAM_RW, P2MType.RAM_LOGDIRTY


@pytest.fixture
def domain():
    made = Domain(VmConfig(memory_bytes=8 * MiB + 3 * 4096))
    yield made
    made.close()


def superpages(domain):
    return int(np.count_nonzero(domain.machine.pool.tables[: domain.machine.pool.used] & np.uint64(PSE)))


def test_ram_is_mapped_by_superpages_and_an_odd_tail_by_pages(domain):
    assert superpages(domain) == 4
    assert [domain.p2m.lookup(gfn)[1] for gfn in (0, 2047, 2048, 2050)] == [RW] * 4
    assert [domain.p2m.lookup(gfn)[1] for gfn in (2051, 1 << 20, MAX_GFN - 1, MAX_GFN, 1 << 50)] == [0] * 5
    mfn, _ = domain.p2m.lookup(1000)
    domain.memory.write(1000 << 12, b"here")
    assert bytes(domain.machine.mapping.view[mfn << 12 : (mfn << 12) + 4]) == b"here"


@pytest.mark.spoils_the_table
def test_one_page_of_a_superpage_changes_alone_and_splits_it(domain):
    before = [domain.p2m.lookup(gfn)[0] for gfn in range(512, 1024)]
    with domain.p2m.lock:
        domain.p2m.change_entry_type_global(logdirty=True)
        assert domain.p2m.change_type(600, LOGDIRTY, RW)
        assert not domain.p2m.change_type(600, LOGDIRTY, RW)
    assert superpages(domain) == 3
    assert [domain.p2m.lookup(gfn)[0] for gfn in range(512, 1024)] == before
    assert [gfn for gfn in range(2051) if domain.p2m.lookup(gfn)[1] == RW] == [600]


def test_a_change_of_the_whole_table_is_seen_at_once_and_undone(domain):
    for logdirty in (True, True, False, True, False):
        with domain.p2m.lock:
            domain.p2m.change_entry_type_global(logdirty=logdirty)
        expected = LOGDIRTY if logdirty else RW
        assert all(domain.p2m.lookup(gfn)[1] == expected for gfn in (0, 511, 1500, 2048, 2050))
        assert domain.p2m.lookup(2051)[1] == P2MType.MMIO_DM
        with domain.p2m.lock:  # one page pushes the recalculation down its path only
            assert domain.p2m.change_type(700, expected, expected)
        assert all(domain.p2m.lookup(gfn)[1] == expected for gfn in range(2051))
    invariants.check(domain)


@pytest.mark.spoils_the_table
def test_many_pages_change_in_one_walk_and_others_are_left_alone(domain):
    with domain.p2m.lock:
        domain.p2m.change_entry_type_global(logdirty=True)
        for gfn in (5, 6, 600, 2050):
            domain.p2m.change_type(gfn, LOGDIRTY, RW)
        asked = np.array([2050, 5, 7, 1200, 600, 1 << 20], np.uint64)  # 7: protected; 1200: superpage; last: no RAM
        assert domain.p2m.change_types(asked, RW, LOGDIRTY) == 3
    assert [gfn for gfn in range(2051) if domain.p2m.lookup(gfn)[1] == RW] == [6]


def test_no_frame_to_split_with_changes_nothing(domain):
    domain.machine.pool.allocation = domain.machine.pool.used
    with domain.p2m.lock, pytest.raises(P2MError, match="gfn 0x258"):
        domain.p2m.change_type(600, RW, LOGDIRTY)
    assert domain.p2m.lookup(600)[1] == RW
    assert superpages(domain) == 4


def test_changes_need_the_lock(domain):
    with pytest.raises(AssertionError):
        domain.p2m.change_type(1, RW, LOGDIRTY)
    with pytest.raises(AssertionError):
        domain.p2m.change_entry_type_global(logdirty=True)


def test_extents_are_aligned(domain):
    with domain.p2m.lock, pytest.raises(P2MError, match="aligned"):
        domain.p2m.map_extent(1, 512, 512, RW)


def change_entry_of_frame_0(domain, change):
    with domain.p2m.lock:
        at, _ = domain.p2m.find(0)
    domain.p2m._words[at] = change(domain.p2m._words[at])


@pytest.mark.spoils_the_table
@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.machine.m2p.set_extent(d.p2m.lookup(0)[0], 512, 512),
        lambda d: d.machine.owner.__setitem__(d.p2m.lookup(2050)[0], 0),
        lambda d: d.machine.pool.allocate(),
        lambda d: change_entry_of_frame_0(d, lambda entry: entry & ~2),
        lambda d: change_entry_of_frame_0(d, lambda _: 0),
    ],
    ids=["reverse-map", "owner", "pool", "permission", "lost-entry"],
)
def test_the_audit_finds_a_spoiled_table(domain, spoil):
    invariants.check(domain)
    spoil(domain)
    with pytest.raises(invariants.InvariantError):
        invariants.check(domain)


GiB_PAGES = 512 * 512


@pytest.fixture
def large():
    made = Domain(VmConfig(memory_bytes=(2 << 30) + 6 * MiB + 4096))
    yield made
    made.close()


def shapes(domain):
    """How many leaves of 1 GiB, 2 MiB and 4 KiB there are."""
    found = {1: 0, 512: 0, GiB_PAGES: 0}
    for leaves in invariants._leaves(domain, domain.p2m.root_mfn, 27, 0, False, set()):
        found[leaves.pages] += leaves.gfns.size
    return found[GiB_PAGES], found[512], found[1]


def test_whole_gigabytes_are_one_entry_each_and_split_one_level_at_a_time(large):
    assert shapes(large) == (2, 3, 1)
    before = {gfn: large.p2m.lookup(gfn) for gfn in range(0, large.memory.gfn_limit, 1009)}
    with large.p2m.lock:
        assert large.p2m.change_type(GiB_PAGES + 700, RW, RW)
    assert shapes(large) == (1, 3 + 511, 1 + 512)
    assert {gfn: large.p2m.lookup(gfn) for gfn in before} == before
    with large.p2m.lock:
        assert large.p2m.join() == 2
    assert shapes(large) == (2, 3, 1)
    assert {gfn: large.p2m.lookup(gfn) for gfn in before} == before


def test_off_makes_whole_again_what_log_dirty_had_split(large):
    used = large.machine.pool.used
    large.paging.enable()
    for gfn in (0, 700, GiB_PAGES, 2 * GiB_PAGES, large.memory.gfn_limit - 1):
        large.paging.fix_and_mark(gfn)
    assert shapes(large) == (0, 2 * 512 - 3 + 2, 4 * 512 + 1)
    large.paging.clean()
    for gfn in (1, GiB_PAGES):  # OFF finds tables of both types
        large.paging.fix_and_mark(gfn)
    large.paging.off()
    assert shapes(large) == (2, 3, 1)
    assert large.machine.pool.used == used


@pytest.mark.spoils_the_table
@pytest.mark.parametrize("shift_by", [1, 511])
def test_frames_in_a_row_that_begin_in_the_middle_of_a_large_frame_do_not_join(large, shift_by):
    gfns = np.arange(512, dtype=np.uint64)
    mfns = gfns + np.uint64(large.p2m.lookup(0)[0] + shift_by)
    with large.p2m.lock:
        large.p2m.set_pages(gfns, mfns, RW)
        assert large.p2m.join() == 0
    assert [large.p2m.lookup(gfn)[0] for gfn in range(512)] == mfns.tolist()


@pytest.mark.spoils_the_table
def test_granted_frames_in_a_row_do_not_join(large):
    gfns = np.arange(512, dtype=np.uint64)
    with large.p2m.lock:
        large.p2m.set_pages(gfns, gfns + np.uint64(large.machine.foreign_start), P2MType.GRANT_MAP_RW)
        assert large.p2m.join() == 0


def test_only_pages_of_one_type_join_and_only_where_their_frames_do(large):
    with large.p2m.lock:
        large.p2m.change_type(5, RW, P2MType.RAM_RO)
        large.p2m.change_superpage_type(512, P2MType.RAM_RO)
        large.p2m.change_type(600, P2MType.RAM_RO, P2MType.RAM_RO)  # splits, and says the same
    large.physmap.add_to_physmap(1025, 1024)
    large.physmap.populate_physmap(1025)
    with large.p2m.lock:
        assert large.p2m.join() == 1
    assert shapes(large) == (1, 3 + 510, 1 + 2 * 512)
    assert [large.p2m.lookup(gfn)[1] for gfn in (4, 5, 511, 512, 1023, 1024)] == [RW, 3, RW, 3, 3, RW]


def test_a_hole_of_one_type_is_one_entry(large):
    with large.p2m.lock:
        assert large.p2m.change_type(3 * GiB_PAGES, P2MType.MMIO_DM, P2MType.INVALID)
    assert [large.p2m.lookup(3 * GiB_PAGES + n)[1] for n in (0, 1, 512)] == [7, 0, 0]
    with large.p2m.lock:
        assert large.p2m.change_type(3 * GiB_PAGES, P2MType.INVALID, P2MType.MMIO_DM)
        assert large.p2m.join() == 2
        with pytest.raises(P2MError, match="no frame to map"):
            large.p2m.change_type(3 * GiB_PAGES, P2MType.MMIO_DM, RW)


def test_without_a_frame_a_whole_gigabyte_is_dirty_and_peek_refuses(large):
    large.machine.pool.set_allocation(large.machine.pool.used + 17)  # the bitmap's, and not one more
    large.paging.enable()
    large.paging.fix_and_mark(700)
    assert [large.p2m.lookup(gfn)[1] for gfn in (0, 700, GiB_PAGES - 1, GiB_PAGES)] == [RW, RW, RW, LOGDIRTY]
    assert large.paging.stats().dirty_count == GiB_PAGES
    assert large.paging.stats().failed_allocations == 1
    invariants.check(large)
    for operator in (large.paging.peek, large.paging.clean):
        with pytest.raises(LogDirtyMemoryError):
            operator()
    large.paging.off()
    large.machine.pool.set_allocation(len(large.machine.pool.tables))
    large.paging.enable()
    large.paging.fix_and_mark(700)
    assert large.paging.clean().gfns().tolist() == [700]
