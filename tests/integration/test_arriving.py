"""Guests that move and run on: whatever they are, whatever they do meanwhile, whatever fails beside them."""

import functools

import numpy as np
import pytest
from altered import AlteredSource
from at_work import runs_on, work
from tiers import sample
from trips import Rounds, source_of

from mutation.tracker_wrapper import Faithful
from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import GuestAt, VmError
from pageferry.core.events import DOWNTIME_PHASES, MigrationEnded, Phase, PhaseBegan, RoundEnded, RoundProgress
from pageferry.core.policies import DowntimePolicy
from pageferry.core.vm import VmStatus
from pageferry.hypervisor import invariants
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.vm import KvmVm


@pytest.mark.parametrize(
    "workload",
    sample(
        ["kv", "hotset", "sweep", "idle", "dma", "timers"], "to the engine guests differ little", quick=["kv", "dma"]
    ),
)
def test_a_running_guest_moves_and_runs_on(guests, inn, accel, workload):
    vm = guests(workload)
    events = []
    vm.resume()
    assert runs_on(vm)
    source = source_of(vm, inn.open(), on_event=events.append)
    report = source.run()
    there = inn.outcome()
    assert isinstance(there, type(vm)), there
    assert there.status is VmStatus.RUNNING
    assert work(there) >= work(vm)
    assert runs_on(there)
    assert not vm.log_dirty.enabled
    frozen_work = work(vm)
    vm.resume()  # a guest that has left does not come back by a mere resume
    assert work(vm) == frozen_work

    assert (report.status, report.guest_at) == ("completed", GuestAt.DESTINATION)
    assert (report.source_accel, report.destination_accel) == (accel, accel)
    assert report.verified
    assert report.verified_pages == expand_runs(*vm.memory.populated()).size
    assert report.downtime_s == pytest.approx(sum(report.downtime_parts_s.values()))
    assert set(report.downtime_parts_s) == {str(phase) for phase in DOWNTIME_PHASES}
    assert [(each.name, each.size_bytes) for each in report.devices] == [
        (device.name, len(device.save())) for device in vm.platform.bus.devices
    ]
    assert all(each.save_ns > 0 for each in report.devices)
    assert report.state_bytes > sum(each.size_bytes for each in report.devices)
    assert [r.index for r in report.rounds] == list(range(len(report.rounds)))
    assert [r.final for r in report.rounds] == [False] * (len(report.rounds) - 1) + [True]
    assert all(r.sent_bytes > (r.sent_pages - r.zero_pages) * 4096 for r in report.rounds if r.sent_pages)
    assert events[-1] == MigrationEnded(report=report)
    assert [e.phase for e in events if isinstance(e, PhaseBegan)] == [
        phase for phase in Phase if phase is not Phase.POSTCOPY
    ]
    assert [e.stats for e in events if isinstance(e, RoundEnded)] == list(report.rounds)
    for stats in report.rounds:
        sent = [e.sent_pages for e in events if isinstance(e, RoundProgress) and e.index == stats.index]
        assert sent == sorted(sent)
        assert not sent or sent[-1] == stats.sent_pages
    if accel == "soft" and workload != "dma":  # one fault for each page that a vCPU made dirty, no more and no less
        assert report.fault_count == sum(r.dirty_pages for r in report.rounds[1:])


def test_a_failure_to_find_words_changes_no_outcome(running, inn):
    vm = running()
    speechless = AlteredSource.having({"report.explain": lambda report: 1 / 0})
    report = source_of(vm, inn.open(), kind=speechless).run()
    assert (report.status, report.explanation) == ("completed", None)
    assert runs_on(inn.outcome())


@pytest.mark.parametrize(
    ("cpus", "workload"),
    sample(
        [(2, "smp"), (4, "smp"), (8, "kv"), (3, "hotset")], "to the engine guests differ little", quick=[(2, "smp")]
    ),
)
def test_a_guest_with_several_vcpus_moves_and_each_runs_on(guests, inn, accel, cpus, workload):
    vm = guests(workload, cpus=cpus)
    vm.resume()
    assert runs_on(vm)
    source = source_of(vm, inn.open())
    report = source.run()
    there = inn.outcome()
    assert isinstance(there, type(vm)), there
    assert (report.status, report.verified) == ("completed", True)
    assert there.config.cpus == cpus
    assert all(new >= old for new, old in zip(work(there), work(vm), strict=True))
    assert runs_on(there)
    if accel == "soft":  # one counted fault for each page that vCPUs made dirty, however many of them at a time
        assert report.fault_count == sum(r.dirty_pages for r in report.rounds[1:])


def test_a_paused_guest_stays_paused(running, inn):
    vm = running()
    vm.pause()
    before = work(vm)
    report = source_of(vm, inn.open(), DowntimePolicy()).run()
    there = inn.outcome()
    assert report.status == "completed"
    assert there.status is VmStatus.PAUSED
    assert work(there) == before
    there.resume()
    assert runs_on(there)


def test_there_and_back_again(guests, inn):
    vm = guests("kv")
    vm.resume()
    for _ in range(3):
        source_of(vm, inn.open()).run()
        vm, old = inn.outcome(), vm
        old.close()
        assert runs_on(vm)


@pytest.mark.parametrize("workload", ["kv", "timers"])
def test_from_machine_to_machine_and_from_mode_to_mode(running, inns, kvm_support, workload):
    """The same running guest on real hardware, on nested paging in software and on shadow paging, one after another."""
    vm = running(workload)
    shadow = functools.partial(Domain, paging_mode="shadow")
    for make_there, name in ((KvmVm, "kvm"), (shadow, "soft"), (Domain, "soft"), (shadow, "soft"), (KvmVm, "kvm")):
        inn = inns(make_there)
        report = source_of(vm, inn.open()).run()
        vm, old = inn.outcome(), vm
        old.close()
        assert (report.source_accel, report.destination_accel) == (old.accel, name)
        assert report.verified
        assert runs_on(vm)


def test_observers_cannot_end_a_migration(running, inn):
    def look(*_):
        raise RuntimeError("I saw nothing")

    vm = running()
    report = source_of(vm, inn.open(on_event=look, on_complete=look), on_event=look).run()
    assert report.status == "completed"
    assert runs_on(inn.outcome())


def test_a_guest_that_runs_there_is_there_whatever_fails_here(running, inn):
    class StaysOn(Faithful):
        def off(self):
            raise VmError("cannot be turned off")

    vm = running()
    vm.replace_tracker(StaysOn(vm))
    source = source_of(vm, inn.open())
    assert source.run().guest_at is GuestAt.DESTINATION
    with pytest.raises(VmError, match="no guest to take back"):
        source.job.take_back()
    assert runs_on(inn.outcome())


@pytest.mark.parametrize("accel", ["soft"], indirect=True)
def test_pages_that_come_and_go_during_the_migration(guests, inn):
    """A balloon: pages removed before and between rounds, some of them given back; the destination is the same."""
    vm = guests("hotset")
    free = np.arange(6000, 6100, dtype=np.uint64)
    for gfn in free.tolist():
        vm.memory.write(gfn << 12, bytes([gfn & 0xFF]) * 4096)
    vm.physmap.decrease_reservation(free[:10])
    vm.resume()
    assert runs_on(vm)

    def breathe(index):
        if index == 0:
            vm.physmap.decrease_reservation(free[10:60])
        if index == 1:
            vm.physmap.populate_physmap(free[30:50])
            vm.memory.write(6040 << 12, b"again")

    report = source_of(vm, inn.open(), Rounds(4, breathe)).run()
    there = inn.outcome()
    gone = [*range(6000, 6030), *range(6050, 6060)]
    assert vm.memory.removed().tolist() == there.memory.removed().tolist() == gone
    assert there.memory.read(6040 << 12, 6) == b"again\0"
    assert there.memory.read(6030 << 12, 4096) == bytes(4096)
    assert there.memory.read(6099 << 12, 4096) == bytes([6099 & 0xFF]) * 4096
    assert report.verified
    assert runs_on(there)
    invariants.check(there)
