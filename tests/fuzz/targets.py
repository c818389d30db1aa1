"""What is fuzzed. Each target has seeds, is run on one changed seed at a time, and knows what must be so afterwards.

A run returns its outcome in words, or raises :class:`WrongError`: an error that nothing promises, a guest that runs in
two places or in none, memory that is not the source's, a write beside RAM, memory taken beyond all bounds. What breaks
the process, or makes it hang, is seen from outside (:mod:`fuzz.fuzz`).
"""

import contextlib
import gc
import json
import os
import random
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import xxhash
from altered import AlteredSource, alter
from processes import Process, cli

from fuzz.guarded import Guarded
from fuzz.record import Scribbles, guest
from fuzz.script import Player, Turn
from fuzz.structure import Chunk, cut, entries_of
from pageferry.core.bitmap import expand_runs
from pageferry.core.errors import (
    GuestAt,
    MigrationError,
    RemoteStreamError,
    UnsupportedError,
    UsageError,
    VmError,
)
from pageferry.core.events import PostcopyPaused
from pageferry.core.frames import PAGE_SIZE
from pageferry.core.memory import GuestMemory
from pageferry.core.vm import VmConfig
from pageferry.engine.destination import Destination
from pageferry.engine.image.restore import restore, restore_lazily
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.engine.options import MigrationOptions, VerifyMode, WireOptions
from pageferry.engine.room import GuestLimits
from pageferry.engine.wire.peer import Peer
from pageferry.hypervisor import invariants
from pageferry.hypervisor.domain import Domain
from pageferry.kvm.probe import probe
from pageferry.kvm.vm import KvmVm
from pageferry.stream.ferry_frames import FrameType
from pageferry.stream.ferry_order import Side
from pageferry.stream.hvm_context import decode_machine_state, encode_machine_state
from pageferry.stream.packing import Packing
from pageferry.vmm.qmp_error import QmpError

MiB = 1 << 20
#: What may arrive; and how much more than nothing any attempt may hold: what is populated ahead, and some.
_LIMITS = GuestLimits(memory_bytes=4 << 30, cpus=8)
_MOST_HELD_BYTES = 256 * MiB
#: A page that comes with one of these is proven by nothing else.
_PROVE_MEMORY = {"SOURCE_HELLO", "DIGESTS", "AUDIT", "PAGES", "MISSING"}
_COMPLETED = "completed"
_EXIT_CODES = {0, 7}


class WrongError(Exception):
    """Something was so that must not be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """Where changes begin: turns, or a file or state as the only one.

    ``outcome``: a regular expression that the outcome matches as long as nothing is changed. ``recorded``: the name of
    the recording that it is made of.
    """

    turns: tuple[Turn, ...]
    outcome: str
    recorded: str = ""


class Target(Protocol):
    """Something that reads what others wrote."""

    name: str
    seeds: Mapping[str, Seed]

    def run(self, seed: Seed, turns: Sequence[Turn], touched: set[str], draw: random.Random) -> str:
        """Run it on changed turns of a seed; ``touched`` are the names of what was changed. Return the outcome."""

    def close(self) -> None:
        """Check what is left of all runs, and end."""

    def cut(self, data: bytes) -> list[Chunk]:
        """Take what is said in one turn apart."""

    def keeps(self, text: str) -> bool:
        """Tell whether a string in JSON stays as it is."""


def require(condition: object, what: str) -> None:
    """Raise WrongError unless it is so."""
    if not condition:
        raise WrongError(what)


def _kvm_works() -> bool:
    try:
        probe()
    except (UnsupportedError, VmError):
        return False
    return True


def contents_of(memory: GuestMemory) -> str:
    """Return a digest of all pages that are not zeros."""
    digest = xxhash.xxh3_128()
    for gfn in expand_runs(*memory.populated()).tolist():
        if memory.is_ram(gfn * PAGE_SIZE):
            page = memory.read(gfn * PAGE_SIZE, PAGE_SIZE)
            if any(page):
                digest.update(gfn.to_bytes(8, "little") + page)
    return digest.hexdigest()


class Held:
    """How much memory this process has taken since it was made, at the most; 0 where the host does not tell."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before_bytes = self._read("VmRSS")

    def most_bytes(self) -> int:
        """Return it."""
        return self._read("VmHWM") - self._before_bytes

    @staticmethod
    def _read(name: str) -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[name].split()[0]) << 10


class _InProcess:
    """Shared by targets in this process: machines, and that nothing is left behind."""

    def __post_init__(self) -> None:
        self._kvm = _kvm_works()
        self._threads = threading.active_count()
        self._descriptors: int | None = None
        self._runs = 0

    cut = staticmethod(cut)

    def keeps(self, text: str) -> bool:
        """Keep nothing."""
        return False

    @contextlib.contextmanager
    def _nothing_left(self) -> Iterator[None]:
        held = Held()
        yield
        most_bytes = held.most_bytes()
        require(most_bytes < _MOST_HELD_BYTES, f"{most_bytes >> 20} MiB of memory were taken")
        self._runs += 1
        if self._runs % 50 == 0:
            self.close()

    def close(self) -> None:
        """Check that no thread and no descriptor is left."""
        gc.collect()
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and thread.daemon and thread.name in ("thaw", "freeze"):
                thread.join(60)
        threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
        require(threads <= self._threads, f"threads are left: {threading.enumerate()}")
        most = descriptors if self._descriptors is None else self._descriptors + 4
        require(descriptors <= most, f"{descriptors} descriptors are left, {self._descriptors} were there")
        self._descriptors = descriptors if self._descriptors is None else self._descriptors

    def _machines(self, draw: random.Random, make_vm: Callable[[VmConfig], Any] | None = None) -> Guarded:
        on_kvm = draw.random() < 0.5 and self._kvm
        return Guarded(make_vm or (KvmVm if on_kvm else Domain))

    @staticmethod
    def _close(machines: Guarded) -> None:
        for vm in tuple(machines.made):
            if isinstance(vm, Domain):
                invariants.check(vm)
            vm.close()
        dead = machines.dead()
        require(not dead, f"something was written beside RAM, at {dead}")


@dataclass
class DestinationTarget(_InProcess):
    """A destination, to which a source is played."""

    seeds: Mapping[str, Seed]
    kind: Any = Destination
    make_vm: Callable[[VmConfig], Any] | None = None
    name: str = "destination"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._memory_of: dict[str, str] = {}

    def run(self, seed: Seed, turns: Sequence[Turn], touched: set[str], draw: random.Random) -> str:
        """Take the guest in; the memory of one that is here is that of the recorded one."""
        with self._nothing_left():
            machines = self._machines(draw, self.make_vm or (None if touched else Domain))
            handed = os.memfd_create("handed") if "handed" in seed.recorded else None
            player = Player(Side.DESTINATION, turns, handed)
            ran: list[str] = []
            try:
                outcome, vm = self._take(machines, player, ran)
                self._check(seed, touched, outcome, vm, ran, machines)
                return outcome
            finally:
                player.close()
                self._close(machines)
                if handed is not None:
                    os.close(handed)

    def _take(self, machines: Guarded, player: Player, ran: list[str]) -> tuple[str, Any]:
        def make_vm(config: VmConfig) -> Any:
            _LIMITS.check(config)
            vm = machines(config)
            alter(vm, "resume", lambda _: lambda: None)  # or a COMMIT that was changed would set it going
            return vm

        def accept(_: float) -> Peer:
            return Peer(player.connect(), Side.DESTINATION)

        destination = self.kind(
            Peer(player.connect(), Side.DESTINATION),
            make_vm,
            accept=accept,
            asked_within_s=0.0,
            on_event=lambda event: destination.abort() if _is_alone(event, player) else None,
            before_run=lambda vm, name: ran.append(name),
        )
        try:
            return _COMPLETED, destination.run()
        except MigrationError as error:
            return f"{error.guest_at}: {error}", None

    def _check(self, seed: Seed, touched: set[str], outcome: str, vm: Any, ran: list[str], machines: Guarded) -> None:
        require("internal error" not in outcome, outcome)
        if vm is None:
            lost = outcome.startswith(GuestAt.DESTINATION)
            require(lost == bool(ran), f"{outcome}, and the guest {'ran' if ran else 'never ran'}")
            require(lost or not machines.made, f"a machine is left: {outcome}")
            return
        require(ran, "the guest is here, and it was never told")
        if seed.recorded and not touched & _PROVE_MEMORY:
            memory = contents_of(vm.memory)
            if not touched:
                self._memory_of.setdefault(seed.recorded, memory)
            elif (recorded := self._memory_of.get(seed.recorded)) is not None:
                require(memory == recorded, "the guest runs with other memory than it had at the source")


def _is_alone(event: object, player: Player) -> bool:
    """Tell whether the guest stands still for a source that does not come back."""
    return isinstance(event, PostcopyPaused) and not player.has_more_connections


class QuickSource(
    AlteredSource,
    parts={"source._LEASE_S": 0.05, "handoff.give._ASK_AT_LEAST_S": 0.02, "handoff.give._AGAIN_S": 0.002},
):
    """Stands by its word for a moment only, and asks for as long."""


_WAYS: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "plain": (2, False, {"verify": VerifyMode.FULL}),
    "audit": (3, False, {"verify": VerifyMode.AUDIT}),
    "packed": (2, False, {"wire": WireOptions(connections=3, compress=Packing.LZ4, delta_cache_bytes=16 << 20)}),
    "postcopy": (1, True, {}),
}


class _Way:
    """Where a source connects: to what is played."""

    def __init__(self, player: Player, watch: Callable[[bytes], None]) -> None:
        self._player = player
        self._watch = watch

    def __str__(self) -> str:
        return "tcp://played"

    def expect_suits(self, credentials: object) -> None:
        """Any do."""

    def connect(self, timeout_s: float, given_up: object = None) -> Any:
        """Connect."""
        return self._player.connect(self._watch)


@dataclass
class SourceTarget(_InProcess):
    """A source, to which a destination is played. Its guest stands still and stays until it has moved."""

    seeds: Mapping[str, Seed]
    kind: Any = QuickSource
    name: str = "source"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._machines_here = Guarded(Domain)
        self._vm: Any = None

    def run(self, seed: Seed, turns: Sequence[Turn], touched: set[str], draw: random.Random) -> str:
        """Move the guest away; whether it may still run here is what the destination has said."""
        with self._nothing_left():
            if self._vm is None:
                self._vm = guest(make_vm=self._machines_here)
            vm, sent = self._vm, list[int]()
            player = Player(Side.SOURCE, turns)
            try:
                outcome, guest_at = self._move(seed, vm, player, sent)
            finally:
                said = b"".join(bytes(channel.said) for channel in player.channels)
                player.close()
            self._check(vm, outcome, guest_at, set(sent), said)
            if guest_at is not GuestAt.SOURCE:
                self._vm = None
                self._close(self._machines_here)
            return outcome

    def _move(self, seed: Seed, vm: Any, player: Player, sent: list[int]) -> tuple[str, GuestAt]:
        def on_event(event: object) -> None:
            if isinstance(event, PostcopyPaused):
                recovery = source.job.postcopy.recovery
                recovery.ask(way) if player.has_more_connections else recovery.abandon()

        rounds, switches, options = _WAYS[seed.recorded]
        way = _Way(player, lambda data: sent.append(int.from_bytes(data[:4], "little")))
        policy = Scribbles(vm, rounds, switches=switches)
        source = self.kind(vm, way, policy, MigrationOptions(timeout_s=0.05, **options), on_event=on_event)
        try:
            source.run()
        except MigrationError as error:
            return f"{error.guest_at}: {error}", error.guest_at
        return _COMPLETED, GuestAt.DESTINATION

    def _check(self, vm: Any, outcome: str, guest_at: GuestAt, sent: set[int], said: bytes) -> None:
        require("internal error" not in outcome, outcome)
        on = vm.log_dirty.enabled and guest_at is GuestAt.SOURCE
        require(not on, f"log-dirty is on still: {outcome}")
        frozen = True
        try:
            vm.thaw()
        except VmError:
            frozen = False
        given = bool(sent & {FrameType.COMMIT, FrameType.SWITCH})
        heard = {kind for kind in FrameType if int(kind).to_bytes(4, "little") in said}
        require(frozen == (guest_at is not GuestAt.SOURCE), f"frozen: {frozen}, and {outcome}")
        if guest_at is GuestAt.DESTINATION:
            there = heard & {FrameType.RUNNING, FrameType.RECOVERED}
            require(given and there, f"{outcome}, and only {sorted(heard)} were said")
        elif given and guest_at is GuestAt.SOURCE:
            require(FrameType.FAILED in heard, f"{outcome}, and nobody promised that it never runs there")
        else:
            require(given == (guest_at is GuestAt.UNKNOWN), f"{outcome}, and it was given away: {given}")

    def close(self) -> None:
        """Close the guest, too."""
        if self._vm is not None:
            self._vm = None
            self._close(self._machines_here)
        super().close()


@dataclass
class ReaderTarget(_InProcess):
    """A file, from which a guest is restored, at once or lazily."""

    seeds: Mapping[str, Seed]
    opened: Callable[[Path, int], SavedGuest] = SavedGuest
    name: str = "file"

    def run(self, seed: Seed, turns: Sequence[Turn], touched: set[str], draw: random.Random) -> str:
        """Restore the guest, or refuse it with one of the errors that are promised."""
        fd = os.memfd_create("guest")
        os.write(fd, b"".join(turn.said for turn in turns))
        machines = self._machines(draw)
        lazily = draw.random() < 0.2
        failures: list[Exception] = []
        with self._nothing_left():
            try:
                with self.opened(Path("guest.bin"), fd) as saved:
                    if lazily:
                        vm, lazy = restore_lazily(saved, machines, on_failure=failures.append)
                        lazy.read_ahead()
                        self._until(lambda: lazy.done or failures)
                        lazy.close()
                    else:
                        vm = restore(saved, machines)
                    encode_machine_state(vm.save_state())
                return "restored"
            except (UsageError, VmError, RemoteStreamError) as error:
                return f"{type(error).__name__}: {error}"
            finally:
                os.close(fd)
                self._close(machines)

    @staticmethod
    def _until(condition: Callable[[], object]) -> None:
        while not condition():
            threading.Event().wait(0.001)


@dataclass
class StateTarget(_InProcess):
    """A machine's state, which a machine of the same kind takes over, and runs from there for a moment."""

    seeds: Mapping[str, Seed]
    configs: Mapping[str, VmConfig]
    make_vm: Callable[[VmConfig], Any] | None = None
    name: str = "state"
    cut = staticmethod(entries_of)

    def run(self, seed: Seed, turns: Sequence[Turn], touched: set[str], draw: random.Random) -> str:
        """Load it, or refuse it with one of the errors that are promised; what was loaded can be saved."""
        machines = self._machines(draw, self.make_vm)
        with self._nothing_left():
            try:
                state = decode_machine_state(b"".join(turn.said for turn in turns))
                config = replace(self.configs[seed.recorded or "plain"], cpus=min(len(state.vcpus), 4))
                vm = guest(make_vm=machines, machine=config.machine, devices=config.devices, cpus=config.cpus)
                vm.load_state(state)
                encode_machine_state(vm.save_state())
                if draw.random() < 0.3:
                    vm.resume()
                    vm.wait(0.002)
                    vm.pause()
                    encode_machine_state(vm.save_state())
                return "loaded"
            except (UsageError, VmError, RemoteStreamError) as error:
                return f"{type(error).__name__}: {error}"
            finally:
                self._close(machines)


@dataclass
class InspectTarget:
    """``inspect`` of a file, in each of its forms."""

    seeds: Mapping[str, Seed]
    command: Callable[..., Any] = cli
    name: str = "inspect"
    cut = staticmethod(cut)

    def __post_init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()

    def run(self, seed: Seed, turns: Sequence[Turn], touched: set[str], draw: random.Random) -> str:
        """Show the file, or say in one line what is wrong with it."""
        file = Path(self._folder.name) / "stream"
        file.write_bytes(b"".join(turn.said for turn in turns))
        whole = Path(self._folder.name) / "whole"
        whole.write_bytes(b"".join(turn.said for turn in seed.turns))
        form = draw.choice(
            ([], ["--check"], ["--json"], ["--json", "--check"], ["--diff", whole], ["--diff", whole, "--json"])
        )
        done = self.command("inspect", file, *form)
        codes = _EXIT_CODES | {10} if "--diff" in form else _EXIT_CODES
        require(done.returncode in codes, f"exit code {done.returncode} of {form}: {done.stderr}")
        require("Traceback" not in done.stderr, done.stderr)
        if "--json" in form and done.stdout:
            json.loads(done.stdout)
        return f"exit code {done.returncode}: {done.stderr.splitlines()[:1]}"

    def keeps(self, text: str) -> bool:
        """Keep nothing."""
        return False

    def close(self) -> None:
        """Remove the files."""
        self._folder.cleanup()


@dataclass
class QmpTarget:
    """The control socket of a guest process. It goes on answering whatever it was told."""

    seeds: Mapping[str, Seed]
    arguments: tuple[str, ...] = ("run", "kv", "--accel", "soft", "--memory", "8M", "--working-set", "64K")
    within: tuple[str, ...] = ()
    name: str = "qmp"
    cut = staticmethod(cut)

    def __post_init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._process: Process | None = None

    def run(self, seed: Seed, turns: Sequence[Turn], touched: set[str], draw: random.Random) -> str:
        """Say it on a connection of its own; each answer is one line of JSON and no defect."""
        process = self._process = self._process or Process(
            Path(self._folder.name), "guest", *self.arguments, within=self.within
        )
        answers = self._say(process, b"".join(turn.said for turn in turns))
        for answer in answers:
            error = json.loads(answer).get("error", {})
            require("internal error" not in error.get("desc", ""), answer.decode())
        if any(b"quit" in turn.said for turn in turns):
            self._end(process)
        else:
            self._expect_alive(process)
        return f"{sum(b'return' in answer for answer in answers)} commands were done"

    def _end(self, process: Process) -> None:
        try:
            process.ask("quit")
        except QmpError:  # it migrates
            process.popen.terminate()
        except VmError:  # it has ended already
            pass
        code = process.popen.wait(60)
        require(code == 0, f"exit code {code}: {process.log.read_text()}")
        process.end()
        self._process = None

    def _expect_alive(self, process: Process) -> None:
        try:
            status = process.status()
        except VmError as error:
            raise WrongError(f"{error}; exit code {process.popen.poll()}: {process.log.read_text()}") from error
        require(status in ("running", "paused", "finish-migrate", "postmigrate"), status)
        require("Traceback" not in process.log.read_text(), process.log.read_text())

    @staticmethod
    def _say(process: Process, data: bytes) -> list[bytes]:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.settimeout(60)
            sock.connect(str(process.control))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(b'{"execute":"qmp_capabilities"}\n' + data + b"\n")
                sock.shutdown(socket.SHUT_WR)
            with sock.makefile("rb") as lines:
                try:
                    return list(lines)
                except ConnectionResetError:
                    return []

    def keeps(self, text: str) -> bool:
        """Keep whatever names a place: a changed one might be somebody's."""
        return "/" in text or ":" in text

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.end()
        self._folder.cleanup()
