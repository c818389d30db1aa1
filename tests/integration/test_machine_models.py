"""Machine models: a guest goes where its model is, and nowhere else."""

from dataclasses import replace

import pytest
from at_work import runs_on, until
from trips import expect_as_before, source_of

from pageferry import __version__
from pageferry.core.cpuid import SOFT_CPU
from pageferry.core.errors import MigrationError, PeerError, UnsupportedError
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.engine.wire.channel import Endpoint
from pageferry.engine.wire.peer import Peer, PeerFailedError
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.probe_ring_0 import expect_ring_0
from pageferry.kvm.vm import KvmVm
from pageferry.stream.ferry_frames import SourceHello
from pageferry.stream.ferry_order import Side
from pageferry.vmm.accel import Accel, Machines, choose_machines
from pageferry.vmm.process import GuestProcess
from pageferry.vmm.qmp_client import QmpClient


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
    home, away = inns(make_vm), inns(machines["kvm" if accel == "soft" else "soft"])
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


def test_an_unknown_machine_model_is_refused_by_name(inn):
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


@pytest.fixture
def pc_cannot_be_on_kvm():
    """A KVM for small programs alone; what AUTO chooses for a PC there, with the reason that it has."""

    def none(config):
        pytest.fail(f"a machine of KVM was made for {config}")

    soft = choose_machines(Accel.SOFT)
    return Machines(
        accel="kvm",
        reason="/dev/kvm works",
        make_vm=none,
        choose_for_pc=lambda: replace(soft, reason="ring 0 is interpreted"),
    )


@pytest.mark.parametrize("accel", ["soft"], indirect=True)
def test_a_process_takes_a_pc_in_on_the_machine_that_can_hold_it(running, tmp_path, pc_cannot_be_on_kvm):
    vm, messages = running("kv", machine=MachineModel.PC), []
    process = GuestProcess(
        pc_cannot_be_on_kvm, tmp_path / "control", on_console=lambda _: None, on_message=messages.append
    )
    try:
        endpoint = process.incoming.listen(Endpoint(host="127.0.0.1"))
        process.start()
        report = source_of(vm, endpoint).run()
        assert (report.status, report.destination_accel) == ("completed", "soft")
        until(lambda: process.run_state() == "running", "arrival")
        with QmpClient(tmp_path / "control") as client:
            state = client.execute("x-query-guest")
        assert (state["accel"], state["accel_reason"]) == ("soft", "ring 0 is interpreted")
        assert "machine: soft (ring 0 is interpreted)" in messages
    finally:
        process.close()


def test_the_machine_for_a_plain_guest_stays_as_it_is(pc_cannot_be_on_kvm):
    assert pc_cannot_be_on_kvm.suited_to(MachineModel.PLAIN) is pc_cannot_be_on_kvm


@pytest.fixture
def no_native_ring_0(kvm_support):
    try:
        expect_ring_0()
    except UnsupportedError as error:
        return str(error).partition(":")[0]
    return pytest.skip("this KVM runs ring 0 natively")


@pytest.mark.kvm
def test_without_native_ring_0_the_choice_for_a_pc_is_soft_if_it_may_be(no_native_ring_0):
    for machines in (choose_machines(Accel.AUTO), choose_machines(Accel.AUTO, machine=MachineModel.PC)):
        chosen = machines.suited_to(MachineModel.PC)
        assert chosen.accel == "soft"
        assert chosen.reason.startswith(no_native_ring_0)
    with pytest.raises(UnsupportedError, match=no_native_ring_0) as refused:
        choose_machines(Accel.AUTO, "kvm-bitmap").suited_to(MachineModel.PC)
    assert refused.value.hint == "kvm-bitmap is of kvm only; without it the guest can be on soft"
    assert choose_machines(Accel.KVM).suited_to(MachineModel.PC).accel == "kvm"


@pytest.mark.kvm
def test_a_pc_of_two_cpus_is_told_why_neither_machine_holds_it(no_native_ring_0):
    machines = choose_machines(Accel.AUTO).suited_to(MachineModel.PC)
    with pytest.raises(UnsupportedError, match=f"has 1 vCPU, not 2; {no_native_ring_0}") as refused:
        machines.make_vm(VmConfig(memory_bytes=32 << 20, cpus=2, machine=MachineModel.PC))
    assert refused.value.hint == "choose a host on which pageferry doctor finds accel-kvm and kvm-ring0"
