"""Laws 1, 2 and 8 in every interleaving of vCPUs, device and operators; and each fault of ordering is found."""

from contextlib import nullcontext

import numpy as np
import pytest
from tiers import sample

from pageferry.hypervisor.p2m_types import P2MType
from simulation.interleave import Violated, explore, step
from simulation.paging_world import PagingWorld

WORLDS = {
    # name: (options, at least so many distinct states)
    "two vCPUs on one page, a CLEAN between two rounds": ({"programs": ((0,), (0,)), "cleans": 1}, 1500),
    "two vCPUs on two pages": ({"programs": ((0, 1), (0,)), "cleans": 0}, 800),
    "two vCPUs and a device": ({"programs": ((0,), (1,)), "device": (0,), "cleans": 0}, 3000),
    "a vCPU and a device on one page, a CLEAN between two rounds": (
        {"programs": ((0,),), "device": (0,), "cleans": 1},
        800,
    ),
    "each access to the P2M's entries, one page": ({"programs": ((0,), (0,)), "cleans": None, "fine": True}, 600),
    "each access to the P2M's entries, two pages": ({"programs": ((0,), (1,)), "cleans": None, "fine": True}, 600),
}
QUICK = ["each access to the P2M's entries, one page"]


@pytest.mark.parametrize("name", sample(WORLDS, "a vCPU against a vCPU, and against a device", quick=QUICK))
def test_the_laws_hold_in_every_state(name, record_property):
    options, at_least = WORLDS[name]
    explored = explore(lambda: PagingWorld(**options))
    record_property("explored", str(explored))
    print(f"{name}: {explored}")
    assert explored.states >= at_least
    assert explored.schedules >= explored.states


def grants_before_it_marks(domain):
    """The grant and the mark, swapped, and not one step."""
    paging, locks = domain.paging, domain.locks

    def fix_and_mark(gfn):
        with locks.p2m:
            if not domain.p2m.change_type(gfn, P2MType.RAM_LOGDIRTY, P2MType.RAM_RW):
                return
            paging._journal.append(gfn)
        with locks.log_dirty:
            if paging._bitmap is not None:
                paging._fault_count += 1
                paging._bitmap.set(gfn)

    paging.fix_and_mark = fix_and_mark


def clears_after_it_protects(domain):
    """CLEAN copies the bitmap, protects, and clears what it never copied."""
    paging, locks = domain.paging, domain.locks

    def clean():
        with locks.domain, paging._hold(), locks.p2m:
            with locks.log_dirty:
                dirty = paging._complete().copy()
            paging._ops.clean(np.array(paging._journal, np.uint64))
            with locks.log_dirty:
                paging._end_cycle(range(domain.memory.gfn_limit))
            paging.flush_tlbs()
            return dirty

    paging.clean = clean


def forgets_the_flush(domain):
    """CLEAN leaves the vCPUs their translations."""
    domain.paging.flush_tlbs = lambda: None


def does_not_hold_the_vcpus(domain):
    """CLEAN while the vCPUs run on."""
    domain.paging._hold = nullcontext


def flushes_after_the_entry(domain):
    """A vCPU that enters the guest with what it knew before."""
    for vcpu in domain.vcpus:
        vcpu._before_entry = lambda engine: None


def counts_every_fault(domain):
    """The loser of a race for a page is counted too."""
    paging, fix = domain.paging, domain.paging.fix_and_mark

    def fix_and_mark(gfn):
        before = paging._fault_count
        fix(gfn)
        if paging._fault_count == before and paging.enabled:
            paging._fault_count += 1

    paging.fix_and_mark = fix_and_mark


def marks_before_it_writes(domain):
    """A device that marks the page and then writes it."""
    memory, write = domain.memory, domain.memory.write

    def early(gpa, data):
        memory._on_write(np.array([gpa >> 12], np.uint64))
        step("write")
        marked, memory._on_write = memory._on_write, lambda gfns: None
        try:
            write(gpa, data)
        finally:
            memory._on_write = marked

    memory.write = early


def forgets_the_journal(domain):
    """CLEAN does not protect again what became writable."""
    p2m, change = domain.p2m, domain.p2m.change_types
    p2m.change_types = lambda gfns, old, new: change(gfns[:0], old, new)


TWO_VCPUS = {"programs": ((0, 1), (0,)), "cleans": 1}
WRITES_AGAIN = {"programs": ((0, 0), (1,)), "cleans": 1}
WRITES_TWICE_MORE = {"programs": ((0, 0, 0), (1,)), "cleans": 1}  # what ENABLE asked to flush goes after the first
WITH_DEVICE = {"programs": ((0,),), "device": (0,), "cleans": 1}


@pytest.mark.parametrize(
    ("fault", "options", "law"),
    [
        (grants_before_it_marks, TWO_VCPUS, "law 1: .* writable and clean"),
        (clears_after_it_protects, WITH_DEVICE, "law 2: a write was lost"),
        (forgets_the_flush, WRITES_AGAIN, "law 2: .* stale TLB entry"),
        (flushes_after_the_entry, WRITES_TWICE_MORE, "law 2: .* stale TLB entry"),
        (does_not_hold_the_vcpus, TWO_VCPUS, "law [12]"),
        (forgets_the_journal, TWO_VCPUS, "law 1"),
        (marks_before_it_writes, WITH_DEVICE, "law 2: a write was lost"),
        (counts_every_fault, {"programs": ((0, 1), (0,)), "cleans": None}, "law 8: 3 faults for 2 pages"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fault_of_ordering_is_found(fault, options, law):
    with pytest.raises(Violated, match=law) as caught:
        explore(lambda: PagingWorld(**options, break_it=fault))
    assert len(caught.value.schedule) > 5


def test_a_mark_under_the_p2m_lock_or_the_bus_lock_is_one_of_the_orders():
    """What a fault handler and a device do: a mark with an outer lock held, while CLEAN is at work."""

    def break_nothing(domain):
        mark, locks = domain.paging.mark, domain.locks

        def nested(gfns):
            with locks.devices, locks.p2m:
                mark(gfns)

        domain.paging.mark = nested

    explored = explore(lambda: PagingWorld(programs=((0,),), device=(0,), cleans=0, break_it=break_nothing))
    assert explored.states > 300
