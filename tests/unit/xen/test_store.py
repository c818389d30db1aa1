"""XenStore against a store that speaks the wire as Xen's does, over a real socket."""

import contextlib
import errno
import os
import socket
import struct
import threading

import pytest

from pageferry.core.errors import UnsupportedError, XenError
from pageferry.xen.store import XenStore

MESSAGE = struct.Struct("<IIII")
READ, WRITE, DIRECTORY, RM, ERROR = 2, 11, 1, 13, 16


def serve(listener, answers, heard):
    connection, _ = listener.accept()
    with connection, contextlib.suppress(ConnectionError):  # a client that had enough
        for kind, payload in answers:
            head = connection.recv(MESSAGE.size, socket.MSG_WAITALL)
            if not head:
                return
            asked, _, _, length = MESSAGE.unpack(head)
            heard.append((asked, connection.recv(length, socket.MSG_WAITALL)))
            for byte in MESSAGE.pack(asked if kind is None else kind, 0, 0, len(payload)) + payload:
                connection.send(bytes([byte]))  # as slowly as can be


@pytest.fixture
def store(tmp_path):
    """A function that connects to a store with scripted answers; ``heard`` are the requests."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(tmp_path / "socket"))
    listener.listen()
    threads, heard, stores = [], [], []

    def connect(*answers):
        threads.append(threading.Thread(target=serve, args=(listener, answers, heard)))
        threads[-1].start()
        stores.append(XenStore((tmp_path / "none", tmp_path / "socket"), ()))
        stores[-1].heard = heard
        return stores[-1]

    yield connect
    for each in stores:
        each.close()
    for thread in threads:
        thread.join()
    listener.close()


def test_values_names_and_writes_are_in_the_stores_form(store):
    xen = store((None, b"guest"), (None, b"0\x001\x00"), (None, b"OK\0"), (None, b"OK\0"))
    assert xen.read("/a") == "guest"
    assert xen.directory("/local") == ["0", "1"]
    xen.write("/b", "suspend")
    xen.remove("/c")
    assert xen.heard == [(READ, b"/a\0"), (DIRECTORY, b"/local\0"), (WRITE, b"/b\0suspend"), (RM, b"/c\0")]


def test_what_is_not_there_is_none(store):
    xen = store((ERROR, b"ENOENT\0"), (ERROR, b"ENOENT\0"), (None, b""))
    assert (xen.read("/a"), xen.directory("/a"), xen.directory("/empty")) == (None, [], [])


def test_a_refusal_names_the_path_and_the_error(store):
    with pytest.raises(XenError, match=r"^xenstore /a: EACCES") as refused:
        store((ERROR, b"EACCES\0")).read("/a")
    assert refused.value.errno == errno.EACCES


def test_an_answer_that_is_too_long_or_cut_is_refused(store):
    with pytest.raises(XenError, match="EPROTO"):
        store((None, bytes(5000))).read("/a")
    with pytest.raises(XenError, match=r"EPIPE|ECONNRESET"):
        store().read("/a")


def test_a_request_that_no_store_takes_is_not_sent(store):
    with pytest.raises(XenError, match="E2BIG"):
        store().write("/a", "x" * 5000)


def test_a_store_that_cannot_be_reached_is_told_with_what_to_do(tmp_path):
    with pytest.raises(UnsupportedError, match="Xen's store cannot be reached") as refused:
        XenStore((tmp_path / "socket",), (tmp_path / "xenbus",))
    assert "xenstored" in refused.value.hint
