import contextlib
import os
import re
import socket
import ssl
import threading

import pytest
from at_work import until
from descriptors import open_descriptors
from hypothesis import given, settings
from hypothesis import strategies as st

from pageferry.core.errors import UsageError
from pageferry.engine.wire.carrier import TlsCarrier
from pageferry.engine.wire.channel import Channel, Endpoint


@pytest.mark.parametrize(
    ("uri", "endpoint"),
    [
        ("tcp://127.0.0.1:4444", Endpoint(host="127.0.0.1", port=4444)),
        ("tcp:host.example:1", Endpoint(host="host.example", port=1)),
        ("tcp://[::1]:99", Endpoint(host="::1", port=99)),
        ("tcp://[fe80::1%Eth0]:0", Endpoint(host="fe80::1%Eth0", port=0)),
        ("tcp://127.0.0.1:0", Endpoint(host="127.0.0.1", port=0)),
        ("unix:/run/x.sock", Endpoint(path="/run/x.sock")),
        ("unix:///run/x.sock", Endpoint(path="/run/x.sock")),
    ],
)
def test_addresses(uri, endpoint):
    assert Endpoint.parse(uri) == endpoint
    assert Endpoint.parse(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("", ""),
        ("exec:rm", ""),
        ("h:1", ""),
        ("tcp://", "must end with a port"),
        ("tcp://host", "must end with a port"),
        ("tcp://host:x", "must end with a port"),
        ("tcp://host:70000", "from 0 to 65535"),
        ("tcp://host:\u0661", "must end with a port"),
        ("tcp://:1", "the host is missing"),
        ("tcp://h:1/path", "'/' cannot be in it"),
        ("tcp://h:1?tls", "'?' cannot be in it"),
        ("tcp://user@h:1", "'@' cannot be in it"),
        ("tcp://h :1", "' ' cannot be in it"),
        ("tcp://h\0:1", r"'\x00' cannot be in it"),
        ("tcp://*:1", "'*' cannot be a host's name"),
        ("tcp://" + "a" * 64 + ".example:1", "cannot be a host's name"),
        ("tcp://::1:99", "in brackets"),
        ("tcp://[::1:99", "not closed"),
        ("tcp://[127.0.0.1]:1", "'127.0.0.1' is not an IPv6 address"),
        ("tcp://[fe80::1]:1", "needs its interface, as in [fe80::1%eth0]"),
        ("tcp://[fe80::1%]:1", "needs its interface"),
        ("tcp://[::1%lo]:1", "only a link-local address has an interface"),
        ("unix:", "the path is missing"),
        ("unix:/a\0b", "NUL"),
        ("unix:/" + "x" * 107, "at most 107 bytes"),
    ],
)
def test_what_is_not_an_address(uri, why):
    with pytest.raises(UsageError, match=re.escape(f"not an address: {uri!r}" + (": " if why else ""))) as refused:
        Endpoint.parse(uri)
    assert why in str(refused.value)


class Counting:
    """A pacer that counts what was reserved, and lets nothing pass for ``wait_s``."""

    def __init__(self, wait_s=0.0):
        self.reserved_bytes = 0
        self.asked = threading.Event()
        self._wait_s = wait_s

    def reserve(self, size_bytes):
        self.reserved_bytes += size_bytes
        self.asked.set()
        return self._wait_s


def test_every_byte_is_paced_before_it_leaves():
    left, right = socket.socketpair()
    sender, receiver = Channel(left, 10), Channel(right, 10)
    sender.pacer = Counting()
    sender.send([b"abc", b"", memoryview(b"defg")])
    sender.send([b"h"])
    assert sender.pacer.reserved_bytes == sender.sent_bytes == 8
    assert receiver.receive_some(100) == b"abcdefgh"
    sender.close()
    receiver.close()


def test_an_abort_wakes_a_sender_that_waits_for_its_turn():
    left, right = socket.socketpair()
    sender = Channel(left, 10)
    sender.pacer = Counting(wait_s=3600)
    errors = []

    def send():
        try:
            sender.send([b"x"])
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    assert sender.pacer.asked.wait(60)
    sender.abort()
    thread.join(60)
    assert len(errors) == 1
    assert sender.sent_bytes == 0
    sender.close()
    right.close()


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5000), max_size=40).filter(any),
    st.lists(st.integers(0, 5000), min_size=1, max_size=40),
    st.integers(1, 255),
)
def test_gather_and_scatter_keep_every_byte_in_order(sent_sizes, view_sizes, seed):
    data = bytes((i * seed) & 0xFF for i in range(sum(sent_sizes)))
    view_sizes = [*view_sizes, len(data)]
    left, right = socket.socketpair()
    sender, receiver = Channel(left, 10), Channel(right, 10)
    pieces, at = [], 0
    for size in sent_sizes:
        pieces.append(memoryview(data)[at : at + size])
        at += size
    thread = threading.Thread(target=sender.send, args=(pieces,))
    thread.start()
    got, at = bytearray(len(data)), 0
    views = []
    for size in view_sizes:
        views.append(memoryview(got)[at : at + size])
        at += size
    receiver.receive_into(views)
    thread.join()
    assert bytes(got) == data
    assert sender.sent_bytes == len(data)
    sender.close()
    receiver.close()


@pytest.mark.parametrize("sent_bytes", range(10, 17))
def test_of_what_comes_behind_is_taken_what_is_there(sent_bytes):
    left, right = socket.socketpair()
    sender, receiver = Channel(left, 10), Channel(right, 10)
    data = bytes(range(sent_bytes))
    sender.send([data])
    got, ahead = bytearray(10), bytearray(4)
    count = receiver.receive_into([memoryview(got)[:3], memoryview(got)[3:]], memoryview(ahead))
    assert bytes(got + ahead[:count]) == data[:14]
    assert receiver.receive_into([], memoryview(ahead)) == 0
    sender.send([b"end"])
    assert receiver.receive_some(10) == (data[14:] + b"end")
    sender.close()
    receiver.close()


def test_more_buffers_than_the_kernel_takes_at_once():
    left, right = socket.socketpair()
    sender, receiver = Channel(left, 10), Channel(right, 10)
    data = [bytes([i & 0xFF]) * 10 for i in range(5000)]
    thread = threading.Thread(target=sender.send, args=(data,))
    thread.start()
    got = bytearray(50_000)
    receiver.receive_into([memoryview(got)[i * 10 : i * 10 + 10] for i in range(5000)])
    thread.join()
    assert bytes(got) == b"".join(data)
    sender.close()
    with pytest.raises(ConnectionResetError, match="closed"):
        receiver.receive_into([memoryview(got)])
    assert receiver.readable()
    receiver.close()


def test_a_stall_and_an_abort():
    left, right = socket.socketpair()
    channel = Channel(left, 0.05)
    with pytest.raises(TimeoutError):
        channel.receive_some(1)
    patient = Channel(right, 60)
    failed = []

    def wait():
        try:
            failed.append(patient.receive_some(1))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    patient.abort()
    thread.join(60)
    assert failed
    channel.close()
    patient.close()


def test_the_last_words_are_heard_although_the_peer_has_more_to_say():
    """Closing with unread data would reset the connection and destroy what was just sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = Endpoint(host="127.0.0.1", port=listener.getsockname()[1]).connect(10)
        server = Channel(listener.accept()[0], 10)
    client.send([b"x" * 100_000])
    server.send([b"failed, sorry"])
    thread = threading.Thread(target=server.finish)
    thread.start()
    got = b""
    while piece := client.receive_some(100):
        got += piece
    assert got == b"failed, sorry"
    client.close()
    thread.join(60)
    assert not thread.is_alive()


def test_unix_sockets(tmp_path):
    endpoint = Endpoint(path=str(tmp_path / "x"))
    with endpoint.listen() as listener:
        assert endpoint.bound(listener) == endpoint
        client = endpoint.connect(5)
        server = Channel(listener.accept(), 5)
        client.send([b"abc"])
        assert server.receive_some(10) == b"abc"
        client.close()
        server.close()
    with pytest.raises(OSError, match="No such file"):
        endpoint.connect(1)


def test_a_full_backlog_is_tried_again_now_and_then(tmp_path):
    path = tmp_path / "full"
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as waiting:
        listener.bind(str(path))
        listener.listen(0)
        waiting.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
        rounds = []
        with pytest.raises(TimeoutError):
            Endpoint(path=str(path)).connect(0.2, given_up=lambda: bool(rounds.append(1)))
        assert 1 <= len(rounds) <= 50  # a busy loop makes thousands
        threading.Timer(0.05, lambda: listener.accept()[0].close()).start()
        Endpoint(path=str(path)).connect(60).close()


def test_a_peer_has_one_descriptor_open_here_however_many_it_hands_over():
    left, right = socket.socketpair()
    sender, receiver = Channel(left, 10), Channel(right, 10)
    first, other = os.pipe()
    before = len(open_descriptors())
    for index in range(50):
        sender.send([b"x"], fd=other if index else first)
        assert receiver.receive_some(1) == b"x"
    assert len(open_descriptors()) == before + 1
    taken = receiver.take_fd()
    assert os.path.samestat(os.fstat(taken), os.fstat(first))
    assert receiver.take_fd() is None
    sender.send([b"x"], fd=other)
    receiver.receive_some(1)
    receiver.close()
    assert len(open_descriptors()) == before  # the receiver's socket is gone, `taken` is there
    for fd in (taken, first, other):
        os.close(fd)
    sender.close()


@pytest.mark.parametrize(("timeout_s", "probe_s"), [(30, 7), (0.1, 1), (86_400, 21_600)])
def test_a_peer_that_is_gone_is_noticed_within_the_timeout(timeout_s, probe_s):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        channel = Endpoint(host="127.0.0.1", port=listener.getsockname()[1]).connect(timeout_s)
        sock = channel._sock
        names = [socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT]
        tcp = [sock.getsockopt(socket.IPPROTO_TCP, name) for name in names]
        assert tcp == [timeout_s * 1000, probe_s, probe_s, 3]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        channel.close()


def test_a_peer_is_silent_while_it_is_waited_for_and_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        channel = Endpoint(host="127.0.0.1", port=listener.getsockname()[1]).connect(60)
        there = Channel(listener.accept()[0], 60)
    assert channel.silent_s == 0.0
    got = []
    waiting = threading.Thread(target=lambda: got.append(channel.receive_some(1)))
    waiting.start()
    until(lambda: channel.silent_s > 0.05, "silence")
    there.send([b"x"])
    waiting.join()
    assert got == [b"x"]
    assert channel.silent_s == 0.0
    assert channel.unmoved_s >= 0.0
    channel.close()
    assert channel.silent_s == 0.0
    there.close()


def test_to_look_whether_tls_has_something_waits_for_nothing():
    class Watch:
        """A host whose clock stands still but for its being looked at."""

        def __init__(self):
            self.looks = 0

        def now_s(self):
            self.looks += 1
            return self.looks * 1e-6

    left, right = socket.socketpair()
    context, watch = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), Watch()
    secured = context.wrap_socket(left, server_hostname="there", do_handshake_on_connect=False)
    assert not TlsCarrier(secured, watch).readable(0.0)
    assert watch.looks == 2  # when it began, and that it is over
    secured.close()
    right.close()
