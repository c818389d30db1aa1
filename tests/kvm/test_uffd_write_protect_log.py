"""What is particular to our own fault handler; the promises are the conformance kit's."""

import os
import re
import threading
from functools import partial

import pytest
from altered import alter

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import LogDirtyError, UffdError, UnsupportedError
from pageferry.core.frames import PAGE_SIZE
from pageferry.kvm.trackers import find_tracker
from pageferry.uffd import fds, handler
from pageferry.uffd.write_protect_log import WriteProtectLog

PATIENCE_S = 30

pytestmark = pytest.mark.kvm


@pytest.fixture
def log(make_uffd_log):
    return make_uffd_log(WriteProtectLog)


@pytest.fixture
def writers(log, by_vcpu):
    """Starts threads that each write one page and returns them; they have ended when the test ends."""
    started = []

    def start(*gfns):
        threads = [threading.Thread(target=by_vcpu, args=(log, gfn), daemon=True) for gfn in gfns]
        for thread in threads:
            thread.start()
        started.extend(threads)
        return threads

    yield start
    log.off()
    join(started)


def join(threads):
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for a page for ever"


def until_waiting(log, count):
    """Wait until so many faults wait, heard of or not."""
    pause = threading.Event()
    for _ in range(PATIENCE_S * 1000):
        with open(f"/proc/self/fdinfo/{log._uffd.fileno()}") as file:
            if int(re.search(r"total:\s*(\d+)", file.read())[1]) == count:
                return
        pause.wait(0.001)
    raise AssertionError(f"{count} faults never come")


def faults(log):
    return log.stats().fault_count


def test_faults_that_wait_are_resolved_together_and_runs_at_once(log, writers):
    log.enable()
    batches, granted, heard = [], [], threading.Event()
    resolve, unprotect = log._resolve, log._uffd.unprotect

    def note_batch(uffd, read):
        batches.append(read.size)
        heard.set()
        resolve(uffd, read)

    def note_grant(hva, size_bytes):
        granted.append(size_bytes // PAGE_SIZE)
        unprotect(hva, size_bytes)

    alter(log, "_resolve", lambda _: note_batch)
    alter(log._uffd, "unprotect", lambda _: note_grant)
    with log._step:  # the handler hears of the first, and of the others only when it may go on
        first = writers(100)
        assert heard.wait(PATIENCE_S)
        rest = writers(7, 5, 6, 900, 8)
        until_waiting(log, 6)
    join(first + rest)
    assert batches == [1, 5]
    assert granted == [1, 4, 1]
    assert log.clean().gfns().tolist() == [5, 6, 7, 8, 100, 900]


def test_two_vcpus_on_one_page_are_one_fault(log, writers):
    log.enable()
    for cycle in range(3):
        with log._step:
            both = writers(50, 50)
            until_waiting(log, 2)
        join(both)
        join(writers(50))  # it is writable now
        assert faults(log) == cycle + 1
        assert log.clean().gfns().tolist() == [50]
        assert not log.peek().any()


def test_two_messages_of_one_batch_are_one_fault(log, by_vcpu, monkeypatch):
    log.enable()
    read = fds.UffdFd.read_faults
    monkeypatch.setattr(fds.UffdFd, "read_faults", lambda uffd: read(uffd).repeat(2))
    by_vcpu(log, 3, 4)
    assert faults(log) == 2


def test_the_count_starts_afresh_with_each_enable_and_marks_are_not_faults(log, by_vcpu):
    log.enable()
    by_vcpu(log, 1, 2)
    log._view.memory.write(2 * PAGE_SIZE, b"host")
    log._view.memory.write(3 * PAGE_SIZE, b"host")
    assert faults(log) == 2
    by_vcpu(log, 3)
    assert faults(log) == 3
    log.off()
    log.enable()
    assert faults(log) == 0


def test_a_fault_that_meets_a_clean_is_resolved_after_it_and_reported_by_the_next(log, by_vcpu, writers):
    log.enable()
    by_vcpu(log, 10)
    protect, late = log._uffd.protect, []

    def protect_and_write(hva, size_bytes):
        protect(hva, size_bytes)
        if not late:
            late.extend(writers(10, 11))
            until_waiting(log, 2)

    alter(log._uffd, "protect", lambda _: protect_and_write)
    assert log.clean().gfns().tolist() == [10]
    join(late)
    assert log.clean().gfns().tolist() == [10, 11]


def test_the_handler_gets_its_turn_between_two_spans_of_a_clean(log, by_vcpu, writers):
    log.enable()
    by_vcpu(log, 10, 1500)
    seen = []

    def note(protect):
        def protect_and_note(hva, size_bytes):
            if not seen:
                seen.extend(writers(500))
            protect(hva, size_bytes)

        return protect_and_note

    class AsksBetweenSpans(DirtyBitmap):
        def words_of(self, gfns):
            join(seen)  # would wait for ever, had CLEAN kept the lock
            return super().words_of(gfns)

    def take_into_it(take):
        def taking(part, taken):
            bitmap = AsksBetweenSpans(taken.nbits)
            take(part, bitmap)
            taken |= bitmap

        return taking

    alter(log._uffd, "protect", note)
    alter(log, "_take", take_into_it)
    cleaned = log.clean()
    assert (cleaned | log.clean()).gfns().tolist() == [10, 500, 1500]


def test_a_clean_that_fails_half_way_loses_no_bit(log, by_vcpu, monkeypatch):
    log.enable()
    protect, calls = log._uffd.protect, []

    def refuse(hva, size_bytes):
        protect(hva, size_bytes)
        calls.append(hva)
        if len(calls) == 2:
            raise UffdError("UFFDIO_WRITEPROTECT", 12)

    by_vcpu(log, 10, 800, 1600)
    with monkeypatch.context() as patch:
        patch.setattr(log._uffd, "protect", refuse)
        with pytest.raises(UffdError, match="ENOMEM"):
            log.clean()
    assert log.peek().gfns().tolist() == [10, 800, 1600]
    by_vcpu(log, 10, 800, 1600)
    assert log.clean().gfns().tolist() == [10, 800, 1600]
    by_vcpu(log, 10, 800, 1600)
    assert log.clean().gfns().tolist() == [10, 800, 1600]


def test_off_wakes_waiting_threads_even_while_another_process_holds_the_descriptor(log, writers):
    alter(log, "_resolve", lambda _: lambda uffd, read: None)
    log.enable()
    threads = writers(5, 6, 2000)
    until_waiting(log, 3)
    copy = os.dup(log._uffd.fileno())  # as a forked child would
    try:
        log.off()
        join(threads)
        join(writers(7))
    finally:
        os.close(copy)


def test_a_handler_that_fails_lets_the_guest_run_on_and_the_migration_fail(log, writers, caplog, monkeypatch):
    def fail(uffd, read):
        raise UffdError("UFFDIO_WRITEPROTECT", 12)

    log.enable()
    join(writers(4))
    with monkeypatch.context() as patch:
        patch.setattr(log, "_resolve", fail)
        join(writers(5, 6))
    join(writers(7))
    for refused in (log.peek, log.clean, log.stats, partial(log.clean_range, range(64))):
        with pytest.raises(LogDirtyError, match="fault handler failed"):
            refused()
    assert "the fault handler failed" in caplog.text
    log.off()
    log.enable()
    join(writers(5))
    assert log.clean().gfns().tolist() == [5]


def test_an_enable_without_a_descriptor_for_the_handler_is_off(log, monkeypatch, open_descriptors, by_vcpu):
    def refuse(*arguments):
        raise OSError(24, "no")

    before = open_descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(handler.os, "eventfd", refuse)
        with pytest.raises(UffdError, match="eventfd: EMFILE"):
            log.enable()
    assert not log.enabled
    assert open_descriptors() == before
    by_vcpu(log, 1)


def test_the_handlers_thread_ends_with_off_and_with_close(log):
    def handlers():
        return [thread for thread in threading.enumerate() if thread.name == "uffd-handler"]

    for end in (log.off, log.close):
        log.enable()
        assert len(handlers()) == 1
        end()
        assert handlers() == []


def test_a_pause_is_not_held_up_by_faults_that_wait(kvm, log):
    """The handler does nothing until a vCPU is kicked; then the pause must end, by the kick or by the handler."""
    states = tuple(kvm.start_state(rdi=0x20_0000 + n * 0x10_0000, rsi=200) for n in range(2))
    vm = kvm.guest("stamp", memory_bytes=8 << 20, tracker="uffd-wp", vcpus=states)
    kicked = threading.Event()
    for vcpu in vm.vcpus:
        alter(vcpu, "kick", lambda kick: lambda: (kicked.set(), kick()))
    alter(vm.log_dirty, "_resolve", lambda resolve: lambda uffd, read: (kicked.wait(), resolve(uffd, read)))
    vm.log_dirty.enable()
    for _ in range(3):
        kicked.clear()
        vm.resume()
        until_waiting(vm.log_dirty, 2)
        vm.pause()
        assert not any(vm.run_control._inside)
    kicked.set()
    vm.resume()
    kvm.wait_for(vm, lambda: vm.log_dirty.peek().count() >= 400)


def test_a_machine_with_a_running_guest_is_closed_while_faults_come(kvm, log):
    vm = kvm.guest("stamp", memory_bytes=8 << 20, tracker="uffd-wp", rdi=0x20_0000, rsi=64)
    vm.log_dirty.enable()
    vm.resume()
    for _ in range(20):
        vm.log_dirty.clean()
    vm.close()
    assert not vm.log_dirty.enabled


def test_the_tracker_is_refused_where_userfaultfd_is(monkeypatch):
    monkeypatch.setattr(fds, "_WP_FEATURES", 1 << 60)
    monkeypatch.setitem(fds.uapi.FEATURE_NAMES, 1 << 60, "UFFD_FEATURE_OF_TOMORROW")
    with pytest.raises(UnsupportedError, match="UFFD_FEATURE_OF_TOMORROW"):
        find_tracker("uffd-wp").prepare(None)
