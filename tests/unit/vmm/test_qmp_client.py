"""The QMP client against a server that answers as it is told."""

import contextlib
import json
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


def test_an_answer_without_end_is_refused(answering):
    with QmpClient(answering("x" * (17 << 20))) as client, pytest.raises(VmError):
        client.execute("query-migrate")
