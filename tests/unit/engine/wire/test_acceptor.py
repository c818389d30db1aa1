"""A caller costs little and delays no guest, whatever it says or does not; the place is for one guest at a time."""

import contextlib
import os
import threading
from dataclasses import replace

import pytest
from at_work import until
from descriptors import open_descriptors
from shortage import no_more_threads

from pageferry.core.cpuid import SOFT_CPU
from pageferry.core.threads import OutOfThreadsError
from pageferry.engine.wire import acceptor as acceptor_module
from pageferry.engine.wire.acceptor import MAX_CALLERS, Acceptor
from pageferry.engine.wire.peer import Peer, PeerRefusedError
from pageferry.stream.ferry import MAGIC, PREAMBLE_REST, PROTOCOL_VERSION
from pageferry.stream.ferry_frames import Join, Recover, SourceHello
from pageferry.stream.ferry_order import Side

GIVE_UP_S = 60
#: Of a source that gives up soon, so that it does not wait long either; and of one that does.
HELLO = SourceHello(
    version="1", memory_bytes=1 << 21, cpus=1, accel="soft", cpuid=SOFT_CPU, migration_id="x", lease_ms=100
)
PATIENT = replace(HELLO, lease_ms=60_000)


class Place(Acceptor):
    """Closes whom it has given away; ``refused`` are the lines that it told."""

    def __init__(self, timeout_s=GIVE_UP_S):
        self.refused = []
        self._given = []
        super().__init__("tcp://127.0.0.1:0", timeout_s, on_refused=self.refused.append)

    def wait(self):
        self._given.append(super().wait())
        return self._given[-1]

    def accept(self, wait_s):
        if (peer := super().accept(wait_s)) is not None:
            self._given.append(peer)
        return peer

    def close(self):
        super().close()
        for peer in self._given:
            peer.channel.close()


@pytest.fixture
def place():
    with Place() as made:
        yield made


@pytest.fixture
def callers(place):
    """Makes connections to it."""
    made = []

    def connect():
        made.append(place.endpoint.connect(GIVE_UP_S))
        return made[-1]

    yield connect
    for channel in made:
        channel.close()


def saying(channel, frame):
    """Say something first, as a source does; return the peer."""
    peer = Peer(channel, Side.SOURCE)
    peer.greet()
    peer.send(frame)
    return peer


def test_a_whole_hello_takes_the_place_and_a_second_source_hears_that_it_is_taken(place, callers):
    saying(callers(), HELLO)
    first = place.wait()
    assert first.first.migration_id == "x"
    with pytest.raises(PeerRefusedError, match="another guest is being received here"):
        saying(callers(), HELLO).receive()
    place.free()
    saying(callers(), HELLO)
    assert place.wait() is not first


def test_a_second_source_hears_it_too_while_the_first_waits_to_be_taken_in(place, callers):
    saying(callers(), HELLO)
    until(lambda: len(place._places.next) == 1, "first")
    with pytest.raises(PeerRefusedError, match="another guest"):
        saying(callers(), HELLO).receive()
    assert place.wait().first.migration_id == "x"


@pytest.mark.parametrize("silent", [0, 3, 3 * MAX_CALLERS])
def test_silent_callers_delay_no_source(place, callers, silent):
    """However many: the one that has been silent longest goes."""
    for _ in range(silent):
        callers()
    saying(callers(), HELLO)
    assert place.wait().first.migration_id == "x"


def half_a_hello(channel):
    channel.send([MAGIC + PREAMBLE_REST.pack(PROTOCOL_VERSION, 0) + bytes(32), b"\1\0"])


def a_byte_now_and_then(channel):
    def trickle():
        with contextlib.suppress(OSError):
            for byte in MAGIC + PREAMBLE_REST.pack(PROTOCOL_VERSION, 0) + bytes(1000):
                channel.send([bytes([byte])])
                threading.Event().wait(0.05)

    threading.Thread(target=trickle, daemon=True).start()


@pytest.mark.parametrize("how", [lambda _: None, half_a_hello, a_byte_now_and_then], ids=["silent", "half", "trickle"])
def test_a_caller_has_so_much_time_in_all(how):
    with Place(0.5) as place:
        channel = place.endpoint.connect(GIVE_UP_S)
        how(channel)
        until(lambda: place.refused, "refusal")
        assert "stalled" in place.refused[0] or "timed out" in place.refused[0]
        until(lambda: place._places.heard == [], "end")
        channel.close()


def test_noise_is_answered_once_and_forgotten(place, callers):
    channel = callers()
    channel.send([b"GET / HTTP/1.1\r\n\r\n"])
    until(lambda: place.refused, "refusal")
    assert "it looks like an HTTP client" in place.refused[0]
    while channel.receive_some(1 << 16):
        pass


def test_a_source_is_heard_though_there_are_no_more_threads(place, callers):
    with no_more_threads():
        saying(callers(), HELLO)
        assert place.wait().first.migration_id == "x"
        waiting = saying(callers(), Join(proof="p", index=1))
        until(lambda: len(place._places.others) == 1, "who joins")
        place.free()
        with pytest.raises(PeerRefusedError, match="no guest is being received here"):
            waiting.receive()
    saying(callers(), HELLO)
    assert place.wait().first.migration_id == "x"


def test_a_place_that_cannot_be_reached_is_not_left_open(tmp_path):
    with no_more_threads(), pytest.raises(OutOfThreadsError):
        Acceptor(f"unix:{tmp_path}/x")
    assert [*tmp_path.iterdir()] == []


def test_a_source_that_comes_again_at_once_waits_until_its_first_attempt_is_over(place, callers):
    saying(callers(), HELLO)
    first = place.wait()
    saying(callers(), replace(PATIENT, migration_id="again"))
    until(lambda: place._places.patient == 1, "who waits")
    place.free()
    again = place.wait()
    assert again is not first
    assert again.first.migration_id == "again"


def test_few_wait_for_an_attempt_to_end(place, callers):
    saying(callers(), PATIENT)
    place.wait()
    for index in range(acceptor_module._MAX_PATIENT):
        saying(callers(), PATIENT)
        until(lambda index=index: place._places.patient == index + 1, "who waits")
    with pytest.raises(PeerRefusedError, match="busy with another attempt"):
        saying(callers(), PATIENT).receive()


def test_a_source_that_waits_for_a_place_that_is_closed_is_told(place, callers):
    saying(callers(), PATIENT)
    place.wait()
    waiting = saying(callers(), PATIENT)
    until(lambda: place._places.patient == 1, "who waits")
    place.close()
    with pytest.raises(PeerRefusedError, match="no guest is waited for here any more"):
        waiting.receive()


def test_who_wants_to_join_or_come_back_waits_for_the_guest_that_is_received(place, callers):
    saying(callers(), HELLO)
    place.wait()
    saying(callers(), Join(proof="p", index=1))
    assert isinstance(place.accept(GIVE_UP_S).first, Join)
    saying(callers(), Recover(proof="p"))
    assert isinstance(place.accept(GIVE_UP_S).first, Recover)
    assert place.accept(0.01) is None


def test_of_those_who_wait_to_join_there_is_a_bound(place, callers):
    saying(callers(), HELLO)
    place.wait()
    for index in range(acceptor_module._MAX_WAITING):
        saying(callers(), Join(proof="p", index=1))
        until(lambda index=index: len(place._places.others) == index + 1, "caller")
    with pytest.raises(PeerRefusedError, match="another guest"):
        saying(callers(), Join(proof="p", index=1)).receive()


def test_who_came_back_too_early_is_answered_when_the_attempt_is_over(place, callers):
    saying(callers(), HELLO)
    place.wait()
    joining = saying(callers(), Join(proof="p", index=1))
    saying(callers(), Recover(proof="p"))
    until(lambda: len(place._places.others) == 2, "both")
    place.free()
    assert isinstance(place.wait().first, Recover)
    with pytest.raises(PeerRefusedError, match="no guest is being received here"):
        joining.receive()


def test_a_source_is_served_before_those_who_come_back_for_nothing(place, callers):
    for _ in range(3):
        saying(callers(), Recover(proof="p"))
    until(lambda: len(place._places.next) == 3, "callers")
    saying(callers(), HELLO)
    until(lambda: len(place._places.next) == 4, "source")
    assert isinstance(place.wait().first, SourceHello)


def test_a_place_that_is_closed_wakes_all_who_wait(place):
    woken = []

    def wait(what):
        with pytest.raises(ConnectionAbortedError):
            what()
        woken.append(what)

    threads = [threading.Thread(target=wait, args=(what,)) for what in (place.wait, lambda: place.accept(GIVE_UP_S))]
    for thread in threads:
        thread.start()
    place.close()
    for thread in threads:
        thread.join(GIVE_UP_S)
    assert len(woken) == 2


def test_a_place_that_is_closed_keeps_nothing(place, callers):
    before = len(open_descriptors())
    for _ in range(5):
        callers()
    saying(callers(), Recover(proof="p"))
    until(lambda: len(place._places.next) == 1, "a caller in its place")
    place.close()
    with pytest.raises(ConnectionRefusedError):
        callers()
    until(lambda: len(os.listdir("/proc/self/fd")) <= before + 6, "descriptors")  # the callers' own
