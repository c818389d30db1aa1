"""Pages added, removed and moved under log-dirty; foreign mappings; grants."""

import numpy as np
import pytest
from soft import access

from pageferry.core.errors import GuestCrash, P2MError, VmError
from pageferry.core.vm import VmConfig
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.p2m_types import P2MType

MiB = 1 << 20
PAGES = 6 * 256 + 1


@pytest.fixture
def domain():
    made = Domain(VmConfig(memory_bytes=PAGES << 12))
    yield made
    made.close()


def write(domain, *gfns):
    for gfn in gfns:
        access(domain, gfn, write=True)


def types(domain, *gfns):
    return [P2MType(domain.p2m.lookup(gfn)[1]).name for gfn in gfns]


def runs(memory):
    return [gfn for s, n in zip(*(a.tolist() for a in memory.populated()), strict=True) for gfn in range(s, s + n)]


def test_a_removed_page_is_not_ram_any_more_and_its_content_is_gone(domain):
    memory = domain.memory
    for gfn in (5, 6, 600):
        memory.write(gfn << 12, b"old")
    domain.physmap.decrease_reservation([600, 5])
    assert memory.removed().tolist() == [5, 600]
    assert runs(memory) == [6]
    assert not memory.is_ram(4 << 12, 8192)
    assert not memory.all_ram().test(5)
    gfns = np.array([4, 5, 6], np.uint64)
    assert memory.are_ram(gfns).tolist() == [True, False, True]
    for refused in (
        lambda: memory.read(5 << 12, 1),
        lambda: memory.write((5 << 12) - 1, b"ab"),
        lambda: memory.page_views(gfns),
        lambda: memory.views(gfns[:1], gfns[2:]),
    ):
        with pytest.raises(VmError):
            refused()
    for is_write in (False, True):
        with pytest.raises(GuestCrash, match="gfn 0x5, which is invalid"):
            access(domain, 5, write=is_write)
    domain.physmap.populate_physmap([5])
    assert memory.read(5 << 12, 4096) == bytes(4096)
    memory.write(5 << 12, b"new")
    mfn = domain.p2m.lookup(5)[0]
    assert bytes(domain.machine.frame(mfn)[:3]) == b"new"


def test_a_view_held_since_before_harms_nothing(domain):
    view = domain.memory.page_views(np.array([5], np.uint64))[0]
    view[:3] = b"old"
    domain.physmap.decrease_reservation(5)
    assert bytes(view[:3]) == bytes(3)
    view[:3] = b"new"
    domain.physmap.populate_physmap(5)
    assert bytes(view[:3]) == bytes(3)


def test_removed_pages_are_never_dirty_and_added_ones_are(domain):
    domain.paging.enable()
    write(domain, 5, 6)
    domain.physmap.decrease_reservation([5, 700])
    domain.paging.mark(np.array([5, 7], np.uint64))
    assert domain.paging.peek().gfns().tolist() == [6, 7]
    domain.paging.clean()
    domain.physmap.populate_physmap([700, 5])
    assert domain.paging.clean().gfns().tolist() == [5, 700]
    assert types(domain, 5, 700) == ["RAM_LOGDIRTY"] * 2
    write(domain, 5)
    assert domain.paging.clean().gfns().tolist() == [5]


def test_a_page_in_this_cycles_journal_may_leave_and_return(domain):
    domain.paging.enable()
    write(domain, 5)
    domain.physmap.decrease_reservation(5)
    domain.physmap.populate_physmap(5)
    write(domain, 5)
    assert domain.paging.clean().gfns().tolist() == [5]
    assert types(domain, 5) == ["RAM_LOGDIRTY"]


def test_a_moved_page_keeps_its_content_and_is_dirty_where_it_is_now(domain):
    memory = domain.memory
    memory.write(5 << 12, b"here")
    memory.write(700 << 12, b"gone")
    domain.paging.enable()
    write(domain, 5)
    domain.physmap.add_to_physmap(5, 700)
    assert memory.read(700 << 12, 4) == b"here"
    assert memory.removed().tolist() == [5]
    assert domain.paging.clean().gfns().tolist() == [700]
    domain.physmap.add_to_physmap(700, 5)
    assert memory.read(5 << 12, 4) == b"here"
    assert domain.paging.clean().gfns().tolist() == [5]
    domain.physmap.add_to_physmap(5, 5)
    assert domain.paging.clean().gfns().tolist() == []
    domain.physmap.populate_physmap(700)
    assert memory.read(700 << 12, 4) == bytes(4)


def test_what_left_in_one_piece_comes_back_as_one_superpage(domain):
    before = domain.machine.pool.used
    gfns = np.arange(500, 1100, dtype=np.uint64)
    domain.physmap.decrease_reservation(gfns)
    domain.paging.enable()
    domain.paging.off()
    assert domain.machine.pool.used == before + 2  # 512..1023 is one hole now, its neighbours are still split
    domain.physmap.populate_physmap(gfns)
    domain.paging.enable()
    domain.paging.off()
    assert domain.machine.pool.used == before
    assert not (domain.machine.m2p._large == np.uint64((1 << 64) - 1))[1:4].any()  # nor is the reverse map in pieces


def test_what_cannot_be_removed_added_or_moved_changes_nothing(domain):
    physmap = domain.physmap
    physmap.decrease_reservation(9)
    with physmap.map_foreign(20, 2, writable=False):
        for operation in (
            lambda: physmap.decrease_reservation([3, 9]),
            lambda: physmap.decrease_reservation([3, 3]),
            lambda: physmap.decrease_reservation([3, 1 << 20]),
            lambda: physmap.decrease_reservation([3, 21]),
            lambda: physmap.populate_physmap([9, 3]),
            lambda: physmap.add_to_physmap(9, 3),
            lambda: physmap.add_to_physmap(21, 9),
            lambda: physmap.add_to_physmap(3, 1 << 20),
            lambda: physmap.map_grant(3, domain.machine.foreign_start, writable=True),
            lambda: physmap.map_grant(9, domain.p2m.lookup(3)[0], writable=True),
            lambda: physmap.unmap_grant(3),
            lambda: physmap.map_foreign(8, 2, writable=True),
        ):
            with pytest.raises(VmError):
                operation()
            assert domain.memory.removed().tolist() == [9]
    domain.set_allocation(domain.machine.pool.used)
    with pytest.raises(P2MError, match="no frame"):
        physmap.decrease_reservation([10, 600])
    assert domain.memory.removed().tolist() == [9]


def test_a_writable_foreign_mapping_is_dirty_in_every_cycle(domain):
    mapping = domain.physmap.map_foreign(7, 2, writable=True)
    domain.paging.enable()
    for _ in range(2):
        assert domain.paging.peek().gfns().tolist() == [7, 8]
        assert domain.paging.clean().gfns().tolist() == [7, 8]
    mapping.view[4096:4100] = b"last"
    with domain.physmap.map_foreign(8, 1, writable=True):
        pass
    mapping.unmap()
    mapping.unmap()
    assert domain.memory.read(8 << 12, 4) == b"last"
    assert domain.paging.clean().gfns().tolist() == [7, 8]
    assert domain.paging.clean().gfns().tolist() == []
    with pytest.raises(ValueError, match="released"):
        mapping.view[0] = 1


def test_a_writable_mapping_made_under_log_dirty_marks_and_a_read_only_one_does_not(domain):
    domain.paging.enable()
    with domain.physmap.map_foreign(7, 1, writable=False) as mapping:
        assert not domain.paging.peek().any()
        with pytest.raises(TypeError, match="read-only"):
            mapping.view[0] = 1
    with domain.physmap.map_foreign(7, 1, writable=True):
        assert domain.paging.clean().gfns().tolist() == [7]
    assert domain.paging.clean().gfns().tolist() == [7]
    assert domain.paging.clean().gfns().tolist() == []


@pytest.mark.parametrize("writable", [True, False])
def test_a_grant_is_seen_by_all_and_dirty_as_long_as_it_is_mapped(domain, writable):
    physmap, machine = domain.physmap, domain.machine
    theirs = machine.allocate_foreign()
    machine.frame(theirs)[:5] = b"hello"
    physmap.decrease_reservation([5, 6])
    domain.paging.enable()
    physmap.map_grant(5, theirs, writable=writable)
    assert types(domain, 5) == ["GRANT_MAP_RW" if writable else "GRANT_MAP_RO"]
    assert domain.memory.removed().tolist() == [6]
    assert domain.memory.read(5 << 12, 5) == b"hello"
    assert runs(domain.memory) == [5]
    for _ in range(2):  # the owner may write at any time, and the guest without a fault
        assert domain.paging.clean().gfns().tolist() == [5]
    domain.paging.off()
    domain.paging.enable()
    assert types(domain, 5, 7) == ["GRANT_MAP_RW" if writable else "GRANT_MAP_RO", "RAM_LOGDIRTY"]
    assert domain.paging.clean().gfns().tolist() == [5]
    for operation in (lambda: physmap.decrease_reservation(5), lambda: physmap.add_to_physmap(5, 6)):
        with pytest.raises(VmError, match="own"):
            operation()
    physmap.unmap_grant(5)
    assert domain.memory.removed().tolist() == [5, 6]
    assert not domain.paging.clean().any()
    assert bytes(machine.frame(theirs)[:5]) == b"hello"
    physmap.populate_physmap([5, 6])
    assert domain.memory.read(5 << 12, 5) == bytes(5)
