import numpy as np
import pytest

from pageferry.core.errors import P2MError
from pageferry.core.vm import VmConfig
from pageferry.hypervisor import audit
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.p2m import MAX_GFN, PSE, P2MType

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
    audit.check(domain)


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


@pytest.mark.spoils_the_table
@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.machine.m2p.set_extent(d.p2m.lookup(0)[0], 512, 512),
        lambda d: d.machine.owner.__setitem__(d.p2m.lookup(2050)[0], 0),
        lambda d: d.machine.pool.allocate(),
        lambda d: d.p2m._words.__setitem__(d.p2m._leaf(0), d.p2m._words[d.p2m._leaf(0)] & ~2),
        lambda d: d.p2m._words.__setitem__(d.p2m._leaf(0), 0),
    ],
    ids=["reverse-map", "owner", "pool", "permission", "lost-entry"],
)
def test_the_audit_finds_a_spoiled_table(domain, spoil):
    audit.check(domain)
    spoil(domain)
    with pytest.raises(audit.AuditError):
        audit.check(domain)
