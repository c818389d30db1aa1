"""``make test-npt``: run KVM tests in an emulated machine whose processor has AMD-V with nested paging.

KVM on an ordinary developer's machine may use any kind of paging; here it is nested paging for certain, whatever the
processor underneath, because QEMU emulates all of it (TCG). The machine runs Debian's kernel. Its user space is this
very one: the host's files, read-only over 9p, under an overlay in the machine's own memory, so that tests find the same
interpreter and packages, may write where they like, and change nothing. It has no network.

The tests' output goes to standard output; the exit code is pytest's, or 2 when the tests could not be run.
"""

import argparse
import compileall
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pageferry.core.errors import UnsupportedError
from pageferry.guests.linux.debian import KERNELS, LinuxImage, build_image

PROJECT = Path(__file__).resolve().parents[2]
CACHE = PROJECT / "build" / "npt"
PACKAGES = PROJECT / "build" / "linux" / "packages"
QEMU = "qemu-system-x86_64"
#: The variable that names the Linux image of the tests; they find it in the machine too.
LINUX_IMAGE = "PAGEFERRY_LINUX_IMAGE"
#: What must be installed, and the Debian package that has it.
TOOLS = {QEMU: "qemu-system-x86", "dpkg-deb": "dpkg", "apt-get": "apt"}
MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "ccp", "kvm_amd", "tun")


@dataclass(frozen=True, slots=True)
class Part:
    """What one machine does: arguments for pytest, or for a script, on how many processors, under which of KERNELS."""

    tests: tuple[str, ...]
    processors: int = 2
    script: str | None = None
    kernel: str = "standard"

    @property
    def program(self) -> list[str]:
        """The command that it runs."""
        return [sys.executable, *(["-m", "pytest"] if self.script is None else [self.script]), *self.tests]

    @property
    def kernel_options(self) -> str:
        """More for the kernel's command line.

        With one processor it ticks whether there is something to do or not. Such a machine was seen to stand still for
        good: halted, no timer set. So QEMU's SVM may lose a timer's interrupt, it seems; of this one there is a next.
        """
        return "nohz=off highres=off" if self.processors == 1 and self.script is None else ""


#: The KVM tests of the quick tier, and the conformance kit over each tracker of a KVM machine, 1 and 2 vCPUs. Of the
#: programs that run freely those with an oracle of their own, page tables that change, and two vCPUs: how the others
#: spread their writes is no matter of paging, and each takes a minute here. Nothing on the software machine, which does
#: not care what processor this is, and would be one emulator in another. On a busy host everything takes long: the
#: time-out is for what is stuck.
_ALIKE = "free-running-sweep or free-running-random or free-running-hotset or free-running-kv or free-running-idle"
_LEFT_OUT = f"-3- or -4- or whatever_the_seed or soft or small-ring or {_ALIKE} or free-running-dma or by-range-dma"
SELECTION = f"(kvm or uffd or pagemap) and not ({_LEFT_OUT})"
_KIT = "tests/conformance/test_log_dirty.py"
_LINUX = ("tests/kvm/test_linux.py", "tests/integration/test_linux_devices.py")
_BY_KVM, _NOT_KIT_BY_KVM = "not (uffd or pagemap)", "(uffd or pagemap or not test_log_dirty)"
#: A test that takes long is no news there, and to print where each thread of a running process is may crash it.
_OPTIONS = ("--timeout", "3600", "-o", "faulthandler_timeout=0", "--durations=10")
_QUICK = ("-m", "not exhaustive")
_NEWER = "6.12-standard"
#: What the kernel's headers say is the same on each machine.
_IGNORED = (f"--ignore={_LINUX[0]}", "--ignore=tests/kvm/test_uapi.py")
#: One machine for each, with about as much to do: emulated processors share one thread of the host. They take turns of
#: up to 100 ms, for which a guest of KVM waits that is on the one and needs the other: so Linux has one.
#: Each on the kernel that has what it tests: pagemap-scan needs Linux 6.7.
PARTS = (
    Part(("tests/kvm", *_IGNORED, _KIT, *_OPTIONS, *_QUICK, "-k", f"{SELECTION} and {_NOT_KIT_BY_KVM}"), kernel=_NEWER),
    Part((_KIT, *_OPTIONS, *_QUICK, "-k", f"{SELECTION} and {_BY_KVM}")),
    Part((*_LINUX, *_OPTIONS, "-k", "not soft"), processors=1, kernel=_NEWER),
)
MEMORY_BYTES = 3 << 30
GIVE_UP_S = 7200
NOT_RUN = 2
_machines: list[subprocess.Popen[bytes]] = []
#: When the machine writes n to the debug exit device, QEMU ends with 2n + 1; the base tells that from its own errors.
#: A process ends with one byte, so there is room for codes up to the one that stands for any signal.
EXIT_PORT = 0xF4
EXIT_BASE = 0x40
EXIT_BY_SIGNAL = 0x3F

_INIT = """
export PATH=/bin
for applet in $(busybox --list); do busybox ln -s busybox /bin/$applet 2>/dev/null; done
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module; done
mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=1048576 host /host
mount -t tmpfs ram /ram
mkdir /ram/upper /ram/work
mount -t overlay -o lowerdir=/host,upperdir=/ram/upper,workdir=/ram/work root /root
mount -t proc proc /root/proc
mount -t sysfs sys /root/sys
mount -t devtmpfs dev /root/dev
mkdir -p /root/dev/shm /root/dev/pts
mount -t tmpfs shm /root/dev/shm
mount -t devpts pts /root/dev/pts
ifconfig lo up
dmesg | grep 'kvm:' >/dev/ttyS1
chroot /root /bin/sh -c {command} >/dev/ttyS1 2>&1 </dev/null
code=$?
if [ $code -gt {most} ]; then echo "ended by signal $((code - 128))" >/dev/ttyS1; code={most}; fi
printf "\\\\$(printf %o $(({base} + code)))" | dd of=/dev/port bs=1 seek={port} 2>/dev/null
"""


def main(arguments: Sequence[str]) -> int:
    """Run the tests; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = " and ".join(shlex.join(part.tests) for part in PARTS)
    parser.add_argument("--processors", type=int, help="of that machine (default: 2; for a script 1)")
    parser.add_argument("--script", help="run this instead of pytest, as benchmarks/linux_kvm.py")
    parser.add_argument("tests", nargs="*", help=f"arguments (after --) instead of: {usual}")
    asked = parser.parse_args(arguments)
    named = asked.tests or asked.script
    processors = asked.processors or (2 if asked.script is None else 1)
    parts = (Part(tuple(asked.tests), processors, asked.script),) if named else PARTS
    if missing := [package for tool, package in TOOLS.items() if shutil.which(tool) is None]:
        print(f"test-npt: {', '.join(missing)} not installed: sudo apt-get install {' '.join(missing)}")
        return NOT_RUN
    try:
        images = {kernel: machine_image(kernel, parts) for kernel in {part.kernel for part in parts}}
    except UnsupportedError as error:
        print(f"test-npt: {error}\n  hint: {error.hint}")
        return NOT_RUN
    # A machine would compile all of it anew, and measure that; it cannot write to these files.
    compileall.compile_dir(PROJECT / "src", quiet=1)
    commands = [qemu_command(images[part.kernel], kernel_log(CACHE, at), at, part) for at, part in enumerate(parts)]
    return run_machines(commands, CACHE)


def machine_image(kernel: str, parts: Sequence[Part]) -> LinuxImage:
    """Return what a machine under this kernel boots from; the standard one where Debian's lists have no other.

    Raises:
        UnsupportedError: the packages cannot be had.
    """
    init = init_script(parts)
    try:
        return build_image(CACHE / kernel, PACKAGES, kernel=KERNELS[kernel], modules=MODULES, init=init, programs={})
    except UnsupportedError as error:
        if kernel == "standard":
            raise
        print(f"test-npt: no kernel {kernel} ({error}): the standard one, on which some tests are skipped")
        return machine_image("standard", parts)


def run_machines(commands: Sequence[Sequence[str]], folder: Path, name: str = "test-npt") -> int:
    """Run each part's machine, as many at once as there are processors for; return the worst exit code.

    Their files are in ``folder``.
    """
    began = time.monotonic()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        running = [pool.submit(run_machine, command, folder, part) for part, command in enumerate(commands)]
        try:
            codes = [each.result() for each in running]
        except BaseException:  # Ctrl-C, SIGTERM: or the emulators would outlive this process
            pool.shutdown(wait=False, cancel_futures=True)
            for machine in _machines:
                machine.kill()
            raise
    code = max(codes)
    print(f"{name}: exit code {code} after {time.monotonic() - began:.0f} s")
    return code


def init_script(parts: Sequence[Part]) -> str:
    """Return what a machine's first process does: mount the host's files, run its part of the tests, end the machine.

    Machine number i has ``part=i`` on its kernel's command line, and does ``parts[i]``.
    """
    settings = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT / "src"), "PAGEFERRY_REQUIRE_KVM": "1"}
    settings |= {name: os.environ[name] for name in (LINUX_IMAGE,) if name in os.environ}
    environment = [f"{name}={value}" for name, value in settings.items()]
    cases = [
        f"*part={number}*) exec {shlex.join(['/usr/bin/env', *environment, *part.program])};;"
        for number, part in enumerate(parts)
    ]
    steps = (
        f"cd {shlex.quote(str(PROJECT))}",
        "{ grep -q Y /sys/module/kvm_amd/parameters/npt || { echo 'no nested paging in this machine'; exit 2; }; }",
        f"case $(cat /proc/cmdline) in {' '.join(cases)} esac",
    )
    command = shlex.quote(" && ".join(steps))
    return _INIT.format(command=command, base=EXIT_BASE, port=EXIT_PORT, most=EXIT_BY_SIGNAL)


def kernel_log(folder: Path, part: int) -> Path:
    """Return where the kernel of a part's machine writes."""
    return folder / f"kernel{part}.log"


def run_machine(command: Sequence[str], folder: Path, part: int, give_up_s: float = GIVE_UP_S) -> int:
    """Run an emulator, show what the tests print, and return pytest's exit code; NOT_RUN when the machine gave none.

    The first machine's tests are shown as they go, those of the others when they have ended.
    """
    output = folder / f"tests{part}.log"
    with output.open("wb") as file:
        machine = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file if part else None)
        _machines.append(machine)
        try:
            ended = machine.wait(give_up_s)
        except subprocess.TimeoutExpired:
            print(f"{folder.name}: no result after {give_up_s} s; given up")
            return NOT_RUN
        finally:
            machine.kill()
            machine.wait()
    if part:
        print(output.read_text(errors="replace"))
    code = (ended >> 1) - EXIT_BASE
    if ended & 1 and code >= 0:
        return code
    print(f"{folder.name}: the machine ended without a result ({QEMU}: {ended}); its kernel said:")
    print(*kernel_log(folder, part).read_text(errors="replace").splitlines()[-20:], sep="\n")
    return NOT_RUN


def qemu_command(image: LinuxImage, log: Path, number: int, part: Part) -> list[str]:
    """Return the emulator's command line for a part and its number.

    The machine has processors with SVM, a serial port for the kernel, and one for the tests.

    All run on one thread: on two, the machine was seen to hang under QEMU 7.2, it seems while the kernel patched its
    own code (KVM has the scheduler patched for the first guest). One thread is not slower. ``tsc=reliable`` spares the
    kernel's test of the TSCs, which an emulator fails: KVM would then stop each guest's TSC with its vCPU.
    ``no_timer_check`` spares that of the timer's interrupt: an emulator that has to wait for a processor of a busy host
    fails it, and the kernel panics. A script's machine counts instructions for a clock, so that what it measures is the
    same on a busy host; with two processors it stands still then where the second one is started.
    """
    return [
        *(QEMU, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *(
            "-accel",
            "tcg,thread=single",
            "-cpu",
            "max,-smap",
            "-smp",
            str(part.processors),
            "-m",
            f"{MEMORY_BYTES >> 20}M",
        ),
        *(() if part.script is None else ("-icount", "shift=0,sleep=off")),
        *("-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append"),
        f"console=ttyS0 panic=-1 tsc=reliable no_timer_check {part.kernel_options} part={number}",
        *("-serial", f"file:{log}", "-serial", "stdio"),
        *("-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1"),
        *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
    ]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(NOT_RUN)
