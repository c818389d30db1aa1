"""A process that was told to quit takes no guest in any more, at whatever moment that was: its source keeps it."""

import errno
import threading

import pytest
from altered import alter
from at_work import runs_on, until
from proxy import marker
from trips import LOOPBACK, source_of

from pageferry.cli.status import print_status
from pageferry.core.errors import GuestAt, PeerError
from pageferry.stream.ferry_frames import FrameType
from pageferry.vmm import incoming as incoming_module
from pageferry.vmm.accel import Accel, choose_machines
from pageferry.vmm.announcer import Announcer
from pageferry.vmm.guest import Guest
from pageferry.vmm.incoming import Incoming
from pageferry.vmm.local_backends import AS_AT_THE_SOURCE, is_local
from pageferry.vmm.outgoing import Outgoing
from pageferry.vmm.queries import Queries

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


def expect_kept(vm, source, place, reason):
    """Migrate, and see that the guest is where it was."""
    with pytest.raises(PeerError, match=reason):
        source.run()
    place.close()
    assert place.guest.vm is None
    assert source.job.guest_at is GuestAt.SOURCE
    assert runs_on(vm)


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
    expect_kept(vm, source, place, "no guest is waited for here any more")
    closing.join()


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
    expect_kept(vm, source, place, "the destination was told to quit")
    assert "waiting for another attempt" not in "".join(place.said)


class Mute:
    """Where a source connects that dies once it has heard that its guest runs there; it is heard from no more."""

    def __init__(self, endpoint):
        self._endpoint = endpoint
        self.channels = []

    def __getattr__(self, name):
        return getattr(self._endpoint, name)

    def connect(self, timeout_s, **options):
        if self.channels:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "it is dead")
        self.channels.append(self._endpoint.connect(timeout_s, **options))
        alter(self.channels[0], "send", self._silence)
        return self.channels[0]

    def _silence(self, sound):
        def send(buffers, fd=None):
            if marker(FrameType.DROPPED) in b"".join(map(bytes, buffers)):
                self.channels[0].abort()
                raise ConnectionResetError(errno.ECONNRESET, "it is dead")
            sound(buffers, fd)

        return send


def test_a_guest_whose_source_died_when_it_had_gone_is_not_being_received(guests, place):
    vm = guests("idle")
    assert (place.silent_s, place.unheard) == (None, False)
    source_of(vm, Mute(place.listen(LOOPBACK))).run()
    until(lambda: "a guest has arrived and is ours" in place.said, "arrival")
    state = Queries(place.guest, place, Outgoing(place.guest, Announcer(place.said.append))).handlers()
    lines = []
    print_status({**state["query-status"]({}), **state["x-query-guest"]({}), "migration": None}, lines.append)
    told = "\n".join(lines)
    assert f"its source has not heard yet that the guest is here; it may ask at {place.listening}" in told
    assert "being received" not in told
    assert "waiting for a guest" not in told
    place.close()
    assert not place.unheard
