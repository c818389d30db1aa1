"""``make soak-linux``: a Debian guest does real work, which checks itself, while it is moved again and again.

    python -m simulation.linux_soak [--seed N] [--count N] [--image FOLDER]

The guest is a stock kernel on the software machine, with a disk and a network. Its work (tests/linux/toil.sh) is
memtester, stress-ng, fio, sqlite3 and redis out of Debian's packages, and what is said and echoed on one TCP connection
through a tap to another network namespace, all at once. The moves, drawn by chance, are of all kinds: each policy,
post-copy, several connections, packing, both paging modes, save and restore, eager and lazy, and each leads to another
tap. After each the guest works on. At the end each job has been done anew since the last move, the kernel has said
nothing bad, the wall clock is right, the guest has missed no time but what it stood still for, the connection is the
first, and the file system checks clean.

Ends with 0 when all of that is so, with 1 at the first thing that is not, with 5 where no guest can be had.
"""

import argparse
import random
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from debian_root import NoRootError, debian_root
from linux_guest import Said
from trips import Inn, source_of
from two_networks import ADDRESS, PEER, NoNetworkError, Peer, two_networks

from pageferry.core.device_spec import DeviceKind, DeviceSpec
from pageferry.core.errors import PageferryError
from pageferry.core.policies import ConvergePolicy, DeadlinePolicy, DowntimePolicy, PostcopyPolicy, XenPolicy
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.engine.image.restore import restore, restore_lazily
from pageferry.engine.image.save import Save
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.engine.options import VerifyMode, WireOptions
from pageferry.guests.linux.boot import boot_linux
from pageferry.guests.linux.debian import LinuxImage
from pageferry.guests.linux.image import load_kernel
from pageferry.guests.linux.initramfs import PROGRAM, cpio
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.paging import PAGING_MODES
from pageferry.stream.packing import Packing

PROJECT = Path(__file__).resolve().parents[2]
BUILD = PROJECT / "build" / "linux"
TOIL = PROJECT / "tests" / "linux" / "toil.sh"
JOBS = ("memory", "stress", "disk", "database", "store", "link")
TAPS = 2
DEFAULT_COUNT = 50
MEMORY_BYTES = 512 << 20
_PATIENCE_S = 3600.0  # only a guest that hangs takes so long
_CLOCK_S = 1.5  # the clock shows whole seconds
_RATE = 1e-3  # how wrong the guest may know the rate of its time-stamp counter to be
_NOT_HERE = 5


class WentWrongError(Exception):
    """The guest or its file system is not as it must be; the message says what was seen."""


@dataclass
class Guest:
    """The guest, wherever it is.

    ``vm`` is its machine now, ``said`` what it has said on its console since boot, ``stood_s`` for how long it has
    stood still at the most, ``moves`` how often it was moved.
    """

    vm: Domain
    said: Said = field(default_factory=Said)
    stood_s: float = 0.0
    moves: int = 0

    def be(self, vm: Domain) -> None:
        """Be on another machine, which it has come to."""
        old, self.vm = self.vm, vm
        self.moves += 1
        old.close()

    def machine(self, mode: str, config: VmConfig) -> Domain:
        """Return a machine for it to come to, whose tap is another one than it has now."""
        tap = f"tap:tap{(self.moves + 1) % TAPS}"
        devices = tuple(replace(spec, backend=tap) if spec.kind == DeviceKind.NET else spec for spec in config.devices)
        return Domain(replace(config, devices=devices), paging_mode=mode)

    def done(self, job: str) -> int:
        """Return how often a job has ended well."""
        turns = re.findall(rf"^toil: {job} (\d+)\r?$", bytes(self.said).decode(errors="replace"), re.MULTILINE)
        return int(turns[-1]) if turns else 0

    def works_on(self, *, all_jobs: bool) -> None:
        """Wait until a job, or each of them, was done anew."""
        before = [self.done(job) for job in JOBS]
        enough = all if all_jobs else any

        def reached() -> bool:
            self.said.expect_no_trouble()
            return enough(self.done(job) > turns for job, turns in zip(JOBS, before, strict=True))

        self.said.wait_for(reached, f"job done, of {JOBS} after {before}", _PATIENCE_S)

    def tell(self, line: str) -> None:
        """Type a line to the guest's shell."""
        data = line.encode() + b"\n"
        while data:
            data = data[self.vm.type_console(data) :]
            time.sleep(0.01)

    def ask(self, command: str) -> str:
        """Run a command in the guest's shell; return what it prints. The work may say something in between."""
        mark = f"answer-{secrets.token_hex(4)}"
        before = len(bytes(self.said))
        apart = f"{mark[:6]}''{mark[6:]}"  # the console may echo what is typed, which is not an answer
        self.tell(f"({command}) 2>&1 | sed s/^/{apart}:/; echo {apart}.")
        self.said.wait_for(
            lambda: f"{mark}.".encode() in bytes(self.said)[before:], f"answer to {command}", _PATIENCE_S
        )
        lines = re.findall(rf"{mark}:(.*?)\r?\n", bytes(self.said)[before:].decode(errors="replace"))
        return "\n".join(lines)

    def times(self) -> tuple[float, float, float]:
        """Return how long the guest believes to be up, and our own clock's time before it was asked and after, in s."""
        before_s = time.monotonic()
        up_s = float(self.ask("cut -d ' ' -f 1 /proc/uptime"))
        return up_s, before_s, time.monotonic()


Way = Callable[[Guest, random.Random, Path], str]


def _to(guest: Guest, draw: random.Random, policy: object, **options: object) -> str:
    mode = draw.choice(PAGING_MODES)
    inn = Inn(partial(guest.machine, mode))
    try:
        report = source_of(guest.vm, inn.open(before_run=guest.said.listen_to), policy, **options).run()
        arrived = inn.outcome()
        if arrived is not inn.vm or not report.verified:
            raise WentWrongError(f"no verified guest has arrived: {arrived}")
        guest.be(inn.check_out())
        guest.stood_s += report.downtime_s
    finally:
        inn.close()
    return f"to {mode}, {report.policy}, {len(report.rounds)} rounds, {report.downtime_s * 1e3:.0f} ms"


def _xen(guest: Guest, draw: random.Random, _: Path) -> str:
    return _to(guest, draw, XenPolicy(max_rounds=draw.randint(1, 5)), verify=draw.choice(list(VerifyMode)))


def _downtime(guest: Guest, draw: random.Random, _: Path) -> str:
    return _to(guest, draw, DowntimePolicy(limit_s=30.0))


def _converge(guest: Guest, draw: random.Random, _: Path) -> str:
    return _to(guest, draw, ConvergePolicy(limit_s=5.0), wire=WireOptions(connections=draw.choice((2, 4))))


def _deadline(guest: Guest, draw: random.Random, _: Path) -> str:
    return _to(guest, draw, DeadlinePolicy(deadline_s=10.0))


def _packed(guest: Guest, draw: random.Random, _: Path) -> str:
    wire = WireOptions(compress=Packing.LZ4, delta_cache_bytes=16 << 20, bandwidth_bytes_per_s=100 << 20)
    return _to(guest, draw, XenPolicy(), wire=wire)


def _postcopy(guest: Guest, draw: random.Random, _: Path) -> str:
    return _to(guest, draw, PostcopyPolicy(max_rounds=1, limit_s=1e-3))


def _file(guest: Guest, draw: random.Random, folder: Path, *, lazily: bool) -> str:
    path, mode = folder / "guest.bin", draw.choice(PAGING_MODES)
    began_s = time.monotonic()
    Save(guest.vm, path, XenPolicy(), stop=True, on_event=lambda _: None).run()
    make_vm = partial(guest.machine, mode)
    failures: list[PageferryError] = []
    saved = SavedGuest(path)
    if lazily:
        vm, lazy = restore_lazily(saved, make_vm, on_failure=failures.append)
    else:
        vm, lazy = restore(saved, make_vm), None
        saved.close()
    guest.said.listen_to(vm)
    guest.be(vm)
    vm.resume()
    guest.stood_s += time.monotonic() - began_s
    if lazy is not None:
        lazy.read_ahead()
        while not (lazy.done or failures):
            time.sleep(0.05)
        lazy.close()
    if failures:
        raise failures[0]
    return f"through a file to {mode}{', lazily' if lazily else ''}"


WAYS: dict[str, Way] = {
    "xen": _xen,
    "downtime": _downtime,
    "converge": _converge,
    "deadline": _deadline,
    "packed": _packed,
    "postcopy": _postcopy,
    "file": partial(_file, lazily=False),
    "lazy": partial(_file, lazily=True),
}


def boot(image: LinuxImage, disk: Path) -> Guest:
    """Boot the guest; its work has begun when this returns, and there is a shell on the console."""
    disk_spec = DeviceSpec(kind=DeviceKind.DISK, backend=str(disk))
    net_spec = DeviceSpec(kind=DeviceKind.NET, backend="tap:tap0", mac="52:54:00:77:00:02")
    devices = (disk_spec, net_spec, DeviceSpec(kind=DeviceKind.RNG), DeviceSpec(kind=DeviceKind.BALLOON))
    guest = Guest(Domain(VmConfig(memory_bytes=MEMORY_BYTES, machine=MachineModel.PC, devices=devices)))
    guest.said.listen_to(guest.vm)
    script = b"#!/bin/busybox sh\n" + TOIL.read_bytes()
    initrd = image.initramfs.read_bytes()
    initrd += bytes(-len(initrd) % 4) + cpio([("bin/toil", PROGRAM, script)])
    boot_linux(guest.vm, load_kernel(image.kernel), initrd=initrd, command_line="console=ttyS0 panic=-1")
    guest.vm.claim_backends()
    guest.vm.resume()
    guest.said.wait_for(lambda: b"pageferry: ready" in bytes(guest.said), "first process", _PATIENCE_S)
    guest.tell(f"ADDRESS={ADDRESS} PEER={PEER} toil > /dev/ttyS0 2>&1 &")
    guest.said.wait_for(lambda: b"toil: begun" in bytes(guest.said), "work", _PATIENCE_S)
    return guest


def expect_on_time(guest: Guest, begin: tuple[float, float, float]) -> None:
    """Check the clocks: the wall clock goes on while the guest stands still, its own time does not.

    Args:
        guest: it.
        begin: what :meth:`Guest.times` has told before the first move.

    Raises:
        WentWrongError: one is wrong.
    """
    asked_s = time.time()
    shown_s = int(guest.ask("cat /sys/class/rtc/rtc0/since_epoch"))
    if not asked_s - _CLOCK_S <= shown_s <= time.time() + _CLOCK_S:
        raise WentWrongError(
            f"the wall clock shows {shown_s}, asked at {asked_s:.1f} and answered by {time.time():.1f}"
        )
    (up_first_s, before_first_s, after_first_s), (up_s, before_s, after_s) = begin, guest.times()
    passed_s = up_s - up_first_s
    least_s, most_s = before_s - after_first_s - guest.stood_s, after_s - before_first_s
    if not least_s * (1 - _RATE) <= passed_s <= most_s * (1 + _RATE):
        raise WentWrongError(f"{passed_s:.2f} s have passed in the guest, not {least_s:.2f} to {most_s:.2f} s")


def expect_sound(guest: Guest, disk: Path, peer: Peer) -> None:
    """Check what only the end shows; the guest is off afterwards.

    Raises:
        WentWrongError: the kernel complained, the connection was made anew, or the file system is damaged.
    """
    if peer.connections != 1:
        raise WentWrongError(f"the guest's connection was made {peer.connections} times")
    bad = guest.ask("dmesg | grep -iE 'BUG:|WARNING|stall|lockup|error|unstable' | grep -v 'workqueue lockup detector'")
    if bad:
        raise WentWrongError(f"the kernel said: {bad}")
    guest.ask("killall toil; sleep 1; for i in 1 2 3; do killall -9 redis-server memtester stress-ng fio sqlite3; done")
    guest.ask("sync; umount /root/tmp /root/proc /root/sys /root/dev; umount -l /root; sync; sleep 2")
    guest.vm.pause()
    guest.vm.release_backends()
    checked = subprocess.run(["e2fsck", "-fy", str(disk)], capture_output=True, text=True, check=False)
    if checked.returncode not in (0, 1) or "FILE SYSTEM WAS MODIFIED" in checked.stdout.replace("*", "").strip():
        raise WentWrongError(f"e2fsck: {checked.stdout}")


def soak(seed: int, count: int, image: LinuxImage, root: Path, peer: Peer, say: Callable[[str], None]) -> None:
    """Move a guest at work ``count`` times, then look whether all is well.

    This thread is in the network that the peer is behind.

    Raises:
        Exception: whatever went wrong; the seed has been said.
    """
    draw = random.Random(seed)
    say(f"linux soak: seed {seed}, {count} moves")
    with TemporaryDirectory(dir=root.parent) as folder:
        disk = Path(folder) / "disk"
        shutil.copyfile(root, disk)
        guest = boot(image, disk)
        try:
            say("it works")
            begin = guest.times()
            names = [*WAYS] * (count // len(WAYS) + 1)
            draw.shuffle(names)
            for number, name in enumerate(names[:count], start=1):
                began_s = time.monotonic()
                how = WAYS[name](guest, draw, Path(folder))
                took_s = time.monotonic() - began_s
                guest.works_on(all_jobs=False)
                say(f"{number}/{count} {name:<9} {how}; {took_s:.1f} s")
            guest.works_on(all_jobs=True)
            expect_on_time(guest, begin)
            expect_sound(guest, disk, peer)
        finally:
            guest.vm.close()
    done = ", ".join(f"{job} {guest.done(job)}" for job in JOBS)
    echoed = f"{peer.echoed_bytes >> 10:,} KiB echoed on one connection"
    say(f"linux soak: {count} moves, all verified; done: {done}; {echoed}; kernel, clocks and file system are well")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m simulation.linux_soak", description="Move a Debian at work.")
    parser.add_argument("--seed", type=int, help="draw the moves of that seed (default: another one each time)")
    parser.add_argument("--count", type=int, default=DEFAULT_COUNT, help="moves (default: %(default)s)")
    parser.add_argument("--image", type=Path, default=BUILD / "cloud", help="kernel and initramfs (make linux-image)")
    options = parser.parse_args(arguments)
    image = LinuxImage.of(options.image)
    if not image.kernel.is_file():
        print(f"linux soak: no kernel in {options.image}: make linux-image")
        return _NOT_HERE
    try:
        root = debian_root(BUILD)
    except NoRootError as error:
        print(f"linux soak: {error}")
        return _NOT_HERE
    seed = secrets.randbits(32) if options.seed is None else options.seed
    try:
        with two_networks(TAPS) as peer:
            soak(seed, options.count, image, root, peer, partial(print, flush=True))
    except NoNetworkError as error:
        print(f"linux soak: {error}")
        return _NOT_HERE
    except (PageferryError, WentWrongError, AssertionError) as error:
        print(f"linux soak: FAILED, seed {seed}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
