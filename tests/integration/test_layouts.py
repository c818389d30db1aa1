"""Guests of every size and shape move between all kinds of machines, at the cost of what they have touched."""

from dataclasses import replace
from functools import partial

import pytest
from altered import alter
from machines import Kind
from tiers import sample

from mutation.fault import injected
from pageferry.core.bitmap import expand_runs
from pageferry.core.hugepages import HugePages
from pageferry.core.policies import XenPolicy
from pageferry.hypervisor.domain import Domain
from pageferry.testing import check_log_dirty
from pageferry.testing.lab import Lab
from simulation import soak

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
SIZES = {
    "4M+4K": 4 * MiB + 4 * KiB,
    "3G-4K": 3 * GiB - 4 * KiB,
    "3G": 3 * GiB,
    "3G+4K": 3 * GiB + 4 * KiB,
    "5G+12K": 5 * GiB + 12 * KiB,
    "16G": 16 * GiB,
}
SHAPES = sample(SIZES, "one size on both sides of the hole stands for all", quick=["3G+4K"])
PAGES = 120
SOFT = Kind(accel="soft", tracker="hap", make_vm=Domain)


def counting(kind, viewed_pages):
    """Return this kind of machine; pages of it that anybody reads or writes through its memory are counted.

    They are what a migration's time goes with.
    """

    def counted(views):
        return lambda starts, lengths: (viewed_pages.append(int(lengths.sum())), views(starts, lengths))[1]

    small = {"huge_pages": HugePages.OFF} if kind.accel == "kvm" else {}  # what is touched is then what has storage
    make_vm = partial(kind.make_vm, **small)
    return replace(kind, make_vm=injected(make_vm, lambda vm: alter(vm.memory, "views", counted)))


@pytest.mark.parametrize("size", SHAPES)
def test_a_guest_of_that_size_goes_and_comes_back(kind, size):
    """Its working set is the end of its RAM: above 4 GiB, and in 3 GiB + 4 KiB on both sides of the hole."""
    viewed_pages = []
    kind, soft = counting(kind, viewed_pages), counting(SOFT, viewed_pages)
    with Lab(make_vm=kind.make_vm, memory_bytes=SIZES[size], seed=5).guest("kv", pages=PAGES) as guest:
        vm = guest.vm
        assert expand_runs(*vm.memory.populated()).size < 60  # booted: program, page tables, information page
        vm.resume()
        for there in (soft, kind):
            soak.until_checked(vm)
            viewed_pages.clear()
            last, (vm, report) = vm, soak.migrate(vm, soak.Leg(kind=there, policy=XenPolicy(max_rounds=3)))
            populated = expand_runs(*last.memory.populated())
            assert (last.memory.gfn_limit - 1) in populated.tolist()
            assert PAGES < populated.size < PAGES + 60
            assert report.verified_pages == populated.size
            assert report.rounds[0].sent_pages <= populated.size
            # Each round once at each end, and three samples to estimate the downtime; at last a digest at each end.
            assert sum(viewed_pages) <= populated.size * (5 * len(report.rounds) + 2)
            assert set(expand_runs(*vm.memory.populated()).tolist()) >= set(populated.tolist())
            assert (vm.memory.size_bytes, vm.memory.gfn_limit) == (SIZES[size], last.memory.gfn_limit)
            last.close()
        soak.until_checked(vm)
        vm.close()


@pytest.mark.parametrize("size", SHAPES)
def test_a_tracker_is_exact_in_a_guest_of_that_size(kind, size):
    checks = ["rounds-are-exact", "free-running-kv", "host-writes-are-marked", "marks-outside-ram"]
    check_log_dirty(kind.make_vm, memory_bytes=[SIZES[size]], seeds=[1], checks=checks)
