"""The documents as tests read them: their code blocks, the commands in them, and a session that runs these.

A block of ``sh`` is run line by line, one of ``python`` as it is, and one of ``text`` that follows a block of ``sh`` is
what the first command there prints. After a line that begins with ``NOT_RUN`` the rest of its block is left out.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from at_work import until
from processes import launch, reap

from pageferry.core.errors import VmError
from pageferry.vmm.qmp_client import QmpClient

ROOT = Path(__file__).parents[2]
NOT_RUN = "# not run by the tests: "
#: Commands that go on until their guest ends, or for ever.
LASTING = ("run", "receive", "restore")
#: Commands that end well only if the guest can be paused for no longer than is allowed.
MOVING = ("demo", "migrate", "save")
#: What says by itself when such a one is paused.
_LIMITED = {"--downtime-limit", "--policy"}
_GIVE_UP_S = 500
_BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.M)
_ENVIRONMENT = re.compile(r"[A-Z]+=\S*")
_UNITS = r"(?:[KMG]iB/s|B/s|[KMG]iB|B|ns|µs|ms|s)\b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One code block: its language, "" for none, and its lines."""

    language: str
    text: str

    def commands(self) -> list[str]:
        """Return the commands of a block of ``sh``, each in one line, without comments."""
        run = self.text.partition(NOT_RUN)[0].replace("\\\n", " ")
        lines = (re.sub(r"(^|\s+)#( .*)?$", "", line).strip() for line in run.splitlines())
        return [line for line in lines if line]


def blocks_of(document: Path) -> list[Block]:
    """Return the code blocks of a document, in order."""
    return [Block(language=language, text=text) for language, text in _BLOCK.findall(document.read_text())]


def outputs_of(blocks: list[Block]) -> dict[str, str]:
    """Return what commands print, by command, as the document shows it."""
    pairs = [pair for pair in pairwise(blocks) if [block.language for block in pair] == ["sh", "text"]]
    return {commands.commands()[0]: output.text for commands, output in pairs}


def shape(line: str) -> str:
    """Return a line of output without what differs from run to run: figures, units, reasons, the machine."""
    line = re.sub(r"0x[0-9a-f]+|\d[\d,.]*", "#", line.partition("→")[0])
    line = re.sub(rf"# {_UNITS}", "#", line)
    line = re.sub(r"^machine: .*", "machine:", line)
    return " ".join(line.split())


def expect_printed(shown: str, printed: str) -> None:
    """Check that each line that a document shows, up to a "…", begins one that was printed, except for figures."""
    shapes = [shape(line) for line in printed.splitlines()]
    lines = [(line, shape(line.partition("…")[0]).rstrip("│ ")) for line in shown.splitlines()]
    assert [line for line, begin in lines if not any(each.startswith(begin) for each in shapes)] == [], printed


class Session:
    """Does in a folder, line by line, what a document says.

    ``/tmp`` is this folder, ports are free ones, and a migration has all the time that a busy host may take. Guests run
    on until :meth:`close`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = self._at = folder
        self._ports: dict[str, int] = {}
        self._going_on: list[subprocess.Popen[Any]] = []
        self._to_end: list[subprocess.Popen[Any]] = []
        self._made = 0

    def do(self, line: str) -> str:
        """Do what one line says; return what it prints, as far as it is waited for."""
        here = re.sub(r":(\d{4})\b", self._port, line.replace("/tmp/", f"{self._folder}/"))
        here, in_background = re.subn(r"\s*&$", "", here)
        words = shlex.split(here)
        given = [words.pop(0) for _ in range(len(words)) if _ENVIRONMENT.fullmatch(words[0])]
        environment = os.environ | dict(each.split("=", 1) for each in given)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(self._at))))
        if words[0] == "cd":
            self._at = ROOT / words[1]
            return ""
        if words[0] == "make":
            return self._make(words[1:])
        assert words[0] == "pageferry", line
        patience = ["--downtime-limit", "60000"] if words[1] in MOVING and not _LIMITED & {*words} else []
        command = [sys.executable, "-m", *words, *patience]
        if words[1] in LASTING:
            return self._begin(command, environment)
        if words[1] == "console":
            return self._talk(command, environment)
        if in_background:
            return self._ask(command, environment)
        there = self._at if not any(word.startswith(("tests/", "build/")) for word in words) else ROOT
        done = subprocess.run(
            command, cwd=there, env=environment, capture_output=True, text=True, timeout=_GIVE_UP_S, check=False
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return done.stdout + done.stderr

    def close(self) -> None:
        """Wait for what was to end, and end the rest."""
        try:
            for popen in self._to_end:
                assert popen.wait(_GIVE_UP_S) == 0
        finally:
            for popen in (*self._to_end, *self._going_on):
                reap(popen)

    def _port(self, match: re.Match[str]) -> str:
        if match[1] not in self._ports:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self._ports[match[1]] = free.getsockname()[1]
        return f":{self._ports[match[1]]}"

    def _make(self, targets: list[str]) -> str:
        """Do what the recipes say of pageferry; what else they do is for those who set up."""
        listed = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
        assert listed.returncode == 0, listed.stderr
        there, self._at = self._at, ROOT
        recipes = [line.partition("/bin/")[2] for line in listed.stdout.splitlines() if "/bin/pageferry " in line]
        printed = [self.do(recipe) for recipe in recipes]
        self._at = there
        return "".join(printed)

    def _begin(self, command: list[str], environment: dict[str, str]) -> str:
        self._made += 1
        own = [] if "--control" in command else ["--control", f"{self._folder}/own{self._made}.sock"]
        command = [*command, *own]
        log = self._folder / f"{self._made}.log"
        with log.open("w") as output:
            popen = launch(
                command,
                cwd=self._at,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                text=True,
            )
        self._going_on.append(popen)
        control = Path(command[command.index("--control") + 1])

        def answers() -> bool:
            assert popen.poll() is None, f"{command}: {log.read_text()}"
            try:
                QmpClient(control).close()
            except VmError:
                return False
            return True

        until(answers, lambda: f"{command}: {log.read_text()}")
        if own:
            reap(popen)
        return ""

    def _talk(self, command: list[str], environment: dict[str, str]) -> str:
        """Type at a console until it answers: a guest that is still booting may drop what it does not read yet."""
        popen = launch(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._going_on.append(popen)
        os.set_blocking(popen.stdout.fileno(), False)
        printed = b""

        def answers() -> bool:
            nonlocal printed
            assert popen.poll() is None, popen.stderr.read()
            popen.stdin.write(b"are you there?\n")
            popen.stdin.flush()
            printed += popen.stdout.read() or b""
            return b"are you there?" in printed

        until(answers, lambda: f"answer at the console: {printed!r}", poll_s=0.5)
        popen.send_signal(signal.SIGINT)
        popen.wait(_GIVE_UP_S)
        return printed.decode(errors="replace")

    def _ask(self, command: list[str], environment: dict[str, str]) -> str:
        """Begin a migration that other commands are about; return when it is under way."""
        popen = launch(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
        self._to_end.append(popen)
        with QmpClient(Path(command[command.index("--control") + 1])) as client:
            until(lambda: client.execute("query-migrate").get("status") in ("active", "pre-switchover"), "begin")
        return ""
