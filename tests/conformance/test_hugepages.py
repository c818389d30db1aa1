"""Every tracker over huge pages of the host, and while they come and go under the running guest."""

import threading
from functools import partial

import pytest
from machines import KINDS
from tiers import sample

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.frames import SIZE_2M
from pageferry.core.hugepages import HugePages
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import VmConfig
from pageferry.testing import check_log_dirty
from pageferry.vmm.accel import choose_machines

ODD = (4 << 20) + 7 * 4096
FREE_RUNNING = [f"free-running-{name}" for name in ("stamp", "sweep", "random", "hotset", "kv", "smp", "dma")]
CHECKS = [
    *("rounds-are-exact", "peek-changes-nothing", "changed-between-cleans", "state-restore-keeps-tracking"),
    *("peeking-thread", "writing-thread", "two-cleaners", "on-and-off-while-running"),
    *FREE_RUNNING,
]
IN_PLACE = ("kvm/kvm-bitmap", "kvm/kvm-ring")  # they leave the guest's only mapping as it is
MADV_DONTNEED = 4
MADV_PAGEOUT = 21
MADV_COLLAPSE = 25
UNTOUCHED_BYTE = 0x320 << 12  # RAM that no guest of the kit touches


def test_a_tracker_is_exact_over_transparent_huge_pages(kind, thp):
    option = {"huge_pages": HugePages.THP} if kind.accel == "kvm" else {"thp": True}
    check_log_dirty(partial(kind.make_vm, **option), memory_bytes=[ODD], seeds=[1], cpus=2, checks=CHECKS)


ON_KVM = [kind for kind in KINDS if kind.accel == "kvm"]
BY_DEFAULT = "the kit's other tests run over it by default, on most kernels"


@pytest.mark.parametrize("kind", sample(ON_KVM, BY_DEFAULT, quick=ON_KVM[:1]), ids=str, indirect=True)
def test_a_tracker_is_exact_over_a_file_of_small_pages(kind):
    make_vm = partial(kind.make_vm, huge_pages=HugePages.OFF)
    check_log_dirty(make_vm, memory_bytes=[ODD], seeds=[1], cpus=2, checks=CHECKS)


@pytest.mark.parametrize(
    "kind",
    sample([kind for kind in ON_KVM if kind.name in IN_PLACE], BY_DEFAULT, quick=ON_KVM[1:2]),
    ids=str,
    indirect=True,
)
def test_a_tracker_is_exact_over_private_memory(kind):
    make_vm = partial(kind.make_vm, huge_pages=HugePages.ANONYMOUS)
    check_log_dirty(make_vm, memory_bytes=[ODD], seeds=[1], cpus=2, checks=CHECKS)


@pytest.mark.parametrize("tracker", ["uffd-wp", "pagemap-scan"])
def test_a_tracker_that_maps_memory_twice_refuses_private_memory(kvm_support, tracker):
    with pytest.raises(UnsupportedError, match="private memory cannot be mapped a second time") as refused:
        choose_machines("kvm", tracker, HugePages.ANONYMOUS).make_vm(VmConfig(memory_bytes=ODD))
    assert refused.value.hint == "use --hugepages auto, thp or off"


@pytest.mark.parametrize("kind", ON_KVM, ids=str, indirect=True)
def test_a_tracker_is_exact_over_a_hugetlb_pool_or_refuses_it(kind, hugetlb_pool):
    make_vm = partial(kind.make_vm, huge_pages=HugePages.HUGETLB)
    try:
        check_log_dirty(make_vm, memory_bytes=[ODD], seeds=[1], cpus=2, checks=CHECKS)
    except UnsupportedError as error:
        pytest.skip(f"{kind.name}: {error} ({error.hint})")


def collapses(mapping, at):
    """Join the pages of 2 MiB at ``at`` into one; return whether the kernel did (it needs all of them for a moment)."""
    try:
        mapping.advise(at, SIZE_2M, MADV_COLLAPSE)
    except VmError:
        return False
    return True


class Storm:
    """Joins the guest's RAM into huge pages and splits them again, over and over, as khugepaged and reclaim might."""

    def __init__(self, vm):
        self.mapping = vm.memory.mapping
        # Of a file only the mapping of a page goes; private memory would lose the page, and is asked for it instead.
        self.split = MADV_DONTNEED if vm.memory.huge_pages is not HugePages.ANONYMOUS else MADV_PAGEOUT
        self.ends = range(0, vm.memory.size_bytes & -SIZE_2M, SIZE_2M)
        self.calm = threading.Event()
        self.thread = threading.Thread(target=self.rage)
        self.thread.start()

    def rage(self):
        while not self.calm.wait(0.0005):  # the guest must come by its memory too
            for at in self.ends:
                collapses(self.mapping, at)
                for page in (1, 255, 511):  # the huge page is split, the content stays
                    self.mapping.advise(at + (page << 12), 4096, self.split)

    def end(self):
        self.calm.set()
        self.thread.join()


def stormy(make_vm, weathered):
    """Machines whose memory is joined and split from the first moment to the last."""

    def make(config):
        vm = make_vm(config)
        storm, close = Storm(vm), vm.close

        def end_and_close():
            storm.end()
            if vm.memory.populated()[0].size:
                vm.pause()
                weathered.append(collapses(vm.memory.mapping, 0))  # no other mapping holds these pages now
            close()

        vm.close = end_and_close
        return vm

    return make


@pytest.fixture
def collapsible():
    memory = GuestMemory.linear(ODD)
    memory.write(0, b"x")
    if not collapses(memory.mapping, 0):
        pytest.skip("this kernel has no MADV_COLLAPSE for memfds (Linux 6.1 has)")


# Not "rounds-are-exact": KVM may report a page that it maps writable once more after a split, though it was not
# written.
STORMY = ["changed-between-cleans", "two-cleaners", *FREE_RUNNING]


@pytest.mark.parametrize(
    "check", sample(STORMY, "one guest and one race of many", quick=["two-cleaners", "free-running-kv"])
)
def test_no_dirty_bit_is_lost_while_pages_are_joined_and_split(kind, collapsible, check):
    weathered = []
    make_vm = partial(kind.make_vm, huge_pages=HugePages.OFF) if kind.accel == "kvm" else kind.make_vm
    check_log_dirty(stormy(make_vm, weathered), memory_bytes=[ODD], seeds=[1], cpus=2, checks=[check])
    assert weathered
    assert any(weathered)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.name in IN_PLACE], ids=str, indirect=True)
@pytest.mark.parametrize("check", ["two-cleaners", "free-running-kv"])
def test_nor_while_those_of_private_memory_are(kind, check):
    weathered = []
    make_vm = partial(kind.make_vm, huge_pages=HugePages.ANONYMOUS)
    check_log_dirty(stormy(make_vm, weathered), memory_bytes=[ODD], seeds=[1], cpus=2, checks=[check])
    assert weathered
    assert any(weathered)
