"""Every tracker: KVM's, and the software hypervisor's in each paging mode, in hybrid order, and without superpages."""

from functools import partial

import pytest
from tiers import sample

from pageferry.core.errors import UnsupportedError
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.trackers import ring_tracker
from pageferry.kvm.vm import KvmVm
from pageferry.uffd.fds import check_pagemap_scan, check_userfaultfd
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


#: Dirty rings as large as they get, and so small that guests of the kit fill them.
RINGS = ("kvm-ring", "kvm-small-ring")
ON_KVM = {
    "kvm": KvmVm,
    "uffd-wp": partial(KvmVm, tracker="uffd-wp"),
    "pagemap-scan": partial(KvmVm, tracker="pagemap-scan"),
}
#: Trackers with a witness: it must blame no sound one, and return what the tracker returns.
WATCHED = {
    "kvm+digests": partial(KvmVm, tracker=with_witness("kvm-bitmap", "digests")),
    "kvm+pagemap-scan": partial(KvmVm, tracker=with_witness("kvm-bitmap", "pagemap-scan")),
    "uffd-wp+kvm": partial(KvmVm, tracker=with_witness("uffd-wp", "kvm-bitmap")),
    "hap+digests": with_digests(Domain),
}
#: What KVM machines with these trackers need besides KVM.
CHECKED = {"uffd-wp": check_userfaultfd, "pagemap-scan": check_pagemap_scan}
MACHINES = {
    **ON_KVM,
    "hap": Domain,
    "small-pages": small_pages,
    "shadow": partial(Domain, paging_mode="shadow"),
    "hybrid": hybrid,
}


def expect_host(request, name):
    if name.partition("+")[0] in ON_KVM:
        request.getfixturevalue("kvm_support")
        try:
            for each in name.split("+"):
                CHECKED.get(each, lambda: None)()
        except UnsupportedError as error:
            pytest.skip(f"{error} ({error.hint})")


@pytest.fixture(
    params=sample(
        [*MACHINES, *RINGS],
        "a variant of a tracker whose like is in `make test`",
        quick=["kvm", "uffd-wp", "pagemap-scan", "kvm-ring", "hap", "shadow"],
    )
)
def make_vm(request):
    """Makes a machine with the tracker under test from a VmConfig."""
    if request.param in RINGS:
        smallest_bytes = request.getfixturevalue("smallest_ring_bytes")
        return partial(KvmVm, tracker=ring_tracker(smallest_bytes) if request.param == "kvm-small-ring" else "kvm-ring")
    expect_host(request, request.param)
    return MACHINES[request.param]


@pytest.fixture(params=sample(WATCHED, "one pair on each machine", quick=["kvm+pagemap-scan", "hap+digests"]))
def make_watched_vm(request):
    """Makes a machine with a tracker and a witness."""
    expect_host(request, request.param)
    return WATCHED[request.param]
