"""Standard streams that cannot be written or are closed, encodings, and what others say."""

import io
import json
import os
import sys

import pytest
from ended_command import ending, failing
from rich.console import Console

from pageferry.cli import stdio
from pageferry.cli.stdio import STREAMS, is_watched, print_object, standard_output, tell
from pageferry.core.errors import GuestAt, MigrationError, UsageError


class Standard:
    """The descriptors 1 and 2 of this process, on other files; everything as before at the end."""

    def __init__(self, out, err, encoding="utf-8"):
        self.files = {1: out, 2: err}
        self.encoding = encoding

    def __enter__(self):
        self.saved = {fd: os.dup(fd) for fd in self.files}
        self.streams = sys.stdout, sys.stderr
        for fd, file in self.files.items():
            os.dup2(file.fileno(), fd)
        for name, fd in (("stdout", 1), ("stderr", 2)):
            setattr(sys, name, open(fd, "w", encoding=self.encoding, closefd=False))  # as the interpreter
        return self

    def __exit__(self, *_):
        sys.stdout, sys.stderr = self.streams
        for fd, old in self.saved.items():
            os.dup2(old, fd)
            os.close(old)


@pytest.fixture
def full():
    with open("/dev/full", "wb", buffering=0) as file:
        yield file


@pytest.fixture
def no_reader():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as file:
        yield file


@pytest.mark.parametrize("lost", ["full", "no_reader"])
def test_progress_that_cannot_be_written_is_dropped(request, tmp_path, lost):
    def command():
        for _ in range(1000):
            tell("news")
        print_object({"status": "completed"})

    lost = request.getfixturevalue(lost)
    with (tmp_path / "out").open("w+b") as out:
        with Standard(out, lost):
            assert ending(command, "migrate", "--json") == 0
        assert json.loads((tmp_path / "out").read_text()) == {"status": "completed"}


@pytest.mark.parametrize("error", [None, MigrationError("cut", phase="x", guest_at=GuestAt.UNKNOWN)])
def test_results_that_cannot_be_written_do_not_change_what_happened(tmp_path, full, error):
    def command():
        STREAMS.make_results_a_courtesy()
        if error is not None:
            raise error
        for _ in range(1000):
            print_object({"status": "completed"})

    with (tmp_path / "err").open("w+b") as err:
        with Standard(full, err):
            assert ending(command, "migrate", "--json") == (0 if error is None else 4)
        assert "could not be written to standard output: No space left" in (tmp_path / "err").read_text()


def test_a_command_that_only_tells_fails_where_it_cannot(tmp_path, full, no_reader):
    for file, said in ((full, "pageferry: standard output: No space left on device\n"), (no_reader, "")):
        with (tmp_path / "err").open("w+b") as err:
            with Standard(file, err):
                assert ending(lambda: print_object({"status": "running"}), "status", "--json") == 1
            assert (tmp_path / "err").read_text() == said


def test_what_is_meant_for_a_closed_standard_output_is_told_to_be_lost(tmp_path):
    """As by ``>&-``: the interpreter has no such stream then."""
    for courtesy, code, said in (
        (False, 1, "pageferry: standard output: it is closed\n"),
        (True, 0, "pageferry: the result could not be written to standard output: it is closed\n"),
    ):

        def command(courtesy=courtesy):
            if courtesy:
                STREAMS.make_results_a_courtesy()
            print_object({"status": "completed"})

        with (tmp_path / "err").open("w+b") as err, Standard(err, err):
            sys.stdout = None
            assert ending(command, "migrate") == code
        assert (tmp_path / "err").read_text() == said


def test_a_guest_s_console_on_a_closed_standard_output_is_dropped_and_that_is_said(tmp_path):
    with (tmp_path / "err").open("w+b") as err, Standard(err, err):
        sys.stdout = None
        assert ending(lambda: os.write(standard_output("the console"), b"") or standard_output()) == 1
    assert (tmp_path / "err").read_text() == "pageferry: standard output is closed: the console is dropped\n"


def test_a_reader_that_is_slow_on_a_descriptor_that_does_not_block_gets_everything(tmp_path):
    read, write = os.pipe2(os.O_NONBLOCK)
    os.set_blocking(read, True)
    text = "x" * (1 << 20)
    pid = os.fork()
    if not pid:  # the reader
        os.close(write)
        with os.fdopen(read, "rb") as file:
            os._exit(0 if len(file.read()) > len(text) else 1)
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as out, (tmp_path / "err").open("wb") as err, Standard(out, err):
        assert ending(lambda: print_object({"text": text}), "status") == 0
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", b"> ### \\xe9 \\xff"), ("latin-1", b"> ### \xe9 \\xff"), ("utf-8", "→ █▌▕ é \\xff".encode())],
)
def test_characters_that_the_encoding_has_not_are_degraded(tmp_path, encoding, shown):
    name = os.fsdecode(b"\xff")

    def command():
        print(f"→ █▌▕ é {name}")
        raise UsageError(f"cannot read {name}")

    with (tmp_path / "out").open("w+b") as out, (tmp_path / "err").open("w+b") as err, Standard(out, err, encoding):
        assert ending(command, "inspect") == 2
    assert (tmp_path / "out").read_bytes() == shown + b"\n"
    assert b"cannot read \\xff\n" in (tmp_path / "err").read_bytes()


def test_a_stream_that_a_caller_put_there_is_used_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert ending(failing(UsageError("x", hint="y")), "status", "--json") == 2
    assert json.loads(sys.stdout.getvalue())["error"] == "x"
    assert sys.stderr.getvalue() == "pageferry: x\nhint: y\n"


def test_what_others_say_is_shown_and_never_obeyed(capfd):
    """A peer's reason, a guest's name or a file's may hold what a terminal obeys, or a line of its own."""
    evil = "a\x1b[2J\x1b]0;owned\x07\r\npageferry: all is well\u202e\x9b31m"

    def command():
        stdio.OUT.print(evil, markup=False)
        raise UsageError(evil, hint=evil)

    assert ending(command, "status") == 2
    said = capfd.readouterr()
    for text in (said.out, said.err):
        assert not {"\x1b", "\x07", "\r", "\x9b", "\u202e"} & {*text}
        assert "a\\x1b[2J" in text
    assert len(said.err.splitlines()) == 2
    assert len(said.out.splitlines()) == 1


def test_colours_that_are_forced_make_no_terminal_of_a_log(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    log = Console(file=io.StringIO())
    assert log.is_terminal
    assert not is_watched(log)
