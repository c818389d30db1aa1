"""A process that was told to quit takes no guest in any more, at whatever moment that was: its source keeps it."""

import threading

import pytest
from altered import alter
from at_work import runs_on, until
from trips import LOOPBACK, source_of

from pageferry.core.errors import GuestAt, PeerError
from pageferry.vmm import incoming as incoming_module
from pageferry.vmm.accel import Accel, choose_machines
from pageferry.vmm.announcer import Announcer
from pageferry.vmm.guest import Guest
from pageferry.vmm.incoming import Incoming
from pageferry.vmm.local_backends import AS_AT_THE_SOURCE, is_local

pytestmark = pytest.mark.parametrize("accel", ["soft"])


class Place(Incoming):
    """A wait for a guest; ``guest`` is where it would be."""

    def __init__(self):
        self.said = []
        self.guest = Guest(choose_machines(Accel.SOFT), lambda _: None)
        super().__init__(self.guest, AS_AT_THE_SOURCE, Announcer(self.said.append))

    def is_closing(self):
        return self.listening is None


@pytest.fixture
def place():
    made = Place()
    yield made
    made.close()
    made.guest.close()


def test_law_6_a_source_that_was_let_in_just_before_the_end_keeps_its_guest(guests, place, monkeypatch):
    vm = guests("kv")
    vm.resume()
    closing = threading.Thread(target=place.close)

    def closed_meanwhile(connection):
        closing.start()
        until(place.is_closing, "end")
        return is_local(connection)

    monkeypatch.setattr(incoming_module, "is_local", closed_meanwhile)
    source = source_of(vm, place.listen(LOOPBACK))
    with pytest.raises(PeerError, match="no guest is waited for here any more"):
        source.run()
    closing.join()
    assert place.guest.vm is None
    assert source.job.guest_at is GuestAt.SOURCE
    assert runs_on(vm)


def test_law_6_a_source_that_commits_after_the_end_was_asked_for_keeps_its_guest(guests, place):
    vm = guests("kv")
    vm.resume()

    def quit_there(sound):
        def release():
            sound()
            place.begin_no_more()  # its READY was heard

        return release

    alter(vm, "release_backends", quit_there)
    source = source_of(vm, place.listen(LOOPBACK))
    with pytest.raises(PeerError, match="the destination was told to quit"):
        source.run()
    place.close()
    assert place.guest.vm is None
    assert source.job.guest_at is GuestAt.SOURCE
    assert runs_on(vm)
    assert "waiting for another attempt" not in "".join(place.said)
