"""Machine models: a guest goes where its model is, and nowhere else."""

from dataclasses import replace

import pytest
from at_work import runs_on
from trips import expect_as_before, source_of

from pageferry import __version__
from pageferry.core.cpuid import SOFT_CPU
from pageferry.core.errors import MigrationError, PeerError
from pageferry.core.vm import MachineModel
from pageferry.engine.wire.peer import Peer, PeerFailedError
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.vm import KvmVm
from pageferry.stream.ferry_frames import SourceHello
from pageferry.stream.ferry_order import Side


@pytest.fixture
def irqchip(kvm_support):
    if not kvm_support.capabilities["KVM_CAP_IRQCHIP"]:
        pytest.skip("this KVM has no KVM_CAP_IRQCHIP")


@pytest.mark.kvm
@pytest.mark.parametrize("accel", ["kvm"], indirect=True)
def test_a_guest_with_interrupt_controllers_moves_there_and_back(guests, inn, irqchip):
    vm = guests("smp", cpus=2, machine=MachineModel.PC)
    vm.resume()
    assert runs_on(vm)
    for _ in range(2):
        assert source_of(vm, inn.open()).run().verified
        vm = inn.outcome()
        assert vm.config.machine is MachineModel.PC
        assert runs_on(vm)


@pytest.mark.kvm
def test_a_pc_of_one_cpu_goes_from_either_machine_to_the_other_and_back(guests, inns, accel, make_vm, irqchip):
    machines = {"kvm": KvmVm, "soft": Domain}
    home, away = inns(make_vm, accel), inns(machines["kvm" if accel == "soft" else "soft"], "the other")
    vm = guests("kv", machine=MachineModel.PC)
    vm.resume()
    assert runs_on(vm)
    for inn in (away, home, away):
        assert source_of(vm, inn.open()).run().verified
        vm = inn.outcome()
        assert not isinstance(vm, Exception), vm
        assert runs_on(vm)


@pytest.mark.kvm
@pytest.mark.parametrize("accel", ["kvm"], indirect=True)
def test_a_machine_without_local_apics_refuses_a_pc_of_two_cpus_before_the_first_page(running, inn, irqchip):
    vm = running("smp", cpus=2, machine=MachineModel.PC)
    make_vm, inn.make_vm = inn.make_vm, Domain
    source = source_of(vm, inn.open())
    with pytest.raises(PeerError, match="the software machine's PC has 1 vCPU, not 2") as caught:
        source.run()
    assert (caught.value.phase, caught.value.hint) == ("hello", "use --accel kvm")
    assert source.job.report.rounds == ()
    inn.make_vm = make_vm
    assert isinstance(inn.outcome(), MigrationError)
    expect_as_before(vm, inn, source)


def test_a_machine_model_that_nobody_knows_is_refused_by_name(inn):
    channel = inn.open().connect(10)
    peer = Peer(channel, Side.SOURCE)
    peer.greet()
    hello = SourceHello(
        version=__version__, memory_bytes=32 << 20, cpus=1, accel="soft", cpuid=SOFT_CPU, migration_id="x"
    )
    peer.send(replace(hello, machine="q35"))
    with pytest.raises(PeerFailedError, match="there is no machine model 'q35' here"):
        peer.receive()
    channel.close()
    assert isinstance(inn.outcome(), MigrationError)
