"""XCR0 and the XSAVE components beyond SSE: held, moved, and refused by name where they cannot be held."""

import dataclasses
import struct

import pytest

from pageferry.core.cpuid import SOFT_CPU, XSAVE, CpuModel, baseline, find
from pageferry.core.errors import GuestAt, MigrationError, PeerError, UnsupportedError, VmError
from pageferry.core.state import ExtendedState, MachineState
from pageferry.core.xsave import component_names, component_places, enabled_components
from pageferry.hypervisor.domain import Domain
from pageferry.kvm import uapi
from pageferry.kvm.cpuid import shown_cpuid, supported_cpuid
from pageferry.kvm.fds import SystemFd, VcpuFd
from pageferry.kvm.vm import KvmVm
from pageferry.stream.hvm_context import decode_machine_state, encode_machine_state

pytestmark = pytest.mark.kvm

AVX = 1 << 2
ANY_BYTES = (2, 5, 6, 7)  # AVX and AVX-512: every value is legal there
# 1: vpaddq ymm3, ymm3, ymm4; vpaddq ymm15, ymm15, ymm4; inc rax; mov [DATA], rax; jmp 1b
YMM_PROGRAM = "c5e5d4dcc505d4fc48ffc04889042500001800ebeb"


def upper_halves(**ymm):
    """The AVX component: 16 upper halves of 16 bytes."""
    area = bytearray(256)
    for name, (low, high) in ymm.items():
        struct.pack_into("<QQ", area, 16 * int(name[3:]), low, high)
    return bytes(area)


def ymm(state, number):
    """Return the four u64 of a register."""
    low = struct.unpack_from("<QQ", state.fpu_regs, 160 + 16 * number)
    return low + (
        struct.unpack_from("<QQ", state.extended.area, 16 * number) if state.extended.in_use & AVX else (0, 0)
    )


def avx_state(kvm, **registers):
    image = bytearray(kvm.start_state().fpu_regs)
    struct.pack_into("<QQ", image, 160 + 16 * 4, 1, 2)
    return kvm.start_state(
        cr4=0x4_0620,
        fpu_regs=bytes(image),
        extended=ExtendedState(xcr0=7, in_use=AVX, area=upper_halves(ymm3=(5, 1 << 63), ymm4=(3, 4))),
        **registers,
    )


@pytest.fixture
def xsave_table(kvm_support, monkeypatch):
    """The baseline with XSAVE and all components of this KVM, which from now on offers just that."""
    with SystemFd() as system:
        offered = supported_cpuid(system, lapic=False)
    places = [leaf for leaf in offered if leaf.leaf == 0xD]
    if not find(offered, 0xD)[0] & AVX:
        pytest.skip("this KVM knows no XSAVE components")
    table = []
    for leaf in (*baseline(offered), *places):
        if leaf.leaf == 0:
            leaf = leaf._replace(eax=0xD)
        elif leaf.leaf == 1:
            leaf = leaf._replace(ecx=leaf.ecx | XSAVE)
        table.append(leaf)
    table = tuple(sorted(table))
    monkeypatch.setattr("pageferry.kvm.vm.supported_cpuid", lambda *_, **__: table)
    return table


@pytest.fixture(params=["unasked", "by-table"])
def avx_cpu(request, kvm):
    """The CPU of a guest that may use AVX: the baseline, where KVM shows it unasked, or a table that has it."""
    if request.param == "by-table":
        return request.getfixturevalue("xsave_table")
    if not enabled_components(shown_cpuid(kvm.guest().vcpus[0].fd)) & AVX:
        pytest.skip("this KVM gives a baseline guest no AVX")
    return CpuModel.BASELINE


@pytest.fixture
def without_avx(monkeypatch):
    """Lets new machines believe that KVM shows their vCPUs the baseline and nothing else."""
    monkeypatch.setattr("pageferry.kvm.xsave.shown_cpuid", lambda vcpu: SOFT_CPU)


def test_a_guest_keeps_its_ymm_registers_from_machine_to_machine(kvm, avx_cpu, monkeypatch):
    monkeypatch.setitem(kvm.PROGRAMS, "ymm", YMM_PROGRAM)
    vm = kvm.guest("ymm", cpu=avx_cpu, vcpus=(avx_state(kvm),))
    for _ in range(4):
        before = vm.save_state().vcpus[0].rax
        vm.resume()
        kvm.wait_for(vm, lambda vm=vm, before=before: vm.memory.read_u64(kvm.DATA_GPA) > before)
        vm.pause()
        saved = vm.save_state()
        (state,) = saved.vcpus
        offset = state.rip - kvm.PROGRAM_GPA
        done = [state.rax + (offset in at) for at in (range(4, 11), range(8, 11))]
        assert ymm(state, 3) == (done[0], 2 * done[0], 5 + 3 * done[0], ((1 << 63) + 4 * done[0]) % (1 << 64)), offset
        assert ymm(state, 15) == (done[1], 2 * done[1], 3 * done[1], 4 * done[1]), offset
        assert state.extended.xcr0 == 7
        other = kvm.guest(cpu=avx_cpu)
        for region in vm.memory.regions:
            other.memory.write(region.gpa, vm.memory.read(region.gpa, region.size_bytes))
        other.load_state(decode_machine_state(encode_machine_state(saved)))
        vm.close()
        vm = other


def works_on(kvm, vm):
    """The guest goes on counting."""
    before = vm.memory.read_u64(kvm.DATA_GPA)
    kvm.wait_for(vm, lambda: vm.memory.read_u64(kvm.DATA_GPA) > before)
    return True


def test_a_running_guest_moves_with_its_ymm_registers(kvm, avx_cpu, journey, monkeypatch):
    monkeypatch.setitem(kvm.PROGRAMS, "ymm", YMM_PROGRAM)
    vm = kvm.guest("ymm", cpu=avx_cpu, vcpus=(avx_state(kvm),))
    vm.resume()
    assert works_on(kvm, vm)
    trip = journey(vm, KvmVm)
    assert trip.run().verified
    try:
        assert works_on(kvm, trip.there)
        trip.there.pause()
        (state,) = trip.there.save_state().vcpus
        done = state.rax + (state.rip - kvm.PROGRAM_GPA in range(4, 11))
        assert ymm(state, 3) == (done, 2 * done, 5 + 3 * done, ((1 << 63) + 4 * done) % (1 << 64))
    finally:
        trip.there.close()


def test_a_destination_without_avx_refuses_before_the_commit_and_the_guest_stays(kvm, avx_cpu, journey, monkeypatch):
    monkeypatch.setitem(kvm.PROGRAMS, "ymm", YMM_PROGRAM)
    vm = kvm.guest("ymm", cpu=avx_cpu, vcpus=(avx_state(kvm),))
    vm.resume()
    monkeypatch.setattr("pageferry.kvm.xsave.shown_cpuid", lambda vcpu: SOFT_CPU)
    trip = journey(vm, KvmVm)
    with pytest.raises(MigrationError, match="a vCPU here has no AVX, which the guest uses") as caught:
        trip.run()
    assert caught.value.guest_at is GuestAt.SOURCE
    assert isinstance(trip.there, MigrationError)
    assert not vm.log_dirty.enabled
    assert works_on(kvm, vm)


def test_xcr0_and_the_area_come_back_and_are_gone_after_a_state_without_them(kvm, avx_cpu):
    states = [avx_state(kvm)]
    states += [dataclasses.replace(states[0], extended=ExtendedState(xcr0=xcr0)) for xcr0 in (3, 7)]
    states += [
        dataclasses.replace(states[0], extended=ExtendedState(xcr0=1, in_use=AVX, area=upper_halves(ymm0=(1, 1))))
    ]
    vm = kvm.guest("spin", cpu=avx_cpu)
    for state in (*states, kvm.start_state()):
        vm.load_state(MachineState(vcpus=(state,), devices=vm.platform.bus.save()))
        (saved,) = decode_machine_state(encode_machine_state(vm.save_state())).vcpus
        assert saved.extended == state.extended


def test_a_component_of_zeros_is_in_its_initial_state(kvm, avx_cpu):
    state = dataclasses.replace(avx_state(kvm), extended=ExtendedState(xcr0=1, in_use=AVX, area=bytes(256)))
    (saved,) = kvm.guest("spin", cpu=avx_cpu, vcpus=(state,)).save_state().vcpus
    assert saved.extended is None  # and so goes to machines without AVX


@pytest.fixture
def kernel_area(kvm, monkeypatch):
    """A guest, and what its kernel is to say of the XSAVE area beyond what is there: XSTATE_BV, and the last bytes."""
    vm = kvm.guest("spin")
    fd, says = vm.vcpus[0].fd, {"in_use": 0, "last": 0}

    def ioctl(request, argument=0):
        result = VcpuFd.ioctl(fd, request, argument)
        if request in (uapi.KVM_GET_XSAVE, uapi.KVM_GET_XSAVE2):
            argument[64] |= says["in_use"]
            argument[-1] |= says["last"]
        return result

    monkeypatch.setattr(fd, "ioctl", ioctl)
    return vm, says


def test_a_component_whose_place_the_table_does_not_tell_is_refused_by_name(kernel_area):
    vm, says = kernel_area
    says.update(in_use=1 << 5 | 1 << 11, last=1)
    with pytest.raises(
        UnsupportedError, match="uses AVX-512 masks, XSAVE component 11, which its CPUID table"
    ) as caught:
        vm.save_state()
    assert "--cpu host" in caught.value.hint


def test_a_component_that_the_kernel_names_and_that_holds_nothing_is_not_in_use(kernel_area):
    vm, says = kernel_area
    before = vm.save_state().vcpus[0].extended
    says.update(in_use=1 << 9)  # PKRU, of a guest without protection keys
    assert vm.save_state().vcpus[0].extended == before


def test_with_its_place_in_the_table_a_component_travels(kvm, xsave_table):
    first, other = kvm.guest("spin", cpu=xsave_table), kvm.guest("spin", cpu=xsave_table)
    shown = enabled_components(shown_cpuid(first.vcpus[0].fd))
    where = {
        number: place
        for number, place in component_places(xsave_table).items()
        if number in ANY_BYTES and shown >> number & 1
    }
    assert where
    area = bytearray(max(place.stop for place in where.values()) - 576)
    for number, place in where.items():
        area[place.start - 576 : place.stop - 576] = bytes([number]) * len(place)
    mask = sum(1 << number for number in where)
    state = kvm.start_state(extended=ExtendedState(xcr0=3 | mask, in_use=mask, area=bytes(area)))
    first.load_state(MachineState(vcpus=(state,), devices=first.platform.bus.save()))
    saved = first.save_state()
    assert saved.vcpus[0].extended == state.extended
    other.load_state(decode_machine_state(encode_machine_state(saved)))
    assert other.save_state().vcpus[0].extended == state.extended


def test_a_destination_without_xsave_refuses_such_a_table_before_the_first_page(kvm, xsave_table, journey, monkeypatch):
    vm = kvm.guest("spin", cpu=xsave_table)
    monkeypatch.setattr("pageferry.kvm.vm.supported_cpuid", lambda *_, **__: baseline(xsave_table))
    trip = journey(vm, KvmVm)
    with pytest.raises(PeerError, match="this host lacks xsave, XSAVE of x87, XSAVE of SSE, XSAVE of AVX") as caught:
        trip.run()
    assert (caught.value.phase, caught.value.guest_at) == ("hello", GuestAt.SOURCE)
    assert trip.source.job.report.rounds == ()


def test_a_destination_without_the_component_refuses_by_its_name(kvm, without_avx):
    vm = kvm.guest("spin")
    before = vm.save_state()
    for extended in (
        ExtendedState(xcr0=7),
        ExtendedState(xcr0=1, in_use=AVX, area=upper_halves(ymm0=(1, 1))),
    ):
        state = kvm.start_state(rax=77, extended=extended)
        with pytest.raises(UnsupportedError, match="a vCPU here has no AVX, which the guest uses") as caught:
            vm.load_state(MachineState(vcpus=(state,), devices=before.devices))
        assert "choose a host" in caught.value.hint
    assert vm.save_state().vcpus[0].rax == before.vcpus[0].rax  # nothing was loaded


def test_the_software_machine_refuses_it_by_name(kvm):
    vm = Domain(dataclasses.replace(kvm.guest().config))
    try:
        with pytest.raises(UnsupportedError, match="software machine has no AVX, which the guest uses"):
            vm.load_state(MachineState(vcpus=(avx_state(kvm),), devices=vm.platform.bus.save()))
    finally:
        vm.close()


def test_an_area_of_another_length_is_refused(kvm, avx_cpu):
    vm = kvm.guest("spin", cpu=avx_cpu)
    for length in (0, 255, 257):
        state = kvm.start_state(extended=ExtendedState(xcr0=7, in_use=AVX, area=b"\1" * length))
        with pytest.raises(VmError, match=f"components have {length} bytes, not 256"):
            vm.load_state(MachineState(vcpus=(state,), devices=vm.platform.bus.save()))


def test_an_xcr0_that_no_cpu_takes_is_refused(kvm, avx_cpu):
    vm = kvm.guest("spin", cpu=avx_cpu)
    avx_without_sse = MachineState(
        vcpus=(kvm.start_state(extended=ExtendedState(xcr0=5)),), devices=vm.platform.bus.save()
    )
    with pytest.raises(VmError, match="KVM_SET_XCRS"):
        vm.load_state(avx_without_sse)


def test_components_have_names():
    assert component_names(0b1010_0111 | 1 << 20) == (
        "x87, SSE, AVX, AVX-512 masks, AVX-512 (ZMM16-31), XSAVE component 20"
    )


def test_without_xsave_a_table_tells_no_place_but_that_of_avx(kvm_support):
    with SystemFd() as system:
        offered = supported_cpuid(system, lapic=False)
    table = tuple(leaf._replace(ecx=leaf.ecx & ~XSAVE) if leaf.leaf == 1 else leaf for leaf in offered)
    assert enabled_components(table) == 0
    assert component_places(table) == {2: range(576, 832)}
    assert find(SOFT_CPU, 0xD) == (0, 0, 0, 0)
