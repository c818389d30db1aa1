"""Huge pages of the host under guest memory: what is used, what is refused, and what stays exact."""

import gc
import re

import numpy as np
import pytest

from pageferry.core import hugepages
from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.frames import SIZE_2M
from pageferry.core.hostmem import HostMapping
from pageferry.core.hugepages import HugePages, chosen, expect_offered
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import VmConfig
from pageferry.guests.boot import boot
from pageferry.guests.workloads import load_workload
from pageferry.hypervisor import invariants
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.vm import KvmVm
from pageferry.vmm.accel import Accel, choose_machines
from pageferry.vmm.doctor import examine

PAGE = 4096
ODD = 4 * SIZE_2M + 3 * PAGE


def u64(*values):
    return np.array(values, np.uint64)


def gfns(memory):
    return expand_runs(*memory.populated()).tolist()


@pytest.mark.parametrize("size_bytes", [PAGE, SIZE_2M - PAGE, SIZE_2M, SIZE_2M + PAGE])
def test_a_mapping_begins_at_a_multiple_of_2_mib_and_ends_where_it_should(size_bytes):
    mappings = [HostMapping(size_bytes) for _ in range(3)]
    assert all(mapping.hva % SIZE_2M == 0 for mapping in mappings)
    assert {len(mapping.view) for mapping in mappings} == {size_bytes}


def test_a_mapping_frees_all_that_it_took():
    def mapped_bytes():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * PAGE

    before = mapped_bytes()
    mappings = [HostMapping((1 << 40) + PAGE) for _ in range(2)]
    assert mapped_bytes() - before > 1 << 41
    del mappings
    assert mapped_bytes() - before < 1 << 40


def test_thp_advice_gives_huge_pages_and_storage_comes_by_2_mib(thp):
    memory = GuestMemory.linear(ODD, huge_pages=HugePages.THP)
    assert memory.huge_bytes() == 0
    memory.write(SIZE_2M + 5, b"x")
    assert gfns(memory) == list(range(512, 1024))
    assert memory.huge_bytes() == SIZE_2M
    memory.write(4 * SIZE_2M + 5, b"tail")  # of three pages
    assert set(gfns(memory)) <= {*range(512, 1024), 2048, 2049, 2050}
    memory.populate(u64(3), u64(1))
    assert {3, 512, 2048} <= set(gfns(memory))
    assert memory.read(0, SIZE_2M) == bytes(SIZE_2M)
    assert not memory.reserved


def test_without_it_storage_comes_by_4_kib_and_is_not_counted(thp):
    memory = GuestMemory.linear(ODD)
    memory.write(SIZE_2M + 5, b"x")
    assert gfns(memory) == [512]
    assert memory.huge_bytes() is None


def test_thp_on_the_software_machine_single_frames_still_come_and_go(thp):
    domain = Domain(VmConfig(memory_bytes=ODD), thp=True)
    boot(domain, load_workload("idle"))
    domain.memory.write(3 * SIZE_2M, bytes([7]) * SIZE_2M)
    assert domain.memory.huge_pages is HugePages.THP
    populated = set(gfns(domain.memory))
    assert set(range(1536, 2048)) <= populated
    domain.physmap.decrease_reservation(u64(1540, 1541, 1700))
    domain.physmap.populate_physmap(u64(1541, 1700))
    assert domain.memory.read(1541 * PAGE, PAGE) == domain.memory.read(1700 * PAGE, PAGE) == bytes(PAGE)
    assert domain.memory.read(1539 * PAGE, PAGE) == domain.memory.read(1542 * PAGE, PAGE) == bytes([7]) * PAGE
    assert 1540 not in gfns(domain.memory)
    assert max(gfns(domain.memory)) < domain.memory.gfn_limit
    domain.paging.enable()
    domain.resume()
    domain.pause()
    invariants.check(domain)
    domain.close()


def test_what_vcpus_of_the_software_machine_touch_is_huge(thp):
    domain = Domain(VmConfig(memory_bytes=ODD), thp=True)
    boot(domain, load_workload("stamp"))
    domain.attach_sync(True)
    domain.resume()
    domain.wait(60)
    assert domain.memory.huge_bytes() >= SIZE_2M
    domain.close()


NEVER, ADVISE, ALWAYS = "always madvise [never]\n", "always within_size [advise] never\n", "[always] madvise never\n"


@pytest.mark.parametrize(
    ("enabled", "shmem_enabled", "needs_file", "expected"),
    [
        ("always [madvise] never\n", NEVER, False, HugePages.ANONYMOUS),
        (ALWAYS, NEVER, False, HugePages.ANONYMOUS),
        (ALWAYS, NEVER, True, HugePages.OFF),
        (NEVER, NEVER, False, HugePages.OFF),
        (ALWAYS, ADVISE, False, HugePages.THP),
        (NEVER, ADVISE, True, HugePages.THP),
        (ALWAYS, "always within_size advise never [deny] force\n", False, HugePages.ANONYMOUS),
    ],
)
def test_auto_is_a_file_where_that_costs_nothing_or_must_be(enabled, shmem_enabled, needs_file, expected):
    settings = {"enabled": enabled, "shmem_enabled": shmem_enabled}
    assert chosen(HugePages.AUTO, needs_file=needs_file, **settings) is expected
    assert chosen(HugePages.HUGETLB, needs_file=needs_file, **settings) is HugePages.HUGETLB


@pytest.fixture
def private():
    try:
        expect_offered(HugePages.ANONYMOUS)
    except UnsupportedError as error:
        pytest.skip(f"no 2 MiB page to be had: {error} ({error.hint})")
    return GuestMemory.linear(ODD, huge_pages=HugePages.ANONYMOUS)


def test_private_memory_is_huge_and_gives_back_what_it_is_told_to(private):
    assert private.storage is None
    assert gfns(private) == []
    private.write(SIZE_2M + 5, b"x")
    assert gfns(private) == list(range(512, 1024))
    assert private.huge_bytes() == SIZE_2M
    assert private.release([(SIZE_2M, SIZE_2M // 2)])
    assert gfns(private) == list(range(768, 1024))
    assert private.read(SIZE_2M, 8) == bytes(8)
    private.drop(u64(768), u64(256))
    assert gfns(private) == []
    private.close()
    assert gfns(private) == []


def test_private_memory_behind_the_hole_is_found_at_its_frames():
    memory = GuestMemory.linear((3 << 30) + ODD, huge_pages=HugePages.ANONYMOUS)
    memory.write((4 << 30) + 4 * SIZE_2M, b"x")  # the last three pages, which no huge page has
    assert gfns(memory) == [(1 << 20) + 2048]


@pytest.mark.parametrize("kind", [HugePages.ANONYMOUS, HugePages.THP], ids=str)
def test_a_guest_that_comes_thin_stays_thin(thp, kind):
    memory = GuestMemory.linear(ODD, huge_pages=kind)
    memory.advice.begin_arrival()
    memory.write(SIZE_2M + 5, b"x")
    assert gfns(memory) == [512]
    memory.advice.make_huge(u64(500, 1030), u64(500, 500))  # no whole 2 MiB
    memory.write(2 * SIZE_2M, b"x")
    assert gfns(memory) == [512, 1024]
    memory.drop(u64(1024), u64(1))
    memory.advice.make_huge(u64(1000), u64(600))
    memory.write(0, b"x")
    assert memory.huge_bytes() == 0
    memory.populate(u64(1536), u64(512))
    assert gfns(memory) == [0, 512, *range(1536, 2048)]
    assert memory.huge_bytes() == SIZE_2M


@pytest.mark.parametrize("kind", [HugePages.ANONYMOUS, HugePages.THP], ids=str)
def test_one_that_has_come_gets_huge_pages_again(thp, kind):
    memory = GuestMemory.linear(ODD, huge_pages=kind)
    memory.advice.begin_arrival()
    memory.write(5, b"x")
    memory.advice.end_arrival()
    memory.write(SIZE_2M + 5, b"x")
    assert gfns(memory) == [0, *range(512, 1024)]


@pytest.mark.parametrize("size_bytes", [ODD, 2 * SIZE_2M, 2 * SIZE_2M - PAGE])
def test_hugetlb_reserves_at_once_whole_pages_and_gives_them_back(hugetlb_pool, size_bytes):
    before = hugetlb_pool()
    memory = GuestMemory.linear(size_bytes, huge_pages=HugePages.HUGETLB)
    assert before - hugetlb_pool() == -(-size_bytes // SIZE_2M)
    assert memory.reserved
    assert len(memory.mapping.view) == memory.size_bytes == size_bytes
    assert gfns(memory) == []
    last = size_bytes // PAGE - 1
    memory.write(last * PAGE + 4095, b"x")
    assert gfns(memory) == list(range(last & -512, last + 1))  # the rest of the last huge page is not RAM
    assert memory.huge_bytes() == SIZE_2M
    with pytest.raises(VmError):
        memory.write(size_bytes, b"x")
    memory.populate(u64(3), u64(1))
    assert gfns(memory) == [*range(512), *range(last & -512, last + 1)]
    assert memory.read(0, SIZE_2M) == bytes(SIZE_2M)
    del memory
    gc.collect()
    assert hugetlb_pool() == before


def test_a_pool_too_small_is_one_clear_error_and_takes_nothing(hugetlb_pool):
    before = hugetlb_pool()
    with pytest.raises(UnsupportedError, match=rf"cannot give {before + 1}, it has {before} left") as caught:
        GuestMemory.linear((before + 1) * SIZE_2M, huge_pages=HugePages.HUGETLB)
    assert caught.value.capability == "hugetlb"
    assert "vm.nr_hugepages=" in caught.value.hint
    del caught
    gc.collect()
    assert hugetlb_pool() == before


def test_a_reserved_page_stays_available(hugetlb_pool):
    """Two guests that promise themselves more than there is: the second is refused, the first is never killed."""
    pages = hugetlb_pool() - 1
    first = GuestMemory.linear(pages * SIZE_2M, huge_pages=HugePages.HUGETLB)
    with pytest.raises(UnsupportedError):
        GuestMemory.linear(2 * SIZE_2M, huge_pages=HugePages.HUGETLB)
    for at in range(0, first.size_bytes, SIZE_2M):
        first.write(at, b"x")
    assert len(gfns(first)) == pages * 512


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("always within_size advise [never] deny force\n", "as root: echo advise > /sys/kernel/mm/.*/shmem_enabled$"),
        (None, "as root: echo advise > "),
        ("always within_size [advise] never deny force\n", "in one piece"),
    ],
)
def test_what_the_kernel_refuses_says_what_to_set(setting, hint):
    error = hugepages.none_given(setting)
    assert "no transparent huge pages" in str(error)
    assert re.search(hint, error.hint)


def test_a_pool_too_small_says_how_large_it_should_be(tmp_path):
    for name, number in (("nr", 7), ("free", 4), ("resv", 1)):
        (tmp_path / f"{name}_hugepages").write_text(f"{number}\n")
    error = hugepages.pool_too_small(5, str(tmp_path))
    assert str(error) == "the host's pool of 2 MiB pages cannot give 5, it has 3 left"
    assert error.hint == "as root: sysctl vm.nr_hugepages=9"


def test_no_pool_and_no_numbers_is_still_one_clear_error(tmp_path):
    error = hugepages.pool_too_small(5, str(tmp_path))
    assert str(error) == "the host's pool of 2 MiB pages cannot give 5"
    assert error.hint == "as root: sysctl vm.nr_hugepages=5"


def test_a_trial_takes_nothing_for_good(thp, hugetlb_pool):
    before = hugetlb_pool()
    for kind in HugePages:
        expect_offered(kind)
    gc.collect()
    assert hugetlb_pool() == before


def test_the_software_machine_takes_no_pool(hugetlb_pool):
    with pytest.raises(UnsupportedError, match="single 4 KiB frames") as caught:
        choose_machines(Accel.SOFT, huge_pages=HugePages.HUGETLB)
    assert caught.value.hint == "use --hugepages thp"


def test_doctor_knows(monkeypatch):
    def refuse(kind):
        raise UnsupportedError(str(kind), f"no {kind} here", hint="set something")

    monkeypatch.setattr("pageferry.vmm.doctor.expect_offered", refuse)
    found = {finding.capability: finding for finding in examine()}
    for kind in ("thp", "hugetlb"):
        finding = found[f"hugepages-{kind}"]
        assert (finding.works, finding.detail, finding.advice) == (False, f"no {kind} here", "set something")


@pytest.mark.parametrize("option", [{}, {"huge_pages": HugePages.HUGETLB}], ids=["plain", "hugetlb"])
def test_a_closed_machine_has_given_its_memory_back(kvm_support, hugetlb_pool, option):
    """At once, not when the collector comes by: the next guest may need it. Views that live on read zeros."""
    before = hugetlb_pool()
    vm = KvmVm(VmConfig(memory_bytes=ODD), **option)
    vm.memory.write(0, b"x")
    (view,) = vm.memory.page_views(u64(0))
    vm.close()
    assert hugetlb_pool() == before
    assert bytes(view[:1]) == b"\0"
    assert gfns(vm.memory) == []
