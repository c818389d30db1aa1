"""Storage ahead of the pages that arrive."""

import pytest
from altered import alter
from at_work import until

from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import VmError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.hugepages import HugePages
from pageferry.core.memory import GuestMemory
from pageferry.engine.pages.populate import Populator


@pytest.fixture
def memory():
    made = GuestMemory.linear(8 << 20)
    yield made
    made.close()


def test_runs_that_are_hinted_at_get_storage_as_far_as_they_are_ram(memory):
    limit = memory.gfn_limit
    with Populator(memory, ((8, 4), (limit - 2, 1 << 40), (limit, 5), (1 << 50, 1)), lambda: 0):
        until(lambda: int(memory.populated()[1].sum()) == 6, "storage")
    assert expand_runs(*memory.populated()).tolist() == [8, 9, 10, 11, limit - 2, limit - 1]
    assert memory.read(8 * PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)


def test_a_host_that_refuses_storage_ahead_does_not_matter(memory):
    def refuse(starts, lengths):
        raise VmError("no memory")

    alter(memory, "populate", lambda _: refuse)
    with Populator(memory, ((8, 4),), lambda: 0):
        pass
    assert memory.populated()[0].size == 0


@pytest.mark.parametrize("kind", [HugePages.ANONYMOUS, HugePages.THP], ids=str)
def test_a_page_that_comes_before_its_storage_gets_the_huge_page_all_the_same(thp, kind):
    memory = GuestMemory.linear(8 << 20, huge_pages=kind)
    memory.advice.begin_arrival()
    with Populator(memory, ((512, 513),), lambda: -(1 << 30)):  # so far behind that it gives none
        for gfn in (600, 1024):  # within 2 MiB that were hinted at whole, and beyond
            memory.write(gfn * PAGE_SIZE, b"x")
    assert expand_runs(*memory.populated()).tolist() == [*range(512, 1024), 1024]
    memory.close()


def test_storage_is_never_given_further_ahead_than_a_bound():
    """However much the source says that it will send."""
    big = GuestMemory.linear(256 << 20)
    arrived = 0

    def populated():
        return int(big.populated()[1].sum())

    with Populator(big, ((0, big.gfn_limit),), lambda: arrived):
        until(lambda: populated() >= 16_384, "storage ahead")
        for arrived in (1, 4096, 20_000):
            until(lambda arrived=arrived: populated() >= 16_384 + arrived, "storage ahead")
            assert populated() < 16_384 + arrived + 5 * 512
    assert populated() < 40_000
    big.close()
