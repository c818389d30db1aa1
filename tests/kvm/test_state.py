"""vCPU and device state: there, back, and into another machine in the middle of things."""

import contextlib
import dataclasses
import struct

import pytest

from pageferry.core.cpuid import SOFT_CPU, baseline, find, of_vcpu
from pageferry.core.errors import VmError
from pageferry.core.state import MachineState, VcpuState
from pageferry.core.vm import GuestEnd
from pageferry.kvm import msrs, uapi, vcpu_state
from pageferry.kvm.cpuid import supported_cpuid
from pageferry.kvm.fds import SystemFd
from pageferry.kvm.msrs import MSR_FIELDS, MSR_IA32_CR_PAT, listed_msrs, read_msrs, travels, write_msrs
from pageferry.stream.hvm_context import decode_machine_state, encode_machine_state

pytestmark = pytest.mark.kvm

_TSC = "tsc"  # runs on while the guest is paused: never compared


def fx_image(**xmm):
    """A 512-byte image: st0 = 0.0, st1 = 1.0, double precision x87 control, MXCSR with flush to zero, xmm registers."""
    image = bytearray(512)
    struct.pack_into("<HHB", image, 0, 0x027F, 0, 0b11)
    struct.pack_into("<II", image, 24, 0x9F80, 0xFFFF)
    struct.pack_into("<QH", image, 32 + 16, 1 << 63, 0x3FFF)
    for name, (low, high) in xmm.items():
        struct.pack_into("<QQ", image, 160 + 16 * int(name[3:]), low, high)
    return bytes(image)


def xmm(state, number):
    return struct.unpack_from("<QQ", state.fpu_regs, 160 + 16 * number)


def st0(state):
    mantissa, exponent = struct.unpack_from("<QH", state.fpu_regs, 32)
    return mantissa * 2.0 ** (exponent - 0x3FFF - 63) if mantissa else 0.0


def without_tsc(vcpu):
    return dataclasses.replace(vcpu, tsc=0)


def full_state(kvm):
    general = ("rax", "rbx", "rcx", "rdx", "rbp", "rsi", "rdi", "rsp", *(f"r{number}" for number in range(8, 16)))
    registers = {name: 0x1111_2222_0000_0000 + number for number, name in enumerate(general)}
    return kvm.start_state(
        **registers,
        cr2=0x7000,
        dr0=0x10_0001,
        dr3=0x18_0000,
        dr7=0x400,
        star=0x0023_0010_0000_0000,
        lstar=0xFFFF_8000_0000_1000,
        cstar=0xFFFF_8000_0000_2000,
        syscall_mask=0x4_7700,
        sysenter_esp=0xFFFF_8000_0000_3000,
        sysenter_eip=0xFFFF_8000_0000_4000,
        shadow_gs=0xFFFF_8000_0000_5000,
        fpu_regs=fx_image(xmm0=(1, 2), xmm7=(3, 4), xmm15=(5, 6)),
        msrs=((0x277, 0x0007_0106_0007_0406),),
    )


def kept(kvm, state, *names):
    """Return what this KVM keeps of MSRs that were set: of some it drops the upper half."""
    fd = kvm.guest("spin").vcpus[0].fd
    indices = {index: name for index, name in MSR_FIELDS.items() if name in names}
    write_msrs(fd, {index: getattr(state, name) for index, name in indices.items()})
    return {indices[index]: value for index, value in read_msrs(fd, indices).items()}


def test_every_field_comes_back_as_it_was_loaded(kvm):
    state = full_state(kvm)
    vm = kvm.guest("spin", vcpus=(state,))
    (saved,) = vm.save_state().vcpus
    # SYSENTER does not exist in AMD's long mode.
    state = dataclasses.replace(state, **kept(kvm, state, "sysenter_esp", "sysenter_eip"))
    for field in dataclasses.fields(VcpuState):
        if field.name != _TSC:
            assert getattr(saved, field.name) == getattr(state, field.name), field.name


def test_state_is_the_same_in_a_second_machine(kvm):
    vm = kvm.guest("spin", vcpus=(full_state(kvm),))
    vm.resume()
    vm.pause()
    saved = vm.save_state()
    other = kvm.guest()
    other.load_state(saved)
    assert [without_tsc(v) for v in other.save_state().vcpus] == [without_tsc(v) for v in saved.vcpus]


def test_a_guest_goes_on_exactly_in_another_machine(kvm):
    start = fx_image(xmm0=(1 << 32, 0), xmm1=(1, 1), xmm7=(0, 7), xmm15=(5, 1 << 63))
    vm = kvm.guest("sse", fpu_regs=start)
    for _ in range(8):
        before = vm.save_state().vcpus[0].rax
        vm.resume()
        kvm.wait_for(vm, lambda vm=vm, before=before: vm.memory.read_u64(kvm.DATA_GPA) > before)
        vm.pause()
        saved = vm.save_state()
        (state,) = saved.vcpus
        rip = state.rip - kvm.PROGRAM_GPA
        done = [state.rax + (end <= rip <= 15) for end in (4, 8, 13, 15)]  # before or after inc rax, which ends at 18
        for number, (low, high), count in (
            (0, (1 << 32, 0), done[0]),
            (7, (0, 7), done[1]),
            (15, (5, 1 << 63), done[2]),
        ):
            assert xmm(state, number) == (low + count, high + count), f"xmm{number} at +{rip}"
        assert st0(state) == done[3]
        assert state.fpu_regs[:2] == (0x027F).to_bytes(2, "little")
        assert state.fpu_regs[24:28] == (0x9F80).to_bytes(4, "little")
        other = kvm.guest()
        for region in vm.memory.regions:
            other.memory.write(region.gpa, vm.memory.read(region.gpa, region.size_bytes))
        other.load_state(saved)
        vm.close()
        vm = other


def test_the_tsc_goes_on_and_never_back(kvm):
    start = 1 << 50 if kvm.support.tsc_offset else 0  # else it is the host's, whatever is set
    vm = kvm.guest("spin", tsc=start)
    saved = vm.save_state()
    other = kvm.guest()
    other.load_state(saved)
    first = other.save_state().vcpus[0].tsc
    assert start <= saved.vcpus[0].tsc <= first < saved.vcpus[0].tsc + (1 << 40)
    assert other.save_state().vcpus[0].tsc > first


def test_tscs_of_two_vcpus_keep_their_distance(kvm):
    vm = kvm.guest("spin", vcpus=(kvm.start_state(tsc=1 << 40), kvm.start_state(tsc=(1 << 40) + 12345)))
    first, second = vm.save_state().vcpus
    assert second.tsc - first.tsc == (12345 if kvm.support.tsc_offset else 0)


def test_iopl_survives_a_kvm_that_drops_it(kvm):
    vm = kvm.guest("sync", vcpus=(kvm.start_state(rflags=0x3202),))
    vm.attach_sync(True)
    vm.resume()
    vm.wait(60)
    saved = vm.save_state()
    assert saved.vcpus[0].rflags & 0x3000 == 0x3000
    other = kvm.guest("sync")
    other.load_state(saved)
    other.resume()  # and may still do port I/O
    other.wait(60)
    assert other.end is not None
    assert other.end.exit_code is not None


def test_every_msr_that_can_be_set_travels_and_no_other_is_left_behind(kvm):
    with SystemFd() as system:
        listed = listed_msrs(system)
    seen = 0
    for index in filter(travels, listed):
        first, other = kvm.guest("spin"), kvm.guest("spin")
        fd = first.vcpus[0].fd
        before = read_msrs(fd, (index,))
        with contextlib.suppress(VmError):  # read-only, or this bit is reserved
            write_msrs(fd, {index: before[index] ^ 1})
        value = read_msrs(fd, (index,)).get(index)
        saved = decode_machine_state(encode_machine_state(first.save_state()))
        assert (index in dict(saved.vcpus[0].msrs)) == (value != before[index] or index == MSR_IA32_CR_PAT)
        other.load_state(saved)
        assert read_msrs(other.vcpus[0].fd, (index,)) == {index: value}
        other.load_state(MachineState(vcpus=(kvm.start_state(),), devices=saved.devices))
        assert read_msrs(other.vcpus[0].fd, (index,)) == before, hex(index)
        seen += value != before[index]
        first.close()
        other.close()
    assert seen


def test_an_msr_that_this_kvm_takes_and_forgets_is_refused(kvm, monkeypatch):
    vm = kvm.guest("spin")
    monkeypatch.setattr(msrs, "write_msrs", lambda fd, values: None)
    state = kvm.start_state(msrs=((0x1D9, 1),))
    with pytest.raises(VmError, match="does not keep MSR 0x1d9 = 0x1"):
        vm.load_state(MachineState(vcpus=(state,), devices=vm.platform.bus.save()))


def test_one_call_reads_all_msrs_and_passes_over_what_is_missing(kvm):
    fd = kvm.guest("spin", star=5).vcpus[0].fd
    assert read_msrs(fd, (0x4B4D_0000, 0xC000_0081, 0x4B4D_0001)) == {0xC000_0081: 5}


def test_more_msrs_than_one_call_takes_are_read_without_a_gap(kvm):
    fd = kvm.guest("spin", star=5, lstar=6).vcpus[0].fd
    assert read_msrs(fd, [0xC000_0081] * 255 + [0xC000_0082]) == {0xC000_0081: 5, 0xC000_0082: 6}


def test_more_msrs_than_kvm_takes_are_refused(kvm):
    fd = kvm.guest("spin").vcpus[0].fd
    with pytest.raises(VmError, match="256 MSRs are more than KVM takes"):
        write_msrs(fd, dict.fromkeys(range(256), 0))


def test_a_pending_event_is_carried(kvm):
    vm = kvm.guest("spin")
    page_fault = 1 << 31 | 1 << 11 | 3 << 8 | 14
    state = kvm.start_state(pending_event=page_fault, error_code=4)
    vm.load_state(MachineState(vcpus=(state,), devices=vm.platform.bus.save()))
    (saved,) = vm.save_state().vcpus
    assert (saved.pending_event, saved.error_code) == (page_fault, 4)
    vm.load_state(MachineState(vcpus=(kvm.start_state(),), devices=vm.platform.bus.save()))
    assert vm.save_state().vcpus[0].pending_event == 0


def test_what_a_machine_cannot_hold_is_refused(kvm):
    vm = kvm.guest("spin")
    devices = vm.platform.bus.save()
    good = kvm.start_state()
    with pytest.raises(VmError, match="2 vCPUs"):
        vm.load_state(MachineState(vcpus=(good, good), devices=devices))
    with pytest.raises(VmError, match="FPU state has 5 bytes"):
        vm.load_state(MachineState(vcpus=(dataclasses.replace(good, fpu_regs=b"short"),), devices=devices))
    with pytest.raises(VmError, match="MSR 0x4b4d0000"):
        vm.load_state(MachineState(vcpus=(dataclasses.replace(good, msrs=((0x4B4D_0000, 1),)),), devices=devices))
    bad = good.fpu_regs[:24] + b"\xff" * 8 + good.fpu_regs[32:]
    with pytest.raises(VmError, match="KVM_SET_XSAVE"):
        vm.load_state(MachineState(vcpus=(dataclasses.replace(good, fpu_regs=bad),), devices=devices))
    with pytest.raises(VmError, match="kind 7"):
        vm.load_state(MachineState(vcpus=(dataclasses.replace(good, pending_event=1 << 31 | 7 << 8),), devices=devices))


def test_state_needs_a_paused_guest(kvm):
    vm = kvm.guest("spin")
    saved = vm.save_state()
    vm.resume()
    with pytest.raises(VmError, match="while the guest runs"):
        vm.save_state()
    with pytest.raises(VmError, match="while the guest runs"):
        vm.load_state(saved)


def test_devices_travel_too(kvm):
    vm = kvm.guest("sync")
    vm.attach_sync(True)
    vm.resume()
    vm.wait(60)
    vm.reply_sync(40)
    other = kvm.guest("sync")
    other.load_state(vm.save_state())
    other.attach_sync(True)
    other.resume()
    other.wait(60)
    assert other.sync_value() == 41
    other.reply_sync(2)
    other.resume()
    other.wait(60)
    assert other.end == GuestEnd(exit_code=42)


def test_cpuid_is_the_baseline_and_nothing_more(kvm_support):
    with SystemFd() as system:
        leaves = of_vcpu(baseline(supported_cpuid(system, lapic=False)), index=1, cpus=2)
    _, ebx, ecx, edx = find(leaves, 1)
    assert edx & ~find(SOFT_CPU, 1)[3] == 0
    assert edx >> 26 & 1, "SSE2"
    assert ecx == 1 << 31, "no SSE3, no AVX, no XSAVE"
    assert ebx >> 24 == 1
    assert {leaf.leaf for leaf in leaves} == {0, 1, 0x8000_0000, 0x8000_0001, 0x8000_0008}
    assert find(leaves, 0)[0] == 1
    assert find(leaves, 0x8000_0001)[3] >> 29 & 1, "long mode"


class Heard:
    """A vCPU's descriptor that keeps the special registers that were set, and sets none."""

    def __init__(self, fd):
        self._fd = fd
        self.set = []

    def ioctl(self, request, argument):
        if request != uapi.KVM_SET_SREGS:
            return self._fd.ioctl(request, argument)
        self.set.append((argument.cr3, argument.tr.type))
        return 0


@pytest.mark.parametrize("tss", [0x8B, 0x89], ids=["busy", "available"])
def test_translations_are_forgotten_and_the_kind_of_tss_is_not(kvm, tss):
    (vcpu,) = kvm.guest("spin").vcpus
    assert vcpu._sealed is not None
    cr3, fd = vcpu.save().cr3, Heard(vcpu.fd)
    vcpu_state.forget_translations(fd, vcpu._sealed, dataclasses.replace(vcpu._parts, tss=tss))
    assert fd.set == [(cr3 ^ 8, tss & 15), (cr3, tss & 15)]
