"""The progress display on real terminals of many widths: no line of the bar is broken, and no word is lost."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from processes import GIVE_UP_S, launch, reap
from progress_script import STEPS
from rich.cells import cell_len

SCRIPT = Path(__file__).parents[1] / "helpers" / "progress_script.py"
ESCAPES = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]")
SAID = [
    "round 0         123,456 pages  482.2 MiB in    1.50 s    321.5 MiB/s       77 dirty → next-round: "
    "the downtime fits when it is done → soon",
    "warning: a warning that is told",
    "cancelling",
    "held; `pageferry switch` lets it go on",
    "stop-and-copy        77 pages  482.2 MiB in    1.50 s    321.5 MiB/s",
]


class Terminal:
    """The script on a terminal; ``seen`` is all that it wrote there."""

    def __init__(self, columns, term):
        self.master, slave = pty.openpty()
        self.resize(columns)
        env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        env |= {"TERM": term, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"}
        self.popen = launch([sys.executable, SCRIPT], stdin=subprocess.PIPE, stdout=slave, stderr=slave, env=env)
        os.close(slave)
        self.seen = b""

    def resize(self, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def go(self, steps=1):
        self.popen.stdin.write(b"\n" * steps)
        self.popen.stdin.flush()

    def read(self, until=None):
        """Read on, to the end or as far as a text."""
        while until is None or until not in self.seen:
            assert select.select([self.master], [], [], GIVE_UP_S)[0], self.seen
            try:
                self.seen += os.read(self.master, 1 << 16)
            except OSError:  # the other end is closed
                break
        return self.seen.decode()

    def close(self):
        reap(self.popen)
        os.close(self.master)


@pytest.fixture
def terminal():
    made = []

    def open_one(columns, term="xterm"):
        made.append(Terminal(columns, term))
        return made[-1]

    yield open_one
    for each in made:
        each.close()


def shown(text):
    """The lines that stay, and those that are drawn over: the bar."""
    stay, drawn = [], []
    for line in text.split("\r\n"):
        *over, last = (ESCAPES.sub("", part) for part in line.split("\r"))
        stay.append(last)
        drawn += over
    return [line for line in stay if line.strip()], [line for line in drawn if line]


@pytest.mark.parametrize("columns", [80, 300, 10, 1])
def test_a_bar_fits_the_terminal_and_every_word_is_there(terminal, columns):
    at = terminal(columns)
    at.go(len(STEPS))
    text = at.read()
    assert at.popen.wait(GIVE_UP_S) == 0
    stay, drawn = shown(text)
    assert [line for line in stay if line in SAID] == SAID
    assert drawn
    assert max(map(cell_len, drawn)) <= columns
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is back
    if columns >= 80:
        assert any(re.search(r"post-copy .*50 %.*over in 1.00 s", line) for line in (*drawn, *stay))


def test_a_terminal_that_becomes_narrow_meanwhile_is_heeded(terminal):
    at = terminal(300)
    at.go()
    at.read(until=b"round 0")
    at.resize(10)
    at.go(len(STEPS) - 1)
    _, drawn = shown(at.read().partition(SAID[0])[2])
    assert drawn
    assert max(map(cell_len, drawn)) <= 10


def test_a_dumb_terminal_gets_lines_and_no_bar(terminal):
    at = terminal(80, "dumb")
    at.go(len(STEPS))
    text = at.read()
    assert "\x1b" not in text
    assert shown(text) == (SAID, [])


def test_without_a_terminal_there_are_lines_and_no_bar():
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"}
    lines = "\n" * len(STEPS)
    result = subprocess.run(
        [sys.executable, SCRIPT], input=lines, capture_output=True, text=True, env=env, timeout=GIVE_UP_S, check=True
    )
    assert result.stdout == ""
    assert result.stderr.splitlines() == SAID
