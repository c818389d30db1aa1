"""The control socket's wire form: strict JSON, nothing unknown accepted silently, bounded by bytes."""

import json
import socket
import threading
import tracemalloc

import pytest
from at_work import until
from shortage import no_more_threads

from pageferry.core.errors import RefusedError, UnsupportedError, UsageError, VmError
from pageferry.vmm.qmp import QmpServer, decode, encode
from pageferry.vmm.qmp_client import QmpClient
from pageferry.vmm.qmp_error import ErrorKind, QmpError

MiB = 1 << 20
ERRORS = {
    "refuse": QmpError("not now", hint="wait"),
    "mistake": UsageError("no such thing", hint="name another"),
    "decline": RefusedError("not as it is now", hint="ask again"),
    "lack": UnsupportedError("kvm", "not here", hint="buy one"),
    "break": VmError("it broke"),
}


def raising(error):
    def handler(arguments):
        raise error

    return handler


@pytest.fixture
def server(tmp_path):
    commands = {name: raising(error) for name, error in ERRORS.items()}
    server = QmpServer(tmp_path / "qmp.sock", commands | {"echo": lambda arguments: arguments})
    server.start()
    yield server
    server.close()


class Talk:
    """A client that sends bytes as they are."""

    def __init__(self, path, *, negotiate=True):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(path))
        self.lines = self.sock.makefile("rb")
        assert "QMP" in json.loads(self.lines.readline())
        if negotiate:
            assert self.say(b'{"execute":"qmp_capabilities"}') == {"return": {}}

    def say(self, data):
        self.sock.sendall(data + b"\n")
        return json.loads(self.lines.readline(), parse_constant=pytest.fail)


@pytest.fixture
def talk(server, tmp_path):
    made = []

    def connect(**options):
        made.append(Talk(tmp_path / "qmp.sock", **options))
        return made[-1]

    yield connect
    for each in made:
        each.lines.close()
        each.sock.close()


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (b'{"execute":"echo","id":NaN}', "JSON parse error"),
        (b'{"execute":"echo","arguments":{"a":-Infinity}}', "JSON parse error"),
        (b'{"execute":"echo","arguments":{"a":1e400}}', "out of range"),
        (b'{"execute":"echo","arguments":{"a":' + b"9" * 400 + b"}}", "out of range"),
        (b'{"execute":"echo","arguments":{"a":' + b"9" * 5000 + b"}}", "out of range"),
        (b'{"execute":"echo","arguments":{"a":' + b"[" * 5000 + b"]" * 5000 + b"}}", "nested more than 512 deep"),
        (b'{"execute":"echo","id":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 512 deep"),
        (b'{"execute":"echo","id":"\xff"}', "JSON parse error"),
        (b'{"execute":"echo",}', "JSON parse error"),
        (b'["execute","echo"]', "a command is an object"),
        (b'{"execute":"echo","exec-oob":"echo"}', "'exec-oob' is unexpected"),
        (b'{"execute":"echo","argument":{}}', "'argument' is unexpected"),
        (b'{"execute":["echo"]}', "a string 'execute'"),
        (b'{"execute":"query-version","arguments":{"all":true}}', "'all' is unexpected"),
        (b'{"execute":"query-commands","arguments":{"all":true}}', "'all' is unexpected"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_a_command_is_refused_in_strict_json(talk, request_, says):
    client = talk()
    error = client.say(request_)["error"]
    assert error["class"] == "GenericError"
    assert says in error["desc"]
    assert client.say(b'{"execute":"echo","arguments":{"a":18446744073709551615},"id":1.5}') == {
        "return": {"a": (1 << 64) - 1},
        "id": 1.5,
    }


def test_an_id_as_deep_as_can_be_read_is_sent_back(talk):
    deep = b"[" * 511 + b"]" * 511
    assert json.dumps(talk().say(b'{"execute":"echo","id":' + deep + b"}")["id"]).encode() == deep
    assert "nested more" in talk().say(b'{"execute":"echo","id":[' + deep + b"]}")["error"]["desc"]


def test_a_client_without_a_thread_hears_that_and_the_next_is_served(server, tmp_path):
    path = tmp_path / "qmp.sock"
    with QmpClient(path) as first:
        with no_more_threads():
            for _ in range(3):
                with pytest.raises(VmError, match="turned the connection away: no more threads can be started") as told:
                    QmpClient(path)
                assert "ulimit -u" in told.value.hint
            assert first.execute("echo", a=1) == {"a": 1}
        with QmpClient(path) as later:
            assert later.execute("echo", a=2) == {"a": 2}
    until(lambda: not server.connected, "end of all")


def test_capabilities_that_are_not_offered_are_refused(talk):
    client = talk(negotiate=False)
    assert client.say(b'{"execute":"echo"}')["error"]["class"] == "CommandNotFound"
    for arguments in (b'{"enable":["oob"]}', b'{"enable":"oob"}', b'{"disable":[]}'):
        assert "error" in client.say(b'{"execute":"qmp_capabilities","arguments":' + arguments + b"}")
        assert client.say(b'{"execute":"echo"}')["error"]["class"] == "CommandNotFound"
    assert client.say(b'{"execute":"qmp_capabilities","arguments":{"enable":[]}}') == {"return": {}}
    assert client.say(b'{"execute":"qmp_capabilities"}')["error"]["class"] == "CommandNotFound"
    assert client.say(b'{"execute":"eject"}')["error"]["class"] == "CommandNotFound"


def test_an_error_has_its_hint_and_whose_fault_it_is(server, tmp_path):
    kinds = dict(zip(ERRORS, ("usage", "usage", "usage", "unsupported", "failed"), strict=True))
    with QmpClient(tmp_path / "qmp.sock") as client:
        for name, error in ERRORS.items():
            with pytest.raises(QmpError, match=str(error)) as told:
                client.execute(name)
            assert (told.value.hint, told.value.kind) == (error.hint, ErrorKind(kinds[name]))
            assert str(told.value) == str(error)  # the hint is not in the text


def test_a_command_that_runs_when_the_server_closes_is_answered(tmp_path):
    closer = threading.Thread(target=lambda: closing.close())

    def close_meanwhile(arguments):
        closer.start()
        closer.join(0.1)  # as long as it would take if it did not wait for this

    closing = QmpServer(tmp_path / "closing.sock", {"close": close_meanwhile})
    closing.start()
    client = Talk(tmp_path / "closing.sock")
    assert client.say(b'{"execute":"close"}') == {"return": {}}
    assert client.lines.readline() == b""
    closer.join()
    client.lines.close()
    client.sock.close()


def test_a_client_that_reads_nothing_is_not_listened_to(talk):
    """Commands with an id of most of 1 MiB: what is kept of them is bounded, and all are answered at last."""
    client, count = talk(), 60
    command = b'{"execute":"echo","id":"' + b"x" * (MiB - 100) + b'"}\n'
    sent = []

    def send():
        for _ in range(count):
            client.sock.sendall(command)
            sent.append(None)

    tracemalloc.start()
    try:
        client.sock.settimeout(None)
        sender = threading.Thread(target=send)
        sender.start()
        until(lambda: len(sent) >= 1 and _stands_still(sent), "end of the room", 0.05)
        kept_bytes, _ = tracemalloc.get_traced_memory()
        assert len(sent) < 20
        assert kept_bytes < 16 * MiB
    finally:
        tracemalloc.stop()
    client.sock.settimeout(60)
    for _ in range(count):
        assert client.lines.readline().endswith(b'"}\r\n')
    sender.join()


def _stands_still(sent, seen=[]):  # noqa: B006  # what was seen before
    seen.append(len(sent))
    return len(seen) > 20 and len({*seen[-20:]}) == 1


def test_events_that_are_not_read_are_bounded_and_others_get_theirs(server, talk, tmp_path):
    talk()  # reads nothing
    with QmpClient(tmp_path / "qmp.sock") as other:
        for number in range(40):
            server.event("NEWS", {"number": number, "text": "x" * MiB})
            assert next(other.events())["data"]["number"] == number
        until(lambda: len(server._clients) == 1, "drop of the other")


def test_nothing_that_is_not_json_is_ever_sent():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            encode({"return": value})
    with pytest.raises(QmpError):
        decode(b'{"a": nan}')
