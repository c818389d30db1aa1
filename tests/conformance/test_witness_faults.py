"""A witness finds every fault that loses a dirty bit in a migration: which page, which round, whose bit."""

from functools import partial

import pytest
from tiers import sample

from mutation import DECLARED, WRAPPED, Room
from mutation.fault import BEHIND_THE_HOLE, ODD
from pageferry.core.errors import LostPageError, UnsupportedError
from pageferry.core.frames import PAGE_SIZE, gpa_of
from pageferry.core.vm import VmConfig
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.trackers import DEFAULT_TRACKER
from pageferry.kvm.vm import KvmVm
from pageferry.testing.lab import Copy, Lab
from pageferry.testing.operators import STRAY_GFN
from pageferry.witness.cross_check import CrossCheck

FAULTS = {fault.name: fault for fault in (*DECLARED, *WRAPPED)}


class Migration:
    """A migration in miniature, that remembers memory as it was at the last two CLEANs: what a lost bit stood for."""

    def __init__(self, guest):
        self.guest = guest
        self.round = 0

    def enable(self):
        self.guest.log_dirty.enable()
        self.round = 1
        self._copies = [self._copy()]

    def clean(self, *, by_range=False):
        if by_range:
            for part in self.guest.parts():
                self.guest.log_dirty.clean_range(part)
        else:
            self.guest.log_dirty.clean()
        self.round += 1
        self._copies = [self._copies[-1], self._copy()]

    def _copy(self):
        copy = Copy(self.guest.memory)
        copy.take_all()
        return copy

    def changed(self, gfn):
        now = self.guest.memory.read(gpa_of(gfn), PAGE_SIZE)
        return any(copy._copy.read(gpa_of(gfn), PAGE_SIZE) != now for copy in self._copies)

    def write(self, gpa):
        self.guest.memory.write(gpa, (0x55 + self.round).to_bytes(8, "big"))


def stamping(migration):
    """Rounds of a guest that stands still in between, with host writes, PEEKs, and a second attempt."""
    guest = migration.guest
    guest.start_stamping()
    for _ in range(2):
        migration.enable()
        for number in (1, 3, 4, 2):
            guest.play(number)
            for gfn in (STRAY_GFN + 1, int(guest.oracle.gfns[migration.round])):
                migration.write(gpa_of(gfn) - 4)
            guest.log_dirty.peek()
            migration.clean()
        guest.log_dirty.peek()
        guest.log_dirty.off()


def cleans_only(migration):
    """Rounds without a PEEK before the last; a host write in the first, in which the guest does next to nothing."""
    guest = migration.guest
    guest.start_stamping()
    migration.enable()
    migration.write(gpa_of(STRAY_GFN))
    for number in range(1, 9):
        guest.play(number)
        migration.clean()
    guest.log_dirty.peek()


def by_range(migration):
    """Rounds that are cleaned range by range; in every other one the guest does next to nothing."""
    guest = migration.guest
    guest.start_stamping()
    migration.enable()
    for number in (3, 1, 8, 1, 13, 1):
        guest.play(number)
        migration.write(gpa_of(STRAY_GFN))
        migration.clean(by_range=True)
    guest.log_dirty.peek()


def transfers(migration):
    """A guest that has a device write its memory."""
    guest = migration.guest
    migration.enable()
    for _ in range(3):
        guest.vm.resume()
        guest.progress(8)
        guest.vm.pause()
        guest.log_dirty.peek()
        migration.clean()
    guest.log_dirty.peek()


def cleaned_in_the_mark(migration):
    """Host writes whose marks a CLEAN comes right behind."""
    guest = migration.guest
    guest.start_stamping()
    migration.enable()

    def mark_and_clean(gfns):
        guest.log_dirty.mark(gfns)
        migration.clean()

    guest.memory.on_write(mark_and_clean)
    for _ in range(3):
        migration.write(gpa_of(STRAY_GFN))
    guest.log_dirty.peek()


#: Which scenario brings a fault to lose a bit. Left out: what needs a second vCPU, a race, ballooning or an empty pool,
#: what depends on where a ring starts over, and what is wrong without losing any.
LOSING = {
    stamping: [
        *("protect-before-swap", "clear-after-copy", "mfn-logged", "peek-clears", "second-reader-takes-bits"),
        *("hole-not-counted", "journal-forgotten-for-marks", "tlb-not-flushed", "tlb-not-flushed-at-enable"),
        *("split-forgets-neighbours", "recalculation-lost", "vmm-writes-untracked", "marks-need-a-vcpu"),
        *("first-page-marked", "grant-before-mark", "vcpu-log-not-drained"),
        *("kvm-slot-remade-before-read", "kvm-second-slot-shifted", "kvm-peek-takes"),
        *("uffd-granted-before-marked", "uffd-protected-before-taken"),
        *("uffd-not-protected-again", "uffd-untouched-not-protected", "uffd-second-region-not-registered"),
        *("uffd-only-the-vcpus-bits", "pagemap-peek-protects", "pagemap-first-buffer-only"),
        *("pagemap-looked-then-protected", "pagemap-addresses-of-the-wrong-slot"),
        *("ring-reset-skipped", "ring-reset-before-kept", "ring-only-the-kernels-bits"),
        *("ring-peek-keeps-nothing", "ring-offsets-taken-for-frames", "ring-reset-cut-short"),
        *("tracker-drops-a-bit", "tracker-does-not-protect-again", "tracker-peek-clears"),
        *("tracker-marks-nothing", "tracker-marks-the-first", "tracker-ignores-the-hole"),
    ],
    cleans_only: [
        *("cleared-unread", "kvm-cleared-unread", "kvm-only-the-kernels-bits", "walker-writes-unmarked"),
        *("uffd-first-of-a-batch-marked", "ring-dropped-when-full"),
        *("tracker-drops-the-last-word", "tracker-skips-small-rounds", "tracker-reports-late"),
    ],
    by_range: [
        *("range-takes-the-whole-journal", "kvm-range-clears-the-slot", "kvm-range-of-the-first-slot"),
        *("ring-range-keeps-its-own", "ring-range-not-reset", "pagemap-range-protects-all"),
        *("uffd-range-protected-from-the-start-of-ram", "tracker-range-clears-all"),
        *("tracker-range-protects-its-first-word", "tracker-range-clears-before-it-reads"),
        *("tracker-range-shifted-by-a-word", "tracker-range-forgets-the-tail", "tracker-range-ends-at-the-hole"),
        "tracker-range-knows-no-marks",
    ],
    transfers: ["dma-not-marked", "last-device-log-lost"],
    cleaned_in_the_mark: ["mark-before-write"],
}
CASES = [(scenario, FAULTS[name]) for scenario, names in LOSING.items() for name in names]
FIRST = [(scenario, FAULTS[names[0]]) for scenario, names in LOSING.items()]


def watch(vm, log):
    vm.replace_tracker(CrossCheck(log, None, vm.memory, still=lambda: vm.run_control.still))
    return vm


def watched(fault):
    """Makes machines with a fault and digests beside the tracker, the marks going wherever the fault sends them."""

    def make(config):
        vm = (partial(KvmVm, tracker=fault.tracker or DEFAULT_TRACKER) if fault.on_kvm else Domain)(config)
        if fault.room is Room.TRACKER:
            return watch(vm, fault.inject(vm))
        fault.inject(vm)
        mark = vm.memory._on_write
        watch(vm, vm.log_dirty)
        vm.memory.on_write(mark)
        return vm

    return make


def guest_of(scenario, make_vm, memory_bytes):
    lab = Lab(make_vm=make_vm, memory_bytes=memory_bytes, seed=1)
    return lab.guest("dma" if scenario is transfers else "stamp")


@pytest.mark.parametrize(
    ("scenario", "fault"),
    sample(CASES, "one fault of each scenario", quick=FIRST),
    ids=[fault.name for _, fault in CASES],
)
def test_a_lost_bit_is_found(request, scenario, fault):
    if fault.on_kvm:
        request.getfixturevalue("kvm_support")
        try:
            KvmVm(VmConfig(memory_bytes=ODD), tracker=fault.tracker or DEFAULT_TRACKER).close()
        except UnsupportedError as error:
            pytest.skip(f"{error} ({error.hint})")
    with guest_of(scenario, watched(fault), fault.memory_bytes) as guest:
        migration = Migration(guest)
        with pytest.raises(LostPageError) as caught:
            scenario(migration)
        error = caught.value
        assert migration.changed(error.gfn)
        assert error.round_index in (migration.round - 2, migration.round - 1)
        assert (guest.log_dirty.tracker, error.seen_by) == (f"{error.lost_by} against digests", "digests")


@pytest.mark.parametrize("memory_bytes", sample([ODD, BEHIND_THE_HOLE], "one size of two", quick=[ODD]))
@pytest.mark.parametrize("scenario", sample(LOSING, "two ways to CLEAN", quick=[stamping, by_range]))
def test_without_a_fault_both_agree(make_vm, scenario, memory_bytes):
    def make(config):
        vm = make_vm(config)
        return watch(vm, vm.log_dirty)

    with guest_of(scenario, make, memory_bytes) as guest:
        migration = Migration(guest)
        scenario(migration)
        assert migration.round > 3
