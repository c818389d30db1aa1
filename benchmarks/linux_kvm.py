"""Linux on KVM: boot, disk and network, against QEMU with its own devices, the same kernel and the same host.

Both run a stock Debian kernel (``make linux-image``) as a process of their own, with 1 CPU, 256 MiB, a virtio disk and
a virtio network on a tap:

* boot: processor time of the whole process, from its start to the guest's first process;
* disk: the guest reads and writes a file in the host's memory past its own cache, 64 KiB and 4 KiB at a time;
* network: TCP from the guest to this process, and back.

Ratios are ours to QEMU's: of processor time at most 1.3, of throughput at least 0.5. Needs a KVM that runs ring 0
natively, root for the tap, ``apt install qemu-system-x86 iproute2``. A host without such a KVM can emulate one::

    .venv/bin/python tests/vm/npt.py --script benchmarks/linux_kvm.py

There the clock counts what the emulated processor executes, an instruction a nanosecond, whatever else the host does.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pageferry.core.errors import UnsupportedError
from pageferry.guests.linux.debian import LinuxImage
from pageferry.kvm.probe_ring_0 import expect_ring_0

IMAGES = Path(__file__).resolve().parents[1] / "build" / "linux"
READY = b"pageferry: ready"
_LACKING = 5
_MIB = 1 << 20
_DISK_BYTES = 64 * _MIB
_NET_BYTES = 8 * _MIB
_TAP, _HOST, _GUEST, _PORT = "ferry0", "10.99.0.1", "10.99.0.2", 5001
_MAC = "52:54:00:fe:55:01"
_COMMAND_LINE = "console=ttyS0 quiet"
#: The disk's tests: name, options of `dd`, size of a request in KiB and how many there are.
_READ, _WRITE = "if=/dev/vda of=/dev/null iflag=direct", "if=/dev/zero of=/dev/vda oflag=direct"
_DISK = (
    ("read 64 KiB", _READ, 64, 256),
    ("read 4 KiB", _READ, 4, 512),
    ("write 64 KiB", _WRITE, 64, 256),
    ("write 4 KiB", _WRITE, 4, 512),
)


class Guest:
    """A guest's process, and a shell on its console.

    Args:
        command: starts it, with the console at standard input and output.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._said = b""
        self._commands = 0

    def wait_for(self, text: bytes, begin: int = 0) -> None:
        """Wait until the guest has said this, after byte ``begin`` of all that it said."""
        assert self._process.stdout is not None
        while text not in self._said[begin:]:
            data = os.read(self._process.stdout.fileno(), 4096)
            if not data:
                raise RuntimeError(f"the guest ended: {self._said[-500:]!r}")
            self._said += data

    def begin(self, command: str) -> Callable[[], str]:
        """Have the shell run a command; return what waits for its end and returns what it said."""
        assert self._process.stdin is not None
        begin, self._commands = len(self._said), self._commands + 1
        mark = b"end-%d\r\n" % self._commands
        self._process.stdin.write(f"{command}; echo end-$(({self._commands}))\n".encode())
        self._process.stdin.flush()

        def end() -> str:
            self.wait_for(mark, begin)
            return self._said[begin:].decode()

        return end

    def cpu_s(self) -> tuple[float, float]:
        """Return the processor time of the process so far, and the part of it that the guest ran."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        user, system, guest = (int(fields[at]) / os.sysconf("SC_CLK_TCK") for at in (11, 12, 40))
        return user + system, guest

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def pageferry(image: LinuxImage, disk: Path) -> list[str]:
    """Return our command."""
    return [
        *(sys.executable, "-m", "pageferry", "run", "--accel", "kvm", "--memory", "256M", "--console", "stdio"),
        *("--kernel", str(image.kernel), "--initrd", str(image.initramfs), "--append", _COMMAND_LINE),
        *("--disk", str(disk), "--net", f"tap:{_TAP},mac={_MAC}"),
    ]


def qemu(image: LinuxImage, disk: Path) -> list[str]:
    """Return QEMU's command; its network is served in its own process too, not in the kernel."""
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"),
        *("-accel", "kvm", "-cpu", "qemu64", "-m", "256M"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", _COMMAND_LINE),
        *("-drive", f"file={disk},if=none,id=disk0,format=raw", "-device", "virtio-blk-pci,drive=disk0"),
        *("-netdev", f"tap,id=net0,ifname={_TAP},script=no,downscript=no,vhost=off"),
        *("-device", f"virtio-net-pci,netdev=net0,mac={_MAC}", "-device", "virtio-rng-pci"),
    ]


VMMS = {"pageferry": pageferry, "qemu": qemu}


def measure(command: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Yield what one of the two does, as it is measured: the name of the measurement, and seconds or MiB a second."""
    guest = Guest(command)
    try:
        guest.wait_for(READY)
        boot_s, guest_s = guest.cpu_s()
        yield "boot", boot_s
        yield "boot, outside the guest", boot_s - guest_s
        for name, options, kib, requests in _DISK:
            began_s = time.monotonic()
            said = guest.begin(f"dd {options} bs={kib}k count={requests}")()
            took_s = time.monotonic() - began_s
            if f"{requests}+0 records out" not in said:
                raise RuntimeError(f"dd in the guest said {said!r}")
            yield name, kib * requests / 1024 / took_s
        setup = f"ip addr add {_GUEST}/24 dev eth0; ip link set eth0 up; until ping -c 1 {_HOST} >/dev/null; do :; done"
        guest.begin(setup)()
        yield "send", _send(guest)
        yield "receive", _receive(guest)
    finally:
        guest.end()


def _send(guest: Guest) -> float:
    with socket.create_server((_HOST, _PORT)) as listener:
        end = guest.begin(f"dd if=/dev/zero bs=64k count={_NET_BYTES >> 16} 2>/dev/null | nc {_HOST} {_PORT}")
        connection, _ = listener.accept()
        began_s = time.monotonic()
        received = 0
        with connection:
            while data := connection.recv(_MIB):
                received += len(data)
        took_s = time.monotonic() - began_s
        end()
    if received != _NET_BYTES:
        raise RuntimeError(f"{received} bytes came from the guest, not {_NET_BYTES}")
    return received / took_s / _MIB


def _receive(guest: Guest) -> float:
    with socket.create_server((_HOST, _PORT)) as listener:
        end = guest.begin(f"nc {_HOST} {_PORT} </dev/null | wc -c")
        connection, _ = listener.accept()
        began_s = time.monotonic()
        with connection:
            connection.sendall(bytes(_NET_BYTES))
        said = end()
        took_s = time.monotonic() - began_s
    if str(_NET_BYTES) not in said:
        raise RuntimeError(f"the guest received {said!r}, not {_NET_BYTES} bytes")
    return _NET_BYTES / took_s / _MIB


@contextlib.contextmanager
def tap() -> Iterator[None]:
    """Have a tap with this host's address; needs root."""
    steps = (f"tuntap add {_TAP} mode tap", f"addr add {_HOST}/24 dev {_TAP}", f"link set {_TAP} up")
    for step in steps:
        subprocess.run(["ip", *step.split()], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "del", _TAP], check=True)


def main() -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--image", default="cloud", help="which image of make linux-image (default cloud)")
    parser.add_argument("--only", choices=VMMS, help="measure this one alone")
    options = parser.parse_args()
    image = LinuxImage.of(IMAGES / options.image)
    try:
        expect_ring_0()
    except UnsupportedError as error:
        print(f"linux_kvm: {error}", file=sys.stderr)
        return _LACKING
    found: dict[str, Any] = {}
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as disk, tap():
        disk.write(os.urandom(_MIB) * (_DISK_BYTES // _MIB))
        disk.flush()
        for vmm in [options.only] if options.only else VMMS:
            command = VMMS[vmm]
            found[vmm] = {}
            for name, value in measure(command(image, Path(disk.name))):
                found[vmm][name] = value
                print(f"{vmm}: {name}: {value:.2f}", file=sys.stderr, flush=True)  # an emulated host takes its time
    if options.json or options.only:
        print(json.dumps(found))
        return 0
    print(f"{'':<26}{'pageferry':>12}{'QEMU':>12}{'ratio':>8}")
    for name, ours in found["pageferry"].items():
        theirs = found["qemu"][name]
        unit = "s" if name.startswith("boot") else "MiB/s"
        print(f"{name + ', ' + unit:<26}{ours:>12.2f}{theirs:>12.2f}{ours / theirs:>8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
