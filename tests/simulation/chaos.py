"""``make chaos``: real processes are killed, stopped, cut off and left without disk in the midst of what they do.

    python -m simulation.chaos [--seed N] [--count N] [--run N] [--image FOLDER]

In each run a guest that checks itself is migrated, by pre-copy or post-copy, saved or restored, on ``soft`` or ``kvm``;
one of twenty is a Linux at work. At a moment drawn by chance one thing goes wrong: SIGKILL, SIGSTOP and SIGCONT, a cut,
a network that stands still, a full disk. Afterwards, by following what the commands and the documents advise, there is
exactly one guest, or it is lost and was told to be, because the process was killed that had it; what the exit codes
said of it was true; it has found no fault with itself; and it can be migrated again, to the process that was left
waiting if there is one.

The seed and a run's number decide what is tried (not how far it is when it goes wrong: that is up to the host), and are
said with a failure. Ends with 0 when every run ended well, with 1 at the first that did not. What this host lacks, KVM,
a Linux image, the right to mount a tmpfs, is left out, which is said.
"""

import argparse
import contextlib
import hashlib
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from linux_guest import trouble_in
from processes import GIVE_UP_S, PAGEFERRY, Process, cli, launch, reap
from proxy import Line, marker

from pageferry.core.errors import UnsupportedError, VmError
from pageferry.guests.linux.debian import LinuxImage
from pageferry.kvm.probe import probe
from pageferry.stream.ferry_frames import FrameType
from pageferry.testing.lab import Violation, require

DEFAULT_COUNT = 500
BUILD = Path(__file__).resolve().parents[2] / "build" / "linux"
#: A saved guest that is to be replaced.
_EARLIER = Path(__file__).resolve().parents[1] / "golden" / "pageferry-v3-1.bin"
_LINUX_PART = 0.05
#: Room for any guest, until something else fills it.
_DISK_KIB = 256 << 10
_FILLER = "filler"
#: States of a guest that has found something wrong; its process may stay, for a source that has not heard yet.
_ENDED = ("shutdown", "guest-panicked", "io-error")
#: After so many operations ``kv`` checks the next page of its working set.
_WORK_PER_PAGE = 4
_ROUND = re.compile(r"work: round (\d+)")
_LINUX_PATIENCE_S = 900
#: How long the ends of a migration that is disturbed wait for each other; how long it stands still is drawn around it.
_TIMEOUT_S = 3.0
_SPANS_S = (0.1, 0.5, 1.5, 4.5, 6.0)
_F = FrameType
_FRAMES = (_F.SOURCE_HELLO, _F.DESTINATION_HELLO, _F.REACHED, _F.DIGESTS, _F.READY)
_AT_THE_END = {
    "precopy": (_F.COMMIT, _F.RUNNING, _F.DROPPED),
    "postcopy": (_F.SWITCH, _F.RUNNING, _F.WANTED, _F.PAGES, _F.COMPLETE, _F.DROPPED),
}
_POLICIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "precopy": (
        ("--policy", "xen", "--max-rounds", "3"),
        ("--policy", "downtime", "--downtime-limit", "5000"),
        ("--policy", "converge", "--downtime-limit", "5000"),
    ),
    "postcopy": (("--policy", "postcopy", "--downtime-limit", "1", "--max-rounds", "1"),),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is tried in one run.

    ``way``: ``precopy``, ``postcopy``, ``save`` or ``restore``. ``guest``: ``kv`` or ``linux``. ``harm``: ``kill``,
    ``stop``, ``cut``, ``stall`` or ``full``; ``victim``: whose process, ``source`` or ``destination``. When: ``frame``
    is about to be sent, or after ``after_bytes`` on the wire, or ``after_s``. ``span_s``: how long it lasts.
    ``lazily``: a restore; ``stop``: a save.
    """

    way: str
    guest: str
    accels: tuple[str, str]
    memory_mib: int
    working_set_kib: int
    options: tuple[str, ...]
    harm: str
    victim: str
    span_s: float
    frame: FrameType | None = None
    after_bytes: int | None = None
    after_s: float = 0.0
    lazily: bool = False
    stop: bool = False

    def __str__(self) -> str:
        when = f" at {self.frame.name}" if self.frame is not None else f" after {self.after_s:.2f} s"
        when = when if self.after_bytes is None else f" after {self.after_bytes >> 10} KiB"
        whom = f" {self.victim}" if self.harm in ("kill", "stop") and self.way in _AT_THE_END else ""
        lasts = f" for {self.span_s} s" if self.harm in ("stop", "stall", "cut") else ""
        return f"{self.guest} {'-'.join(self.accels)} {self.way}, {self.harm}{whom}{when}{lasts}"


def plan(draw: random.Random, host: "Host") -> Plan:
    """Draw what is tried."""
    guest = "linux" if draw.random() < _LINUX_PART and host.linux is not None else "kv"
    way = draw.choice(("precopy", "precopy", "precopy", "postcopy", "postcopy", "postcopy", "save", "restore"))
    accels = draw.choice(host.accels), draw.choice(host.accels)
    harms = {
        "save": ("kill", "stop", *(("full",) if host.mounts else ())),
        "restore": ("kill", "stop"),
    }.get(way, ("kill", "kill", "stop", "cut", "cut", "stall"))
    memory_mib, working_set_kib = draw.choice((16, 24, 48)), draw.choice((64, 1024, 4096))
    when = draw.choice(("frame", "frame", "frame", "bytes", "time")) if way in _AT_THE_END else "time"
    frames = (*_FRAMES, *2 * _AT_THE_END.get(way, ()))
    return Plan(
        way=way,
        guest=guest,
        accels=("soft", "soft") if guest == "linux" else accels,
        memory_mib=memory_mib,
        working_set_kib=working_set_kib,
        options=draw.choice(_POLICIES.get(way, ((),))) + (("--connections", "3") if draw.random() < 0.2 else ()),
        harm=draw.choice(harms),
        victim=draw.choice(("source", "destination")),
        span_s=draw.choice(_SPANS_S),
        frame=draw.choice(frames) if when == "frame" else None,
        after_bytes=int(draw.random() * (working_set_kib + 512)) << 10 if when == "bytes" else None,
        after_s=draw.random() * (0.6 if way == "save" else 1.5),
        lazily=draw.random() < 0.5,
        stop=draw.random() < 0.5,
    )


@dataclass(kw_only=True)
class Host:
    """What this host has: accels, a Linux that works in a file, and whether a tmpfs can be mounted.

    ``within``: what processes are run by.
    """

    folder: Path
    accels: tuple[str, ...]
    linux: Path | None
    mounts: bool
    within: tuple[str, ...] = ()


@contextlib.contextmanager
def _small_disk(folder: Path, size_kib: int) -> Iterator[None]:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "chaos", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


class Run:
    """One run: its processes, and what becomes of the guest.

    Args:
        plan: what is tried.
        host: where.
        folder: empty, for files.
    """

    def __init__(self, plan: Plan, host: Host, folder: Path) -> None:
        self._plan = plan
        self._host = host
        self._folder = folder
        self._processes: list[Process] = []
        self._killed: set[Process] = set()
        self._told: list[str] = []

    def close(self) -> None:
        """End all processes."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.popen.send_signal(signal.SIGCONT)
            process.end()

    def logs(self) -> str:
        """Return what the processes have said."""
        shown = [f"{each.control.stem} ({each.popen.poll()}): {each.log.read_text()}" for each in self._processes]
        return "\n".join([*self._told, *shown])

    def go(self) -> str:
        """Do it all; return in words what became of the guest.

        Raises:
            Violation: something was not as it must be.
        """
        doing = {"save": self._save, "restore": self._restore}.get(self._plan.way, self._migrate)
        what, owner = doing()
        if owner is not None:
            self._works(owner)
            self._move_on(owner)
        return what

    # -- processes and commands ----------------------------------------------------------------------------------------

    def _start(self, name: str, *arguments: object) -> Process:
        name = f"{name}{len(self._processes)}"
        self._processes.append(Process(self._folder, name, *arguments, within=self._host.within))
        return self._processes[-1]

    def _source(self) -> Process:
        plan = self._plan
        if plan.guest == "linux":
            return self._start("linux", "restore", self._host.linux, "--accel", plan.accels[0])
        size = ("--memory", f"{plan.memory_mib}M", "--working-set", f"{plan.working_set_kib}K")
        source = self._start("source", "run", "kv", "--accel", plan.accels[0], *size)
        self._works(source)
        return source

    def _receiver(self) -> Process:
        where = ("tcp://127.0.0.1:0", "--timeout", str(_TIMEOUT_S))
        return self._start("destination", "receive", *where, "--accel", self._plan.accels[1])

    def _command(self, name: str, process: Process, *arguments: object) -> int:
        """Run a command; return its exit code."""
        done = cli(name, "--control", process.control, *arguments)
        self._told.append(f"{name} {' '.join(map(str, arguments))}: {done.returncode}: {done.stderr.strip()[-600:]}")
        require("Traceback" not in done.stderr and done.returncode != 1, f"a defect: {done.stderr}")
        return done.returncode

    @staticmethod
    def _lives(process: Process) -> bool:
        return process.popen.poll() is None

    def _state(self, process: Process) -> str:
        """Return the state of a guest process, "dead" if there is none."""
        if not self._lives(process):
            require(process in self._killed, f"{process.control.stem} ended by itself: {process.popen.returncode}")
            return "dead"
        state = str(process.status())
        require(state not in _ENDED, f"{process.control.stem} ended by itself: {state}")
        return state

    def _comes_to(self, process: Process, *states: str, never: str = "") -> None:
        """Wait for a state; it is in no instant ``never``."""

        def there() -> bool:
            state = self._state(process)
            require(state != never, f"{process.control.stem} is {state}, and is to be one of {states}")
            return state in states

        process.until(there, f"one of {states}")

    def _kill(self, process: Process) -> None:
        self._killed.add(process)
        process.popen.kill()
        process.popen.wait()

    # -- what goes wrong -----------------------------------------------------------------------------------------------

    def _harm(self, victim: Process, line: Line | None) -> None:
        plan = self._plan
        if plan.harm == "kill":
            self._kill(victim)
        elif plan.harm == "stop":
            victim.popen.send_signal(signal.SIGSTOP)
            time.sleep(plan.span_s)
            victim.popen.send_signal(signal.SIGCONT)
        elif plan.harm == "full":
            with contextlib.suppress(OSError), (self._folder / "disk" / _FILLER).open("wb", buffering=0) as filler:
                while filler.write(bytes(1 << 20)):
                    pass
        elif line is not None and plan.harm in ("cut", "stall"):
            if plan.harm == "cut":
                line.cut()
            else:
                line.stall()
            time.sleep(plan.span_s)
        if line is not None:
            line.flow()

    @contextlib.contextmanager
    def _harmed(self, victim: Process, line: Line | None = None) -> Iterator[list[bool]]:
        """Let it go wrong within the block, when the moment comes, if it comes before the block ends.

        The list has one entry if it did.
        """
        over, happened = threading.Event(), list[bool]()

        def wait() -> None:
            if line is not None and (self._plan.frame is not None or self._plan.after_bytes is not None):
                while not line.reached.wait(0.02):
                    if over.is_set():
                        return
            elif over.wait(self._plan.after_s):
                return
            happened.append(True)
            self._harm(victim, line)

        thread = threading.Thread(target=wait)
        thread.start()
        try:
            yield happened
        finally:
            over.set()
            thread.join()

    # -- migrations ----------------------------------------------------------------------------------------------------

    def _migrate(self) -> tuple[str, Process | None]:
        plan, source, destination = self._plan, self._source(), self._receiver()
        frame = None if plan.frame is None else marker(plan.frame)
        endpoint = destination.endpoint()
        line = Line(endpoint, after_bytes=plan.after_bytes, at=frame)
        victim = source if plan.victim == "source" else destination
        with contextlib.closing(line), self._harmed(victim, line) as happened:
            slow = ("--bandwidth", f"{random.Random(str(plan)).choice((8, 32, 128))}M")
            code = self._command("migrate", source, line.uri, "--timeout", _TIMEOUT_S, *plan.options, *slow)
        what = f"{'' if happened else 'undisturbed, '}code {code}"
        return self._found_out(code, what, source, destination, str(endpoint))

    def _found_out(
        self, code: int, what: str, source: Process, destination: Process, uri: str
    ) -> tuple[str, Process | None]:
        """Do what the exit code advises; return what became of the guest, and the process that has it."""
        require(code in (0, 3, 4, 6, 11), f"{what}, which says nothing about this")
        if code != 0 and not self._lives(source):
            return self._without_source(what, source, destination)
        if code in (4, 11) and self._lives(destination):
            again = self._recovered(source, uri)
            require(again in (0, 3) and (again == 0 or code == 4), f"{what}, and --recover {again}")
            what, code = f"{what}, recovered {again}", again
        if code == 0:
            self._comes_to(source, "postmigrate", "dead", never="running")
            if not self._lives(destination):
                return f"{what}, lost with its destination", self._lost(destination)
            self._comes_to(destination, "running")
            destination.until(lambda: destination.ask("x-query-guest")["missing_pages"] == 0, "all pages")
            return f"{what}, at the destination", destination
        if code == 3:
            self._comes_to(source, "running")
            self._comes_to(destination, "inmigrate", "dead", never="running")
            return f"{what}, at the source", source
        if code == 4:
            require(not self._lives(destination), "the destination is there, and was asked")
            self._expect_stands(source)
            self._taken_back(source)
            return f"{what}, taken back to the source", source
        require(code == 11 and not self._lives(destination), f"{what}, but the source lives, or the destination does")
        self._expect_stands(source)
        return f"{what}, lost with its destination", self._lost(destination)

    def _recovered(self, source: Process, uri: str) -> int:
        """Ask the destination until it has had time to see what went on; return the exit code."""
        for _ in range(20):
            code = self._command("migrate", source, uri, "--recover")
            if code not in (4, 11):
                break
            time.sleep(0.5)
        return code

    def _without_source(self, what: str, source: Process, destination: Process) -> tuple[str, Process | None]:
        """The source was killed: the guest is at the destination, whole, or lost."""
        self._lost(source)
        destination.until(lambda: self._settled(destination), f"an end there: {self._state(destination)}")
        if self._state(destination) == "running":
            return f"{what}, at the destination", destination
        return f"{what}, lost with its source", None

    def _settled(self, destination: Process) -> bool:
        state = self._state(destination)
        told = destination.ask("x-query-guest")
        if state == "inmigrate":
            return "no guest received" in destination.log.read_text() or told["silent_s"] is None
        return bool(told.get("waits_for_source")) or (state == "running" and told["missing_pages"] == 0)

    def _lost(self, process: Process) -> None:
        require(process in self._killed, f"the guest is lost, and {process.control.stem} was not killed")

    def _expect_stands(self, source: Process) -> None:
        require(self._state(source) == "postmigrate", f"the source is {self._state(source)}")
        require(self._command("resume", source) == 2, "a guest that may be elsewhere was resumed")

    def _taken_back(self, source: Process) -> None:
        def taken() -> bool:
            return self._command("resume", source, "--force") == 0

        source.until(taken, "the guest back, when no commit can be accepted any more")
        self._comes_to(source, "running")

    # -- files ---------------------------------------------------------------------------------------------------------

    def _save(self) -> tuple[str, Process | None]:
        plan, source = self._plan, self._source()
        with self._disk() as folder:
            file = folder / "guest.bin"
            earlier = random.Random(str(plan)).choice((None, _EARLIER.read_bytes()))
            if earlier is not None:
                file.write_bytes(earlier)
            stop = ("--stop",) if plan.stop else ()
            with self._harmed(source):
                code = self._command("save", source, file, *stop, "--policy", "xen", "--bandwidth", "8M")
            what = f"code {code}"
            if code == 0:
                require(cli("inspect", "--check", file).returncode == 0, "the file is not whole")
                self._comes_to(source, "postmigrate" if plan.stop else "running", "dead")
                copy = self._start("copy", "restore", file, "--accel", plan.accels[1])
                self._works(copy)
                if plan.stop or not self._lives(source):
                    return f"{what}, in the file", copy
                self._quit(copy)
                return f"{what}, at the source, and a copy in the file", source
            (folder / _FILLER).unlink(missing_ok=True)
            left = sorted(path.name for path in folder.iterdir())
            if code == 3:
                short = re.search(r"No space left|has .* free", self._told[-1])
                require(plan.harm == "full" and short, "the save failed, and not for want of room")
                self._comes_to(source, "running")
            else:
                require(code == 6 and not self._lives(source), f"{what}, which says nothing about this")
                self._lost(source)
            now = file.read_bytes() if file.exists() else None
            whole = now is not None and cli("inspect", "--check", file).returncode == 0
            require(now == earlier or (code == 6 and whole), "the file is neither the earlier one nor whole")
            require(left == ([] if now is None else [file.name]), f"more is left than the file: {left}")
        if code == 3:
            return f"{what}, at the source", source
        return f"{what}, {'in the file' if whole else 'lost with its source'}", None

    @contextlib.contextmanager
    def _disk(self) -> Iterator[Path]:
        """Where a save goes: if that is the harm, a small disk."""
        folder = self._folder / "disk"
        folder.mkdir()
        if self._plan.harm != "full":
            yield folder
            return
        with _small_disk(folder, _DISK_KIB):
            yield folder

    def _restore(self) -> tuple[str, Process | None]:
        plan, source, file = self._plan, self._source(), self._folder / "guest.bin"
        require(self._command("save", source, file, "--stop", "--policy", "xen") == 0, "it could not be saved")
        self._quit(source)
        digest = hashlib.sha256(file.read_bytes()).digest()
        arguments = ["restore", file, "--accel", plan.accels[1], *(["--lazy"] if plan.lazily else [])]
        own = ["--control", str(self._folder / "first.sock")]
        first = launch([*PAGEFERRY, *arguments, *own], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            time.sleep(plan.after_s)
            first.send_signal(signal.SIGKILL if plan.harm == "kill" else signal.SIGSTOP)
            time.sleep(min(plan.span_s, 1.0))
        finally:
            reap(first)
        require(hashlib.sha256(file.read_bytes()).digest() == digest, "restoring has changed the file")
        return "and then restored, at the source", self._start("restored", *arguments)

    # -- the guest -----------------------------------------------------------------------------------------------------

    def _works(self, process: Process) -> None:
        """Wait until the guest has done so much that it has checked all of itself; nothing was wrong."""
        self._comes_to(process, "running")
        if self._plan.guest == "linux":
            self._linux_works(process)
            return
        enough = process.work() + 2 * _WORK_PER_PAGE * (self._plan.working_set_kib // 4)

        def worked() -> bool:
            state = self._state(process)
            require(state == "running", f"the guest is {state}")
            return process.work() >= enough

        process.until(worked, "work")

    @staticmethod
    def _linux_works(process: Process) -> None:
        def rounds() -> int:
            said = process.ask("x-query-guest")["console"]
            require(trouble_in(said.encode()) is None, said[-4000:])
            return max(map(int, _ROUND.findall(said)), default=0)

        enough, give_up_s = rounds() + 2, time.monotonic() + _LINUX_PATIENCE_S
        while rounds() < enough:
            require(time.monotonic() < give_up_s, "the Linux does not go on")
            time.sleep(0.2)

    def _move_on(self, owner: Process) -> None:
        """Migrate the guest again, undisturbed: to who waits for one, or to a new process. Then end all by a word."""
        waiting = next(
            (each for each in self._processes if each is not owner and self._state(each) == "inmigrate"), None
        )
        there = waiting or self._receiver()
        code = self._command("migrate", owner, there.endpoint(), "--timeout", GIVE_UP_S, "--downtime-limit", "60000")
        require(code == 0, f"a second migration failed: {code}")
        self._comes_to(owner, "postmigrate")
        self._comes_to(there, "running")
        self._works(there)
        running = [each.control.stem for each in self._processes if self._state(each) == "running"]
        require(running == [there.control.stem], f"more than one guest runs: {running}")
        for process in (owner, there):
            self._quit(process)

    def _quit(self, process: Process) -> None:
        require(self._command("quit", process) == 0, "it did not quit")
        require(process.popen.wait(GIVE_UP_S) == 0, f"it ended with {process.popen.returncode}")
        self._killed.add(process)  # as we have wanted


# -- all runs ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def host(image: Path, say: Callable[[str], None]) -> Iterator[Host]:
    """Find out what this host has; a Linux is booted only when the first run wants it."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        yield Host(
            folder=folder, accels=_accels(say), linux=_linux_at_work(image, folder, say), mounts=_mounts(folder, say)
        )


def _accels(say: Callable[[str], None]) -> tuple[str, ...]:
    try:
        probe()
    except (UnsupportedError, VmError) as error:
        say(f"kvm is left out: {error}")
        return ("soft",)
    return ("soft", "kvm")


def _mounts(folder: Path, say: Callable[[str], None]) -> bool:
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16k", "chaos", str(folder)], check=True, capture_output=True
        )
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"full disks are left out: a tmpfs cannot be mounted ({error})")
        return False
    return True


def _linux_at_work(image: Path, folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return a file with a Linux that has begun to work on ``soft``, or None."""
    linux = LinuxImage.of(image)
    if not linux.kernel.is_file():
        say(f"Linux is left out: no kernel in {image} (make linux-image)")
        return None
    arguments = ("--accel", "soft", "--memory", "128M", "--append", "console=ttyS0 quiet pageferry=work")
    process = Process(folder, "boot", "run", "--kernel", linux.kernel, "--initrd", linux.initramfs, *arguments)
    try:
        Run._linux_works(process)
        done = cli("save", "--control", process.control, folder / "linux.bin", "--stop", "--policy", "xen")
        require(done.returncode == 0, f"the Linux could not be saved: {done.stderr}")
    finally:
        process.end()
    return folder / "linux.bin"


def run(number: int, seed: int, on: Host) -> str:
    """Do one run; return in one line what was tried, and what became of it.

    Raises:
        Violation: something was not as it must be; the message has all that was said.
    """
    drawn = plan(random.Random(f"{seed} {number}"), on)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir=on.folder) as folder:
        this = Run(drawn, on, Path(folder))
        try:
            outcome = this.go()
        except BaseException as error:
            raise Violation(f"{drawn}: {error}\n{this.logs()}") from error
        finally:
            this.close()
    return f"{drawn}: {outcome}; {time.monotonic() - began_s:.1f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m simulation.chaos", description="Disturb real processes.")
    parser.add_argument("--seed", type=int, help="draw the runs of that seed (default: another one each time)")
    parser.add_argument("--count", type=int, default=DEFAULT_COUNT, help="runs (default: %(default)s)")
    parser.add_argument("--run", type=int, help="only the run of this number, from 1")
    parser.add_argument("--image", type=Path, default=BUILD / "cloud", help="kernel and initramfs (make linux-image)")
    options = parser.parse_args(arguments)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    numbers = range(1, options.count + 1) if options.run is None else [options.run]
    became = Counter[str]()

    def say(line: str) -> None:
        print(line, flush=True)

    say(f"chaos: seed {seed}, {len(numbers)} runs")
    with host(options.image, say) as on:
        for number in numbers:
            try:
                line = run(number, seed, on)
            except Violation as error:
                say(f"{number}: {error}")
                say(f"chaos: FAILED, seed {seed}, run {number}: make chaos SEED={seed} RUN={number}")
                return 1
            became[re.sub(r".*, ", "", line.partition(";")[0])] += 1
            say(f"{number}/{options.count} {line}")
    shown = ", ".join(f"{count} {what}" for what, count in became.most_common())
    say(f"chaos: {len(numbers)} runs, exactly one guest after each or a loss that was told: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
