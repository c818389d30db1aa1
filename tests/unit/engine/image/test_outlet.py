"""A file that comes into being whole or not at all."""

import errno
import os
import re
import stat

import pytest
from descriptors import open_descriptors

from pageferry.core.errors import UsageError
from pageferry.engine.image.outlet import FileOutlet
from pageferry.stream.encoder import Encoder
from pageferry.stream.xl import xl_head


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


@pytest.mark.parametrize("content", [b"a letter", b"x" * 4096, bytes(24), Encoder().header()[:23], xl_head(b"")[:31]])
def test_what_is_not_a_saved_guest_is_not_replaced(path, content):
    path.write_bytes(content)
    with pytest.raises(UsageError, match="is not a saved guest"):
        FileOutlet(path)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


def test_what_xens_tools_saved_is_replaced(path):
    path.write_bytes(xl_head(b"{}"))
    sink = write(path, b"one")
    sink.commit()
    sink.close()
    assert path.read_bytes() == b"one"


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


def test_other_users_cannot_read_a_guest_and_no_name_leads_to_it(path):
    sink = write(path, b"secret")
    assert os.listdir(path.parent) == []
    assert stat.S_IMODE(os.fstat(sink.fileno()).st_mode) == 0o600
    sink.commit()
    sink.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_others_have_made_is_neither_written_nor_removed(path):
    """An earlier save with a second name and other readers, and files with the names that one might guess."""
    earlier = Encoder().header() + b"what was"
    path.write_bytes(earlier)
    path.chmod(0o666)
    second = path.with_name("second")
    second.hardlink_to(path)
    beside = [path.with_name(f"{path.name}{end}") for end in (".part", ".tmp", "~")]
    for each in beside:
        each.write_bytes(b"theirs")
    with path.open("rb") as reader:
        sink = write(path, b"secret")
        sink.commit()
        sink.close()
        assert reader.read() == earlier
    assert second.read_bytes() == earlier
    assert all(each.read_bytes() == b"theirs" for each in beside)
    assert path.read_bytes() == b"secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(os.listdir(path.parent)) == 2 + len(beside)


def test_what_comes_to_be_there_meanwhile_is_not_replaced_unless_it_is_a_save(path):
    sink = write(path, b"mine")
    path.write_bytes(b"a letter")
    with pytest.raises(UsageError, match="is not a saved guest"):
        sink.commit()
    assert path.read_bytes() == b"a letter"
    path.write_bytes(Encoder().header())
    sink.commit()
    sink.close()
    assert path.read_bytes() == b"mine"
    assert os.listdir(path.parent) == [path.name]


def test_two_that_write_one_file_do_not_disturb_each_other(path):
    first, second = write(path, Encoder().header(), b"first"), write(path, b"second")
    first.commit()
    assert path.read_bytes().endswith(b"first")
    second.commit()
    for each in (first, second):
        each.close()
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == [path.name]


@pytest.fixture(params=["second names", "neither"])
def old_file_system(request, monkeypatch):
    """One without unnamed files, as NFS; perhaps without second names, too, as FAT."""

    def refuse(call, unless):
        def called(*arguments, **options):
            if unless(*arguments):
                return call(*arguments, **options)
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

        return called

    monkeypatch.setattr(os, "open", refuse(os.open, lambda _, flags, *__: flags & os.O_TMPFILE != os.O_TMPFILE))
    if request.param == "neither":
        monkeypatch.setattr(os, "link", refuse(os.link, lambda *_: False))


@pytest.mark.usefixtures("old_file_system")
def test_a_file_system_without_unnamed_files(path):
    sink = write(path, b"half")
    (name,) = os.listdir(path.parent)
    assert re.fullmatch(r"\.pageferry-[0-9a-f]{32}\.part", name)
    sink.close()
    assert os.listdir(path.parent) == []
    for content in (Encoder().header(), b"new"):  # where there is nothing, and in place of an earlier one
        sink = write(path, content)
        sink.commit()
        sink.close()
        assert path.read_bytes() == content
        assert os.listdir(path.parent) == [path.name]
    sink = write(path.with_name("other"), b"mine")
    sink.path.write_bytes(b"a letter")
    with pytest.raises(UsageError, match="is not a saved guest"):
        sink.commit()
    sink.close()
    assert sink.path.read_bytes() == b"a letter"
    assert len(os.listdir(path.parent)) == 2


def test_what_is_not_a_file_stays_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nothing")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "link", tmp_path / "/"):
        with pytest.raises(UsageError, match="not a regular file"):
            FileOutlet(path)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]


def test_nothing_stays_open(path):
    before = open_descriptors()
    for end in (FileOutlet.commit, FileOutlet.close):
        sink = write(path, Encoder().header())
        end(sink)
        sink.close()
    path.write_bytes(b"a letter")
    with pytest.raises(UsageError):
        FileOutlet(path)
    assert open_descriptors() == before


def test_a_folder_that_cannot_be_written_to_the_disk_is_a_failure(path, monkeypatch):
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
