"""Follows the console of a Linux at work, wherever it is: shows each line, and counts the rounds of work."""

import base64
import re
import threading
from collections.abc import Callable

from pageferry.core.errors import VmError
from pageferry.core.threads import begin
from pageferry.vmm.qmp_client import QmpClient

#: What ``work.sh`` says.
_ROUND = re.compile(r"work: round (\d+)")
_WRONG = "work: WRONG"
_TIMEOUT_S = 300.0


class LinuxWork:
    """Follows the guest from process to process.

    Args:
        show: sees each line of its console, after the name of the process where it was said; on several threads.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._changed = threading.Condition()
        self._begun = b""  # a line that has no end yet: it may end in another process
        self._thread: threading.Thread | None = None
        self._rounds = 0
        self._wrong: str | None = None
        self._ended: str | None = None

    def follow(self, where: str, client: QmpClient) -> None:
        """Show what the guest says in a process, on a thread, until its console or the connection ends.

        A guest that was followed before has moved: what it said there is shown first.

        Args:
            where: how lines call the process.
            client: a connection for this alone.

        Raises:
            QmpError: there is no guest.
        """
        if self._thread is not None:
            self._thread.join()
        client.execute("x-console-follow")
        self._ended = None
        self._thread = begin(self._take, f"console-{where}", where, client)

    def wait_for_rounds(self, rounds: int) -> int:
        """Wait until the guest has done so many rounds of work in all; return how many it has done.

        Raises:
            VmError: it found something wrong, ended, or took too long.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: self._rounds >= rounds or self._wrong or self._ended, _TIMEOUT_S)
            if why := self._wrong or self._ended:
                raise VmError(f"the guest does not go on: {why}")
            if not done:
                raise VmError(f"the guest did {self._rounds} rounds of work in {_TIMEOUT_S:.0f} s, not {rounds}")
            return self._rounds

    def _take(self, where: str, client: QmpClient) -> None:
        ended = None
        try:
            for message in client.events():
                if message["event"] == "X_PAGEFERRY_CONSOLE":
                    self._take_output(where, base64.b64decode(message["data"]["output"]))
                    ended = message["data"]["end"]
                if ended is not None:
                    break
        except VmError as error:
            ended = str(error)
        with self._changed:
            self._ended = ended
            self._changed.notify_all()

    def _take_output(self, where: str, data: bytes) -> None:
        *lines, self._begun = (self._begun + data).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            self._show(f"{where:>11} │ {text}")
            with self._changed:
                if found := _ROUND.fullmatch(text):
                    self._rounds = int(found[1])
                elif text.startswith(_WRONG):
                    self._wrong = text
                self._changed.notify_all()
