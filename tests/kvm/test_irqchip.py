"""A machine with interrupt controllers inside the kernel: each part of its state travels, or is refused."""

import ctypes
import dataclasses
import struct
from contextlib import nullcontext
from functools import partial

import pytest

from pageferry.core.cpu_features import host
from pageferry.core.cpuid import APIC, TSC_DEADLINE, baseline, find
from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.libc import Fd
from pageferry.core.state import DeviceState, LapicState, MachineState, MpState
from pageferry.core.vm import MachineModel
from pageferry.devices.pc.pit import PIT_HZ
from pageferry.kvm import tsc, uapi
from pageferry.kvm.cpuid import shown_cpuid, supported_cpuid
from pageferry.kvm.fds import SystemFd, VmFd
from pageferry.kvm.irqchip import KvmInterrupts
from pageferry.kvm.msrs import MSR_KVM_SYSTEM_TIME, write_msrs
from pageferry.kvm.uapi_state import KvmIoapicState, KvmPicState
from pageferry.stream.hvm_context import decode_machine_state, encode_machine_state

pytestmark = pytest.mark.kvm

# Registers: 0x80 task priority, 0xa0 processor priority, 0xf0 spurious interrupts (0x100: enabled), 0x320 the timer,
# 0x340 performance counters, 0x3e0 the timer's divisor (0xa: by 128).
TIMER_COUNT, TIMER_NOW, IRR = 0x380, 0x390, 0x200
MASKED, PERIODIC, DEADLINE = 1 << 16, 1 << 17, 2 << 17
LONG = 0xFFFF_FFF0  # by 128: nine minutes

# 1: the low byte, then the high byte of PIT counter 0 (latched) to [DATA]; inc rcx; mov [DATA + 8], rcx; jmp 1b
READ_PIT = "30c0e643e4408804250000180 0e440880425010018 0048ffc148890c2508001800ebe0".replace(" ", "")


@pytest.fixture
def offered(kvm):
    """Returns what this KVM can give to a guest with interrupt controllers."""
    missing = [name for name in ("KVM_CAP_IRQCHIP", "KVM_CAP_PIT2") if not kvm.support.capabilities[name]]
    if missing:
        pytest.skip(f"this KVM lacks {', '.join(missing)}")
    with SystemFd() as system:
        return supported_cpuid(system, lapic=True)


@pytest.fixture
def pc(kvm, offered):
    """Makes guests with interrupt controllers, who see a local APIC even where there is one vCPU only."""
    return partial(kvm.guest, machine=MachineModel.PC, cpu=baseline(offered))


@pytest.fixture
def small_pc(kvm, offered):
    """Makes guests of one vCPU with interrupt controllers, as they are started: without a local APIC."""
    return partial(kvm.guest, machine=MachineModel.PC)


def patched(lapic, **registers):
    """Replace 32-bit registers, named by ``r`` and their hexadecimal offset."""
    data = bytearray(lapic.registers)
    for name, value in registers.items():
        struct.pack_into("<I", data, int(name[1:], 16), value)
    return dataclasses.replace(lapic, registers=bytes(data))


def register(lapic, offset):
    return struct.unpack_from("<I", lapic.registers, offset)[0]


def moved(vm, make):
    """Return another machine with the state of ``vm``, by way of the stream."""
    other = make()
    other.load_state(decode_machine_state(encode_machine_state(vm.save_state())))
    return other


def with_vcpu(vm, **changes):
    """Load the state of ``vm`` again, with changes to its one vCPU."""
    saved = vm.save_state()
    vm.load_state(dataclasses.replace(saved, vcpus=(dataclasses.replace(saved.vcpus[0], **changes),)))


def device(vm, name, kind):
    """Return a device's state as the kernel's structure."""
    (data,) = [state.data for state in vm.save_state().devices if state.name == name]
    return kind.from_buffer_copy(data)


def load_device(vm, name, data):
    saved = vm.save_state()
    devices = tuple(
        DeviceState(name=each.name, data=bytes(data)) if each.name == name else each for each in saved.devices
    )
    vm.load_state(dataclasses.replace(saved, devices=devices))


def test_the_local_apic_travels(pc):
    vm = pc("spin")
    new = vm.save_state().vcpus[0].lapic
    lapic = patched(
        new, r80=0x20, ra0=0x20, rf0=0x1FF, r320=MASKED | 0x31, r340=MASKED | 0x32, r3e0=0xA, r380=LONG, r390=LONG
    )
    with_vcpu(vm, lapic=lapic)
    saved = moved(vm, pc).save_state().vcpus[0].lapic
    count = register(saved, TIMER_NOW)
    assert LONG // 2 < count <= LONG  # it counts on
    assert patched(saved, r390=0) == patched(lapic, r390=0)


def test_the_timer_of_the_local_apic_goes_on_and_does_not_begin_anew(pc):
    vm = pc("spin")
    new = vm.save_state().vcpus[0].lapic
    half = LONG // 2
    with_vcpu(vm, lapic=patched(new, rf0=0x1FF, r320=MASKED | PERIODIC | 0x31, r3e0=0xA, r380=LONG, r390=half))
    other = moved(vm, pc)
    saved = other.save_state().vcpus[0].lapic
    assert register(saved, TIMER_COUNT) == LONG
    assert half // 2 < register(saved, TIMER_NOW) <= half


def test_the_base_travels_before_the_registers_that_it_lays_out(pc):
    vm = pc("spin")
    new = vm.save_state().vcpus[0].lapic
    off = dataclasses.replace(new, base=new.base & ~(1 << 11))  # the guest has switched it off
    with_vcpu(vm, lapic=off)
    assert moved(vm, pc).save_state().vcpus[0].lapic.base == off.base


def test_a_deadline_of_the_tsc_travels(pc, offered):
    vm = pc("spin", cpu=host(offered))
    if not find(shown_cpuid(vm.vcpus[0].fd), 1)[2] & TSC_DEADLINE:
        pytest.skip("this KVM has no tsc_deadline_timer")
    new = vm.save_state().vcpus[0].lapic
    lapic = patched(new, rf0=0x1FF, r320=MASKED | DEADLINE | 0x31)
    with_vcpu(vm, lapic=dataclasses.replace(lapic, tsc_deadline=1 << 62))
    other = moved(vm, lambda: pc(cpu=host(offered)))
    assert other.save_state().vcpus[0].lapic.tsc_deadline == 1 << 62


def test_an_interrupt_that_waits_in_the_local_apic_travels(pc):
    vm = pc("spin", rflags=0x3002)  # interrupts are off
    new = vm.save_state().vcpus[0].lapic
    with_vcpu(vm, lapic=patched(new, rf0=0x1FF, r210=1 << 5))  # vector 0x25
    assert register(moved(vm, pc).save_state().vcpus[0].lapic, IRR + 0x10) == 1 << 5


def test_a_state_without_a_local_apic_finds_a_new_one(pc, kvm):
    vm = pc("spin")
    new = vm.save_state().vcpus[0].lapic
    with_vcpu(vm, lapic=patched(new, rf0=0x1FF, r80=0x30))
    vm.load_state(MachineState(vcpus=(kvm.start_state(),), devices=vm.platform.bus.save()))
    assert vm.save_state().vcpus[0].lapic == new


def test_a_local_apic_that_the_guest_does_not_see_is_off_and_no_part_of_the_state(small_pc):
    vm = small_pc("spin")
    assert not find(vm.cpuid, 1)[3] & APIC
    assert not find(shown_cpuid(vm.vcpus[0].fd), 1)[3] & APIC
    vm.resume()
    vm.pause()
    assert vm.save_state().vcpus[0].lapic is None
    assert moved(vm, small_pc).save_state().vcpus[0].lapic is None


def test_a_guest_that_switches_a_hidden_local_apic_on_takes_it_along(small_pc, pc):
    vm = small_pc("spin")
    with_vcpu(vm, lapic=pc("spin").save_state().vcpus[0].lapic)
    assert moved(vm, small_pc).save_state().vcpus[0].lapic == vm.save_state().vcpus[0].lapic is not None


def test_a_pc_with_several_vcpus_has_local_apics(small_pc, kvm):
    vm = small_pc("spin", vcpus=(kvm.start_state(), kvm.start_state()))
    assert find(vm.cpuid, 1)[3] & APIC
    assert None not in [vcpu.lapic for vcpu in vm.save_state().vcpus]


def test_a_line_is_an_input_of_the_pics_and_of_the_ioapic(small_pc):
    vm = small_pc("spin", rflags=0x3002)
    pics = [device(vm, name, KvmPicState) for name in ("pic0", "pic1")]
    for name, pic in zip(("pic0", "pic1"), pics, strict=True):
        pic.elcr, pic.imr = 0, 0xFF
        load_device(vm, name, pic)
    lines = KvmInterrupts(vm.vm_fd)
    for irq in (4, 10):
        lines.set_line(irq, True)
    assert device(vm, "ioapic", KvmIoapicState).irr == 1 << 4 | 1 << 10
    assert device(vm, "pic0", KvmPicState).last_irr & 1 << 4
    assert device(vm, "pic1", KvmPicState).last_irr == 1 << 2
    for irq in (4, 10):
        lines.set_line(irq, False)
    assert device(vm, "ioapic", KvmIoapicState).irr == 0
    assert device(vm, "pic1", KvmPicState).last_irr == 0


def test_an_interrupt_that_was_not_taken_travels(small_pc):
    vm = small_pc("spin", rflags=0x3002)
    lines = KvmInterrupts(vm.vm_fd)
    for level in (True, False):  # an edge: what is seen of it afterwards is the request
        lines.set_line(4, level)
    assert device(moved(vm, small_pc), "pic0", KvmPicState).irr & 1 << 4


def test_what_kvm_would_write_into_memory_by_itself_is_withheld(small_pc, kvm):
    if not kvm.support.capabilities["KVM_CAP_ENFORCE_PV_FEATURE_CPUID"]:
        pytest.skip("this KVM has no KVM_CAP_ENFORCE_PV_FEATURE_CPUID")
    fd = small_pc("spin").vcpus[0].fd
    for index in (MSR_KVM_SYSTEM_TIME, 0x4B56_4D03, 0x4B56_4D04):  # clock, steal time, end of interrupt
        with pytest.raises(VmError, match=f"refuses MSR {index:#x}"):
            write_msrs(fd, {index: kvm.DATA_GPA | 1})


def test_a_device_interrupts_by_itself(small_pc, kvm, monkeypatch):
    # Register B of the wall clock: interrupt when an update has ended, 24 hours.
    monkeypatch.setitem(kvm.PROGRAMS, "clock", "b00b e670 b012 e671 ebfe".replace(" ", ""))
    vm = small_pc("clock", rflags=0x3002)
    pic1 = next(each for each in vm.platform.bus.elsewhere if each.name == "pic1")
    vm.resume()
    kvm.wait_for(vm, lambda: KvmPicState.from_buffer_copy(pic1.save()).last_irr & 1)


def test_the_rate_of_the_tsc_travels(small_pc, kvm):
    vm = small_pc("spin")
    saved = vm.save_state()
    rate = tsc.rate_khz(vm.vcpus[0].fd)
    assert saved.tsc_khz == rate
    assert find(vm.cpuid, 0x15) == ((0, 0, 0, 0) if rate is None else (1, 1, rate * 1000, 0))
    assert moved(vm, small_pc).save_state().tsc_khz == rate
    assert kvm.guest("spin").save_state().tsc_khz is None


def test_the_time_for_which_a_pc_stood_is_taken_back_from_its_tscs_and_its_clock(pc, kvm):
    vm = pc("spin", vcpus=(kvm.start_state(tsc=1 << 50),) * 2)  # it has run for a while
    clock, stood_s = vm.platform.clock, 1000
    clock.set_back(-2 * stood_s * 10**9)
    before, before_ns = vm.save_state(), clock.now_ns()
    vm._let_time_stand(10**9 - 1)  # too short to count
    vm._let_time_stand(stood_s * 10**9)
    after, passed_ns = vm.save_state(), clock.now_ns() - before_ns
    assert -stood_s * 10**9 < passed_ns < -(stood_s - 60) * 10**9
    back = [old.tsc - new.tsc for old, new in zip(before.vcpus, after.vcpus, strict=True)]
    if kvm.support.tsc_offset:
        assert all(0 < stood_s * before.tsc_khz * 1000 - ticks < 60 * before.tsc_khz * 1000 for ticks in back)
        assert back[0] == back[1]


@pytest.mark.parametrize(
    ("khz", "fits"), [(1_000_000, True), (1_000_249, True), (1_000_251, False), (2_000_000, False)]
)
def test_a_tsc_of_another_rate_needs_a_kvm_that_scales(kvm, monkeypatch, khz, fits):
    vm = kvm.guest("spin")
    set_to = []
    plain = Fd.ioctl

    def ioctl(fd, request, argument=0):
        if request == uapi.KVM_SET_TSC_KHZ:
            set_to.append(argument)
            return 0
        return 1_000_000 if request == uapi.KVM_GET_TSC_KHZ else plain(fd, request, argument)

    for scales in (False, True):
        set_to.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Fd, "ioctl", ioctl)
            patch.setattr(VmFd, "check_extension", lambda *_, scales=scales: scales)
            with (
                nullcontext()
                if fits or scales
                else pytest.raises(UnsupportedError, match=f"at {khz} kHz, this machine")
            ):
                tsc.set_rate(vm.vm_fd, vm.vcpus[0].fd, khz)
        assert set_to == ([khz] if khz != 1_000_000 and (fits or scales) else [])


@pytest.mark.parametrize("state", MpState)
def test_what_a_vcpu_is_doing_travels(pc, kvm, state):
    boot, other = kvm.start_state(), kvm.start_state(mp_state=state)
    vm = pc("spin", vcpus=(boot, other))
    assert vm.save_state().vcpus[1].mp_state is state
    there = moved(vm, lambda: pc(vcpus=(boot, boot))).save_state()
    assert [vcpu.mp_state for vcpu in there.vcpus] == [MpState.RUNNABLE, state]


def test_a_halted_vcpu_can_be_paused_and_moved_again(pc):
    vm = pc("spin", mp_state=MpState.HALTED, rflags=0x3002)
    before = vm.save_state().vcpus[0].rbx
    vm.resume()
    vm.pause()
    other = moved(vm, pc)
    other.resume()
    other.pause()
    state = other.save_state().vcpus[0]
    assert (state.mp_state, state.rbx) == (MpState.HALTED, before)


@pytest.mark.parametrize("name", ["pic0", "pic1"])
def test_a_pic_travels(pc, name):
    vm = pc("spin", rflags=0x3002)
    pic = device(vm, name, KvmPicState)
    pic.imr, pic.irq_base, pic.irr, pic.last_irr, pic.isr, pic.auto_eoi, pic.elcr = (
        0xA5,
        0x28,
        0x81,
        0x80,
        0x08,
        1,
        0x40,
    )
    load_device(vm, name, pic)
    assert bytes(device(moved(vm, pc), name, KvmPicState)) == bytes(pic)


def test_the_ioapic_travels(pc):
    vm = pc("spin")
    ioapic = device(vm, "ioapic", KvmIoapicState)
    ioapic.id, ioapic.ioregsel = 3, 0x12
    for pin in range(24):
        ioapic.redirtbl[pin] = MASKED | 1 << 56 | 0x30 + pin
    load_device(vm, "ioapic", ioapic)
    assert bytes(device(moved(vm, pc), "ioapic", KvmIoapicState)) == bytes(ioapic)


def test_what_is_pending_in_the_ioapic_reaches_the_local_apic_that_was_restored_before_it(pc):
    vm = pc("spin", rflags=0x3002)  # interrupts are off: it waits there
    with_vcpu(vm, lapic=patched(vm.save_state().vcpus[0].lapic, rf0=0x1FF))
    ioapic = device(vm, "ioapic", KvmIoapicState)
    ioapic.redirtbl[5], ioapic.irr = 0x35, 1 << 5
    load_device(vm, "ioapic", ioapic)
    assert register(vm.save_state().vcpus[0].lapic, IRR + 0x10) == 1 << 0x15


def test_the_pit_travels(pc):
    vm = pc("spin")
    pit = device(vm, "pit", uapi.KvmPitState2)
    for number, channel in enumerate(pit.channels):
        channel.count, channel.mode, channel.rw_mode, channel.gate = 0x1000 + number, 2, 3, 1
        channel.latched_count, channel.write_latch, channel.read_state, channel.write_state = 0x1234, 0x56, 3, 3
    pit.flags = 2
    load_device(vm, "pit", pit)
    assert bytes(device(moved(vm, pc), "pit", uapi.KvmPitState2)) == bytes(pit)


@pytest.mark.parametrize("mode", [0, 4])
def test_a_pit_that_ticks_once_has_what_is_left_of_its_count(pc, mode):
    vm = pc("spin")
    load_device(vm, "pic0", not_taken(device(vm, "pic0", KvmPicState)))
    pit = device(vm, "pit", uapi.KvmPitState2)
    counter = pit.channels[0]
    counter.count, counter.mode, counter.rw_mode = 0x10000, mode, 3
    counter.count_load_time = 20_000_000  # of 55 ms
    load_device(vm, "pit", pit)
    left = device(vm, "pit", uapi.KvmPitState2).channels[0]
    assert left.count == 0x10000 - PIT_HZ // 50
    assert left.mode == mode
    counter.count_load_time = 1 << 62  # it has ticked, or was just about to: it ticks once more
    load_device(vm, "pit", pit)
    assert device(vm, "pit", uapi.KvmPitState2).channels[0].count == 1


def not_taken(pic):
    """Mask all inputs of a PIC."""
    pic.imr = 0xFF
    return pic


def test_a_pit_that_ticks_goes_on_ticking_elsewhere(pc, kvm, monkeypatch):
    monkeypatch.setitem(kvm.PROGRAMS, "pit", READ_PIT)
    vm = pc("pit")
    load_device(vm, "pic0", not_taken(device(vm, "pic0", KvmPicState)))
    pit = device(vm, "pit", uapi.KvmPitState2)
    pit.channels[0].count, pit.channels[0].mode, pit.channels[0].rw_mode = 0x10000, 2, 3
    load_device(vm, "pit", pit)
    for _ in range(2):
        seen = set()
        vm.resume()

        def changes(vm=vm, seen=seen):
            seen.add(vm.memory.read(kvm.DATA_GPA, 2))
            return len(seen) > 3

        kvm.wait_for(vm, changes)
        vm.pause()
        other = pc()
        for region in vm.memory.regions:
            other.memory.write(region.gpa, vm.memory.read(region.gpa, region.size_bytes))
        other.load_state(decode_machine_state(encode_machine_state(vm.save_state())))
        vm.close()
        vm = other


def test_pcis_inputs_are_level_triggered_from_the_beginning(pc):
    vm = pc("spin")
    assert [device(vm, name, KvmPicState).elcr for name in ("pic0", "pic1")] == [0, 0x0C]


PIC, IOAPIC, PIT = KvmPicState, KvmIoapicState, uapi.KvmPitState2


@pytest.mark.parametrize(
    ("name", "kind", "offset", "byte", "says"),
    [
        ("pic0", PIC, PIC.priority_add.offset, 8, "priority_add is 0x8, more than 0x7"),
        ("pic0", PIC, PIC.init_state.offset, 4, "init_state is 0x4"),
        ("pic1", PIC, PIC.poll.offset, 2, "poll is 0x2, more than 0x1"),
        ("pic1", PIC, PIC.elcr_mask.offset, 0xF8, "elcr_mask is 0xf8, not 0xde"),
        ("ioapic", IOAPIC, 0, 1, "it is at 0xfec00001, not 0xfec00000"),
        ("ioapic", IOAPIC, IOAPIC.id.offset, 16, "id is 0x10, more than 0xf"),
        ("ioapic", IOAPIC, IOAPIC.irr.offset + 3, 1, "irr is 0x1000000"),
        ("ioapic", IOAPIC, IOAPIC.pad.offset, 1, "pad is 0x1"),
        ("pit", PIT, 3, 1, "count is 0x1010000, more than 0x10000"),
        ("pit", PIT, 13, 6, "mode is 6"),
        ("pit", PIT, 15, 2, "gate is 0x2"),
        ("pit", PIT, 23, 0x80, "count_load_time is -9223372036854775808"),
        ("pit", PIT, PIT.flags.offset, 4, "a flag or reserved field is not 0"),
        ("pit", PIT, PIT.reserved.offset, 1, "a flag or reserved field is not 0"),
    ],
)
def test_what_no_chip_can_have_is_refused(pc, name, kind, offset, byte, says):
    vm = pc("spin")
    before = bytes(device(vm, name, kind))
    data = bytearray(before)
    data[offset] = byte
    with pytest.raises(VmError, match=f"device {name} cannot be: {says}"):
        load_device(vm, name, data)
    for length in (0, len(data) - 1, len(data) + 1):
        with pytest.raises(VmError, match=f"device {name} has {length} bytes, not {ctypes.sizeof(kind)}"):
            load_device(vm, name, bytes(length))
    assert bytes(device(vm, name, kind)) == before


def test_a_guest_that_stood_long_before_a_state_was_refused_has_its_time(pc):
    vm = pc("spin")
    saved = vm.save_state()
    devices = tuple(dataclasses.replace(each, data=b"") if each.name == "ioapic" else each for each in saved.devices)
    vm.run_control._standing_since_ns -= 60 * 10**9
    with pytest.raises(VmError, match="device ioapic has"):
        vm.load_state(dataclasses.replace(saved, devices=devices))
    (time_us,) = (int.from_bytes(each.data, "little") for each in vm.save_state().devices if each.name == "clock")
    assert time_us < 10**9


def test_registers_of_another_length_are_refused(pc):
    vm = pc("spin")
    with pytest.raises(VmError, match="the local APIC has 5 bytes, not 1024"):
        with_vcpu(vm, lapic=LapicState(base=0xFEE0_0900, registers=bytes(5)))


def test_a_base_that_no_cpu_takes_is_refused(pc):
    vm = pc("spin")
    lapic = vm.save_state().vcpus[0].lapic
    with pytest.raises(VmError, match="KVM_SET_SREGS"):
        with_vcpu(vm, lapic=dataclasses.replace(lapic, base=1 << 63))


def test_a_machine_without_interrupt_controllers_refuses_the_state_of_one_with_them(pc, kvm):
    saved = pc("spin").save_state()
    plain = kvm.guest("spin")
    with pytest.raises(UnsupportedError, match="no interrupt controllers, and the state has a local APIC"):
        plain.load_state(saved)
    with pytest.raises(VmError, match=r"saved devices .*ioapic.* are not this machine's"):
        plain.load_state(dataclasses.replace(saved, vcpus=(kvm.start_state(),)))


@pytest.mark.parametrize("name", ["KVM_CAP_IRQCHIP", "KVM_CAP_MP_STATE", "KVM_CAP_PIT2", "KVM_CAP_PIT_STATE2"])
def test_a_kvm_that_lacks_a_part_says_which(kvm, monkeypatch, name):
    plain = VmFd.check_extension
    monkeypatch.setattr(
        VmFd, "check_extension", lambda fd, number: 0 if number == getattr(uapi, name) else plain(fd, number)
    )
    with pytest.raises(UnsupportedError, match=f"this KVM lacks {name}") as caught:
        kvm.guest(machine=MachineModel.PC)
    assert "--machine plain" in caught.value.hint
