import base64
import errno
import os
import threading
from types import SimpleNamespace

import pytest
from at_work import until

from pageferry.vmm.console import ConsoleOutput, ConsoleTail
from pageferry.vmm.qmp import QmpServer
from pageferry.vmm.qmp_client import QmpClient


@pytest.fixture
def pipe():
    """A pipe's two ends; the reader may be closed by the test."""
    reader, writer = os.pipe()
    ends = SimpleNamespace(reader=os.fdopen(reader, "rb", 0), writer=os.fdopen(writer, "wb", 0))
    yield ends
    ends.reader.close()
    ends.writer.close()


def test_output_comes_out_in_order(pipe):
    console = ConsoleOutput(pipe.writer.fileno(), pytest.fail)
    for byte in b"hello":
        console(bytes([byte]))
    console.close()
    assert pipe.reader.read(100) == b"hello"


def test_a_reader_that_is_slow_loses_nothing_though_the_descriptor_does_not_block(pipe):
    os.set_blocking(pipe.writer.fileno(), False)
    console = ConsoleOutput(pipe.writer.fileno(), pytest.fail)
    sent = bytes(range(256)) * (4 << 10)  # a pipe holds 64 KiB
    for at in range(0, len(sent), 64):
        console(sent[at : at + 64])
    got = b""
    while len(got) < len(sent):
        got += pipe.reader.read(1 << 16)
    assert got == sent
    console.close()


def test_neither_a_full_pipe_nor_a_closed_one_blocks_or_raises_and_it_is_told_once(pipe):
    lost = []
    console = ConsoleOutput(pipe.writer.fileno(), lost.append)
    done = threading.Event()

    def talk():
        for _ in range(200_000):
            console(b"x" * 10)
        done.set()

    threading.Thread(target=talk, daemon=True).start()
    assert done.wait(60)
    assert lost == []
    pipe.reader.close()
    until(lambda: lost, "word of it")
    console(b"anybody?")
    console.close()
    assert [error.errno for error in lost] == [errno.EPIPE]


def taken(follower):
    data = follower.take()
    return base64.b64decode(data["output"]), data["dropped"], data["end"]


def test_a_follower_sees_the_tail_and_then_each_byte_once():
    tail, woken = ConsoleTail(), []
    tail(b"early ")
    follower = tail.follow(lambda: woken.append(1))
    tail(b"before the first look")
    assert woken == []  # a client that follows looks at once
    assert taken(follower) == (b"early before the first look", 0, None)
    tail(b"a")
    tail(b"b")
    assert woken == [1]  # and no second time until it has looked
    assert taken(follower) == (b"ab", 0, None)
    tail(b"c")
    assert woken == [1, 1]
    assert tail.text() == "early before the first lookabc"


def test_the_tail_is_bounded_and_so_is_what_a_follower_does_not_read():
    tail = ConsoleTail()
    slow = tail.follow(lambda: None)
    for number in range(30_000):
        tail(b"%06d" % number)
    text = b"".join(b"%06d" % number for number in range(30_000))
    assert 4096 <= len(tail.text()) <= 8192
    assert text.endswith(tail.text().encode())
    output, dropped, end = taken(slow)
    assert len(output) == 64 << 10
    assert output == text[dropped:]
    assert end is None
    tail(b"!")
    assert taken(slow) == (b"!", 0, None)


def test_the_end_comes_after_the_last_byte_and_once():
    tail, woken = ConsoleTail(), []
    followers = [tail.follow(lambda: woken.append(1)) for _ in range(2)]
    assert [taken(each) for each in followers] == [(b"", 0, None)] * 2
    tail(b"last words")
    tail.end("gone")
    tail(b"not of this guest")
    assert [taken(each) for each in followers] == [(b"last words", 0, "gone")] * 2
    assert len(woken) == 2
    assert taken(tail.follow(lambda: None))[2] is None


def test_the_end_wakes_who_sleeps_and_a_closed_follower_gets_nothing():
    tail, woken = ConsoleTail(), []
    follower, other = tail.follow(lambda: woken.append(1)), tail.follow(lambda: woken.append(2))
    taken(follower)
    taken(other)
    other.close()
    other.close()
    tail.end("gone")
    assert woken == [1]
    assert taken(follower) == (b"", 0, "gone")
    assert taken(other) == (b"", 0, None)


def test_a_client_that_does_not_read_holds_up_no_other_and_is_told_what_it_missed(tmp_path):
    tail = ConsoleTail()
    server = QmpServer(tmp_path / "x.sock", {}, {"follow": lambda arguments, wake: tail.follow(wake)})
    server.start()
    try:
        with QmpClient(tmp_path / "x.sock") as client:
            client.execute("follow")
            written = 0
            for number in range(80_000):  # 8 MB: more than the socket and the follower hold
                tail(b"%099d\n" % number)
                written += 100
            tail.end("enough")
            lost, output, end = 0, b"", None
            messages = client.received()
            while end is None:
                for message in messages:
                    assert message["event"] == "X_PAGEFERRY_CONSOLE"
                    data, end = message["data"], message["data"]["end"]
                    lost += data["dropped"]
                    output += base64.b64decode(data["output"])
                messages = client.receive() if end is None else []
        assert end == "enough"
        assert lost > 0
        assert len(output) + lost == written
        assert output.endswith(b"%099d\n" % 79_999)
    finally:
        server.close()


def test_what_is_new_at_the_end_is_let_out_before_the_server_closes(tmp_path):
    tail = ConsoleTail()
    server = QmpServer(tmp_path / "x.sock", {}, {"follow": lambda arguments, wake: tail.follow(wake)})
    server.start()
    with QmpClient(tmp_path / "x.sock") as client:
        client.execute("follow")
        tail(b"last words")
        tail.end("gone")
        server.close()
        messages = client.received()
        while not any(message["data"]["end"] for message in messages):
            messages += client.receive()
    assert b"".join(base64.b64decode(message["data"]["output"]) for message in messages) == b"last words"
