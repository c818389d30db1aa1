"""What is particular to the dirty rings: small ones that fill up, wrap-around, resets, and their end. The kit has more.

Where a test must know who harvests, the collector sleeps (``asleep``) and the test does what it would do.
"""

import errno
import os
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from descriptors import open_descriptors
from stores import NO_STORES, stored

from pageferry.core.errors import KvmError, LogDirtyError, UnsupportedError, VmError
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE
from pageferry.core.state import MachineState
from pageferry.core.vm import GuestEnd
from pageferry.kvm import ring_log, uapi
from pageferry.kvm.dirty_rings import ENTRY_BYTES
from pageferry.kvm.fds import VmFd
from pageferry.kvm.trackers import ring_tracker

pytestmark = pytest.mark.kvm

FIRST_GPA, FIRST_GFN = 0x20_0000, 0x200


@pytest.fixture
def small(kvm, smallest_ring_bytes):
    """Makes guests with the smallest rings."""
    return lambda *args, **more: kvm.guest(*args, tracker=ring_tracker(smallest_ring_bytes), **more)


@pytest.fixture
def room(smallest_ring_bytes):
    """How many entries the smallest ring has."""
    return smallest_ring_bytes // ENTRY_BYTES


@pytest.fixture
def asleep(monkeypatch):
    """Lets no collector do anything."""

    class Asleep(ring_log._Collector):
        def __init__(self, collect, period_s):
            super().__init__(lambda: None, period_s)

    monkeypatch.setattr(ring_log, "_Collector", Asleep)


def span(first, count):
    return set(range(FIRST_GFN + first, FIRST_GFN + first + count))


def stamp_once(kvm, vm, first, count):
    """Let a paused ``stamp`` guest write ``count`` pages at least once; it is paused again."""
    for gfn in (FIRST_GFN + first, FIRST_GFN + first + count - 1):
        vm.memory.mapping.view[gfn << PAGE_SHIFT : (gfn << PAGE_SHIFT) + 8] = bytes(8)  # no write of log-dirty's
    vm.load_state(
        MachineState(
            vcpus=(kvm.start_state(rdi=FIRST_GPA + (first << PAGE_SHIFT), rsi=count),), devices=vm.platform.bus.save()
        )
    )
    vm.resume()
    last = FIRST_GPA + (first + count - 1 << PAGE_SHIFT)
    kvm.wait_for(vm, lambda: vm.memory.read_u64(last))
    vm.pause()


def listed(vm):
    """Return a list that grows with the frames of every entry that is harvested."""
    rings, found = vm.log_dirty._rings, []
    real = rings._gfns_of

    def gfns_of(*entries):
        found.extend(real(*entries).tolist())
        return real(*entries)

    rings._gfns_of = gfns_of
    return found


def kept(vm):
    return [ring.kept for ring in vm.log_dirty._rings._rings]


def test_rings_and_kvms_bitmap_exclude_each_other(small):
    vm = small()
    vm.log_dirty.enable()
    words = np.zeros(16, np.uint64)
    with pytest.raises(KvmError) as refused:
        vm.vm_fd.ioctl(uapi.KVM_GET_DIRTY_LOG, uapi.KvmDirtyLog(slot=0, dirty_bitmap=words.ctypes.data))
    assert refused.value.errno == errno.ENXIO


def test_state_errors(small):
    log = small().log_dirty
    assert (log.tracker, log.enabled) == ("kvm-ring", False)
    log.off()
    log.mark(np.array([1], np.uint64))  # ignored
    for refused in (log.peek, log.clean, log.stats):
        with pytest.raises(LogDirtyError, match="off"):
            refused()
    log.enable()
    with pytest.raises(LogDirtyError, match="on already"):
        log.enable()
    assert log.enabled
    assert stored(log.clean()) == set()
    assert log.stats().fault_count is None


def test_far_more_pages_than_entries(kvm, small, room, asleep):
    vm = small("stamp", memory_bytes=(2 << 20) + 4 * room * PAGE_SIZE)
    vm.log_dirty.enable()
    for _ in range(3):
        before = vm.log_dirty.full_exits
        stamp_once(kvm, vm, 0, 4 * room)
        assert vm.log_dirty.full_exits - before >= 3
        assert stored(vm.log_dirty.peek()) == span(0, 4 * room)
        assert stored(vm.log_dirty.clean()) == span(0, 4 * room)
        assert stored(vm.log_dirty.clean()) == set()


def test_rounds_that_wrap_around_are_exact(kvm, small, room, asleep):
    vm = small("stamp", memory_bytes=8 << 20)
    vm.log_dirty.enable()
    entries = listed(vm)
    number = 0
    while len(entries) < 5 * room:
        first, count = 37 * number % 500, 29 + number % 23
        stamp_once(kvm, vm, first, count)
        assert stored(vm.log_dirty.clean()) == span(first, count)
        number += 1
    assert vm.log_dirty.full_exits == 0


def test_one_fault_per_page_as_long_as_the_ring_has_room(kvm, small, asleep):
    vm = small("stamp", memory_bytes=8 << 20)
    vm.log_dirty.enable()
    entries = listed(vm)
    for take in (vm.log_dirty.clean, vm.log_dirty.clean, vm.log_dirty.peek):
        entries.clear()
        stamp_once(kvm, vm, 0, 100)
        vm.log_dirty.peek()
        vm.log_dirty.stats()
        stamp_once(kvm, vm, 0, 100)
        assert stored(take()) == span(0, 100)
        assert Counter(gfn for gfn in entries if gfn not in NO_STORES) == Counter(span(0, 100))


def test_a_ring_that_was_full_costs_a_page_one_fault_more_and_no_more(kvm, small, asleep):
    vm = small("stamp", memory_bytes=8 << 20)
    vm.log_dirty.enable()
    entries = listed(vm)
    stamp_once(kvm, vm, 0, 10)
    vm.log_dirty.on_ring_full()
    assert kept(vm) == [0]
    for _ in range(2):
        stamp_once(kvm, vm, 0, 10)
    stamp_once(kvm, vm, 20, 10)
    assert stored(vm.log_dirty.clean()) == span(0, 10) | span(20, 10)
    counts = Counter(gfn for gfn in entries if gfn not in NO_STORES)
    assert counts == Counter([*span(0, 10), *span(0, 10), *span(20, 10)])


def test_the_collector_harvests_while_the_guest_runs(kvm, small):
    vm = small("stamp", memory_bytes=8 << 20, rdi=FIRST_GPA, rsi=64)
    vm.log_dirty.enable()
    vm.resume()
    kvm.wait_for(vm, lambda: stored(vm.log_dirty._held.copy()) >= span(0, 64))
    assert stored(vm.log_dirty.clean()) == span(0, 64)


def test_the_collector_makes_room_only_when_a_ring_is_half_full(kvm, small, room, asleep):
    vm = small("stamp", memory_bytes=8 << 20)
    vm.log_dirty.enable()
    stamp_once(kvm, vm, 0, room // 2 - 20)
    vm.log_dirty._collect()
    assert kept(vm)[0] >= room // 2 - 20
    stamp_once(kvm, vm, room, 20)
    vm.log_dirty._collect()
    assert kept(vm) == [0]
    assert stored(vm.log_dirty.peek()) == span(0, room // 2 - 20) | span(room, 20)
    stamp_once(kvm, vm, 0, 1)
    assert stored(vm.log_dirty.clean()) == span(0, room // 2 - 20) | span(room, 20)
    assert stored(vm.log_dirty.clean()) == set()


def test_every_vcpu_has_its_ring(kvm, small, room):
    """Three vCPUs overflow their rings while rounds copy what ``clean()`` reports: the copy must become equal."""
    pages = 2 * room
    states = tuple(kvm.start_state(rdi=FIRST_GPA + (n * pages << PAGE_SHIFT), rsi=pages) for n in range(3))
    vm = small("stamp", memory_bytes=FIRST_GPA + (3 * pages << PAGE_SHIFT), vcpus=states)
    memory = np.frombuffer(vm.memory.mapping.view, np.uint8).reshape(-1, PAGE_SIZE)
    vm.log_dirty.enable()
    copy = memory.copy()
    vm.resume()
    seen = set()
    ends = [state.rdi + (pages - 1 << PAGE_SHIFT) for state in states]
    rounds = 0
    while rounds < 50 or min(vm.memory.read_u64(gpa) for gpa in ends) < 3:
        assert rounds < 100_000
        dirty = vm.log_dirty.clean().gfns().astype(np.int64)
        copy[dirty] = memory[dirty]
        seen |= set(dirty.tolist())
        rounds += 1
    vm.pause()
    dirty = vm.log_dirty.clean().gfns().astype(np.int64)
    copy[dirty] = memory[dirty]
    assert np.flatnonzero((copy != memory).any(axis=1)).size == 0
    assert seen >= span(0, 3 * pages)


def test_pausing_and_cleaning_while_rings_are_full_end(kvm, small, room):
    vm = small(
        "stamp",
        memory_bytes=FIRST_GPA + (4 * room << PAGE_SHIFT),
        vcpus=tuple(kvm.start_state(rdi=FIRST_GPA, rsi=4 * room) for _ in range(2)),
    )
    vm.log_dirty.enable()
    ended = threading.Event()

    def clean():
        while not ended.is_set():
            vm.log_dirty.clean()

    cleaner = threading.Thread(target=clean)
    cleaner.start()
    try:
        for _ in range(50):
            vm.resume()
            vm.freeze()
            vm.log_dirty.peek()
            vm.thaw()
            vm.pause()
    finally:
        ended.set()
        cleaner.join()
    assert vm.end is None


def test_clean_of_a_range_leaves_the_bits_beside_it(kvm, small, asleep):
    vm = small("stamp", memory_bytes=8 << 20)
    vm.log_dirty.enable()
    stamp_once(kvm, vm, 0, 128)
    assert stored(vm.log_dirty.clean_range(range(FIRST_GFN + 64, FIRST_GFN + 128))) == span(64, 64)
    assert stored(vm.log_dirty.peek()) == span(0, 64)
    stamp_once(kvm, vm, 70, 3)
    assert stored(vm.log_dirty.clean_range(range(FIRST_GFN + 64, FIRST_GFN + 128))) == span(70, 3)
    stamp_once(kvm, vm, 0, 1)
    assert stored(vm.log_dirty.clean()) == span(0, 64)
    with pytest.raises(ValueError, match="whole words"):
        vm.log_dirty.clean_range(range(3, 64))


def test_clean_of_a_range_without_a_dirty_page_protects_nothing(kvm, small, asleep):
    vm = small("stamp", memory_bytes=8 << 20)
    vm.log_dirty.enable()
    stamp_once(kvm, vm, 0, 10)
    assert stored(vm.log_dirty.clean_range(range(FIRST_GFN + 64, vm.memory.gfn_limit))) == set()
    assert kept(vm)[0] >= 10
    assert stored(vm.log_dirty.clean_range(range(FIRST_GFN, FIRST_GFN + 64))) == span(0, 10)
    assert kept(vm) == [0]


def test_several_slots(kvm, small):
    at = ((3 << 30) - PAGE_SIZE, 4 << 30, (6 << 30) - PAGE_SIZE)
    vm = small("touch", memory_bytes=(5 << 30) + PAGE_SIZE, rdi=at[0], rsi=at[1], rbp=at[2], r8=0x55)
    vm.log_dirty.enable()
    vm.resume()
    vm.wait(60)
    assert vm.end == GuestEnd(exit_code=0)
    assert stored(vm.log_dirty.clean()) == {gpa >> PAGE_SHIFT for gpa in at}


def test_enable_drops_what_an_earlier_cycle_has_left(kvm, small, asleep, monkeypatch):
    vm = small("stamp", memory_bytes=8 << 20)
    vm.log_dirty.enable()
    stamp_once(kvm, vm, 0, 10)
    with monkeypatch.context() as patch:
        refuse(vm, patch, uapi.KVM_SET_USER_MEMORY_REGION)
        with pytest.raises(KvmError, match="KVM_SET_USER_MEMORY_REGION"):
            vm.log_dirty.off()
    assert not vm.log_dirty.enabled
    stamp_once(kvm, vm, 20, 10)  # that slot is logged still
    assert len(vm.log_dirty._rings._rings[0].look()[0]) >= 10
    vm.log_dirty.enable()
    assert stored(vm.log_dirty.peek()) == set()
    stamp_once(kvm, vm, 20, 3)  # and every page is protected again
    assert stored(vm.log_dirty.clean()) == span(20, 3)


def refuse(vm, patch, refused):
    """Make the kernel refuse one ioctl on the machine."""
    real = vm.vm_fd.ioctl

    def ioctl(request, argument=0):
        if request == refused:
            raise KvmError(uapi.IOCTL_NAMES[request], errno.ENOMEM)
        return real(request, argument)

    patch.setattr(vm.vm_fd, "ioctl", ioctl)


def test_a_slot_that_is_logged_while_log_dirty_is_off_does_not_stop_the_guest(kvm, small, room, asleep, monkeypatch):
    vm = small("stamp", memory_bytes=(2 << 20) + 4 * room * PAGE_SIZE)
    vm.log_dirty.enable()
    with monkeypatch.context() as patch:
        refuse(vm, patch, uapi.KVM_SET_USER_MEMORY_REGION)
        with pytest.raises(KvmError):
            vm.log_dirty.off()
    stamp_once(kvm, vm, 0, 4 * room)
    assert vm.log_dirty.full_exits >= 3
    assert not vm.log_dirty.enabled


def test_an_enable_that_fails_half_way_is_off(kvm, small, monkeypatch):
    vm = small("stamp", memory_bytes=4 << 30)
    calls = []
    real = vm.vm_fd.ioctl

    def ioctl(request, argument=0):
        if request == uapi.KVM_SET_USER_MEMORY_REGION:
            calls.append((argument.slot, argument.flags))
            if argument.slot == 1 and argument.flags:
                raise KvmError("KVM_SET_USER_MEMORY_REGION", errno.ENOMEM)
        return real(request, argument)

    threads = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(vm.vm_fd, "ioctl", ioctl)
        with pytest.raises(KvmError):
            vm.log_dirty.enable()
    assert not vm.log_dirty.enabled
    assert dict(calls) == dict.fromkeys(range(4), 0)  # the last word on each slot
    kvm.wait_for(vm, lambda: threading.active_count() == threads)
    vm.log_dirty.enable()
    stamp_once(kvm, vm, 0, 3)
    assert stored(vm.log_dirty.clean()) == span(0, 3)


def test_a_reset_that_the_kernel_refuses_loses_no_bit(kvm, small, asleep, monkeypatch):
    vm = small("stamp", memory_bytes=8 << 20)
    vm.log_dirty.enable()
    stamp_once(kvm, vm, 0, 10)
    vm.log_dirty.mark(np.array([3], np.uint64))
    with monkeypatch.context() as patch:
        refuse(vm, patch, uapi.KVM_RESET_DIRTY_RINGS)
        with pytest.raises(VmError, match="KVM_RESET_DIRTY_RINGS"):
            vm.log_dirty.clean()
    assert stored(vm.log_dirty.peek()) == span(0, 10) | {3}
    assert stored(vm.log_dirty.clean()) == span(0, 10) | {3}
    stamp_once(kvm, vm, 0, 2)
    assert stored(vm.log_dirty.clean()) == span(0, 2)


def cut_short(vm, monkeypatch):
    """Make the next reset one that KVM leaves with the last page in it neither protected nor in the ring."""
    rings = vm.log_dirty._rings
    real = rings.reset

    def reset():
        for ring in rings._rings:
            ring._slots[ring._next - 1] = 0xFFFF  # KVM frees an entry of an unknown slot, and protects nothing
        real()
        return False

    monkeypatch.setattr(rings, "reset", reset)


def test_after_a_reset_cut_short_all_of_ram_is_dirty_and_protected(kvm, small, asleep, monkeypatch):
    vm = small("stamp", memory_bytes=(4 << 30) + PAGE_SIZE)
    vm.log_dirty.enable()
    stamp_once(kvm, vm, 0, 10)
    with monkeypatch.context() as patch:
        cut_short(vm, patch)
        assert vm.log_dirty.clean() == vm.memory.all_ram()
    stamp_once(kvm, vm, 0, 10)
    assert stored(vm.log_dirty.clean()) == span(0, 10)


def test_after_a_reset_cut_short_that_cannot_be_mended_log_dirty_refuses_until_off(kvm, small, asleep, monkeypatch):
    vm = small("stamp", memory_bytes=8 << 20)
    vm.log_dirty.enable()
    stamp_once(kvm, vm, 0, 10)
    with monkeypatch.context() as patch:
        cut_short(vm, patch)
        refuse(vm, patch, uapi.KVM_SET_USER_MEMORY_REGION)
        with pytest.raises(VmError):
            vm.log_dirty.clean()
    for refused in (vm.log_dirty.peek, vm.log_dirty.clean):
        with pytest.raises(LogDirtyError, match="cut short") as error:
            refused()
        assert "start anew" in error.value.hint
    vm.log_dirty.off()
    vm.log_dirty.enable()
    stamp_once(kvm, vm, 0, 10)
    assert stored(vm.log_dirty.clean()) == span(0, 10)


def test_an_entry_that_names_no_page_makes_log_dirty_refuse_until_off(kvm, small, asleep):
    vm = small("stamp", memory_bytes=8 << 20)
    vm.log_dirty.enable()
    stamp_once(kvm, vm, 0, 10)
    vm.log_dirty._rings._rings[0]._slots[0] = 1 << 16
    for refused in (vm.log_dirty.peek, vm.log_dirty.clean):
        with pytest.raises(LogDirtyError, match="address space 1, which is not RAM"):
            refused()
    assert vm.log_dirty.stats().dirty_count >= 9
    stamp_once(kvm, vm, 0, 10)  # the guest is none the worse
    vm.log_dirty.off()
    vm.log_dirty.enable()
    stamp_once(kvm, vm, 0, 10)
    assert stored(vm.log_dirty.clean()) == span(0, 10)


def test_a_collector_that_fails_is_silent_from_then_on_and_the_operators_tell(kvm, small, monkeypatch, caplog):
    vm = small("stamp", memory_bytes=8 << 20)
    called = threading.Event()

    def harvest(keep):
        called.set()
        raise VmError("the ring is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(vm.log_dirty._rings, "harvest", lambda keep: None)
        vm.log_dirty.enable()
        patch.setattr(vm.log_dirty._rings, "harvest", harvest)
        assert called.wait(60)
        vm.log_dirty._collector.join()
        with pytest.raises(VmError, match="on fire"):
            vm.log_dirty.peek()
    assert [record.getMessage() for record in caplog.records] == [
        "the dirty rings are not collected any more: the ring is on fire"
    ]
    stamp_once(kvm, vm, 0, 10)
    assert stored(vm.log_dirty.clean()) == span(0, 10)


def kvm_descriptors():
    """How many descriptors of KVM this process has; a mapping keeps one."""
    entries = (Path("/proc/self/fd") / fd for fd in open_descriptors())
    return sum("kvm" in os.readlink(entry) for entry in entries if entry.is_symlink())


@pytest.mark.parametrize("on", [True, False])
def test_a_closed_machine_leaves_no_thread_and_no_descriptor(small, on):
    before = threading.active_count(), kvm_descriptors()
    vm = small(vcpus=(None, None))
    vm.log_dirty.enable()
    if not on:
        vm.log_dirty.off()
        assert threading.active_count() == before[0]
    vm.close()
    assert (threading.active_count(), kvm_descriptors()) == before
    with pytest.raises(LogDirtyError, match="off"):
        vm.log_dirty.peek()


def without(monkeypatch, *capabilities):
    real = VmFd.check_extension
    monkeypatch.setattr(
        VmFd, "check_extension", lambda fd, capability: 0 if capability in capabilities else real(fd, capability)
    )


def test_a_kernel_without_rings_says_so(kvm, monkeypatch):
    without(monkeypatch, uapi.KVM_CAP_DIRTY_LOG_RING, uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
    with pytest.raises(UnsupportedError, match="no dirty rings") as refused:
        kvm.guest(tracker="kvm-ring")
    assert refused.value.capability == "KVM_CAP_DIRTY_LOG_RING"
    assert "--tracker kvm-bitmap" in refused.value.hint


def test_a_kernel_that_knows_the_older_capability_only(kvm, monkeypatch):
    without(monkeypatch, uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
    vm = kvm.guest("stamp", tracker="kvm-ring", memory_bytes=8 << 20)
    vm.log_dirty.enable()
    stamp_once(kvm, vm, 0, 3)
    assert stored(vm.log_dirty.clean()) == span(0, 3)


def test_by_default_the_rings_are_as_large_as_they_get(kvm):
    vm = kvm.guest(tracker="kvm-ring")
    size_bytes = vm.vm_fd.check_extension(uapi.KVM_CAP_DIRTY_LOG_RING)
    assert [ring.capacity for ring in vm.log_dirty._rings._rings] == [size_bytes // ENTRY_BYTES]


def test_a_ring_that_cannot_be_mapped_is_an_error_of_kvm(small):
    with pytest.raises(KvmError, match="mmap of a dirty ring: ENOMEM"):
        small().vcpus[0].fd.map_dirty_ring(1 << 60)
