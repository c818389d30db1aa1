"""Every tracker: KVM's, and the software hypervisor's in each paging mode, in hybrid order, and without superpages."""

from functools import partial

import pytest

from pageferry.hypervisor.domain import Domain
from pageferry.kvm import KvmVm


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


MACHINES = {
    "kvm": KvmVm,
    "hap": Domain,
    "small-pages": small_pages,
    "shadow": partial(Domain, paging_mode="shadow"),
    "hybrid": hybrid,
}


@pytest.fixture(params=MACHINES)
def make_vm(request):
    """Makes a machine with the tracker under test from a VmConfig."""
    if request.param == "kvm":
        request.getfixturevalue("kvm_support")
    return MACHINES[request.param]
