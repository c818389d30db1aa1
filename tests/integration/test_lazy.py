"""A guest that runs before its memory was read: each page is there when it is touched, and in the end all of it is."""

import os
import threading

import numpy as np
import pytest
from altered import alter
from at_work import runs_on, slots, until
from tiers import sample

from mutation.fault import injected
from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import UnsupportedError, VmError
from pageferry.core.frames import gpa_of
from pageferry.core.hugepages import HugePages
from pageferry.core.policies import XenPolicy
from pageferry.core.vm import VmStatus
from pageferry.engine.image.lazy import LazyRestore
from pageferry.engine.image.restore import restore_lazily
from pageferry.engine.image.save import Save
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.vm import KvmVm
from pageferry.testing.operators import STRAY_GFN
from pageferry.uffd.fds import UffdFd
from pageferry.vmm.accel import Accel, choose_machines
from pageferry.vmm.process import GuestProcess
from pageferry.vmm.qmp_client import QmpClient
from pageferry.vmm.qmp_error import QmpError

MiB = 1 << 20
GIVE_UP_S = 60


@pytest.fixture
def saved(running, tmp_path):
    """Saves a guest that has worked; returns its file and the guest, which stands still since then."""

    def make(*arguments, **options):
        vm = running(*arguments, **options)
        vm.pause()
        vm.memory.write(gpa_of(STRAY_GFN), b"a page that the guest never touches")
        path = tmp_path / "guest.bin"
        Save(vm, path, XenPolicy(), on_event=lambda _: None).run()
        return path, vm

    return make


@pytest.fixture
def restored():
    """Restores lazily; ends what came of it."""
    made = []

    def make(path, make_vm, on_failure=lambda _: None, restore=restore_lazily):
        vm, lazy = restore(SavedGuest(path), make_vm, on_failure=on_failure)
        made.append((vm, lazy))
        return vm, lazy

    yield make
    for vm, lazy in made:
        if lazy.failure is None:
            vm.pause()
        lazy.close()
        vm.close()


def in_small_pieces(saved, make_vm, *, on_failure):
    vm = make_vm(saved.config)
    lazy = LazyRestore(saved, vm, on_failure=on_failure, piece_pages=3)
    vm.load_state(saved.state)
    return vm, lazy


def expect_all_there(vm, lazy, original):
    """All of memory came, equal to the original's, and nothing waits for anything any more."""
    until(lambda: lazy.done, "end of the restore")
    assert lazy.missing_pages == 0
    vm.memory.on_touch(lambda _: pytest.fail("an access still waits for pages"))
    vm.memory.on_touch(None)
    gfns = np.union1d(expand_runs(*original.memory.populated()), expand_runs(*vm.memory.populated()))
    for gfn in gfns.tolist():
        assert vm.memory.read(gpa_of(gfn), 4096) == original.memory.read(gpa_of(gfn), 4096), hex(gfn)


@pytest.fixture(params=["kvm", "uffd-wp", "hap", "shadow"])
def machine(request):
    """Every way in which a vCPU finds its memory."""
    if request.param in ("kvm", "uffd-wp"):
        request.getfixturevalue("kvm_support")
        tracker = "kvm-bitmap" if request.param == "kvm" else request.param
        return lambda config: KvmVm(config, tracker=tracker)
    return lambda config: Domain(config, paging_mode=request.param)


@pytest.mark.parametrize("accel", ["soft"])
@pytest.mark.parametrize(
    ("workload", "cpus"), sample([("kv", 1), ("dma", 1), ("smp", 2)], "two vCPUs wait as one does", quick=[("smp", 2)])
)
def test_only_what_is_touched_is_read_while_the_rest_waits(saved, restored, machine, workload, cpus):
    path, original = saved(workload, cpus=cpus, working_set_bytes=8 * MiB, memory_bytes=64 * MiB)
    vm, lazy = restored(path, machine)
    pages = lazy.missing_pages
    assert slots(vm) == slots(original)
    vm.resume()
    assert runs_on(vm)
    assert 0 < lazy.missing_pages < pages
    assert not lazy.done
    lazy.read_ahead()
    until(lambda: lazy.done, "end of the restore")
    assert runs_on(vm)
    report = Save(vm, path, XenPolicy(), on_event=lambda _: None).run()  # it is a guest like any other
    assert report.verified
    assert runs_on(vm)


@pytest.mark.parametrize("accel", ["soft"])
def test_a_guest_that_does_not_run_gets_all_of_its_memory(saved, restored, machine):
    path, original = saved("hotset")
    vm, lazy = restored(path, machine)
    lazy.read_ahead()
    expect_all_there(vm, lazy, original)
    vm.resume()
    assert runs_on(vm)


@pytest.mark.parametrize("accel", ["soft"])
def test_code_that_is_not_a_vcpu_finds_what_it_touches(saved, restored, machine):
    """Reads, writes of a part of a page, copies and views; also of pages that have no content."""
    path, original = saved("idle")
    populated = expand_runs(*original.memory.populated()).tolist()
    first, last = gpa_of(populated[0]), gpa_of(populated[-1])
    vm, lazy = restored(path, machine)
    memory, size = vm.memory, original.memory.size_bytes
    assert memory.read(first, 4096) == original.memory.read(first, 4096)
    memory.write(last + 1, b"x")
    whole = original.memory.read(last, 4096)
    assert memory.read(last, 4096) == whole[:1] + b"x" + whole[2:]
    assert not any(memory.read(size - 8192, 4096))
    memory.copy_within(first, size - 4096, 4096)
    assert bytes(memory.page_views(np.array([(size >> 12) - 1], np.uint64))[0]) == original.memory.read(first, 4096)
    assert lazy.missing_pages > 0 or len(populated) < 3
    lazy.read_ahead()
    until(lambda: lazy.done, "end of the restore")
    assert memory.read(last, 4096) == whole[:1] + b"x" + whole[2:]


@pytest.mark.parametrize("accel", ["soft"])
def test_many_who_touch_the_same_pages_at_once_all_find_them(saved, restored, machine):
    path, original = saved("kv")
    vm, lazy = restored(path, machine, restore=in_small_pieces)
    lazy.read_ahead()
    gfns = expand_runs(*original.memory.populated())
    wrong = []

    def look(seed):
        order = np.random.default_rng(seed).permutation(gfns).tolist()
        read, expected = vm.memory.read, original.memory.read
        wrong.extend(gfn for gfn in order if read(gpa_of(gfn), 4096) != expected(gpa_of(gfn), 4096))

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    expect_all_there(vm, lazy, original)


class Disk:
    """Reads of files fail while it is broken."""

    def __init__(self, monkeypatch):
        self.broken = False
        self._preadv = os.preadv
        monkeypatch.setattr(os, "preadv", self._read)

    def _read(self, fd, views, offset):
        if self.broken:
            raise OSError(5, "Input/output error")
        return self._preadv(fd, views, offset)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def stopped(saved, restored, machine, disk):
    """A guest that stands still for a page that cannot be read, and what tells of the next such page."""
    path, _ = saved("kv")
    told = threading.Event()

    def failed(error):
        assert f"cannot read {path} at byte" in str(error)
        told.set()
        vm.pause()

    vm, lazy = restored(path, machine, failed)
    disk.broken = True
    vm.resume()
    assert told.wait(GIVE_UP_S)
    until(lambda: vm.status is VmStatus.PAUSED, "pause")
    return vm, lazy, told


@pytest.mark.parametrize("accel", ["soft"])
def test_a_page_that_cannot_be_read_stops_the_guest_until_it_can(stopped, disk):
    vm, lazy, told = stopped
    assert lazy.failure is not None
    told.clear()
    vm.resume()
    lazy.retry()
    assert told.wait(GIVE_UP_S)  # in vain
    until(lambda: vm.status is VmStatus.PAUSED, "pause")
    disk.broken = False
    vm.resume()
    lazy.retry()
    assert runs_on(vm)
    lazy.read_ahead()
    until(lambda: lazy.done, "end of the restore")
    assert runs_on(vm)


@pytest.mark.parametrize("accel", ["soft"])
def test_a_restore_that_is_given_up_leaves_no_thread_waiting_for_a_page(stopped):
    vm, lazy, _ = stopped
    lazy.read_ahead()
    lazy.close()
    lazy.close()
    with pytest.raises(VmError, match="the guest was given up before all its pages had come"):
        lazy._pager.fetch(vm.memory.all_ram().gfns())
    assert "uffd-handler" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("accel", ["soft"])
def test_the_process_tells_of_it_and_goes_on_when_told(saved, tmp_path, disk):
    path, _ = saved("kv")
    messages = []
    machines = choose_machines(Accel.SOFT)
    process = GuestProcess(machines, tmp_path / "control", on_console=lambda _: None, on_message=messages.append)
    try:
        process.restore_lazily(SavedGuest(path))
        disk.broken = True
        process.start()
        with QmpClient(tmp_path / "control") as client:
            until(lambda: client.execute("query-status")["status"] == "io-error", "io-error")
            (message,) = until(lambda: messages, "message")
            assert message.endswith("Input/output error; the guest is paused: put it right, then pageferry resume")
            state = client.execute("x-query-guest")
            assert state["work"] == []
            assert state["unread_pages"] > 0
            with pytest.raises(QmpError, match="still being read from its file"):
                client.execute("migrate", uri=f"file:{tmp_path}/other")
            disk.broken = False
            client.execute("cont")
            until(lambda: client.execute("query-status")["status"] == "running", "running")
            until(lambda: client.execute("x-query-guest")["unread_pages"] == 0, "end of the restore")
            before = client.execute("x-query-guest")["work"]
            until(lambda: client.execute("x-query-guest")["work"] > before, "work")
    finally:
        process.close()


@pytest.mark.parametrize("accel", ["soft"])
def test_a_guest_that_is_resumed_before_its_failure_has_paused_it_runs_on(saved, tmp_path, disk):
    path, _ = saved("kv")
    told, may_go_on = threading.Event(), threading.Event()

    def on_message(_):
        told.set()
        may_go_on.wait(60)

    process = GuestProcess(
        choose_machines(Accel.SOFT), tmp_path / "control", on_console=lambda _: None, on_message=on_message
    )
    try:
        process.restore_lazily(SavedGuest(path))
        disk.broken = True
        process.start()
        assert told.wait(60)  # and the pause comes only after that
        disk.broken = False
        with QmpClient(tmp_path / "control") as client:
            resumption = threading.Thread(target=client.execute, args=("cont",))
            resumption.start()
            resumption.join(0.2)
            may_go_on.set()
            resumption.join()
            until(lambda: client.execute("x-query-guest")["unread_pages"] == 0, "end of the restore")
            before = client.execute("x-query-guest")["work"]
            until(lambda: client.execute("x-query-guest")["work"] > before, "work")
    finally:
        may_go_on.set()
        process.close()


@pytest.mark.parametrize("accel", ["soft"])
def test_a_process_that_ends_in_the_middle_of_it_ends(saved, tmp_path, disk):
    path, _ = saved("kv")
    process = GuestProcess(choose_machines(Accel.SOFT), None, on_console=lambda _: None, on_message=lambda _: None)
    process.restore_lazily(SavedGuest(path))
    disk.broken = True
    process.start()
    until(lambda: process.run_state() == "io-error", "io-error")
    process.close()


@pytest.mark.parametrize("accel", ["soft"])
def test_what_cannot_wait_for_pages_is_refused_with_a_hint(saved, restored, monkeypatch, kvm_support):
    path, _ = saved("idle")

    def none(*_):
        raise UnsupportedError("userfaultfd", "this kernel has no userfaultfd", hint="something about trackers")

    monkeypatch.setattr(UffdFd, "__init__", none)
    with pytest.raises(UnsupportedError, match="no userfaultfd") as refused:
        restored(path, KvmVm)
    assert "no --lazy" in refused.value.hint


@pytest.mark.parametrize("accel", ["soft"])
def test_a_pool_of_huge_pages_is_refused(saved, restored, hugetlb_pool, kvm_support):
    path, _ = saved("idle", memory_bytes=8 * MiB, working_set_bytes=MiB)
    with pytest.raises(UnsupportedError, match="hugetlb pool cannot come one by one"):
        restored(path, lambda config: KvmVm(config, huge_pages=HugePages.HUGETLB))


@pytest.mark.parametrize("accel", ["soft"])
def test_a_state_that_does_not_fit_leaves_nothing(saved, machine):
    path, _ = saved("idle")
    made = []

    def refuse(state):
        raise VmError("no such device")

    def break_it(vm):
        made.append(vm)
        alter(vm, "load_state", lambda _: refuse)

    with pytest.raises(VmError, match="no such device"):
        restore_lazily(SavedGuest(path), injected(machine, break_it), on_failure=lambda _: None)
    with pytest.raises(VmError):
        made[0].resume()
    assert "uffd-handler" not in {thread.name for thread in threading.enumerate()}
