"""The QMP client against a server that answers as it is told."""

import contextlib
import json
import os
import socket
import threading

import pytest

from pageferry.core.errors import VmError
from pageferry.vmm.qmp_client import QmpClient


@pytest.fixture
def answering(tmp_path):
    """Serves one client, and answers each of its commands with the next of the values."""
    path, servers = tmp_path / "qmp.sock", []

    def serve(*values):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()

        def run():
            connection, _ = listener.accept()
            with listener, connection, connection.makefile() as commands, contextlib.suppress(BrokenPipeError):
                connection.sendall(b'{"QMP": {}}\n')
                for value in ({}, *values):
                    answer = {"return": value, "id": json.loads(commands.readline())["id"]}
                    connection.sendall(json.dumps(answer).encode() + b"\n")

        servers.append(threading.Thread(target=run))
        servers[-1].start()
        return path

    yield serve
    for server in servers:
        server.join()


def test_a_report_of_very_many_rounds_arrives(answering):
    report = {"rounds": ["x" * 500] * 10_000}
    with QmpClient(answering(report)) as client:
        assert client.execute("query-migrate") == report


def test_a_process_that_is_silent_for_long_has_not_gone_away(answering):
    with QmpClient(answering({"status": "active"}), timeout_s=0.4) as client:
        assert client.receive() == []
        assert client.execute("query-migrate") == {"status": "active"}


def test_an_answer_without_end_is_refused(answering):
    with QmpClient(answering("x" * (17 << 20))) as client, pytest.raises(VmError):
        client.execute("query-migrate")


def test_a_process_that_ends_before_its_first_answer_leaves_no_descriptor(tmp_path):
    def greet_and_leave(listener):
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b'{"QMP": {}}\n')
            connection.recv(1 << 10)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp.sock"))
        listener.listen()
        server = threading.Thread(target=greet_and_leave, args=(listener,))
        before = os.listdir("/proc/self/fd")
        server.start()
        with pytest.raises(VmError) as gone:
            QmpClient(tmp_path / "qmp.sock")
        server.join()
        assert os.listdir("/proc/self/fd") == before, gone  # whose traceback keeps the client alive


def test_what_no_process_serves_is_told_apart(tmp_path):
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(tmp_path / "dead.sock"))
    (tmp_path / "file").touch()
    for name, what, hint in (
        ("nowhere", "it does not exist", "check the path"),
        ("file", "it is not a socket", "--control takes the socket"),
        (".", "it is not a socket", "--control takes the socket"),
        ("dead.sock", "the process that made the socket has ended", "start it again"),
        ("file/x", "Not a directory", "a part of its path is not a folder"),
    ):
        with pytest.raises(VmError) as failed:
            QmpClient(tmp_path / name)
        assert str(failed.value) == f"no guest process answers at {tmp_path / name}: {what}"
        assert failed.value.hint.startswith(hint)
