"""Saving a running guest to a file and restoring it: what the file is, and every way to fail."""

import io
import os
import threading
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from altered import AlteredSave
from at_work import runs_on, slots
from tiers import sample

from mutation.tracker_marks import MarksNothing
from pageferry.core.bitmap import expand_runs
from pageferry.core.cpuid import CpuModel
from pageferry.core.errors import GuestAt, MigrationError, PolicyAbort, UnsupportedError, UsageError, VmError
from pageferry.core.events import Phase, PhaseBegan, RoundBegan, RoundEnded, RoundProgress, Warned
from pageferry.core.frames import gpa_of
from pageferry.core.policies import DeadlinePolicy, DowntimePolicy, PostcopyPolicy, XenPolicy
from pageferry.core.vm import MachineModel, VmConfig, VmStatus
from pageferry.engine.image.outlet import FileOutlet
from pageferry.engine.image.proof import AtPause
from pageferry.engine.image.restore import restore
from pageferry.engine.image.save import Save
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.engine.options import MIN_BANDWIDTH_BYTES_PER_S
from pageferry.engine.wire.pacer import BURST_S
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.workloads import load_workload
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.vm import KvmVm
from pageferry.stream.decoder import Decoder
from pageferry.stream.format import PageType
from pageferry.stream.intake import NEED_DATA
from pageferry.stream.records import (
    CpuidPolicy,
    End,
    HvmContext,
    HvmParams,
    PageData,
    StaticDataEnd,
    StreamHeader,
    TscInfo,
)
from pageferry.stream.walk import Walk
from pageferry.testing.operators import STRAY_GFN

MiB = 1 << 20


@pytest.fixture
def path(tmp_path):
    return tmp_path / "guest.bin"


@pytest.fixture
def restored():
    """Restores files, and closes what came of them."""
    made = []

    def make(path, make_vm, **options):
        with SavedGuest(path) as saved:
            made.append(restore(saved, make_vm, **options))
        return made[-1]

    yield make
    for vm in made:
        vm.close()


def attempt(vm, path, policy=None, *, on_event=lambda _: None, kind=Save, **options):
    return kind(vm, path, policy or XenPolicy(), on_event=on_event, **options)


def expect_as_before(vm, path, save):
    """The guest runs on, log-dirty off, no file is left, and the next attempt works."""
    assert save.job.report.status in ("failed", "cancelled")
    assert save.job.report.guest_at is save.job.guest_at is GuestAt.SOURCE
    assert (save.job.report.downtime_s, save.job.frozen) == (None, False)
    assert not vm.log_dirty.enabled
    assert os.listdir(path.parent) == []
    assert runs_on(vm)
    assert attempt(vm, path).run().status == "completed"
    assert runs_on(vm)


OTHER = {"kvm": Domain, "soft": KvmVm}


@pytest.mark.parametrize(
    ("workload", "cpus"),
    sample([("kv", 1), ("dma", 1), ("timers", 1), ("smp", 2)], "to a file guests differ little", quick=[("smp", 2)]),
)
def test_a_guest_goes_through_a_file_to_the_other_machine_while_it_runs_on(
    running, path, restored, accel, workload, cpus, kvm_support
):
    vm = running(workload, cpus=cpus)
    events = []
    report = attempt(vm, path, on_event=events.append).run()
    assert vm.status is VmStatus.RUNNING
    assert not vm.log_dirty.enabled
    assert runs_on(vm)

    assert (report.status, report.guest_at, report.file) == ("completed", GuestAt.SOURCE, str(path))
    assert report.verified
    assert report.downtime_s == pytest.approx(sum(report.downtime_parts_s.values()))
    assert set(report.downtime_parts_s) == {"pause", "stop-and-copy", "state", "verify"}
    assert [e.stats for e in events if isinstance(e, RoundEnded)] == list(report.rounds)
    of_two_ends = (Phase.HELLO, Phase.POSTCOPY)
    assert [e.phase for e in events if isinstance(e, PhaseBegan)] == [p for p in Phase if p not in of_two_ends]
    assert os.listdir(path.parent) == [path.name]

    seen = []
    there = restored(path, OTHER[accel], on_progress=lambda done, pages: seen.append((done, pages)))
    assert there.status is VmStatus.PAUSED
    assert seen[-1][0] == seen[-1][1] <= report.verified_pages  # a page that was only read has storage and no content
    first = slots(there)
    there.resume()
    assert runs_on(there)
    again = restored(path, OTHER[accel])  # the file is as it was
    assert slots(again) == first


def test_the_file_is_a_pure_stream_that_names_every_page_and_holds_the_populated_ones(guests, path):
    vm = guests("kv")
    vm.resume()
    assert runs_on(vm)
    vm.pause()
    report = attempt(vm, path).run()
    assert vm.status is VmStatus.PAUSED
    decoder = Decoder()
    data = path.read_bytes()
    decoder.feed(data)
    events = []
    while (event := decoder.next_event()) is not NEED_DATA:
        events.append(event)
    assert decoder.offset == len(data)
    assert Counter(map(type, events)) == {
        StreamHeader: 1,
        CpuidPolicy: 1,
        StaticDataEnd: 1,
        PageData: sum(isinstance(event, PageData) for event in events),
        TscInfo: 1,
        HvmParams: 1,
        HvmContext: 1,
        End: 1,
    }
    pages = [event for event in events if isinstance(event, PageData)]
    kinds = np.concatenate([event.types for event in pages])
    gfns = np.concatenate([event.pfns for event in pages])
    populated = expand_runs(*vm.memory.populated())
    assert np.array_equal(np.unique(gfns), vm.memory.all_ram().gfns())
    assert set(kinds.tolist()) == {PageType.NOTAB, PageType.XALLOC}
    with_data = np.unique(gfns[kinds == PageType.NOTAB])
    assert np.isin(with_data, populated).all()
    assert not any(map(any, vm.memory.page_views(np.setdiff1d(populated, with_data))))
    assert report.verified_pages == populated.size
    for event in pages:  # of a guest that stands still every content is the last
        views = vm.memory.page_views(event.pfns[event.types == PageType.NOTAB])
        assert event.payload == b"".join(views)
    assert len(data) < (populated.size + 64) * 4096 + 8 * vm.memory.pages + MiB


def test_a_guest_beyond_the_hole_is_no_larger_in_a_file_than_what_it_touched(guests, path, restored, make_vm):
    vm = guests("idle", memory_bytes=4096 * MiB)
    vm.resume()
    assert runs_on(vm)
    report = attempt(vm, path).run()
    assert path.stat().st_size < report.verified_pages * 4096 + 8 * vm.memory.pages + 4 * MiB
    there = restored(path, make_vm)
    assert there.config == VmConfig(memory_bytes=4096 * MiB, cpus=1, cpu=vm.cpuid)
    assert there.memory.regions == vm.memory.regions
    there.resume()
    assert runs_on(there)


def test_pages_sent_many_times_and_pages_that_became_zero_are_as_at_the_pause(running, path, restored, make_vm):
    vm = running("hotset")
    vm.pause()
    last = int(expand_runs(*vm.memory.populated())[-1])
    often, once = gpa_of(last + 16), gpa_of(last + 17)
    vm.memory.write(once, b"content" * 64)

    def write(event):
        if isinstance(event, RoundBegan) and not event.final:
            vm.memory.write(often, bytes([event.index + 1]) * 4096)
            vm.memory.write(once, bytes(4096))

    report = attempt(vm, path, XenPolicy(max_rounds=4, min_dirty_pages=0), on_event=write).run()
    there = restored(path, make_vm)
    for gfn in expand_runs(*vm.memory.populated()).tolist():
        assert there.memory.read(gpa_of(gfn), 4096) == vm.memory.read(gpa_of(gfn), 4096), hex(gfn)
    assert there.memory.read(often, 1) == bytes([len(report.rounds) - 1])
    assert not any(there.memory.read(once, 4096))


def test_a_balloon_goes_with_the_guest(running, path, restored, accel, kvm_support):
    if accel != "soft":
        pytest.skip("a machine of soft has a balloon")
    vm = running("idle", memory_bytes=32 * MiB)
    gone = np.array([5000, 5001, 6000, 8191], np.uint64)
    vm.physmap.decrease_reservation(gone)
    attempt(vm, path).run()
    there = restored(path, Domain)
    assert there.memory.removed().tolist() == gone.tolist()
    assert there.memory.size_bytes == vm.memory.size_bytes
    there.resume()
    assert runs_on(there)
    with pytest.raises(UnsupportedError, match="gave 4 pages back cannot live on kvm"):
        restored(path, KvmVm)


def test_a_capped_save_writes_no_faster_from_the_first_byte_to_the_last(running, path, restored, make_vm):
    cap = 8 * MiB
    vm = running("random")
    began_s = time.monotonic()
    report = attempt(vm, path, XenPolicy(max_rounds=1), bandwidth_bytes_per_s=cap).run()
    assert report.bandwidth_bytes_per_s == cap
    assert report.sent_bytes == path.stat().st_size
    assert report.sent_bytes <= 1.05 * cap * (time.monotonic() - began_s + BURST_S)
    for stats in report.rounds:  # the pause too
        assert stats.sent_bytes <= 1.05 * cap * (stats.duration_s + 2 * BURST_S)
    there = restored(path, make_vm)
    there.resume()
    assert runs_on(there)


class Punctual(XenPolicy):
    """A user's policy, which says by when it is to be done."""

    deadline_s = 1e-6


@pytest.mark.parametrize(
    ("policy", "missed"),
    [(DeadlinePolicy(deadline_s=1e-6), True), (DeadlinePolicy(deadline_s=1e6), False), (Punctual(), True)],
)
def test_a_deadline_that_was_missed_is_warned_of(running, path, policy, missed):
    told = []
    report = attempt(running(), path, policy, on_event=told.append).run()
    start = f"the deadline of {policy.deadline_s:g} s was missed by "
    assert any(warning.startswith(start) for warning in report.warnings) is missed
    assert [each for each in told if isinstance(each, Warned)] == [Warned(text=text) for text in report.warnings]


def test_a_cancel_does_not_wait_for_the_cap(running, path):
    vm = running("random")
    save = attempt(
        vm,
        path,
        bandwidth_bytes_per_s=MIN_BANDWIDTH_BYTES_PER_S,
        on_event=lambda event: save.job.cancel() if isinstance(event, RoundProgress) else None,
    )
    with pytest.raises(PolicyAbort, match="cancelled"):
        save.run()
    assert save.job.traffic().sent_bytes < MiB
    expect_as_before(vm, path, save)


def test_an_earlier_file_stays_until_the_next_is_whole(running, path, restored, make_vm):
    vm = running("kv")
    attempt(vm, path).run()
    first = path.read_bytes()
    work = slots(restored(path, make_vm))[0].work
    with pytest.raises(PolicyAbort):
        attempt(vm, path, DowntimePolicy(limit_s=1e-9)).run()
    assert path.read_bytes() == first
    assert runs_on(vm)
    attempt(vm, path).run()
    assert slots(restored(path, make_vm))[0].work > work


def test_a_guest_that_is_stopped_stays_stopped_until_it_is_forced(running, path, restored, make_vm):
    vm = running("kv")
    save = attempt(vm, path, stop=True)
    with pytest.raises(VmError, match="no guest to take back"):
        save.job.take_back()
    report = save.run()
    assert (report.status, report.guest_at, report.downtime_s) == ("completed", GuestAt.DESTINATION, None)
    assert report.verified
    assert save.job.frozen
    vm.resume()
    stopped_at = slots(vm)
    there = restored(path, make_vm)
    assert slots(there) == stopped_at == slots(vm)
    there.resume()
    assert runs_on(there)
    assert slots(vm) == stopped_at
    save.job.take_back()
    assert (save.job.guest_at, save.job.frozen) == (GuestAt.SOURCE, False)
    assert runs_on(vm)


@pytest.mark.parametrize("stop", [False, True])
def test_a_pause_is_over_when_the_file_has_all_of_the_guest_however_long_it_settles(running, path, stop):
    watched = {}

    def look(event):
        if isinstance(event, PhaseBegan):
            watched[event.phase] = "pause" in {thread.name for thread in threading.enumerate()}

    attempt(running("kv"), path, on_event=look, stop=stop, pause_limit_s=600.0).run()
    assert (watched[Phase.PRECOPY], watched[Phase.VERIFY], watched[Phase.HANDOFF]) == (False, True, False)


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "phase",
    sample(
        [Phase.PRECOPY, Phase.STOP_AND_COPY, Phase.STATE, Phase.HANDOFF],
        "one phase before the pause and one behind it",
        quick=[Phase.PRECOPY, Phase.HANDOFF],
    ),
)
@pytest.mark.parametrize("stop", [False, True])
def test_cancelled_in_any_phase_the_guest_runs_on_and_nothing_is_left(running, path, phase, stop):
    vm = running("kv")

    def cancel(event):
        if isinstance(event, PhaseBegan) and event.phase is phase:
            assert save.job.cancel()

    save = attempt(vm, path, on_event=cancel, stop=stop)
    with pytest.raises(PolicyAbort, match="cancelled"):
        save.run()
    assert save.job.report.status == "cancelled"
    expect_as_before(vm, path, save)
    assert not save.job.handing_over


def test_too_late_to_cancel_when_the_file_is_whole(running, path):
    vm = running("kv")
    save = attempt(vm, path)
    save.run()
    assert not save.job.cancel()


@pytest.mark.parametrize("stop", [False, True])
def test_a_disk_that_fills_up_leaves_the_guest_running_and_no_file(running, path, monkeypatch, stop):
    vm = running("kv")
    writev = os.writev

    def full(fd, buffers):
        if os.lseek(fd, 0, os.SEEK_CUR) > 4096:
            raise OSError(28, "No space left on device")
        return writev(fd, buffers)

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full)
        save = attempt(vm, path, stop=stop)
        with pytest.raises(MigrationError, match=r"cannot write .*guest.bin: No space left on device \(phase pre-copy"):
            save.run()
    expect_as_before(vm, path, save)


@pytest.mark.parametrize("step", ["fsync", "link"])
@pytest.mark.parametrize("stop", [False, True])
def test_a_disk_that_breaks_at_the_end_leaves_the_guest_running_and_no_file(running, path, monkeypatch, step, stop):
    def broken(*_, **__):
        raise OSError(5, "Input/output error")

    vm = running("kv")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, broken)
        save = attempt(vm, path, stop=stop)
        with pytest.raises(MigrationError, match=r"Input/output error \(phase handoff, guest at source\)"):
            save.run()
    expect_as_before(vm, path, save)


def test_a_file_system_without_room_is_refused_before_anything_is_written(running, path, monkeypatch):
    vm = running("kv")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstatvfs", lambda fd: SimpleNamespace(f_bavail=8, f_frsize=512))
        save = attempt(vm, path)
        with pytest.raises(MigrationError, match=r"the guest holds .* has 4 KiB free \(phase connect"):
            save.run()
    assert save.job.traffic().sent_bytes == 0
    expect_as_before(vm, path, save)


def last_page(content):
    """Where the last page data of a stream is."""
    pages = [
        each for each in Walk(io.BytesIO(content).readinto) if each.name == "PAGE_DATA" and each.event.payload_bytes
    ]
    return pages[-1].offset + 8 + pages[-1].body_bytes - 100


@pytest.mark.parametrize(
    ("offset_of", "says"),
    [
        (last_page, "the file is not the guest at the pause: .* pages at gfn"),
        (lambda content: len(content) - 8, "in "),  # END
        (lambda content: len(content) - 40, "the file does not hold the state|in HVM_CONTEXT"),  # the last device
    ],
    ids=["page", "end", "state"],
)
def test_what_the_disk_wrote_wrongly_is_found_and_leaves_no_file(running, path, offset_of, says):
    class Spoiled(FileOutlet):
        def settle(self):
            super().settle()
            content = os.pread(self.fileno(), os.fstat(self.fileno()).st_size, 0)
            at = offset_of(content)
            os.pwrite(self.fileno(), bytes([content[at] ^ 1]), at)

    vm = running("kv")
    vm.pause()  # so that every content in the file counts
    save = attempt(vm, path, kind=AlteredSave.having({"image.save_file.FileOutlet": Spoiled}))
    with pytest.raises(MigrationError, match=says):
        save.run()
    assert not save.job.report.verified
    assert vm.status is VmStatus.PAUSED
    vm.resume()
    expect_as_before(vm, path, save)


def test_a_page_that_the_tracker_lost_is_found(running, path):
    vm = running("idle")
    sound = vm.log_dirty
    populated = expand_runs(*vm.memory.populated())

    def write_unmarked(event):
        if isinstance(event, RoundEnded) and event.stats.index == 0:
            vm.memory.write(gpa_of(int(populated[-1])), b"lost")

    vm.replace_tracker(MarksNothing(vm))
    save = attempt(vm, path, on_event=write_unmarked)
    with pytest.raises(MigrationError, match="the file is not the guest at the pause"):
        save.run()
    vm.replace_tracker(sound)
    expect_as_before(vm, path, save)


class Forgets(AtPause):
    """Does not know of the last run that the guest had."""

    @classmethod
    def of(cls, memory, context):
        found = super().of(memory, context)
        parts = {name: getattr(found, name)[:-1] for name in ("starts", "lengths", "digests")}
        return replace(found, **parts)


def test_content_where_the_guest_has_none_is_found(running, path):
    vm = running("idle")
    vm.memory.write(gpa_of(STRAY_GFN), b"content")
    save = attempt(vm, path, kind=AlteredSave.having({"image.save.AtPause": Forgets}))
    with pytest.raises(MigrationError, match="the file has content where the guest had none: first difference"):
        save.run()
    expect_as_before(vm, path, save)


def test_where_a_guest_cannot_be_saved(running, tmp_path):
    vm = running("kv")
    for path, says in (
        (tmp_path, "not a regular file"),
        (tmp_path / "no" / "folder", "cannot write .*folder: No such file"),
    ):
        save = attempt(vm, path)
        with pytest.raises(MigrationError, match=says):
            save.run()
        assert runs_on(vm)
    assert os.listdir(tmp_path) == []


# -- restoring ---------------------------------------------------------------------------------------------------------


def test_a_machine_that_lacks_a_feature_of_the_guest_refuses_it(path, restored, kvm_support, tmp_path):
    vm = KvmVm(VmConfig(memory_bytes=8 * MiB, cpu=CpuModel.HOST))
    boot(vm, load_workload("idle"), params=GuestParams(working_set_bytes=MiB))
    attempt(vm, path).run()
    vm.close()
    with pytest.raises(UnsupportedError, match="the software machine lacks "):
        restored(path, Domain)
    there = restored(path, KvmVm)
    there.resume()
    assert runs_on(there)


def test_a_machine_with_interrupt_controllers_is_made_again(path, restored, kvm_support):
    vm = KvmVm(VmConfig(memory_bytes=8 * MiB, machine=MachineModel.PC))
    boot(vm, load_workload("kv"), params=GuestParams(working_set_bytes=MiB))
    vm.resume()
    assert runs_on(vm)
    attempt(vm, path).run()
    vm.close()
    for make_vm in (KvmVm, Domain):
        there = restored(path, make_vm)
        assert there.config.machine is MachineModel.PC
        there.resume()
        assert runs_on(there)


def test_a_host_without_room_refuses(running, path, make_vm):
    attempt(running("kv"), path).run()
    with SavedGuest(path) as saved:
        saved.data_pages = np.broadcast_to(np.uint64(0), 1 << 40)
        with pytest.raises(UsageError, match=r"the guest holds 4096 TiB, this host has .* available"):
            restore(saved, make_vm)


def test_a_file_that_cannot_be_read_gives_no_guest(running, path, restored, make_vm, monkeypatch):
    attempt(running("kv"), path).run()
    made = []

    def broken(fd, views, offset):
        raise OSError(5, "Input/output error")

    def make(config):
        made.append(make_vm(config))
        return made[-1]

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(VmError, match=r"cannot read .*guest.bin at byte \d+: Input/output error"):
        restored(path, make)
    with pytest.raises(VmError):
        made[0].resume()


def test_a_policy_that_may_switch_saves_nothing(running, path):
    with pytest.raises(UsageError, match="a save cannot follow the postcopy policy"):
        attempt(running(), path, PostcopyPolicy())
    assert not path.exists()
