"""A stock Linux on KVM: it boots, works, and goes on working wherever it is moved.

It needs a KVM that runs ring 0 natively, as that of ``make test-npt`` does.
"""

import pytest
from linux_guest import Said
from linux_image import READY, linux_image
from machines import KINDS
from trips import source_of

from pageferry.core.errors import UnsupportedError
from pageferry.core.policies import PostcopyPolicy, XenPolicy
from pageferry.core.state import MpState
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.engine.image.restore import restore, restore_lazily
from pageferry.engine.image.save import Save
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.guests.linux.boot import boot_linux
from pageferry.guests.linux.image import load_kernel
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.probe_ring_0 import expect_ring_0
from pageferry.kvm.vm import KvmVm

pytestmark = pytest.mark.kvm

MEMORY_BYTES = 128 << 20
ON_KVM = [kind for kind in KINDS if kind.accel == "kvm"]
TWO_CPUS = pytest.mark.parametrize("at_work", [2], indirect=True, ids=["2-cpus"])
PATIENCE_S = 1800
#: An emulated host on a busy one gives a CPU of the guest no time for half a minute, which a kernel calls a lockup. The
#: guest must go on working all the same.
COMMAND_LINE = "console=ttyS0 quiet nosoftlockup rcupdate.rcu_cpu_stall_suppress=1 pageferry=work"


@pytest.fixture(scope="module")
def kernel_and_initrd(kvm_support):
    try:
        expect_ring_0()
    except UnsupportedError as error:
        pytest.skip(f"{error}; make test-npt has such a KVM")
    image = linux_image()
    return load_kernel(image.kernel), image.initramfs.read_bytes()


@pytest.fixture(scope="module")
def at_work(request, kernel_and_initrd, tmp_path_factory):
    """A file with a guest that has booted and works on all of its CPUs."""
    kernel, initrd = kernel_and_initrd
    path, said = tmp_path_factory.mktemp("linux") / "guest.bin", Said()
    vm = KvmVm(VmConfig(memory_bytes=MEMORY_BYTES, cpus=request.param, machine=MachineModel.PC))
    try:
        said.listen_to(vm)
        boot_linux(vm, kernel, initrd=initrd, command_line=COMMAND_LINE)
        vm.resume()
        said.wait_for(lambda: READY in bytes(said), "first process", PATIENCE_S)
        said.works_on()
        Save(vm, path, XenPolicy(), stop=True, on_event=lambda _: None).run()
    finally:
        vm.close()
    with SavedGuest(path) as saved:
        assert MpState.UNINITIALIZED not in [vcpu.mp_state for vcpu in saved.state.vcpus]
    return path


@pytest.fixture
def guest(at_work):
    """Restores the guest on a machine that ``make_vm`` makes; closes all that it made."""
    made = []

    def make(make_vm=KvmVm):
        with SavedGuest(at_work) as saved:
            made.append(restore(saved, make_vm))
        return made[-1]

    yield make
    for vm in made:
        vm.close()


def moved(vm, inn, said, policy=None):
    """Migrate a guest that runs; return it as it has arrived."""
    report = source_of(vm, inn.open(before_run=said.listen_to), policy).run()
    assert report.verified
    there = inn.outcome()
    assert not isinstance(there, Exception), there
    return there


# The tests that share a guest follow each other: it is booted once.
@pytest.mark.parametrize("at_work", [1], indirect=True, ids=["1-cpus"])
def test_with_one_cpu_it_works_on_under_the_emulator_and_back(guest, inns):
    said, vm = Said(), guest()
    said.listen_to(vm)
    vm.resume()
    said.works_on()
    for make_vm in (Domain, KvmVm):
        vm = moved(vm, inns(make_vm), said)
        said.works_on(1)


@pytest.mark.parametrize(
    ("at_work", "kind"),
    [(1, ON_KVM[0]), *((2, kind) for kind in ON_KVM)],
    indirect=True,
    ids=lambda value: f"{value}-cpus" if isinstance(value, int) else str(value),
)
def test_it_works_on_there_and_back_whatever_the_tracker(guest, inns, kind):
    said, vm, inn = Said(), guest(kind.make_vm), inns(kind.make_vm)
    said.listen_to(vm)
    vm.resume()
    said.works_on()
    for _ in range(2):
        vm = moved(vm, inn, said)
        said.works_on()


@TWO_CPUS
def test_it_works_on_when_its_pages_follow_it(guest, inns):
    said, vm = Said(), guest()
    said.listen_to(vm)
    vm.resume()
    said.works_on()
    moved(vm, inns(KvmVm), said, PostcopyPolicy(limit_s=1e-6, max_rounds=1))
    said.works_on()


@TWO_CPUS
def test_it_works_on_from_a_file_whose_pages_are_read_when_they_are_touched(at_work):
    said = Said()
    with SavedGuest(at_work) as saved:
        vm, lazy = restore_lazily(saved, KvmVm, on_failure=lambda error: pytest.fail(str(error)))
        try:
            said.listen_to(vm)
            vm.resume()
            lazy.read_ahead()
            said.works_on()
        finally:
            vm.close()
            lazy.close()
