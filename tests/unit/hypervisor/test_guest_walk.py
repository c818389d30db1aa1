import numpy as np
import pytest

from pageferry.hypervisor.guest_walk import GuestPageFault, GuestWalker

P, W, U, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
PML4, PDPT, PD, PT = 1, 2, 3, 4  # gfns; here gfn == mfn


class Tables:
    """A PML4 entry -> PDPT -> PD -> PT at gva 0, and the frames that the walker wrote to at the nested level."""

    def __init__(self):
        self.words = np.zeros(8 * 512, np.uint64)
        self.nested_writes = []
        self.walker = GuestWalker(memoryview(self.words), self.nested_write)
        self.walker.cr3 = PML4 << 12
        self.put(PML4, 0, PDPT << 12 | P | W | U)
        self.put(PDPT, 0, PD << 12 | P | W | U)
        self.put(PD, 0, PT << 12 | P | W | U)

    def nested_write(self, gfn):
        self.nested_writes.append(gfn)
        return gfn

    def put(self, table, index, entry):
        self.words[table * 512 + index] = entry

    def get(self, table, index):
        return int(self.words[table * 512 + index])

    def read(self, gva):
        return self.walker.translate(gva, write=False, fetch=False)

    def write(self, gva):
        return self.walker.translate(gva, write=True, fetch=False)

    def fetch(self, gva):
        return self.walker.translate(gva, write=False, fetch=True)


@pytest.fixture
def tables():
    return Tables()


def test_a_4_kib_page(tables):
    tables.put(PT, 5, 0x123 << 12 | P | W | U)
    assert tables.read(5 << 12) == (0x123, False, True)  # not writable yet: its dirty bit is clear
    assert tables.write(5 << 12) == (0x123, True, True)
    assert tables.read(5 << 12) == (0x123, True, True)


def test_a_2_mib_page(tables):
    tables.put(PD, 3, 0x4000 << 12 | P | W | U | PS)
    assert tables.write(3 << 21 | 7 << 12) == (0x4007, True, True)
    assert tables.read(3 << 21 | 511 << 12) == (0x41FF, True, True)


def test_a_1_gib_page(tables):
    tables.put(PDPT, 2, 0x80000 << 12 | P | W | U | PS)
    assert tables.read(2 << 30)[0] == 0x80000
    assert tables.read(2 << 30 | 9 << 21 | 4 << 12)[0] == 0x80000 + 9 * 512 + 4


def test_accessed_and_dirty_bits_are_set_as_the_access_asks(tables):
    tables.put(PT, 0, 0x50 << 12 | P | W | U)
    tables.read(0)
    assert [tables.get(table, 0) & (A | D) for table in (PML4, PDPT, PD, PT)] == [A, A, A, A]
    tables.write(0)
    assert [tables.get(table, 0) & (A | D) for table in (PML4, PDPT, PD, PT)] == [A, A, A, A | D]
    assert tables.get(PT, 0) == 0x50 << 12 | P | W | U | A | D


def test_each_table_is_written_once_per_tlb_flush_even_by_a_read(tables):
    tables.put(PT, 0, 0x50 << 12 | P | U | A)
    tables.put(PT, 1, 0x51 << 12 | P | U | A)
    tables.read(0)
    tables.read(0x1000)
    assert tables.nested_writes == [PML4, PDPT, PD, PT]
    tables.walker.flush()
    tables.read(0x1000)
    assert tables.nested_writes == [PML4, PDPT, PD, PT] * 2


@pytest.mark.parametrize(
    ("level", "taken", "access", "error_code"),
    [
        (PT, P, "read", 4),
        (PT, P, "write", 6),
        (PD, P, "read", 4),
        (PDPT, P, "fetch", 4),
        (PML4, P, "write", 6),
        (PT, W, "write", 7),
        (PD, W, "write", 7),
        (PML4, W, "write", 7),
        (PT, U, "read", 5),
        (PDPT, U, "read", 5),
    ],
)
def test_a_right_must_be_given_at_every_level(tables, level, taken, access, error_code):
    tables.put(PT, 0, 0x50 << 12 | P | W | U)
    tables.put(level, 0, tables.get(level, 0) & ~taken)
    with pytest.raises(GuestPageFault) as refused:
        getattr(tables, access)(0x0)
    assert refused.value.error_code == error_code
    did = {"read": "it read from 0x0", "write": "it wrote to 0x0", "fetch": "it jumped to 0x0"}[access]
    why = "do not map" if taken == P else "forbid"
    assert refused.value.describe() == f"{did}, which its page tables {why} (page fault, error code {error_code:#x})"
    assert not tables.get(PT, 0) & D


def test_a_read_only_page_reads_and_never_becomes_writable(tables):
    tables.put(PT, 0, 0x50 << 12 | P | U | D)
    assert tables.read(0) == (0x50, False, True)


def test_the_supervisor_ignores_user_and_without_wp_also_read_only(tables):
    tables.put(PT, 0, 0x50 << 12 | P)
    tables.walker.user = False
    assert tables.read(0)[0] == 0x50
    with pytest.raises(GuestPageFault) as refused:
        tables.write(0)
    assert refused.value.error_code == 3
    tables.walker.write_protect = False
    assert tables.write(0) == (0x50, True, True)


def test_no_execute_is_a_right_when_enabled_and_a_reserved_bit_otherwise(tables):
    tables.put(PT, 0, 0x50 << 12 | P | U | NX)
    for access, error_code in ((tables.read, 0xD), (tables.fetch, 0xD)):
        with pytest.raises(GuestPageFault) as refused:
            access(0)
        assert refused.value.error_code == error_code
        assert "reserved bit" in refused.value.describe()
    tables.walker.no_execute = True
    assert tables.read(0) == (0x50, False, False)
    with pytest.raises(GuestPageFault) as refused:
        tables.fetch(0)
    assert refused.value.error_code == 0x15


@pytest.mark.parametrize(
    ("level", "bits"),
    [
        (PML4, PS),
        (PML4, 1 << 48),
        (PDPT, 1 << 51),
        (PD, NX),
        (PDPT, PS | 1 << 13),
        (PDPT, PS | 1 << 29),
        (PD, PS | 1 << 13),
        (PD, PS | 1 << 20),
        (PT, 1 << 50),
    ],
)
def test_a_reserved_bit_is_a_fault_of_its_own(tables, level, bits):
    tables.put(PT, 0, 0x50 << 12 | P | W | U)
    entry = tables.get(level, 0)
    tables.put(level, 0, (entry & 0xFFF if bits & PS else entry) | bits)
    with pytest.raises(GuestPageFault) as refused:
        tables.write(0)
    assert refused.value.error_code == 0xF


def test_pat_in_a_large_page_is_not_reserved_and_no_part_of_the_frame(tables):
    tables.put(PD, 3, 0x4000 << 12 | P | W | U | PS | 1 << 12)
    assert tables.read(3 << 21 | 7 << 12)[0] == 0x4007


def test_smep_and_smap_keep_the_supervisor_off_user_pages(tables):
    tables.put(PT, 0, 0x50 << 12 | P | W | U)
    tables.walker.user = False
    assert tables.fetch(0) == (0x50, False, True)
    tables.walker.smep = True
    assert tables.read(0) == (0x50, False, False)
    with pytest.raises(GuestPageFault) as refused:
        tables.fetch(0)
    assert refused.value.error_code == 0x11
    tables.walker.smap = True
    with pytest.raises(GuestPageFault) as refused:
        tables.read(0)
    assert refused.value.error_code == 1
    tables.walker.alignment_check = True
    assert tables.write(0) == (0x50, True, False)


def test_the_path_is_that_of_the_last_whole_walk(tables):
    tables.put(PT, 5, 0x50 << 12 | P | W | U)
    tables.put(PD, 3, 0x4000 << 12 | P | W | U | PS)
    tables.read(5 << 12)
    assert tables.walker.path == [(PML4, PML4 * 512), (PDPT, PDPT * 512), (PD, PD * 512), (PT, PT * 512 + 5)]
    tables.read(3 << 21)
    assert tables.walker.path == [(PML4, PML4 * 512), (PDPT, PDPT * 512), (PD, PD * 512 + 3)]


def test_an_update_is_announced_only_when_an_entry_changes(tables):
    tables.put(PT, 0, 0x50 << 12 | P | W | U)
    updates = []
    tables.walker.nested_update = updates.append
    tables.read(0)
    assert updates == [PML4, PDPT, PD, PT]
    tables.walker.flush()
    tables.read(0)
    assert updates == [PML4, PDPT, PD, PT]
    tables.write(0)
    assert updates == [PML4, PDPT, PD, PT, PT]


@pytest.mark.parametrize("gva", [1 << 47, (1 << 64) - (1 << 47) - 4096, 1 << 63])
def test_a_non_canonical_address_is_not_a_page_fault(tables, gva):
    with pytest.raises(GuestPageFault) as refused:
        tables.read(gva)
    assert refused.value.error_code is None
    assert tables.nested_writes == []


def test_the_highest_canonical_address_is_walked(tables):
    tables.put(PML4, 511, PDPT << 12 | P | W | U)
    tables.put(PDPT, 511, PD << 12 | P | W | U)
    tables.put(PD, 511, 0x4000 << 12 | P | W | U | PS)
    assert tables.read((1 << 64) - 4096)[0] == 0x41FF


def test_two_walkers_on_one_entry_lose_no_accessed_or_dirty_bit(tables):
    """Another vCPU sets the dirty bit between this walker's look at the entry and its update of the accessed bit."""

    class Interrupted(GuestWalker):
        def _set(self, table_gfn, at, bits):
            if at == PT * 512 + 5:
                tables.write(5 << 12)
            super()._set(table_gfn, at, bits)

    walker = Interrupted(memoryview(tables.words), tables.nested_write)
    walker.cr3 = PML4 << 12
    tables.put(PT, 5, 0x123 << 12 | P | W | U)
    walker.translate(5 << 12, write=False, fetch=False)
    assert tables.get(PT, 5) == 0x123 << 12 | P | W | U | A | D


def test_an_entry_that_the_guest_changes_meanwhile_keeps_the_change(tables):
    new = 0x456 << 12 | P | NX

    class Interrupted(GuestWalker):
        def _set(self, table_gfn, at, bits):
            if at == PT * 512 + 5:
                tables.put(PT, 5, new)
            super()._set(table_gfn, at, bits)

    walker = Interrupted(memoryview(tables.words), tables.nested_write)
    walker.cr3 = PML4 << 12
    tables.put(PT, 5, 0x123 << 12 | P | W | U)
    walker.translate(5 << 12, write=True, fetch=False)
    assert tables.get(PT, 5) == new | A | D
