"""A guest changes hands on one host: its memory goes by descriptor, and no page is copied."""

import contextlib
import os
import socket
import threading

import pytest

from pageferry.core.errors import GuestAt, MigrationError, VmError
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.hostmem import MemFd
from pageferry.core.policies import XenPolicy
from pageferry.core.vm import VmConfig, VmStatus
from pageferry.engine.destination import Destination
from pageferry.engine.source import Source
from pageferry.engine.transport import Channel, Endpoint
from pageferry.guests.abi import read_status
from pageferry.guests.boot import GuestParams, boot
from pageferry.guests.workloads import load_workload
from pageferry.hypervisor.domain import Domain
from pageferry.kvm import KvmVm

pytestmark = pytest.mark.kvm


def work(vm):
    return sum(slot.work for slot in read_status(vm.memory, vm.config.cpus))


def runs_on(vm):
    before, patience = work(vm), threading.Event()
    while work(vm) <= before:
        assert vm.end is None, vm.end
        patience.wait(0.001)
    return True


class Inn:
    """A destination at a Unix socket, for one guest."""

    def __init__(self, path, make_vm, accel):
        self.endpoint = Endpoint(path=str(path))
        self._make_vm = make_vm
        self.made = []
        self._accel = accel
        self._listener = self.endpoint.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self.guest = None

    def _make(self, config):
        self.made.append(self._make_vm(config))
        return self.made[-1]

    def _serve(self):
        try:
            self.guest = Destination(Channel(self._listener.accept()[0], 10), self._make, accel=self._accel).run()
        except MigrationError as error:
            self.guest = error

    def outcome(self):
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.guest

    def close(self):
        self._thread.join(60)
        self._listener.close()
        self.endpoint.remove()


@pytest.fixture
def stack():
    with contextlib.ExitStack() as made:
        yield made


@pytest.fixture
def guest(kvm_support, stack):
    def make(workload="kv", make_vm=KvmVm, **params):
        vm = make_vm(VmConfig(memory_bytes=32 << 20))
        stack.callback(vm.close)
        boot(vm, load_workload(workload), params=GuestParams(**{"working_set_bytes": 4 << 20, **params}))
        vm.resume()
        assert runs_on(vm)
        return vm

    return make


@pytest.fixture
def inn(tmp_path, stack):
    def make(make_vm=KvmVm, accel="kvm"):
        inn = Inn(tmp_path / "inn.sock", make_vm, accel)
        stack.callback(lambda: [vm.close() for vm in inn.made])
        stack.callback(inn.close)
        return inn

    return make


def move(vm, inn, **options):
    return Source(vm, inn.endpoint, XenPolicy(), timeout_s=10, **options)


@pytest.mark.parametrize("tracker", ["kvm-bitmap", "kvm-ring", "pagemap-scan"])
def test_no_page_is_copied_and_the_guest_runs_on(guest, inn, tracker):
    vm = guest(make_vm=lambda config: KvmVm(config, tracker=tracker))
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


def test_a_guest_goes_on_from_hand_to_hand_and_is_then_copied(guest, tmp_path, stack):
    vm = guest()
    for number in range(3):
        there = Inn(tmp_path / f"{number}.sock", KvmVm, "kvm")
        stack.callback(lambda there=there: [vm.close() for vm in there.made])
        move(vm, there).run()
        old, vm = vm, there.outcome()
        assert isinstance(vm, KvmVm), vm
        old.close()
        there.close()
        assert runs_on(vm)
    soft = Inn(tmp_path / "soft.sock", Domain, "soft")
    stack.callback(lambda: [vm.close() for vm in soft.made])
    report = move(vm, soft).run()
    assert (report.shared_memory, report.verified) == (False, True)
    assert runs_on(soft.outcome())
    soft.close()


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
    assert source.report.guest_at is GuestAt.SOURCE
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
    errors = []

    def run():
        with pytest.raises(MigrationError, match="cancelled"):
            source.run()
        errors.append(source.report.status)

    thread = threading.Thread(target=run)
    thread.start()
    patience = threading.Event()
    while source.status != "pre-switchover":
        patience.wait(0.001)
    assert runs_on(vm)
    source.cancel()
    thread.join(60)
    assert errors == ["cancelled"]
    assert runs_on(vm)


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
    def open_descriptors():
        return set(os.listdir("/proc/self/fd"))

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
