"""A terminal, or a pair of pipes, at which a test works with a command of pageferry's."""

import os
import pty
import select
import subprocess
import termios

from processes import GIVE_UP_S, PAGEFERRY, reap


class Console:
    """A command of pageferry's, on a terminal (a pty) or with pipes; ``read_until`` reads what comes out."""

    def __init__(self, *arguments, terminal=True, stdin=None):
        self.master, slave = pty.openpty() if terminal else (None, None)
        self.slave = slave
        self.before = termios.tcgetattr(slave) if terminal else None
        self.popen = subprocess.Popen(
            [*PAGEFERRY, *map(str, arguments)],
            stdin=slave if terminal else stdin if stdin is not None else subprocess.PIPE,
            stdout=slave if terminal else subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.reader = self.master if terminal else self.popen.stdout.fileno()
        self.seen = b""

    def read_until(self, text):
        """Read on until ``text``; return everything read since the last call, ``text`` included."""
        while text not in self.seen:
            readable, _, _ = select.select([self.reader], [], [], GIVE_UP_S)
            assert readable, f"no {text!r} in {self.seen[-300:]!r}"
            data = os.read(self.reader, 1 << 16)
            assert data, f"the end instead of {text!r}: {self.seen!r}"
            self.seen += data
        head, _, self.seen = self.seen.partition(text)
        return head + text

    def type(self, data):
        os.write(self.master if self.master is not None else self.popen.stdin.fileno(), data)

    def settings(self):
        return termios.tcgetattr(self.slave)

    def wait(self):
        return self.popen.wait(GIVE_UP_S)

    def close(self):
        reap(self.popen)
        if self.master is not None:
            os.close(self.master)
            os.close(self.slave)
