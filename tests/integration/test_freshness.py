"""A recording of one migration is worth nothing in another, however it is played again."""

import socket
import struct
import threading

import pytest
from at_work import runs_on
from proxy import Recorder, played_again
from trips import TIMEOUT_S, source_of

from pageferry.core.errors import GuestAt, MigrationError, RemoteStreamError
from pageferry.engine.options import WireOptions
from pageferry.engine.wire.channel import Channel, Endpoint
from pageferry.engine.wire.connections import come_back, join
from pageferry.engine.wire.peer import Peer
from pageferry.stream.ferry import MAGIC, NONCE_BYTES, PREAMBLE_REST
from pageferry.stream.ferry_bodies import body_of
from pageferry.stream.ferry_frames import TYPE_OF, DestinationHello, Failed, FrameType, Known
from pageferry.stream.ferry_order import Side

SOFT = pytest.mark.parametrize("accel", ["soft"], indirect=True)
FIRST_FRAME = len(MAGIC) + PREAMBLE_REST.size + NONCE_BYTES


@pytest.fixture
def recorder(inn):
    made = Recorder(inn.open())
    yield made
    made.close()


@SOFT
def test_a_whole_migration_that_is_played_again_is_refused_and_leaves_nothing(running, inn, recorder):
    source = source_of(running(), recorder.endpoint, wire=WireOptions(connections=2))
    assert source.run().status == "completed"
    assert runs_on(inn.outcome())
    made = len(inn.made)
    for tape in recorder.tapes:  # the second begins with JOIN
        answer = played_again(tape, inn.open())
        error = inn.outcome()
        assert isinstance(error, MigrationError)
        assert error.guest_at is GuestAt.SOURCE
        assert len(inn.made) == made  # no machine was made for it
        assert FrameType.RUNNING.to_bytes(4, "little") not in answer
    second = source_of(running(), inn.open())
    assert second.run().status == "completed"
    assert runs_on(inn.outcome())


@SOFT
def test_a_join_that_is_played_again_while_a_migration_waits_for_it_is_refused(running, inn, recorder):
    """The same token even: what is recorded of a connection is for that connection."""
    answers = []
    connect = recorder.endpoint.connect

    class Way:
        """Says again, before connection 2 joins, what connection 1 said."""

        opened = 0

        def __getattr__(self, name):
            return getattr(recorder.endpoint, name)

        def connect(self, *args, **options):
            self.opened += 1
            if self.opened == 3:
                answers.append(played_again(recorder.tapes[1], recorder.endpoint))
            return connect(*args, **options)

    report = source_of(running(), Way(), wire=WireOptions(connections=3)).run()
    assert report.status == "completed"
    assert runs_on(inn.outcome())
    assert answers[0][FIRST_FRAME:][:4] == FrameType.REFUSE.to_bytes(4, "little")


class Stranger:
    """Listens, and takes one connection, on which ``play(peer)`` is what the destination says, on a thread."""

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread()

    def __call__(self, play):
        def run():
            channel = Channel(self._listener.accept()[0], TIMEOUT_S)
            peer = Peer(channel, Side.DESTINATION)
            peer.greet()
            play(peer)
            channel.close()

        self._thread = threading.Thread(target=run)
        self._thread.start()
        return Endpoint(host="127.0.0.1", port=self._listener.getsockname()[1])

    def done(self):
        self._thread.join()

    def close(self):
        self.done()
        self._listener.close()


@pytest.fixture
def stranger():
    made = Stranger()
    yield made
    made.close()


@pytest.fixture
def impostor(stranger):
    """Makes a channel to such a stranger."""
    made = []

    def make(play):
        made.append(stranger(play).connect(TIMEOUT_S))
        return made[-1]

    yield make
    for channel in made:
        channel.close()


@pytest.mark.parametrize("proof", ["", "0" * 64, "of another token"])
@pytest.mark.parametrize(
    "ask", [lambda channel: join(channel, "token", 1), lambda channel: come_back(channel, "token")]
)
def test_only_a_peer_that_knows_the_token_can_answer_a_join_or_a_return(impostor, ask, proof):
    """A recorded answer has another proof, as it was made for other nonces."""

    def play(peer):
        assert peer.proves(peer.receive(), "token")
        peer.send(Known(proof=peer.proof(Known, "tokem") if proof.startswith("of") else proof))

    with pytest.raises(RemoteStreamError, match="did not prove that it has this migration"):
        ask(impostor(play))


def test_a_destination_that_says_failed_to_a_return_without_a_proof_promises_nothing(impostor):
    def play(peer):
        peer.receive()
        peer.channel.send([framed(Failed(reason="it never ran"))])

    with pytest.raises(RemoteStreamError, match="may not send it while recovering"):
        come_back(impostor(play), "token")


def framed(frame):
    """A frame as bytes, in turn or not, with the proof that it has."""
    body = body_of(frame)
    return struct.pack("<II", TYPE_OF[type(frame)], len(body)) + body


@SOFT
def test_a_destination_that_answers_with_the_hello_of_another_connection_gets_no_page(running, stranger):
    """Else a recorded destination would be believed when it says that the guest runs there."""
    heard = []

    def play(peer):
        peer.receive()
        peer.channel.send([framed(DestinationHello(version="1", accel="soft", proof="0" * 64))])
        heard.append(peer.channel.receive_some(1))

    vm = running()
    source = source_of(vm, stranger(play))
    with pytest.raises(MigrationError, match="made for another connection, and is perhaps a recording") as failed:
        source.run()
    assert failed.value.guest_at is GuestAt.SOURCE
    assert "tls://" in failed.value.hint
    stranger.done()
    assert heard == [b""]
    assert runs_on(vm)
