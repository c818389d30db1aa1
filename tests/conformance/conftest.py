"""Every tracker: KVM's, and the software hypervisor's in each paging mode and in hybrid order."""

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


MACHINES = {"kvm": KvmVm, "hap": Domain, "shadow": partial(Domain, paging_mode="shadow"), "hybrid": hybrid}


@pytest.fixture(params=MACHINES)
def make_vm(request):
    """Makes a machine with the tracker under test from a VmConfig."""
    if request.param == "kvm":
        request.getfixturevalue("kvm_support")
    return MACHINES[request.param]
