"""A guest changes hands on one host: its memory goes by descriptor, and no page is copied."""

import contextlib
import itertools
import os
import socket
from functools import partial

import pytest
from at_work import runs_on, until, work
from descriptors import open_descriptors
from trips import Running, source_of

from pageferry.core.errors import GuestAt, MigrationError, VmError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.hostmem import MemFd
from pageferry.core.hugepages import HugePages
from pageferry.core.policies import XenPolicy
from pageferry.core.vm import VmConfig, VmStatus
from pageferry.engine.wire.channel import Channel, Endpoint
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.workloads import load_workload
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.vm import KvmVm

pytestmark = pytest.mark.kvm


in_a_file = partial(KvmVm, huge_pages=HugePages.OFF)


@pytest.fixture
def stack():
    with contextlib.ExitStack() as made:
        yield made


@pytest.fixture
def guest(kvm_support, stack):
    def make(workload="kv", make_vm=in_a_file, **params):
        vm = make_vm(VmConfig(memory_bytes=32 << 20))
        stack.callback(vm.close)
        boot(vm, load_workload(workload), params=GuestParams(**{"working_set_bytes": 4 << 20, **params}))
        vm.resume()
        assert runs_on(vm)
        return vm

    return make


@pytest.fixture
def inn(inns, tmp_path):
    """Opens destinations at Unix sockets, each for one guest."""
    numbers = itertools.count()

    def make(make_vm=KvmVm, accel="kvm"):
        there = inns(make_vm, Endpoint(path=str(tmp_path / f"{next(numbers)}.sock")))
        there.open()
        return there

    return make


def move(vm, inn, **options):
    return source_of(vm, inn.endpoint, XenPolicy(), **options)


@pytest.mark.parametrize("tracker", ["kvm-bitmap", "kvm-ring", "pagemap-scan"])
def test_no_page_is_copied_and_the_guest_runs_on(guest, inn, tracker):
    vm = guest(make_vm=partial(in_a_file, tracker=tracker))
    there = inn()
    report = move(vm, there).run()
    arrived = there.outcome()
    assert isinstance(arrived, KvmVm), arrived
    assert (report.status, report.guest_at) == ("completed", GuestAt.DESTINATION)
    assert (report.shared_memory, report.verified) == (True, True)
    assert report.rounds == ()
    assert report.sent_bytes < 64 << 10
    assert os.fstat(vm.memory.storage.fd).st_ino == os.fstat(arrived.memory.storage.fd).st_ino
    assert runs_on(arrived)
    vm.close()  # the source's process ends
    assert runs_on(arrived)
    assert arrived.memory.populated()[0].size


def test_a_guest_goes_on_from_hand_to_hand_and_is_then_copied(guest, inn):
    vm = guest()
    for _ in range(3):
        there = inn()
        move(vm, there).run()
        old, vm = vm, there.outcome()
        assert isinstance(vm, KvmVm), vm
        old.close()
        assert runs_on(vm)
    soft = inn(Domain, "soft")
    report = move(vm, soft).run()
    assert (report.shared_memory, report.verified) == (False, True)
    assert runs_on(soft.outcome())


def test_private_memory_is_copied_and_that_is_said(guest, inn):
    vm, there = guest(make_vm=partial(KvmVm, huge_pages=HugePages.ANONYMOUS)), inn()
    report = move(vm, there).run()
    assert (report.shared_memory, report.verified) == (False, True)
    assert report.warnings == ("the guest's memory is private and is copied: --hugepages thp or off hands it over",)
    assert runs_on(there.outcome())


def test_a_paused_guest_stays_paused(guest, inn):
    vm = guest()
    vm.pause()
    before, there = work(vm), inn()
    assert move(vm, there).run().shared_memory
    assert there.outcome().status is VmStatus.PAUSED
    assert work(there.outcome()) == before


def test_a_failure_before_the_commit_leaves_the_guest_and_its_memory(guest, inn):
    def failing(config):
        vm = KvmVm(config)

        def load_state(state):
            raise VmError("no such state here")

        vm.load_state = load_state
        return vm

    vm = guest()
    there = inn(failing)
    source = move(vm, there)
    with pytest.raises(MigrationError, match="no such state here"):
        source.run()
    assert isinstance(there.outcome(), MigrationError)
    assert source.job.report.guest_at is GuestAt.SOURCE
    assert runs_on(vm)
    assert there.made[0].memory.storage is not None


@pytest.mark.parametrize(("first", "second"), [("soft", "kvm"), ("kvm", "soft")])
def test_machines_that_cannot_share_copy(guest, inn, first, second):
    kinds = {"kvm": KvmVm, "soft": Domain}
    vm = guest(make_vm=kinds[first])
    there = inn(kinds[second], second)
    report = move(vm, there).run()
    assert isinstance(there.outcome(), kinds[second]), there.outcome()
    assert (report.shared_memory, report.verified) == (False, True)
    assert report.rounds
    assert runs_on(there.outcome())


def test_one_that_is_held_waits_and_can_be_cancelled(guest, inn):
    vm, there = guest(), inn()
    source = move(vm, there, hold=True)
    moving = Running(source)
    moving.status("pre-switchover")
    assert runs_on(vm)
    source.job.cancel()
    assert moving.end().status == "cancelled"
    assert runs_on(vm)


def test_one_that_is_held_does_not_fall_silent(guest, inn):
    vm, there = guest(), inn()
    source = move(vm, there, hold=True)
    moving = Running(source)
    moving.status("pre-switchover")
    heard = len(there.said)
    until(lambda: len(there.said) > heard, "an answer of the destination's, which is asked now and then")
    source.job.go_on()
    assert moving.end().status == "completed"
    assert runs_on(there.outcome())


@pytest.mark.parametrize("size", [0, 4096, 64 << 20])
def test_a_file_of_another_size_is_not_taken_over(size):
    made = MemFd("x", size or PAGE_SIZE)
    with pytest.raises(VmError, match="not a file of the guest's size"):
        MemFd.adopt(os.dup(made.fd), 32 << 20)


def test_a_file_that_can_shrink_is_not_taken_over(tmp_path):
    plain = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(plain, 32 << 20)
    unsealed = os.memfd_create("x")
    os.ftruncate(unsealed, 32 << 20)
    reader, writer = os.pipe()
    for fd in (plain, unsealed, reader):
        with pytest.raises(VmError, match="stays so"):
            MemFd.adopt(fd, 32 << 20)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
    os.close(writer)


def test_what_is_handed_over_and_not_taken_is_closed():
    before = open_descriptors()
    left, right = (Channel(sock) for sock in socket.socketpair())
    made = MemFd("x", PAGE_SIZE)
    left.send([b"hello"], made.fd)
    assert right.receive_some(5) == b"hello"
    left.send([b"again"], made.fd)
    assert right.receive_some(5) == b"again"
    fd = right.take_fd()
    assert os.fstat(fd).st_size == PAGE_SIZE
    os.close(fd)
    for channel in (left, right):
        channel.close()
    made.close()
    assert open_descriptors() == before
