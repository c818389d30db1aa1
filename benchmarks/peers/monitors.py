"""The two monitors, QEMU and pageferry, each as a source and a destination of the same guest."""

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pageferry.core.errors import UnsupportedError
from pageferry.core.frames import PCI_HOLE_START, SIZE_2M

from .image import PROGRAM, Load, assemble_shim, build_image
from .process import Peer

QEMU = "qemu-system-x86_64"
_NO_LIMIT_BYTES_PER_S = 1 << 40
_ANY_PORT = "127.0.0.1:0"
#: Of the kernel's list, what may be written from offset 0 of nothing, or of a file: first and last address, name.
_MAPPING = re.compile(r"^(\w+)-(\w+) rw\S+ 0+ \S+ \d+ *(.*)$", re.M)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a source says of its migration. ``verify_s``: the part of the downtime that proves memory equal, or None."""

    downtime_s: float
    sent_bytes: int
    verify_s: float | None


class PageferryPeer(Peer):
    """A ``pageferry`` process, as a user starts it.

    Args:
        memory_bytes: of the guest that it runs, or waits for.
        others: as for :class:`Peer`.
    """

    def __init__(self, name: str, argv: Sequence[str], folder: Path, memory_bytes: int) -> None:
        super().__init__(name, argv, folder)
        self._low_bytes = min(memory_bytes, PCI_HOLE_START)

    def _control_options(self, control: Path) -> Sequence[str]:
        return ["--control", str(control)]

    def hva(self, gpa: int) -> int | None:
        """Return where guest memory lies: a memfd, or as much private memory, to the byte, as it has below the hole."""
        begins: list[int] = []  # where it may begin: at a mapping from which on there is no gap
        last = 0
        for first, end, name in _MAPPING.findall(self.maps()):
            if "memfd:pageferry-ram" in name:
                return int(first, 16) + gpa
            begins = [*(begins if int(first, 16) == last else []), int(first, 16)]
            last = int(end, 16)
            if last - self._low_bytes in begins and not (last - self._low_bytes) % SIZE_2M:
                return last - self._low_bytes + gpa
        return None


class QemuPeer(Peer):
    """A QEMU process."""

    def _control_options(self, control: Path) -> Sequence[str]:
        return ["-qmp", f"unix:{control},server=on,wait=off"]

    def hva(self, gpa: int) -> int | None:
        """Return where guest memory lies, by QEMU's own word."""
        answer = self.qmp.execute("human-monitor-command", **{"command-line": f"gpa2hva {gpa:#x}"})
        found = re.search(r" is (0x[0-9a-f]+)", answer)
        return None if found is None else int(found[1], 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pageferry:
    """pageferry on kvm, with a downtime limit if ``policy`` takes one.

    ``options``: more arguments of its QMP command ``migrate``; all else is the default.
    """

    policy: str
    limit_s: float | None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """What tables call it."""
        return ", ".join(["pageferry", *(f"{key}={value}" for key, value in self.options)])

    def source(self, load: Load, folder: Path) -> Peer:
        """Return a process with the guest."""
        sizes = {"memory": load.memory_bytes, "working-set": load.filled_bytes}
        if load.rewritten_bytes:
            sizes["argument"] = load.rewritten_bytes
        options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
        argv = [*_PAGEFERRY, "run", PROGRAM, "--accel", "kvm", *options]
        return PageferryPeer("pageferry-source", argv, folder, load.memory_bytes)

    def destination(self, load: Load, folder: Path) -> Peer:
        """Return a process that can receive it."""
        argv = [*_PAGEFERRY, "receive", f"tcp://{_ANY_PORT}", "--accel", "kvm"]
        return PageferryPeer("pageferry-destination", argv, folder, load.memory_bytes)

    def listen(self, destination: Peer) -> str:
        """Return where the destination waits."""
        return str(destination.qmp.execute("x-query-guest")["listening"])

    def migrate(self, source: Peer, uri: str) -> None:
        """Begin; wait for ``MIGRATION`` events."""
        limit = {} if self.limit_s is None else {"x-downtime-limit-s": self.limit_s}
        source.qmp.execute("migrate", uri=uri, **{"x-policy": self.policy, **limit, **dict(self.options)})

    def result(self, source: Peer) -> Result:
        """Return what the source says, after the end."""
        answer = source.qmp.execute("query-migrate")
        report = answer["x-pageferry-report"]
        return Result(
            downtime_s=report["downtime_s"],
            sent_bytes=answer["ram"]["transferred"],
            verify_s=report["downtime_parts_s"]["verify"],
        )


_PAGEFERRY = (sys.executable, "-m", "pageferry")


@dataclass(frozen=True, slots=True, kw_only=True)
class Qemu:
    """QEMU on kvm, its bandwidth limit lifted, with a downtime limit.

    ``shim`` is its guest's beginning; ``channels``: connections of multifd, or None for the single stream;
    ``converge``: whether it may hold the guest back (auto-converge).
    """

    shim: bytes
    channels: int | None
    converge: bool
    limit_s: float

    @property
    def name(self) -> str:
        """What tables call it."""
        return "QEMU" if self.channels is None else f"QEMU multifd, {self.channels} channels"

    def source(self, load: Load, folder: Path) -> Peer:
        """Return a process with the guest."""
        return QemuPeer("qemu-source", self._command(load, folder), folder)

    def destination(self, load: Load, folder: Path) -> Peer:
        """Return a process that can receive it."""
        return QemuPeer("qemu-destination", [*self._command(load, folder), "-incoming", "defer"], folder)

    def _command(self, load: Load, folder: Path) -> list[str]:
        image = folder / "guest.bin"
        image.write_bytes(build_image(self.shim, load))
        command = [QEMU, "-accel", "kvm", "-cpu", "qemu64", "-machine", "pc,max-ram-below-4g=3G"]
        command += ["-m", f"{load.memory_bytes >> 20}M", "-kernel", str(image), "-display", "none", "-nodefaults"]
        return [*command, "-serial", "null", "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]

    def _configure(self, peer: Peer) -> None:
        capabilities = {"events": True, "multifd": self.channels is not None, "auto-converge": self.converge}
        wanted = [{"capability": name, "state": state} for name, state in capabilities.items()]
        peer.qmp.execute("migrate-set-capabilities", capabilities=wanted)
        parameters: dict[str, int] = {
            "max-bandwidth": _NO_LIMIT_BYTES_PER_S,
            "downtime-limit": round(self.limit_s * 1e3),
        }
        if self.channels is not None:
            parameters["multifd-channels"] = self.channels
        peer.qmp.execute("migrate-set-parameters", **parameters)

    def listen(self, destination: Peer) -> str:
        """Let the destination listen; return where."""
        self._configure(destination)
        destination.qmp.execute("migrate-incoming", uri=f"tcp:{_ANY_PORT}")
        return f"tcp:127.0.0.1:{destination.qmp.execute('query-migrate')['socket-address'][0]['port']}"

    def migrate(self, source: Peer, uri: str) -> None:
        """Begin; wait for ``MIGRATION`` events."""
        self._configure(source)
        source.qmp.execute("migrate", uri=uri)

    def result(self, source: Peer) -> Result:
        """Return what the source says, after the end."""
        answer: dict[str, Any] = source.qmp.execute("query-migrate")
        return Result(downtime_s=answer["downtime"] / 1e3, sent_bytes=answer["ram"]["transferred"], verify_s=None)


Monitor = Pageferry | Qemu


def qemu_shim(folder: Path) -> bytes:
    """Return the beginning of QEMU's guest images.

    Raises:
        UnsupportedError: QEMU, or what the image is made with, is not installed.
    """
    if shutil.which(QEMU) is None:
        raise UnsupportedError(QEMU, "QEMU is not installed", hint="apt install qemu-system-x86")
    return assemble_shim(folder)
