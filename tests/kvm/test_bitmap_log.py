"""The operators over KVM's bitmap, with manual protect and without, and the races they must win."""

import threading

import numpy as np
import pytest
from altered import alter
from stores import stored

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import KvmError, LogDirtyError, VmError
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE
from pageferry.core.vm import GuestEnd
from pageferry.kvm import uapi
from pageferry.kvm.fds import VmFd
from pageferry.kvm.vm import KvmVm
from pageferry.testing import check_log_dirty

pytestmark = pytest.mark.kvm

MANUAL, INITIALLY_SET = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, uapi.KVM_DIRTY_LOG_INITIALLY_SET


def gfn(*gpas):
    return {gpa >> PAGE_SHIFT for gpa in gpas}


def run_to_end(vm):
    vm.resume()
    vm.wait(60)
    assert vm.end == GuestEnd(exit_code=0)


def again(kvm, vm, **registers):
    """Let a guest that is paused start over with other registers."""
    from pageferry.core.state import MachineState

    vm.load_state(MachineState(vcpus=(kvm.start_state(**registers),), devices=vm.platform.bus.save()))


def stamps(kvm, manual_protect, **more):
    arguments = {"memory_bytes": 8 << 20, "rdi": 0x20_0000, "rsi": 64} | more
    return kvm.guest("stamp", manual_protect=manual_protect, **arguments)


def test_state_errors(kvm, manual_protect):
    log = kvm.guest(manual_protect=manual_protect).log_dirty
    assert log.tracker == "kvm-bitmap"
    assert not log.enabled
    log.off()
    log.mark(np.array([1], np.uint64))  # ignored
    for refused in (log.peek, log.clean, log.stats):
        with pytest.raises(LogDirtyError, match="off"):
            refused()
    log.enable()
    assert log.enabled
    with pytest.raises(LogDirtyError, match="on already"):
        log.enable()
    assert log.enabled
    assert stored(log.clean()) == set()  # the mark before did not count
    log.off()
    log.off()
    assert not log.enabled


def test_enable_starts_all_clear_and_all_protected(kvm, manual_protect):
    vm = stamps(kvm, manual_protect)
    vm.resume()  # it writes all its pages: they are writable when log-dirty comes
    kvm.wait_for(vm, lambda: vm.memory.read_u64(0x20_0000 + 63 * PAGE_SIZE))
    vm.pause()
    vm.log_dirty.enable()
    assert stored(vm.log_dirty.peek()) == set()
    assert vm.log_dirty.stats().dirty_count == 0
    vm.resume()
    kvm.wait_for(vm, lambda: len(stored(vm.log_dirty.peek())) == 64)
    assert stored(vm.log_dirty.clean()) == set(range(0x200, 0x240))


def test_peek_changes_nothing_and_clean_clears(kvm, manual_protect):
    at = (0x20_0000, 0x20_1008, 0x3F_F000)
    vm = kvm.guest("touch", manual_protect=manual_protect, rdi=at[0], rsi=at[1], rbp=at[2], r8=1)
    log = vm.log_dirty
    log.enable()
    run_to_end(vm)
    first = log.peek()
    assert stored(first) == gfn(*at)
    assert log.peek() == first
    assert log.stats().dirty_count == first.count()
    assert log.stats().fault_count is None
    assert log.clean() == first
    assert log.peek().count() == 0
    assert log.clean().count() == 0
    log.off()
    log.enable()
    assert log.peek().count() == 0


def test_bitmaps_are_the_callers_own(kvm, manual_protect):
    log = kvm.guest(manual_protect=manual_protect).log_dirty
    log.enable()
    for take in (log.peek, log.clean, log.peek):
        take().set(7)
        assert not log.peek().test(7)


def test_writes_after_clean_are_seen_again(kvm, manual_protect):
    vm = stamps(kvm, manual_protect)
    vm.log_dirty.enable()
    vm.resume()
    for _ in range(20):
        kvm.wait_for(vm, lambda: len(stored(vm.log_dirty.peek())) == 64)
        assert stored(vm.log_dirty.clean()) == set(range(0x200, 0x240))


def test_off_stops_logging(kvm, manual_protect):
    vm = stamps(kvm, manual_protect)
    vm.log_dirty.enable()
    vm.resume()
    kvm.wait_for(vm, lambda: vm.log_dirty.peek().any())
    vm.log_dirty.off()
    vm.pause()
    vm.log_dirty.enable()
    assert vm.log_dirty.peek().count() == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_clean_loses_no_write(kvm, manual_protect, threads):
    """The guest stamps pages in a loop while rounds copy what ``clean()`` reports: the copy must become equal."""
    states = tuple(kvm.start_state(rdi=0x20_0000 + n * 0x10_0000, rsi=200) for n in range(threads))
    vm = stamps(kvm, manual_protect, vcpus=states)
    memory = np.frombuffer(vm.memory.mapping.view, np.uint8).reshape(-1, PAGE_SIZE)
    vm.log_dirty.enable()
    copy = memory.copy()
    vm.resume()
    ends = [state.rdi + 199 * PAGE_SIZE for state in states]
    rounds = 0
    while rounds < 200 or min(vm.memory.read_u64(gpa) for gpa in ends) < 3:  # the guest too has work done meanwhile
        assert rounds < 100_000
        dirty = vm.log_dirty.clean().gfns().astype(np.int64)  # clean first ...
        copy[dirty] = memory[dirty]  # ... copy second
        rounds += 1
    vm.pause()
    dirty = vm.log_dirty.clean().gfns().astype(np.int64)
    copy[dirty] = memory[dirty]
    differs = np.flatnonzero((copy != memory).any(axis=1))
    assert differs.size == 0, f"writes lost in gfns {differs[:10]}"


def test_marks_during_clean_are_never_lost(kvm, manual_protect):
    vm = kvm.guest(manual_protect=manual_protect)
    vm.log_dirty.enable()
    found = DirtyBitmap(1024)
    marked = np.random.default_rng(4).permutation(1024).astype(np.uint64)
    done = threading.Event()

    def mark():
        for number in marked:
            vm.log_dirty.mark(np.array([number]))
        done.set()

    thread = threading.Thread(target=mark)
    thread.start()
    while not done.is_set():
        found |= vm.log_dirty.clean()
    thread.join()
    found |= vm.log_dirty.clean()
    assert found.count() == 1024


def test_marks_through_memory_and_those_that_are_not_ram(kvm, manual_protect):
    vm = kvm.guest(manual_protect=manual_protect)
    vm.log_dirty.enable()
    vm.memory.write(0x20_0FFF, b"ab")
    vm.log_dirty.mark(np.array([0x3FF, 0x400, 1 << 40], np.uint64))
    assert stored(vm.log_dirty.peek()) == {0x200, 0x201, 0x3FF}
    assert stored(vm.log_dirty.clean()) == {0x200, 0x201, 0x3FF}
    assert stored(vm.log_dirty.clean()) == set()


def test_dma_marks_what_it_writes_after_it_wrote(kvm, manual_protect):
    """A device fills three pages again and again; rounds copy them as in a migration: the copy must become equal."""
    vm = kvm.guest("dma", manual_protect=manual_protect)
    memory = np.frombuffer(vm.memory.mapping.view, np.uint8).reshape(-1, PAGE_SIZE)
    vm.log_dirty.enable()
    copy = memory.copy()
    vm.resume()
    kvm.wait_for(vm, lambda: vm.memory.read_u64(0x1A_0800))
    for _ in range(200):
        dirty = vm.log_dirty.clean().gfns().astype(np.int64)
        copy[dirty] = memory[dirty]
    vm.pause()
    dirty = vm.log_dirty.clean().gfns().astype(np.int64)
    copy[dirty] = memory[dirty]
    assert np.array_equal(copy, memory)


@pytest.mark.parametrize("pages", [513, 575, 576, 577, 1000, 1023])
def test_sizes_that_are_not_a_multiple_of_64_pages(kvm, manual_protect, pages):
    last = (pages - 1) * PAGE_SIZE
    vm = kvm.guest(
        "touch", memory_bytes=pages * PAGE_SIZE, manual_protect=manual_protect, rdi=last, rsi=0x20_0000, rbp=last
    )
    vm.log_dirty.enable()
    run_to_end(vm)
    for take in (vm.log_dirty.peek, vm.log_dirty.clean):
        bitmap = take()
        assert bitmap.nbits == pages
        assert stored(bitmap) == gfn(last, 0x20_0000)
        assert bitmap.gfns().max() < pages
    assert vm.log_dirty.clean().count() == 0


def test_above_the_pci_hole(kvm, manual_protect):
    """5 GiB + 4 KiB, sparse: the last page below the hole, the first above it, the last of all."""
    size = (5 << 30) + PAGE_SIZE
    at = ((3 << 30) - PAGE_SIZE, 4 << 30, (6 << 30) - PAGE_SIZE)
    vm = kvm.guest("touch", memory_bytes=size, manual_protect=manual_protect, rdi=at[0], rsi=at[1], rbp=at[2], r8=0x55)
    vm.log_dirty.enable()
    run_to_end(vm)
    assert [vm.memory.read_u64(gpa) for gpa in at] == [0x55] * 3
    bitmap = vm.log_dirty.clean()
    assert bitmap.nbits == (6 << 18) + 1
    assert stored(bitmap) == gfn(*at)
    assert vm.log_dirty.peek().count() == 0
    vm.memory.write((6 << 30), b"x")
    assert stored(vm.log_dirty.clean()) == {6 << 18}


def test_a_range_is_cleaned_and_asked_of_its_own_slots_only(kvm, manual_protect):
    at = (0x20_0000, 0x24_0000, (4 << 30) + PAGE_SIZE)
    vm = kvm.guest("touch", memory_bytes=4 << 30, manual_protect=manual_protect, rdi=at[0], rsi=at[1], rbp=at[2])
    vm.log_dirty.enable()
    run_to_end(vm)
    vm.log_dirty.mark(np.array([3, 0x243], np.uint64))
    asked, real = [], vm.vm_fd.ioctl

    def ioctl(number, argument=0):
        asked.append((uapi.IOCTL_NAMES[number], argument.slot))
        return real(number, argument)

    alter(vm.vm_fd, "ioctl", lambda _: ioctl)
    assert stored(vm.log_dirty.clean_range(range(0x240, 0x280))) == {0x240, 0x243}
    taken = ["KVM_GET_DIRTY_LOG", "KVM_CLEAR_DIRTY_LOG"][: 2 if manual_protect else 1]
    assert asked == [(name, 0) for name in taken]
    assert stored(vm.log_dirty.peek()) == {3, 0x200, (4 << 18) + 1}
    asked.clear()
    assert stored(vm.log_dirty.clean_range(range(4 << 18, 1 << 40))) == {(4 << 18) + 1}
    assert asked == [(name, 3) for name in taken]
    asked.clear()
    assert not vm.log_dirty.clean_range(range(3 << 18, 4 << 18)).any()  # nothing but the hole
    assert asked == []
    assert stored(vm.log_dirty.clean()) == {3, 0x200}


def test_a_range_of_no_whole_words_is_refused_and_takes_nothing(kvm, manual_protect):
    vm = kvm.guest("touch", manual_protect=manual_protect, rdi=0x20_0000, rsi=0x21_0000, rbp=0x22_0000)
    vm.log_dirty.enable()
    run_to_end(vm)
    for wrong in (range(0x200, 0x210), range(0x201, 0x240), range(-64, 0x400)):
        with pytest.raises(ValueError, match="whole words"):
            vm.log_dirty.clean_range(wrong)
    assert stored(vm.log_dirty.clean()) == {0x200, 0x210, 0x220}


def refuse(vm, monkeypatch, request, *, after):
    """Make the kernel refuse ``request`` once ``after`` of them have passed."""
    real, seen = vm.vm_fd.ioctl, []

    def ioctl(number, argument=0):
        if number == request:
            seen.append(number)
            if len(seen) > after:
                raise KvmError(uapi.IOCTL_NAMES[request], 12)
        return real(number, argument)

    monkeypatch.setattr(vm.vm_fd, "ioctl", ioctl)


@pytest.mark.parametrize("request_number", [uapi.KVM_GET_DIRTY_LOG, uapi.KVM_CLEAR_DIRTY_LOG], ids=["get", "clear"])
def test_a_clean_that_fails_half_way_loses_no_bit(kvm, manual_protect, monkeypatch, request_number):
    at = (0x20_0000, 4 << 30, (4 << 30) + PAGE_SIZE)  # the first slot and the last
    vm = kvm.guest("touch", memory_bytes=4 << 30, manual_protect=manual_protect, rdi=at[0], rsi=at[1], rbp=at[2])
    vm.log_dirty.enable()
    run_to_end(vm)
    vm.log_dirty.mark(np.array([3], np.uint64))
    with monkeypatch.context() as patch:
        refuse(vm, patch, request_number, after=1)
        if request_number == uapi.KVM_GET_DIRTY_LOG or manual_protect:
            with pytest.raises(VmError, match="DIRTY_LOG"):
                vm.log_dirty.clean()
            assert vm.log_dirty.enabled
    if request_number == uapi.KVM_GET_DIRTY_LOG or manual_protect:
        assert stored(vm.log_dirty.peek()) == gfn(*at) | {3}
        assert stored(vm.log_dirty.clean()) == gfn(*at) | {3}


@pytest.mark.parametrize(
    "request_number", [uapi.KVM_SET_USER_MEMORY_REGION, uapi.KVM_CLEAR_DIRTY_LOG], ids=["set", "clear"]
)
def test_an_enable_that_fails_half_way_is_off(kvm, manual_protect, monkeypatch, request_number):
    if request_number == uapi.KVM_CLEAR_DIRTY_LOG and not manual_protect & uapi.KVM_DIRTY_LOG_INITIALLY_SET:
        pytest.skip("only what starts all set is cleared")
    vm = kvm.guest(memory_bytes=4 << 30, manual_protect=manual_protect)
    real, flags = vm.vm_fd.ioctl, {}

    def ioctl(number, argument=0):
        setting = number == uapi.KVM_SET_USER_MEMORY_REGION
        if number == request_number and argument.slot == 1 and (argument.flags if setting else True):
            raise KvmError(uapi.IOCTL_NAMES[number], 12)
        result = real(number, argument)
        if setting:
            flags[argument.slot] = argument.flags
        return result

    with monkeypatch.context() as patch:
        patch.setattr(vm.vm_fd, "ioctl", ioctl)
        with pytest.raises(KvmError):
            vm.log_dirty.enable()
    assert not vm.log_dirty.enabled
    assert flags.pop(0) == 0  # it was on, and is off again
    assert not any(flags.values())
    vm.log_dirty.enable()
    assert vm.log_dirty.enabled
    assert not vm.log_dirty.peek().any()


@pytest.mark.parametrize("offered", [0, MANUAL, MANUAL | INITIALLY_SET])
def test_what_the_kernel_does_not_offer_is_not_used(kvm, kvm_support, monkeypatch, offered):
    """And the promises of ENABLE, PEEK and CLEAN are kept all the same."""
    if offered & ~kvm_support.capabilities["KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"]:
        pytest.skip("this KVM has not so much of KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
    check, enable, enabled = VmFd.check_extension, VmFd.enable_cap, []

    def check_extension(vm, capability):
        found = check(vm, capability)
        return found & offered if capability == uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 else found

    def enable_cap(vm, capability, argument):
        if capability == uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
            enabled.append(argument)
        enable(vm, capability, argument)

    monkeypatch.setattr(VmFd, "check_extension", check_extension)
    monkeypatch.setattr(VmFd, "enable_cap", enable_cap)
    log = kvm.guest().log_dirty
    assert enabled == ([offered] if offered else [])
    assert log.manual_protect == bool(offered & MANUAL)
    assert log.initially_set == bool(offered & INITIALLY_SET)
    check_log_dirty(KvmVm, checks=["enable-starts-clear", "peek-changes-nothing", "rounds-are-exact"])


def test_what_starts_all_set_is_cleared_piece_by_piece(kvm, kvm_support):
    if not kvm_support.initially_set:
        pytest.skip("this KVM cannot start with all bits set")
    vm = kvm.guest(memory_bytes=(3 << 30) + (130 << 20) + 5 * PAGE_SIZE)
    calls, real = [], vm.vm_fd.ioctl

    def ioctl(number, argument=0):
        if number == uapi.KVM_CLEAR_DIRTY_LOG:
            calls.append((argument.slot, argument.first_page, argument.num_pages))
        return real(number, argument)

    alter(vm.vm_fd, "ioctl", lambda _: ioctl)
    vm.log_dirty.enable()
    piece = 64 << 20 >> PAGE_SHIFT
    assert calls == [
        *((slot, first, piece) for slot in range(3) for first in range(0, 1 << 30 >> PAGE_SHIFT, piece)),
        *((3, 0, piece), (3, piece, piece), (3, 2 * piece, (2 << 20 >> PAGE_SHIFT) + 5)),
    ]
    assert not vm.log_dirty.peek().any()


def test_a_slot_is_cleared_by_one_call_from_its_first_dirty_word_to_its_last(kvm):
    vm = kvm.guest(memory_bytes=2 << 30)
    calls = []
    alter(vm.vm_fd, "ioctl", lambda _: lambda number, argument: calls.append(argument))
    slot = vm.slots[1]
    words = np.zeros(slot.region.pages // 64, np.uint64)
    vm.log_dirty._clear(slot, words)
    assert calls == []
    words[[5, 4000]] = 1
    vm.log_dirty._clear(slot, words)
    assert [(c.slot, c.first_page, c.num_pages) for c in calls] == [(1, 5 * 64, 3996 * 64)]


def test_ram_is_in_slots_of_a_gib_at_most(kvm):
    vm = kvm.guest(memory_bytes=(4 << 30) + PAGE_SIZE)
    assert [(slot.index, slot.region.gpa >> 30, slot.region.pages) for slot in vm.slots] == [
        *((index, gib, 1 << 18) for index, gib in enumerate((0, 1, 2, 4))),
        (4, 5, 1),
    ]
    assert {slot.userspace_addr - slot.region.gpa for slot in vm.slots} == {vm.memory.mapping.hva}
