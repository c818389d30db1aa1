"""Every tracker: KVM's, and the software hypervisor's in each paging mode, in hybrid order, and without superpages."""

from functools import cache, partial

import pytest
from machines import KINDS, expect_works
from tiers import sample

from pageferry.core.errors import UnsupportedError
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.trackers import ring_tracker
from pageferry.kvm.vm import KvmVm
from pageferry.witness.machines import with_digests, with_witness


def hybrid(config):
    """Make a Domain that changes its paging mode before each migration: shadow, hap, shadow, ..."""
    domain = Domain(config)
    enable = domain.paging.enable

    def switch_and_enable():
        if not domain.paging.enabled:
            domain.set_paging_mode("shadow" if domain.paging_mode == "hap" else "hap")
        enable()

    domain.paging.enable = switch_and_enable
    return domain


def small_pages(config):
    """Make a Domain whose P2M has no superpages, and makes none."""
    domain = Domain(config)
    with domain.locks.p2m:
        domain.p2m.prepare(domain.memory.all_ram().gfns())
    domain.p2m.join = lambda: None
    return domain


#: Dirty rings so small that guests of the kit fill them.
SMALL_RING = "kvm-small-ring"
#: Every tracker that a user can choose; a new one joins by itself.
CHOICES = {kind.tracker: kind for kind in KINDS}
#: Trackers with a witness: it must blame no sound one, and return what the tracker returns.
WATCHED = {
    "kvm-bitmap+digests": partial(KvmVm, tracker=with_witness("kvm-bitmap", "digests")),
    "kvm-bitmap+pagemap-scan": partial(KvmVm, tracker=with_witness("kvm-bitmap", "pagemap-scan")),
    "uffd-wp+kvm-bitmap": partial(KvmVm, tracker=with_witness("uffd-wp", "kvm-bitmap")),
    "hap+digests": with_digests(Domain),
}
MACHINES = {**{name: kind.make_vm for name, kind in CHOICES.items()}, "small-pages": small_pages, "hybrid": hybrid}


@cache
def missing_for(kind):
    """Return what this host lacks for a kind of machine; None: nothing."""
    try:
        expect_works(kind)
    except UnsupportedError as error:
        return f"{error} ({error.hint})"
    return None


def expect_host(request, name):
    """Skip the test where this host cannot run a tracker of that name, or a pair ``tracker+witness``."""
    for kind in (CHOICES[each] for each in name.split("+") if each in CHOICES):
        if kind.accel == "kvm":
            request.getfixturevalue("kvm_support")
        if lacks := missing_for(kind):
            pytest.skip(lacks)


@pytest.fixture(
    params=sample(
        [*MACHINES, SMALL_RING],
        "a variant of a tracker whose like is in `make test`",
        quick=CHOICES,
    )
)
def make_vm(request):
    """Makes a machine with the tracker under test from a VmConfig."""
    if request.param == SMALL_RING:
        return partial(KvmVm, tracker=ring_tracker(request.getfixturevalue("smallest_ring_bytes")))
    expect_host(request, request.param)
    return MACHINES[request.param]


@pytest.fixture(params=sample(WATCHED, "one pair on each machine", quick=["kvm-bitmap+pagemap-scan", "hap+digests"]))
def make_watched_vm(request):
    """Makes a machine with a tracker and a witness."""
    expect_host(request, request.param)
    return WATCHED[request.param]
