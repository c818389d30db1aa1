"""Shadow paging: the tables against a plain walk, guest tables that change, log-dirty, and the room they take."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from altered import alter

from pageferry.core.errors import LogDirtyError, VmError
from pageferry.core.state import MachineState
from pageferry.core.vm import VmConfig, VmStatus
from pageferry.guests.abi import PAGE_TABLES_GPA, PROGRAM_BASE, entry_state, page_tables
from pageferry.hypervisor import invariants
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.guest_walk import GuestPageFault
from pageferry.hypervisor.p2m_types import WRITE
from pageferry.hypervisor.shadow_mmu import TABLE_WINDOW
from pageferry.hypervisor.shadow_tables import Key

MiB = 1 << 20
PML4, PDPT, PD = ((PAGE_TABLES_GPA >> 12) + n for n in range(3))
PT, DATA = 0x207, 0x300  # gfns: a table of 4 KiB pages for the 2 MiB from 4 MiB on, and what they map
WINDOW = 4 * MiB
P, W, U, A, D, PS = 1, 2, 4, 0x20, 0x40, 0x80
SYNC, FLUSH = "e7ec", "e7e8"
READ, WRITES, EXECUTES = 1, 2, 4


def put(domain, table_gfn, index, entry):
    domain.memory.write((table_gfn << 12) + 8 * index, struct.pack("<Q", entry))


def get(domain, table_gfn, index):
    return domain.memory.read_u64((table_gfn << 12) + 8 * index)


@pytest.fixture
def machines():
    made = []

    def make(code="", *, cpus=1, memory_bytes=16 * MiB, **registers):
        domain = Domain(VmConfig(memory_bytes=memory_bytes, cpus=cpus), paging_mode="shadow")
        made.append(domain)
        domain.memory.write(PAGE_TABLES_GPA, page_tables(4 << 30))
        put(domain, PD, WINDOW >> 21, PT << 12 | P | W | U)
        for n in range(512):
            put(domain, PT, n, (DATA + n) << 12 | P | W | U)
        domain.memory.write(PROGRAM_BASE, bytes.fromhex(code) or b"\xeb\xfe")
        states = tuple(replace(entry_state(PROGRAM_BASE, n), **registers) for n in range(cpus))
        domain.load_state(MachineState(vcpus=states, devices=domain.save_state().devices))
        domain.attach_sync(True)
        return domain

    yield make
    for domain in made:
        invariants.check(domain)
        domain.close()


def touch(domain, gva, access="read", cpu=0):
    """What a TLB miss of a vCPU gives: (maddr, permissions)."""
    return domain.vcpus[cpu].shadow_mmu.translate(gva, access == "write", access == "fetch")


def gfn_of(domain, maddr):
    return int(domain.machine.m2p.gfns(np.array([maddr >> 12], np.uint64))[0])


def sync(domain):
    domain.resume()
    assert domain.wait(60) is VmStatus.PAUSED, domain.end
    return domain.sync_value()


def test_a_translation_is_that_of_both_tables_and_the_second_is_one_walk(machines):
    domain = machines()
    faults = domain.shadow.fault_count
    maddr, permissions = touch(domain, WINDOW + 0x5000)
    assert (gfn_of(domain, maddr), permissions) == (DATA + 5, READ | EXECUTES)
    assert touch(domain, WINDOW + 0x5000) == (maddr, permissions)
    assert domain.shadow.fault_count == faults + 1
    assert set(domain.shadow.tables.frames) == {Key(PML4, 4), Key(PDPT, 3), Key(PD, 2), Key(PT, 1)}


def test_accessed_comes_with_the_first_access_and_dirty_with_the_first_write(machines):
    domain = machines()
    touch(domain, WINDOW)
    entries = ((PML4, 0), (PDPT, 0), (PD, 2), (PT, 0), (PT, 1))
    assert [get(domain, table, index) & (A | D) for table, index in entries] == [A, A, A, A, 0]
    assert touch(domain, WINDOW, "write")[1] & WRITES
    assert get(domain, PT, 0) & (A | D) == A | D
    assert touch(domain, WINDOW)[1] & WRITES


def test_large_pages_are_splintered_and_keep_their_dirty_bit(machines):
    domain = machines()
    put(domain, PDPT, 5, P | W | U | PS)  # 1 GiB: a second view of all RAM
    for gva in (0x800000 + 0x7000, (5 << 30) + 0x807000):
        maddr, permissions = touch(domain, gva)
        assert (gfn_of(domain, maddr), permissions & WRITES) == (0x807, 0)
        assert touch(domain, gva, "write")[0] == maddr
    assert get(domain, PD, 4) & D
    assert get(domain, PDPT, 5) & D
    frames = domain.shadow.tables.frames
    assert {Key(0, 2, True), Key(0x800, 1, True)} <= set(frames)
    assert len(frames) == 3 + 2  # the 2 MiB page and its part of the 1 GiB page share one table


def test_what_the_guest_refuses_is_the_guests_page_fault(machines):
    domain = machines()
    touch(domain, WINDOW, "write")
    put(domain, PT, 0, DATA << 12 | P | U)
    for access, gva, code in (("write", WINDOW, 7), ("read", 1 << 39, 4)):
        with pytest.raises(GuestPageFault) as refused:
            touch(domain, gva, access)
        assert refused.value.error_code == code


def test_a_guest_table_is_written_through_the_window_and_no_other_way(machines):
    domain = machines()
    identity = PT << 12
    assert touch(domain, identity, "write")[0] < TABLE_WINDOW
    touch(domain, WINDOW)  # now it is a table
    assert domain.shadow.tables.writable_slots(PT) == frozenset()
    assert not touch(domain, identity)[1] & WRITES
    assert touch(domain, identity, "write") == (TABLE_WINDOW + identity, READ | WRITES)
    domain.shadow.write_table(identity, 4, (DATA + 9) << 12 | P | U)
    assert get(domain, PT, 0) & 0xFFFFFFFF == (DATA + 9) << 12 | P | U
    assert gfn_of(domain, touch(domain, WINDOW)[0]) == DATA + 9


def test_a_table_that_nothing_points_to_is_a_page_again(machines):
    domain = machines()
    touch(domain, WINDOW)
    used = domain.machine.pool.used
    domain.shadow.write_table((PD << 12) + 8 * (WINDOW >> 21), 4, 0)
    assert PT not in domain.shadow.tables.protected
    assert domain.machine.pool.used == used - 1
    assert touch(domain, PT << 12, "write")[0] < TABLE_WINDOW


def test_a_page_stays_out_of_sync_until_every_vcpu_has_flushed(machines):
    domain = machines(cpus=2)
    identity = PT << 12
    touch(domain, identity, "write", cpu=1)  # vCPU 1 has it writable in its TLB
    touch(domain, WINDOW)
    maddr = domain.p2m.lookup(PT)[0] << 12
    for flushed, gfn in ((0, DATA + 1), (1, DATA + 2)):
        domain.machine.words[maddr >> 3] = gfn << 12 | P | W | U  # vCPU 1 writes, unseen
        domain.vcpus[0].tlb.flushes += 1
        domain.vcpus[1].tlb.flushes += flushed
        domain.shadow.resync()
        assert gfn_of(domain, touch(domain, WINDOW)[0]) == gfn
    assert not domain.shadow._out_of_sync


@pytest.mark.parametrize("change", [A, D, W, U, P, 1 << 12, 3 << 20])
def test_resync_drops_what_disagrees_and_nothing_else(machines, change):
    domain = machines()
    touch(domain, WINDOW, "write")
    touch(domain, WINDOW + 0x1000, "write")
    faults = domain.shadow.fault_count
    domain.machine.words[domain.p2m.lookup(PT)[0] << 9] ^= change  # unseen
    domain.shadow.resync()
    assert len(domain.shadow.tables.leaves()) == 1
    touch(domain, WINDOW + 0x1000, "write")
    assert domain.shadow.fault_count == faults


@pytest.mark.parametrize("frame", [DATA, DATA + 7])
def test_a_walk_that_was_overtaken_by_a_write_is_repeated(machines, frame):
    domain = machines()
    wrote = []

    def overtaken(translate):
        def walk(gva, **access):
            found = translate(gva, **access)
            if not wrote:
                wrote.append(1)
                domain.shadow.write_table(PT << 12, 4, frame << 12 | P | W | U)
            return found

        return walk

    alter(domain.vcpus[0]._walker, "translate", overtaken)
    assert gfn_of(domain, touch(domain, WINDOW)[0]) == frame
    assert get(domain, PT, 0) & A


def test_writes_of_others_to_a_table_are_seen_too(machines):
    domain = machines()
    touch(domain, WINDOW)
    domain.memory.write(PT << 12, struct.pack("<Q", (DATA + 4) << 12 | P | W | U))
    assert gfn_of(domain, touch(domain, WINDOW)[0]) == DATA + 4


def test_log_dirty_marks_from_the_fault_path_and_clean_takes_back_what_was_written(machines):
    domain = machines()
    for n in range(4):
        touch(domain, WINDOW + n * 4096, "write")
    assert touch(domain, WINDOW)[1] & WRITES
    domain.paging.enable()
    assert not domain.shadow.tables.frames  # blown
    for _ in range(2):
        assert not touch(domain, WINDOW)[1] & WRITES
        assert touch(domain, WINDOW, "write")[1] & WRITES
        assert touch(domain, WINDOW + 0x1000, "write")[1] & WRITES
        faults = domain.paging.stats().fault_count
        assert touch(domain, (DATA << 12), "write")[1] & WRITES  # another way to the same page
        touch(domain, WINDOW, "write")
        invariants.check(domain)
        assert {DATA, DATA + 1} <= set(domain.paging.peek().gfns().tolist())
        assert domain.paging.stats().fault_count - faults <= 1  # the PD's dirty bit, once
        frames = dict(domain.shadow.tables.frames)
        domain.paging.clean()
        assert domain.shadow.tables.frames == frames  # what was not written stays
        invariants.check(domain)
    domain.paging.off()
    assert touch(domain, WINDOW, "write")[1] & WRITES


def test_without_changes_the_guests_tables_stay_clean(machines):
    # l: mov [rbx], rax; out sync; jmp l. Under HAP the walker writes: PML4, PDPT, PD and PT are dirty in every cycle.
    domain = machines("488903" + SYNC + "ebf9", rbx=WINDOW)
    sync(domain)
    domain.paging.enable()
    for _ in range(3):
        sync(domain)
        assert domain.paging.clean().gfns().tolist() == [DATA]


def test_the_same_guest_in_hap_dirties_its_tables_each_cycle_and_modes_may_alternate(machines):
    domain = machines("488903" + SYNC + "ebf9", rbx=WINDOW)
    sync(domain)
    expected = {"hap": [PML4, PDPT, PD, PT, DATA], "shadow": [DATA]}
    for mode in ("hap", "shadow", "hap"):
        domain.set_paging_mode(mode)
        assert (domain.paging_mode, domain.log_dirty.tracker) == (mode, mode)
        domain.paging.enable()
        with pytest.raises(LogDirtyError, match="cannot change"):
            domain.set_paging_mode("hap")
        for _ in range(2):
            sync(domain)
            invariants.check(domain)
            assert domain.paging.clean().gfns().tolist() == expected[mode]
        domain.paging.off()


def test_a_guest_remaps_a_page_and_flushes(machines):
    # mov [rbx], eax; mov [rcx], edx (the entry); out flush; mov [rbx], eax; out sync
    code = "8903" + "8911" + FLUSH + "8903" + SYNC
    domain = machines(code, rbx=WINDOW, rcx=PT << 12, rax=77, rdx=(DATA + 1) << 12 | 7)
    sync(domain)
    assert [domain.memory.read_u64((DATA + n) << 12) for n in (0, 1)] == [77, 77]
    assert domain.shadow.emulated_writes == 1


def test_a_flush_finds_what_was_written_through_an_old_translation(machines):
    # mov [rcx], edx: PT as data; mov eax, [rbx]: as a table; mov [rcx], esi: through the TLB, unseen; out flush; ...
    code = "8911" + "8b03" + "8931" + FLUSH + "8b03" + SYNC
    domain = machines(code, rbx=WINDOW + 0x5000, rcx=(PT << 12) + 40, rdx=DATA << 12 | 7, rsi=(DATA + 3) << 12 | 7)
    domain.memory.write((DATA + 3) << 12, b"\x63")
    assert sync(domain) == 0x63
    assert domain.shadow.emulated_writes == 0


def test_setting_accessed_or_dirty_is_a_write_to_the_table(machines):
    domain = machines()
    touch(domain, WINDOW, "write")
    domain.paging.enable()
    touch(domain, WINDOW)
    assert domain.paging.clean().gfns().tolist() == []
    touch(domain, WINDOW + 0x1000)
    assert domain.paging.clean().gfns().tolist() == [PT]
    touch(domain, WINDOW + 0x1000, "write")
    assert domain.paging.clean().gfns().tolist() == [PT, DATA + 1]
    touch(domain, WINDOW + 0x1000, "write")
    assert domain.paging.clean().gfns().tolist() == [DATA + 1]


@pytest.mark.parametrize("gva", [WINDOW, 0x800000])
def test_a_write_fault_of_log_dirty_alone_needs_no_walk_of_the_guests_tables(machines, gva):
    domain = machines()
    expected = touch(domain, gva, "write")
    domain.paging.enable()
    touch(domain, gva)
    alter(domain.vcpus[0]._walker, "translate", lambda _: None)
    for _ in range(2):
        assert touch(domain, gva, "write") == expected
        invariants.check(domain)
        assert gfn_of(domain, expected[0]) in domain.paging.clean().gfns()
        assert not touch(domain, gva)[1] & WRITES


def test_two_tables_worth_of_room_is_enough_but_not_less(machines):
    domain = machines()
    tables = domain.shadow.tables
    tables._budget = 4
    for n in range(3):
        assert gfn_of(domain, touch(domain, WINDOW + n * 4096, "write")[0]) == DATA + n
        assert gfn_of(domain, touch(domain, (5 + n) * 2 * MiB)[0]) == (5 + n) * 512
        assert len(tables.frames) <= 4
    invariants.check(domain)


def test_the_audit_finds_a_shadow_entry_that_the_p2m_does_not_allow(machines):
    domain = machines()
    domain.paging.enable()
    touch(domain, WINDOW)
    (slot,) = (slot for slot, *_ in domain.shadow.tables.leaves())
    domain.machine.words[slot] |= WRITE
    with pytest.raises(invariants.InvariantError, match="writable in the shadows only"):
        invariants.check(domain)
    domain.shadow.blow()


def test_shadows_keep_a_walk_to_themselves_when_the_pool_is_exhausted(machines):
    """A guest that dirties page after page of splintered memory, with no frame for the P2M to split with."""
    # for ever: for each 2 MiB from 6 MiB to 14 MiB: store; then meet the host
    code = "bf00006000" + "8907" + "81c700002000" + "81ff0000e000" + "72f0" + SYNC + "ebe7"
    domain = machines(code)
    domain.resume()
    assert domain.wait(60) is VmStatus.PAUSED
    assert domain.sync_value() is not None
    domain.log_dirty.enable()
    pool = domain.machine.pool
    pool.set_allocation(pool.needed)
    for _ in range(3):
        domain.resume()
        assert domain.wait(60) is VmStatus.PAUSED
        assert domain.sync_value() is not None, domain.end
    invariants.check(domain)
    with pytest.raises(LogDirtyError, match="allocations failed"):
        domain.log_dirty.clean()
    assert domain.log_dirty.stats().dirty_count >= 4
    domain.log_dirty.off()
    pool.set_allocation(len(pool.tables))
    domain.log_dirty.enable()
    domain.log_dirty.clean()
    domain.resume()
    assert domain.wait(60) is VmStatus.PAUSED
    assert set(range(0x600, 0xE00, 0x200)) <= set(domain.log_dirty.clean().gfns().tolist())


def test_a_pool_without_room_for_one_walk_ends_the_guest_and_nothing_hangs(machines):
    domain = machines()
    domain.machine.pool.allocation = domain.machine.pool.used
    domain.resume()
    assert domain.wait(60) is VmStatus.CRASHED
    assert "no room for the shadows of one walk" in domain.end.crash


def test_shadow_mode_needs_its_promise(machines):
    domain = machines()
    domain.set_paging_mode("hap")
    pool = domain.machine.pool
    pool.set_allocation(pool.used + 15)
    with pytest.raises(VmError, match="no room for shadow tables"):
        domain.set_paging_mode("shadow")
    assert domain.paging_mode == "hap"
    pool.set_allocation(pool.used + 16)
    domain.set_paging_mode("shadow")
    with pytest.raises(VmError, match="are in use"):
        pool.set_allocation(pool.used + 15)
