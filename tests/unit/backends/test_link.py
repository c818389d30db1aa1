"""Taps, in a network namespace that the test makes, and Unix sockets as passt has them."""

import ctypes
import fcntl
import os
import socket
import struct
import threading

import pytest

from pageferry.backends.link import HEADER_BYTES, MAX_FRAME_BYTES, SocketLink, TapLink, open_link, rarp
from pageferry.core.errors import UsageError, VmError
from pageferry.core.libc import libc

HEADER = bytes(HEADER_BYTES)
MAC = bytes.fromhex("525400123456")
_CLONE_NEWNET = 0x4000_0000
_TUNSETIFF, _TUNSETPERSIST = 0x4004_54CA, 0x4004_54CB


def in_namespace(test):
    """Run a test in a network namespace of its own, which ends with it."""
    failures = []

    def run():
        if libc.unshare(_CLONE_NEWNET):
            failures.append(pytest.skip.Exception(f"no network namespace: {os.strerror(ctypes.get_errno())}"))
            return
        try:
            test()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def make_tap(name):
    """Make a tap that stays when no process is attached, and bring it up."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), 0x1002))
    fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    os.close(fd)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, 0x8914, struct.pack("16sH22x", name.encode(), 1))  # SIOCSIFFLAGS, IFF_UP


needs_tap = pytest.mark.skipif(not os.access("/dev/net/tun", os.W_OK) or os.geteuid() != 0, reason="taps need root")


@needs_tap
def test_frames_pass_a_tap_both_ways():
    def test():
        make_tap("tap7")
        link = open_link("tap:tap7")
        assert link.fileno() == -1
        link.claim()
        link.claim()
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        wire.bind(("tap7", 0))
        wire.settimeout(10)
        link.send([memoryview(rarp(MAC))])
        while (frame := wire.recv(2000))[12:14] != b"\x80\x35":
            pass
        assert frame == rarp(MAC)[HEADER_BYTES:]
        ours = MAC + MAC + b"\x88\xb5" + bytes(range(50))
        wire.send(ours)
        buffer = bytearray(MAX_FRAME_BYTES)
        while True:
            size = link.receive(buffer)
            if size and buffer[HEADER_BYTES + 12 : HEADER_BYTES + 14] == b"\x88\xb5":
                break
        assert bytes(buffer[:size]) == HEADER + ours
        link.leave(7)
        link.leave(7)
        link.send([memoryview(b"\xff" * HEADER_BYTES), memoryview(ours)])  # a header of nonsense
        link.send([memoryview(HEADER), memoryview(b"short")])
        wire.close()
        link.close()
        link.close()

    in_namespace(test)


@needs_tap
def test_one_process_has_a_tap_and_another_may_wait_for_it():
    def test():
        make_tap("tap7")
        one = TapLink("tap7")
        one.claim()
        two = TapLink("tap7")  # it exists, and will be free
        with pytest.raises(VmError, match="tap7"):
            two.claim()
        one.release()
        two.claim()
        two.close()

    in_namespace(test)


@needs_tap
def test_what_is_not_a_tap_is_refused_by_name():
    def test():
        for name in ("nosuch", "lo", "a" * 16):
            with pytest.raises(UsageError, match=name):
                TapLink(name)

    in_namespace(test)


@pytest.mark.parametrize("address", ["", "tap", "tap:", "unix:", "user", "eth0", "tcp:1"])
def test_what_names_no_link_is_refused(address):
    with pytest.raises(UsageError, match="no network"):
        open_link(address)


@pytest.fixture
def passt(tmp_path):
    """A listening socket, and a link to it that is connected; the other end of it."""
    path = tmp_path / "passt.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    link = open_link(f"unix:{path}")
    link.claim()
    link.claim()
    peer, _ = listener.accept()
    listener.close()
    peer.settimeout(10)
    yield link, peer
    link.close()
    link.close()
    peer.close()


def received(link):
    buffer = bytearray(MAX_FRAME_BYTES)
    size = link.receive(buffer)
    return bytes(buffer[:size])


def test_frames_pass_a_socket_behind_their_length(passt):
    link, peer = passt
    link.send([memoryview(HEADER[:5]), memoryview(HEADER[5:] + b"to "), memoryview(b"passt")])
    link.send([memoryview(HEADER)])
    link.send([memoryview(HEADER + b"x")])
    assert peer.recv(100) == b"\0\0\0\x08to passt\0\0\0\1x"
    assert received(link) == b""
    stream = b"\0\0\0\5first\0\0\0\6second"
    for byte in stream[:-3]:
        peer.send(bytes((byte,)))
    assert received(link) == HEADER + b"first"
    assert received(link) == b""
    peer.send(stream[-3:])
    assert received(link) == HEADER + b"second"
    assert link.fileno() >= 0


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES, 2**32 - 1])
def test_a_frame_of_an_impossible_length_breaks_the_link(passt, length):
    link, peer = passt
    peer.send(length.to_bytes(4, "big"))
    with pytest.raises(OSError, match="frame of"):
        received(link)


def test_a_peer_that_is_gone_breaks_the_link(passt):
    link, peer = passt
    peer.close()
    with pytest.raises(OSError, match="closed"):
        received(link)
    link.release()
    assert link.fileno() == -1
    for act in (lambda: received(link), lambda: link.send([memoryview(HEADER + b"x")])):
        with pytest.raises(OSError, match="not connected"):
            act()


def test_a_slow_peer_gets_whole_frames_or_none(passt):
    link, peer = passt
    frames = [bytes((n % 256,)) * 60_000 for n in range(100)]
    for frame in frames:
        link.send([memoryview(HEADER), memoryview(frame)])
    got, data = [], bytearray()
    peer.setblocking(False)
    while len(got) < 2 or data:
        try:
            data += peer.recv(1 << 20)
        except BlockingIOError:  # what is left of a frame goes out before the next
            link.send([memoryview(HEADER + b"next")])
        while len(data) >= 4 and len(data) >= 4 + int.from_bytes(data[:4], "big"):
            size = int.from_bytes(data[:4], "big")
            got.append(bytes(data[4 : 4 + size]))
            del data[: 4 + size]
    assert got[0] == frames[0]
    assert len(got) < len(frames)
    assert all(frame in frames or frame == b"next" for frame in got)


def test_a_socket_that_is_not_there_or_does_not_answer_is_refused_by_name(tmp_path):
    path = tmp_path / "passt.sock"
    with pytest.raises(UsageError, match=r"passt\.sock"):
        SocketLink(str(path))
    path.touch()
    with pytest.raises(UsageError, match="not a socket"):
        SocketLink(str(path))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    link = SocketLink(str(path))
    with pytest.raises(VmError, match=r"passt\.sock"):
        link.claim()
