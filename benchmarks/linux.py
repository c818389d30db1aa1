"""Linux on the software machine: what its boot costs, and a move of it while it idles.

A stock Debian kernel (``make linux-image``) boots to its first process on ``soft``, under both paging modes; the figure
is processor time of the whole process, of which the guest's own instructions are a part. Then an idle guest of 512 MiB
is moved to another machine of this process with ``--verify audit``, and one of 2 GiB with a balloon, which keeps files
of 100 MiB and has deleted others of 256 MiB: what it freed it has reported, and so it is not sent. Last, one of 512 MiB
is moved while ``stress-ng --vm`` writes and checks 32 MiB again and again, over a wire of 4 MiB a second: the policy is
``converge``, and stress-ng must have found nothing wrong in the end.

Targets: 8 s of processor time to the first process; a downtime of 50 ms; less than 200 MiB sent of 2 GiB; under
stress-ng, convergence.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pageferry.core.device_spec import DeviceKind, DeviceSpec
from pageferry.core.policies import ConvergePolicy, DowntimePolicy
from pageferry.core.policy import Policy
from pageferry.core.vm import MachineModel, VmConfig
from pageferry.engine.destination import Destination
from pageferry.engine.options import DEFAULT_WIRE, MigrationOptions, VerifyMode, WireOptions
from pageferry.engine.source import Source
from pageferry.engine.wire.acceptor import Acceptor
from pageferry.guests.linux.boot import boot_linux
from pageferry.guests.linux.debian import LinuxImage
from pageferry.guests.linux.image import load_kernel
from pageferry.hypervisor.domain import Domain
from pageferry.hypervisor.paging import PAGING_MODES

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from debian_root import NoRootError, debian_root  # of the tests: that Debian's programs

IMAGES = Path(__file__).resolve().parents[1] / "build" / "linux"
READY = b"pageferry: ready"
_LACKING = 5
_PATIENCE_S = 600.0
_MIB = 1 << 20
_BUSY_WIRE = WireOptions(bandwidth_bytes_per_s=4 * _MIB)
_STRESS = b"stress-ng --vm 1 --vm-bytes 32M --vm-keep --vm-method incdec --verify --temp-path /tmp --timeout 0"


class Talk:
    """What a guest says on its console, and a shell there to be told what to do."""

    def __init__(self) -> None:
        self._said = bytearray()
        self._changed = threading.Condition()

    def listen_to(self, vm: Domain, _name: str = "") -> None:
        """Hear a machine from now on."""
        vm.on_console(self._add)

    def _add(self, data: bytes) -> None:
        with self._changed:
            self._said += data
            self._changed.notify_all()

    def line(self, text: bytes) -> str:
        """Return the first line of all that it said that has this in it; an empty one: there is none."""
        with self._changed:
            said = bytes(self._said).splitlines()
        return next((line.decode(errors="replace").strip() for line in said if text in line), "")

    def wait_for(self, text: bytes) -> None:
        """Wait until the guest has said this."""
        with self._changed:
            if not self._changed.wait_for(lambda: text in self._said, _PATIENCE_S):
                raise TimeoutError(f"the guest never said {text!r}: {bytes(self._said[-500:])!r}")


def booted(
    image: LinuxImage, *, memory_bytes: int, mode: str = PAGING_MODES[0], disks: Sequence[DeviceSpec] = ()
) -> tuple[Domain, Talk, float]:
    """Boot a guest; return it, its console, and the processor time until its first process was ready."""
    balloon = DeviceSpec(kind=DeviceKind.BALLOON)
    config = VmConfig(memory_bytes=memory_bytes, machine=MachineModel.PC, devices=(*disks, balloon))
    vm, talk = Domain(config, paging_mode=mode), Talk()
    talk.listen_to(vm)
    initrd = image.initramfs.read_bytes()
    boot_linux(vm, load_kernel(image.kernel), initrd=initrd, command_line="console=ttyS0 quiet")
    vm.claim_backends()
    began_s = time.process_time()
    vm.resume()
    talk.wait_for(READY)
    return vm, talk, time.process_time() - began_s


def moved(
    vm: Domain, talk: Talk, policy: Policy | None = None, wire: WireOptions = DEFAULT_WIRE
) -> tuple[Domain, dict[str, Any]]:
    """Move a guest within this process; return it where it has come to, and the report. Its old machine is closed."""
    with Acceptor("tcp://127.0.0.1:0") as acceptor:
        arrived: list[Domain] = []

        def receive() -> None:
            destination = Destination(acceptor.wait(), Domain, accept=acceptor.accept, before_run=talk.listen_to)
            arrived.append(destination.run())

        thread = threading.Thread(target=receive)
        thread.start()
        options = MigrationOptions(verify=VerifyMode.AUDIT, wire=wire)
        report = Source(vm, acceptor.endpoint, policy or DowntimePolicy(limit_s=0.05), options).run()
        thread.join()
    vm.close()
    return arrived[0], report.to_json()


def boots(image: LinuxImage, mode: str, repeats: int) -> float:
    """Return the median processor time of so many boots."""
    times_s = []
    for _ in range(repeats):
        vm, _, cpu_s = booted(image, memory_bytes=512 * _MIB, mode=mode)
        vm.close()
        times_s.append(cpu_s)
    return statistics.median(times_s)


def idle_move(image: LinuxImage) -> dict[str, Any]:
    """Move an idle guest of 512 MiB."""
    vm, talk, _ = booted(image, memory_bytes=512 * _MIB)
    time.sleep(3)
    vm, report = moved(vm, talk)
    vm.close()
    return report


def reported_move(image: LinuxImage) -> dict[str, Any]:
    """Move a guest of 2 GiB that keeps 100 MiB of files, and has freed 256 MiB."""
    vm, talk, _ = booted(image, memory_bytes=2048 * _MIB)
    vm.type_console(b"fill() { dd if=/dev/zero bs=1M count=$1 2>/dev/null | tr '\\0' x > /tmp/$1; }\n")
    vm.type_console(b"fill 100; fill 256; rm /tmp/256; sleep 10; echo is''done\n")
    talk.wait_for(b"isdone")
    vm, report = moved(vm, talk)
    vm.close()
    return report


def busy_move(image: LinuxImage) -> dict[str, Any]:
    """Move a guest of 512 MiB under stress-ng; the report says in ``stress`` what that has found in the end.

    Raises:
        NoRootError: there are no Debian programs here.
    """
    disk = DeviceSpec(kind=DeviceKind.DISK, backend=str(debian_root(IMAGES)), readonly=True)
    vm, talk, _ = booted(image, memory_bytes=512 * _MIB, disks=(disk,))
    vm.type_console(b"mount -o ro,noload /dev/vda /root; mount -t tmpfs tmp /root/tmp\n")
    vm.type_console(b"for name in proc sys dev; do mount -o bind /$name /root/$name; done\n")
    vm.type_console(b"chroot /root " + _STRESS + b" > /tmp/said 2>&1 &\n")
    vm.type_console(b"until grep -q dispatching /tmp/said; do sleep 1; done; sleep 5; echo is''busy\n")
    talk.wait_for(b"isbusy")
    vm, report = moved(vm, talk, ConvergePolicy(), _BUSY_WIRE)
    vm.type_console(b"sleep 5; killall -INT stress-ng; wait; grep 'run compl''eted' /tmp/said; echo is''over\n")
    talk.wait_for(b"isover")
    report["stress"] = talk.line(b"run completed")
    vm.close()
    return report


def main() -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--image", default="cloud", help="which image of make linux-image (default cloud)")
    parser.add_argument("--repeats", type=int, default=2, help="boots of each kind (default 2)")
    options = parser.parse_args()
    image = LinuxImage.of(IMAGES / options.image)
    if not image.kernel.is_file():
        print(f"linux: no kernel in {IMAGES / options.image}: make linux-image", file=sys.stderr)
        return _LACKING
    found: dict[str, Any] = {}
    say = partial(print, flush=True, file=sys.stderr if options.json else sys.stdout)
    for mode in PAGING_MODES:
        cpu_s = found[f"boot_{mode}_cpu_s"] = boots(image, mode, options.repeats)
        of_hap = cpu_s / found["boot_hap_cpu_s"]
        say(f"boot to the first process, {mode:<7} {cpu_s:6.1f} s of processor time, {of_hap:.2f} of hap's")
    for name, what, move in (
        ("idle", "512 MiB, idle", idle_move),
        ("reported", "2 GiB, of which 100 MiB are used and 256 MiB were", reported_move),
    ):
        report = move(image)
        for key in ("downtime_s", "sent_bytes", "total_s"):
            found[f"{name}_{key}"] = report[key]
        sent, downtime = report["sent_bytes"] / _MIB, report["downtime_s"] * 1e3
        say(f"{what}: {sent:.0f} MiB sent in {report['total_s']:.1f} s, downtime {downtime:.0f} ms")
    try:
        report = found["busy"] = busy_move(image)
    except NoRootError as error:
        say(f"no move under stress-ng: {error}")
    else:
        say(
            f"512 MiB, under stress-ng: {report['status']} in {report['total_s']:.1f} s, downtime"
            f" {report['downtime_s'] * 1e3:.0f} ms, throttled for {report['throttled_s']:.1f} s"
        )
        for number, (each, end) in enumerate(zip(report["rounds"], report["round_ends"], strict=False)):
            counts = f"{each['sent_pages']} pages sent, {each['remaining_pages']} dirty"
            say(f"  round {number}: {counts}: {end['decision']['reason']}")
        say(f"  {report['stress'] or 'stress-ng has not ended'}")
    if options.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
