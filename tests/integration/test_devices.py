"""Which end owns a guest's disk, after every outcome of a migration or save; and devices that a destination lacks."""

import threading
from dataclasses import replace

import pytest
from altered import ShortLeased
from at_work import runs_on, until
from descriptors import open_descriptors
from proxy import marker
from trips import Rounds, expect_as_before, out_of_lease, source_of

from pageferry.backends.disk import DiskFile
from pageferry.core.device_spec import DeviceKind, DeviceSpec
from pageferry.core.errors import GuestAt, MigrationError, PeerError, RefusedError, UnsupportedError, VmError
from pageferry.core.policies import PostcopyPolicy
from pageferry.core.threads import OutOfThreadsError
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.devices.standard_machine import StandardMachine
from pageferry.devices.virtio.devices import VirtioDevices
from pageferry.engine.image.restore import restore
from pageferry.engine.image.save import Save
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.stream.ferry_frames import FrameType

DISK_BYTES = 1 << 20


@pytest.fixture
def disk(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(DISK_BYTES))
    return DeviceSpec(kind=DeviceKind.DISK, backend=str(path))


@pytest.fixture
def vm(running, disk):
    return running("kv", machine=MachineModel.PC, devices=(disk, DeviceSpec(kind=DeviceKind.RNG)))


def is_free(disk):
    """Whether the disk's lock is free."""
    probe = DiskFile(disk.backend, readonly=False)
    try:
        probe.claim()
    except VmError:
        return False
    finally:
        probe.close()
    return True


def holds(vm):
    """Whether this machine may use its disk: a claim that has it already does nothing."""
    (_, port), *_ = vm.virtio._disks
    return port.disk._claimed


def test_a_disk_goes_with_its_guest_there_and_back(vm, inn, disk):
    for _ in range(2):
        assert not is_free(disk)
        assert source_of(vm, inn.open()).run().verified
        there = inn.outcome()
        assert (holds(vm), holds(there)) == (False, True)
        assert there.config.devices == vm.config.devices
        assert there.config.devices[0].size_bytes == DISK_BYTES
        assert not is_free(disk)
        assert runs_on(there)
        vm = there


def test_a_disk_goes_with_a_guest_some_of_whose_pages_follow(vm, inn, disk):
    policy = PostcopyPolicy(limit_s=1e-6, max_rounds=1)
    assert source_of(vm, inn.open(), policy).run().status == "completed"
    there = inn.outcome()
    assert (holds(vm), holds(there)) == (False, True)
    assert runs_on(there)


@pytest.mark.parametrize("frame", [FrameType.DESTINATION_HELLO, FrameType.READY], ids=lambda frame: frame.name)
def test_a_migration_that_fails_before_the_commit_leaves_the_disk_here(vm, inn, wires, disk, frame):
    wire = wires(inn.open(), hold_at=marker(frame))
    source = source_of(vm, wire.uri)
    with wire.cut_when_held(), pytest.raises(MigrationError):
        source.run()
    wire.release()
    assert isinstance(inn.outcome(), MigrationError)
    assert holds(vm)
    assert not is_free(disk)
    expect_as_before(vm, inn, source)


def test_a_destination_that_cannot_take_the_disk_gives_the_guest_back(vm, inn, disk):
    make_vm = inn.make_vm

    def without_disk(config):
        made = make_vm(config)

        def claim():
            raise VmError("disk0 is in use by another process")

        made.claim_backends = claim
        return made

    inn.make_vm = without_disk
    source = source_of(vm, inn.open())
    with pytest.raises(PeerError, match="disk0 is in use") as caught:
        source.run()
    assert caught.value.guest_at is GuestAt.SOURCE
    assert isinstance(inn.outcome(), MigrationError)
    assert holds(vm)
    inn.make_vm = make_vm
    expect_as_before(vm, inn, source)


def test_a_guest_whose_disk_does_not_answer_at_the_pause_runs_on_here(vm, inn):
    finish = vm.virtio.finish

    def does_not_answer(patience_s):
        raise VmError("disk0 has not ended a request of the guest")

    source = source_of(vm, inn.open())
    vm.virtio.finish = does_not_answer
    with pytest.raises(MigrationError, match="disk0 has not ended") as caught:
        source.run()
    assert caught.value.guest_at is GuestAt.SOURCE
    assert isinstance(inn.outcome(), MigrationError)
    vm.virtio.finish = finish
    assert holds(vm)
    expect_as_before(vm, inn, source)


def test_a_guest_whose_disk_was_taken_meanwhile_stands_still_and_says_why(vm, inn, disk):
    thief = DiskFile(disk.backend, readonly=False)
    release = vm.release_backends

    def release_to_a_thief():
        release()
        thief.claim()

    vm.release_backends = release_to_a_thief
    source = source_of(vm, inn.open())
    with pytest.raises(PeerError, match="in use") as caught:
        source.run()
    assert caught.value.guest_at is GuestAt.SOURCE
    assert source.job.frozen
    assert any("stands still" in warning for warning in source.job.report.warnings)
    with pytest.raises(RefusedError, match="in use"):
        source.job.go_on_here()
    assert vm.run_control.held
    thief.close()
    source.job.go_on_here()
    source.job.go_on_here()
    assert holds(vm)
    assert runs_on(vm)
    del vm.release_backends
    inn.outcome()
    expect_as_before(vm, inn, source)


def test_a_lock_knows_better_than_who_takes_a_guest_back(vm, inn, wires, disk):
    wire = wires(inn.open(), hold_at=marker(FrameType.RUNNING))
    source = source_of(vm, wire.uri, kind=ShortLeased)
    with wire.cut_when_held(), pytest.raises(MigrationError) as caught:
        source.run()
    wire.release()
    out_of_lease(source)
    assert caught.value.guest_at is GuestAt.UNKNOWN
    there = inn.outcome()
    assert runs_on(there)
    with pytest.raises(RefusedError, match="in use"):
        source.job.take_back()
    assert source.job.guest_at is GuestAt.UNKNOWN
    assert runs_on(there)
    there.close()
    source.job.take_back()
    assert holds(vm)
    assert runs_on(vm)


def changed(inn, **changes):
    """Have the inn's machines made with the first device changed."""
    make_vm = inn.make_vm

    def make(config):
        first, *others = config.devices
        return make_vm(replace(config, devices=(replace(first, **changes), *others)))

    inn.make_vm = make
    return make_vm


@pytest.mark.parametrize("what", ["missing", "other", "unknown"])
def test_a_device_that_a_destination_lacks_is_refused_by_name_before_the_first_page(vm, inn, tmp_path, what):
    other = tmp_path / "other.img"
    if what == "other":
        other.write_bytes(bytes(512))
    make_vm = changed(inn, **({"kind": "gpu"} if what == "unknown" else {"backend": str(other)}))
    words = {"missing": "other.img", "other": "disk0 of the guest has", "unknown": "there is no device 'gpu' here"}
    source = source_of(vm, inn.open())
    with pytest.raises(PeerError, match=words[what]) as caught:
        source.run()
    assert caught.value.phase == "hello"
    assert isinstance(inn.outcome(), MigrationError)
    inn.make_vm = make_vm
    expect_as_before(vm, inn, source)


def test_a_guest_that_is_saved_and_stopped_leaves_its_disk_to_who_restores_it(vm, make_vm, tmp_path, disk):
    path = tmp_path / "guest.bin"
    job = Save(vm, path, Rounds(1), stop=True, on_event=lambda event: None)
    report = job.run()
    assert report.verified_pages
    assert not any("disk0" in warning for warning in report.warnings)
    assert not holds(vm)
    with SavedGuest(path) as saved:
        assert saved.config.devices == vm.config.devices
        restored = restore(saved, make_vm)
    restored.resume()
    assert not is_free(disk)
    assert runs_on(restored)
    with pytest.raises(VmError, match="in use"):
        job.job.take_back()
    restored.close()
    job.job.take_back()
    assert runs_on(vm)


def test_a_guest_that_runs_on_after_a_save_keeps_its_disk(vm, make_vm, tmp_path, disk):
    path = tmp_path / "guest.bin"
    save = Save(vm, path, Rounds(1), on_event=lambda event: None)
    assert any("disk0 will change" in warning for warning in save.run().warnings)
    assert holds(vm)
    with SavedGuest(path) as saved:
        restored = restore(saved, make_vm)
    with pytest.raises(VmError, match="in use"):
        restored.resume()
    restored.close()
    assert runs_on(vm)


def test_a_plain_machine_has_no_devices(make_vm, disk):
    before = open_descriptors()
    with pytest.raises(UnsupportedError, match="no virtio devices") as refused:
        make_vm(VmConfig(memory_bytes=32 << 20, devices=(disk,)))
    assert refused.tb  # which holds what was made
    assert open_descriptors() == before


def test_a_machine_that_cannot_be_finished_closes_what_stands_behind_its_devices(make_vm, disk, monkeypatch):
    def fail(machine, vcpus, log_dirty):
        raise OutOfThreadsError

    monkeypatch.setattr(StandardMachine, "_attach", fail)
    closed = []
    monkeypatch.setattr(VirtioDevices, "close", lambda devices: closed.append(devices))
    with pytest.raises(OutOfThreadsError):
        make_vm(VmConfig(memory_bytes=32 << 20, machine=MachineModel.PC, devices=(disk,)))
    (devices,) = closed
    monkeypatch.undo()
    devices.close()


def test_a_run_names_disks_and_networks_and_a_plain_machine_has_none(here, disk):
    refused = here("run", "kv", "--disk", disk.backend)
    assert refused.returncode == 2
    assert "--machine pc" in refused.stderr
    missing = here("run", "kv", "--machine", "pc", "--accel", "soft", "--disk", "/nowhere/disk")
    assert missing.returncode == 2
    assert "/nowhere/disk" in missing.stderr


@pytest.mark.parametrize("stop", ["freeze", "pause"])
def test_a_guest_stands_still_only_when_its_devices_do(vm, stop):
    entered, finish, stopped = threading.Event(), threading.Event(), threading.Event()

    def be_a_device():
        with vm.platform.bus.locked():
            entered.set()
            finish.wait()
            assert not stopped.is_set()

    def hold():
        getattr(vm, stop)()
        stopped.set()

    device, holder = threading.Thread(target=be_a_device), threading.Thread(target=hold)
    device.start()
    entered.wait()
    holder.start()
    until(lambda: vm.run_control.held, "stop")
    assert not stopped.wait(0.05)
    finish.set()
    device.join()
    holder.join()
    assert stopped.is_set()
