"""A file that comes into being whole or not at all."""

import os
import stat

import pytest

from pageferry.core.errors import UsageError
from pageferry.engine.image.outlet import FileOutlet
from pageferry.stream.encoder import Encoder


@pytest.fixture
def path(tmp_path):
    return tmp_path / "guest.bin"


def write(path, *data):
    sink = FileOutlet(path)
    sink.send(list(data))
    sink.settle()
    return sink


def test_it_has_its_name_only_when_it_is_committed(path):
    before = Encoder().header() + b"what was"
    path.write_bytes(before)
    sink = write(path, b"one", memoryview(b"two"), b"", b"three")
    assert sink.sent_bytes == 11
    assert path.read_bytes() == before
    sink.commit()
    sink.close()
    assert path.read_bytes() == b"onetwothree"
    assert os.listdir(path.parent) == [path.name]
    sink.close()


@pytest.mark.parametrize("content", [b"a letter", b"x" * 4096, bytes(24), Encoder().header()[:23]])
def test_what_is_no_saved_guest_is_not_replaced(path, content):
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is no saved guest"):
        FileOutlet(path)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


def test_an_empty_file_is_replaced(path):
    path.touch()
    sink = write(path, b"one")
    sink.commit()
    sink.close()
    assert path.read_bytes() == b"one"


def test_more_buffers_than_one_call_takes_arrive_in_order(path):
    pieces = [str(number).encode() for number in range(3000)]
    sink = write(path, *pieces)
    sink.commit()
    sink.close()
    assert path.read_bytes() == b"".join(pieces)


def test_one_that_is_given_up_leaves_nothing(path):
    write(path, b"half").close()
    assert os.listdir(path.parent) == []


def test_nobody_else_can_read_a_guest(path):
    path.with_name("guest.bin.part").touch(mode=0o666)
    sink = write(path, b"secret")
    assert stat.S_IMODE(os.fstat(sink.fileno()).st_mode) == 0o600
    sink.commit()
    sink.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_a_killed_process_left_is_taken_over_and_a_living_one_is_not_disturbed(path):
    path.with_name("guest.bin.part").write_bytes(b"left by somebody who was killed")
    first = write(path, b"mine")
    with pytest.raises(UsageError, match="is being written already"):
        FileOutlet(path)
    first.commit()
    first.close()
    assert path.read_bytes() == b"mine"


def test_what_is_no_file_stays_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "/"):
        with pytest.raises(UsageError, match="no regular file"):
            FileOutlet(path)
    assert os.listdir(tmp_path) == ["pipe"]
    os.mkfifo(tmp_path / "x.part")
    with pytest.raises(UsageError, match="no regular file"):
        FileOutlet(tmp_path / "x")


def test_a_folder_that_cannot_be_written_to_the_disk_is_no_success(path, monkeypatch):
    sink = write(path, b"data")
    fsync = os.fsync

    def broken(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(5, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        sink.commit()
    sink.close()
    assert os.listdir(path.parent) == []
