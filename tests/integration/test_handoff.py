"""Law 6: whatever is lost around the commit, there are never two guests, and never none by our doing."""

import pytest
from at_work import runs_on, work
from proxy import marker
from trips import expect_as_before, source_of

from pageferry.core.errors import GuestAt, MigrationError, PeerError, TransportError, VmError
from pageferry.stream.ferry_frames import FrameType


def test_law_6_an_unanswered_commit_ends_unknown_and_paused(running, inn, wires):
    vm = running()
    wire = wires(inn.open(), hold_at=marker(FrameType.RUNNING))
    source = source_of(vm, wire.uri)
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
    source.job.take_back()
    assert runs_on(vm)
    with pytest.raises(VmError, match="no guest to take back"):
        source.job.take_back()


def test_law_6_a_lost_commit_ends_unknown_and_the_destination_never_runs(running, inn, wires):
    vm = running()
    wire = wires(inn.open(), hold_at=marker(FrameType.COMMIT))
    source = source_of(vm, wire.uri)
    with wire.cut_when_held(), pytest.raises(TransportError) as caught:
        source.run()
    assert caught.value.guest_at is GuestAt.UNKNOWN
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
