"""Law 6: whatever is lost around the commit, there are never two guests, and never none by our doing."""

import pytest
from altered import ShortLeased, alter
from at_work import runs_on, work
from proxy import marker
from trips import TIMEOUT_S, expect_as_before, out_of_lease, source_of

from pageferry.core.errors import GuestAt, MigrationError, PeerError, RefusedError, TransportError, VmError
from pageferry.core.vm import VmStatus
from pageferry.engine.wire.channel import Endpoint
from pageferry.engine.wire.connections import NeverRan
from pageferry.stream.ferry_frames import FrameType


@pytest.fixture
def accel(process_accel):
    """Who owns the guest is the engine's business, whatever machine runs it; and each lease is waited for."""
    return process_accel


def test_law_6_an_unanswered_commit_ends_unknown_and_paused(running, inn, wires):
    vm = running()
    wire = wires(inn.open(), hold_at=marker(FrameType.RUNNING))
    source = source_of(vm, wire.uri, kind=ShortLeased)
    with wire.cut_when_held(), pytest.raises(TransportError) as caught:
        source.run()
    assert caught.value.guest_at is source.job.report.guest_at is GuestAt.UNKNOWN
    there = inn.outcome()
    assert runs_on(there)  # it did arrive; only the answer was lost
    before = work(vm)
    vm.resume()
    assert work(vm) == before
    assert not source.job.cancel()
    there.close()
    out_of_lease(source)
    source.job.take_back()
    assert runs_on(vm)
    with pytest.raises(RefusedError, match="no guest to take back"):
        source.job.take_back()


def test_law_6_a_lost_commit_ends_unknown_and_the_destination_never_runs(running, inn, wires):
    vm = running()
    wire = wires(inn.open(), hold_at=marker(FrameType.COMMIT))
    source = source_of(vm, wire.uri, kind=ShortLeased)
    with wire.cut_when_held(), pytest.raises(TransportError) as caught:
        source.run()
    assert caught.value.guest_at is GuestAt.UNKNOWN
    out_of_lease(source)
    assert isinstance(inn.outcome(), MigrationError)
    source.job.take_back()
    assert not vm.log_dirty.enabled
    assert runs_on(vm)
    expect_as_before_next = source_of(vm, inn.open())
    assert expect_as_before_next.run().status == "completed"
    assert runs_on(inn.outcome())


def test_a_destination_that_fails_after_the_commit_gives_the_guest_back(running, inn):
    vm = running()

    def refuse(there, name):
        raise VmError("no room at the inn after all")

    source = source_of(vm, inn.open(before_run=refuse))
    with pytest.raises(PeerError, match="no room at the inn after all"):
        source.run()
    inn.outcome()
    expect_as_before(vm, inn, source)


class Detour:
    """Where a source connects: the first time by one way, later by another."""

    def __init__(self, first, later):
        self._ways = [first]
        self._later = later

    def __getattr__(self, name):
        return getattr(self._later, name)

    def connect(self, timeout_s, **options):
        return (self._ways.pop() if self._ways else self._later).connect(timeout_s, **options)


def test_a_guest_whose_answer_was_lost_has_moved_when_its_destination_is_asked(running, inn, wires):
    vm = running()
    inn.asked_within_s = TIMEOUT_S
    wire = wires(inn.open(), hold_at=marker(FrameType.RUNNING))
    source = source_of(vm, Detour(Endpoint.parse(wire.uri), inn.endpoint))
    with wire.cut_when_held():
        report = source.run()
    assert (report.status, report.guest_at) == ("completed", GuestAt.DESTINATION)
    assert runs_on(inn.outcome())
    with pytest.raises(RefusedError, match="no guest to take back"):
        source.job.take_back()


def test_a_guest_whose_commit_was_lost_is_here_when_its_destination_is_asked(running, inn, wires):
    vm = running()
    never_ran = NeverRan()
    wire = wires(inn.open(never_ran=never_ran), hold_at=marker(FrameType.COMMIT))
    source = source_of(vm, wire.uri, kind=ShortLeased)
    with wire.cut_when_held(), pytest.raises(TransportError):
        source.run()
    assert isinstance(inn.outcome(), MigrationError)
    assert source.job.guest_at is GuestAt.UNKNOWN
    inn.open(never_ran=never_ran)
    with pytest.raises(PeerError, match="never ran there"):
        source.find_out(inn.endpoint)
    assert source.job.report.guest_at is GuestAt.SOURCE
    inn.outcome()
    expect_as_before(vm, inn, source)


def test_a_guest_that_moved_is_found_out_by_who_asks_later(running, inn, wires):
    vm = running()
    inn.asked_within_s = TIMEOUT_S
    wire = wires(inn.open(), hold_at=marker(FrameType.RUNNING))
    source = source_of(vm, wire.uri, kind=ShortLeased)
    with wire.cut_when_held(), pytest.raises(TransportError):
        source.run()
    assert source.job.guest_at is GuestAt.UNKNOWN

    class Impatient:
        """Where a source connects, and where a person takes the guest back meanwhile."""

        def __getattr__(self, name):
            return getattr(inn.endpoint, name)

        def connect(self, timeout_s, **options):
            with pytest.raises(RefusedError, match="is being asked now"):
                source.job.take_back()
            return inn.endpoint.connect(timeout_s, **options)

    source.job.begun()
    report = source.find_out(Impatient())
    assert (report.status, report.guest_at) == ("completed", GuestAt.DESTINATION)
    assert runs_on(inn.outcome())


def test_a_commit_that_comes_after_its_lease_is_refused(running, inn, wires):
    """A network holds COMMIT up; the source waits no longer, and a person takes the guest back before it arrives."""
    vm = running()
    wire = wires(inn.open(), hold_at=marker(FrameType.COMMIT))
    source = source_of(vm, wire.uri, kind=ShortLeased, timeout_s=3.0)
    with pytest.raises(MigrationError) as caught:
        source.run()
    wire.release()
    error = inn.outcome()
    assert isinstance(error, MigrationError)
    assert "did not hand the guest over in time" in error.reason
    if caught.value.guest_at is GuestAt.UNKNOWN:
        source.job.take_back()
    assert runs_on(vm)
    assert inn.vm is None


def test_a_commit_that_did_not_leave_whole_is_none(running, inn):
    vm = running()

    class Halting:
        """Where a source connects; the first half of COMMIT leaves, and nothing more."""

        def __getattr__(self, name):
            return getattr(inn.endpoint, name)

        def connect(self, timeout_s, **options):
            channel = inn.endpoint.connect(timeout_s, **options)
            send = channel.send

            def send_half(buffers, fd=None):
                if bytes(buffers[0][:4]) != marker(FrameType.COMMIT):
                    return send(buffers, fd)
                send([buffers[0][: len(buffers[0]) // 2]])
                raise ConnectionResetError("cut in the middle")

            channel.send = send_half
            return channel

    inn.open()
    source = source_of(vm, Halting())
    with pytest.raises(TransportError, match="cut in the middle") as caught:
        source.run()
    assert caught.value.guest_at is GuestAt.SOURCE
    inn.outcome()
    expect_as_before(vm, inn, source)


def test_a_guest_that_its_user_stops_just_before_the_commit_arrives_stopped(running, inn):
    vm = running()
    alter(vm, "release_backends", lambda sound: lambda: (vm.pause(), sound()))
    source_of(vm, inn.open()).run()
    assert inn.outcome().status is VmStatus.PAUSED
