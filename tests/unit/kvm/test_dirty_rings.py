"""Dirty rings over ordinary memory: the test plays the kernel's part, so no KVM is needed."""

import mmap
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from pageferry.core.errors import VmError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.ram import RamRegion
from pageferry.kvm.dirty_rings import ENTRY_BYTES, DirtyRing, DirtyRings
from pageferry.kvm.slots import MemorySlot
from pageferry.kvm.uapi import KVM_DIRTY_GFN_F_DIRTY, KVM_DIRTY_GFN_F_RESET, KVM_RESET_DIRTY_RINGS

ENTRIES = PAGE_SIZE // ENTRY_BYTES
FIRST_GFNS = (0, 1 << 20)


class Kernel:
    """The kernel's side of one ring."""

    def __init__(self, entries=ENTRIES):
        mapping = mmap.mmap(-1, entries * ENTRY_BYTES)
        self.entries = np.frombuffer(mapping, [("flags", "<u4"), ("slot", "<u4"), ("offset", "<u8")])
        self.ring = DirtyRing(mapping)
        self.dirty_index = self.reset_index = 0

    def push(self, *offsets, slot=0):
        for offset in offsets:
            assert self.dirty_index - self.reset_index < self.entries.size, "the ring overflows"
            self.entries[self.dirty_index % self.entries.size] = (KVM_DIRTY_GFN_F_DIRTY, slot, offset)
            self.dirty_index += 1

    def reset(self, limit=1 << 30):
        done = 0
        while done < limit:
            at = self.reset_index % self.entries.size
            if not self.entries["flags"][at] & KVM_DIRTY_GFN_F_RESET:
                break
            self.entries["flags"][at] = 0
            self.reset_index += 1
            done += 1
        assert self.reset_index <= self.dirty_index, "the kernel was made to reset what it never pushed"
        return done


class Kernels:
    """A machine with some rings and two slots; ``limits`` are how much each KVM_RESET_DIRTY_RINGS may do."""

    def __init__(self, count=1, entries=ENTRIES, limits=()):
        self.kernels = [Kernel(entries) for _ in range(count)]
        self.limits = list(limits)
        self.masks = []
        regions = [RamRegion(gpa=gfn * PAGE_SIZE, size_bytes=1024 * PAGE_SIZE) for gfn in FIRST_GFNS]
        slots = tuple(MemorySlot(index=i, region=region, userspace_addr=0) for i, region in enumerate(regions))
        vm = SimpleNamespace(ioctl=self.ioctl)
        self.rings = DirtyRings(vm, slots, tuple(kernel.ring for kernel in self.kernels))

    def ioctl(self, request):
        assert request == KVM_RESET_DIRTY_RINGS
        self.masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        left = self.limits.pop(0) if self.limits else 1 << 30
        done = 0
        for kernel in self.kernels:
            done += kernel.reset(left - done)
        return done

    def harvest(self):
        found = []
        self.rings.harvest(lambda gfns: found.extend(gfns.tolist()))
        return found


def looked(ring):
    slots, offsets = ring.look()
    return list(zip(slots.tolist(), offsets.tolist(), strict=True))


def test_a_look_shows_what_is_new_until_it_is_harvested():
    kernel = Kernel()
    assert looked(kernel.ring) == []
    kernel.push(5, 7, 7)
    assert looked(kernel.ring) == looked(kernel.ring) == [(0, 5), (0, 7), (0, 7)]
    kernel.ring.harvested(2)
    kernel.push(9, slot=3)
    assert looked(kernel.ring) == [(0, 7), (3, 9)]
    kernel.ring.harvested(2)
    assert looked(kernel.ring) == []
    assert kernel.ring.kept == 4


def test_what_a_look_returned_is_a_copy():
    kernel = Kernel()
    kernel.push(5)
    _, offsets = kernel.ring.look()
    kernel.entries["offset"][0] = 6
    assert offsets.tolist() == [5]


def test_an_entry_behind_a_gap_waits():
    kernel = Kernel()
    kernel.push(1, 2, 3)
    kernel.entries["flags"][1] = 0  # being written
    assert looked(kernel.ring) == [(0, 1)]
    kernel.entries["flags"][1] = KVM_DIRTY_GFN_F_DIRTY
    assert looked(kernel.ring) == [(0, 1), (0, 2), (0, 3)]


@pytest.mark.parametrize("step", [1, 3, 100, ENTRIES - 1, ENTRIES])
def test_nothing_is_lost_or_repeated_round_and_round(step):
    machine = Kernels()
    (kernel,) = machine.kernels
    for first in range(0, 1000, step):
        kernel.push(*range(first, min(first + step, 1000)))
        assert machine.harvest() == list(range(first, min(first + step, 1000)))
        assert machine.rings.reset()
        assert (kernel.ring.kept, kernel.dirty_index) == (0, kernel.reset_index)


def test_a_full_ring_of_harvested_entries_is_not_harvested_again():
    machine = Kernels()
    (kernel,) = machine.kernels
    kernel.push(*range(100))
    machine.harvest()
    machine.rings.reset()
    kernel.push(*range(ENTRIES))
    assert machine.harvest() == list(range(ENTRIES))
    assert machine.harvest() == []
    assert machine.rings.reset()
    assert kernel.reset_index == 100 + ENTRIES


def test_a_ring_longer_than_one_look():
    machine = Kernels(entries=1 << 14)
    machine.kernels[0].push(*[offset % 1024 for offset in range(1 << 14)])
    assert machine.harvest() == [offset % 1024 for offset in range(1 << 14)]


def test_what_is_new_is_not_reset_with_what_is_harvested():
    machine = Kernels()
    machine.kernels[0].push(1, 2)
    machine.harvest()
    machine.kernels[0].push(3)
    assert machine.rings.reset()
    assert machine.kernels[0].reset_index == 2
    assert machine.harvest() == [3]


def test_frames_of_every_ring_and_slot():
    machine = Kernels(count=3)
    for vcpu, kernel in enumerate(machine.kernels):
        kernel.push(vcpu)
        kernel.push(1000 + vcpu, slot=1)
    assert sorted(machine.harvest()) == [0, 1, 2, *((1 << 20) + 1000 + vcpu for vcpu in range(3))]
    assert machine.rings.reset()
    assert [kernel.reset_index for kernel in machine.kernels] == [2, 2, 2]


@pytest.mark.parametrize(
    ("slot", "offset", "words"),
    [
        (1 << 16, 3, "slot 0 in address space 1"),
        (1 << 16 | 1, 3, "slot 1 in address space 1"),
        (2, 3, "slot 2 in address space 0"),
        (1, 1024, "page 0x400 of slot 1"),
        (0, (1 << 64) - 1, "page 0xffffffffffffffff of slot 0"),
        (0xFFFF_FFFF, 0, "slot 65535 in address space 65535"),
    ],
)
def test_an_entry_that_names_no_page_is_told_and_the_others_are_kept(slot, offset, words):
    machine = Kernels(count=2)
    machine.kernels[1].push(1)
    machine.kernels[1].push(offset, slot=slot)
    machine.kernels[1].push(2)
    assert machine.harvest() == [1, 2]
    assert words in machine.rings.unknown
    assert machine.rings.unknown.startswith("vcpu 1: ")
    first = machine.rings.unknown
    machine.kernels[0].push(0, slot=9)
    machine.harvest()
    assert machine.rings.unknown == first


def test_a_keeper_that_fails_leaves_the_entries_new():
    machine = Kernels()
    machine.kernels[0].push(4)

    def keep(gfns):
        raise MemoryError

    with pytest.raises(MemoryError):
        machine.rings.harvest(keep)
    assert machine.harvest() == [4]


def test_half_full_counts_what_is_harvested_and_not_reset_in_any_ring():
    machine = Kernels(count=2)
    machine.kernels[1].push(*range(ENTRIES // 2))
    assert not machine.rings.half_full
    machine.harvest()
    assert machine.rings.half_full
    machine.rings.reset()
    assert not machine.rings.half_full


def test_a_larger_ring_is_looked_at_less_often_and_a_small_one_not_all_the_time():
    assert Kernels(entries=1 << 16).rings.period_s == pytest.approx(0.0164, rel=0.01)
    assert Kernels().rings.period_s == 0.005


@pytest.mark.parametrize("limits", [[0], [1], [299, 0, 0, 50], [150], [399]])
def test_a_reset_cut_short_is_finished_and_told(limits):
    machine = Kernels(count=2, limits=limits)
    for kernel in machine.kernels:
        kernel.push(*range(200))
    machine.harvest()
    assert not machine.rings.reset()
    assert [kernel.reset_index for kernel in machine.kernels] == [200, 200]
    for kernel in machine.kernels:
        kernel.push(*range(ENTRIES))
    assert machine.harvest() == [*range(ENTRIES)] * 2
    assert machine.rings.reset()


def test_a_kernel_that_does_not_reset_is_given_up_and_what_is_left_stays_harvested():
    machine = Kernels(limits=[10, *[0] * 99])
    machine.kernels[0].push(*range(100))
    machine.harvest()
    with pytest.raises(VmError, match="90 entries are left"):
        machine.rings.reset()
    machine.kernels[0].push(*range(100, 200))
    assert machine.harvest() == list(range(100, 200))
    assert machine.rings.reset()
    assert machine.kernels[0].reset_index == 200


def test_nothing_to_reset_asks_the_kernel_nothing():
    machine = Kernels()
    assert machine.rings.reset()
    assert machine.masks == []


def test_no_signal_interrupts_a_reset_and_all_are_let_in_again():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    machine = Kernels()
    machine.kernels[0].push(1)
    machine.harvest()
    machine.rings.reset()
    blockable = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    assert machine.masks == [blockable]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_closed_ring_is_unmapped():
    mapping = mmap.mmap(-1, PAGE_SIZE)
    DirtyRing(mapping).close()
    assert mapping.closed
