"""``make test-xen``: run the tests of real Xen in the dom0 of an emulated machine with nested paging.

QEMU emulates a processor with AMD-V and nested paging (TCG), Xen 4.17 of Debian runs on it with HAP, and Debian's
kernel is its dom0. As for ``make test-npt`` dom0's user space is this very one, read-only over 9p under an overlay;
between the two lie the files of Debian's Xen packages, which are downloaded and unpacked, not installed. No root is
needed on the host.

The tests' output goes to standard output; the exit code is pytest's, or 2 when the tests could not be run.
"""

import argparse
import compileall
import gzip
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from debian_root import NoRootError, unpack
from npt import (
    EXIT_BASE,
    EXIT_BY_SIGNAL,
    EXIT_PORT,
    NOT_RUN,
    PACKAGES,
    PROJECT,
    QEMU,
    TOOLS,
    kernel_log,
    run_machines,
)

from pageferry.core.errors import UnsupportedError
from pageferry.guests.linux.debian import KERNELS, LinuxImage, build_image, downloaded, needed_packages

CACHE = PROJECT / "build" / "xen"
#: Of these and of what they need the packages of Xen and of OpenSSH are unpacked; all else the host has already.
WANTED_PACKAGES = ("xen-utils-4.17", "xen-hypervisor-4.17-amd64", "qemu-system-xen", "openssh-server")
_UNPACKED = re.compile(
    r"(lib)?xen.*|libyajl\d+|qemu-system-xen|openssh-(server|client)|lib(wrap0|nsl2|tirpc3|edit2|bsd0|fido2-1|cbor0\.8)"
)
MODULES = (
    *("virtio_pci", "9pnet_virtio", "9p", "overlay"),
    *("xen_privcmd", "xen_evtchn", "xen_gntdev", "xen_gntalloc", "xenfs"),
)
MEMORY_BYTES = 3 << 30
DOM0_MEMORY = "1536M"
#: What the tests of tests/xen do not need is not loaded: that took a minute of each machine.
_PYTEST = ("-m", "pytest", "--confcutdir=tests/xen", "-p", "no:hypothesispytest", "-p", "no:xdist")
_OPTIONS = ("--timeout", "1800", "-o", "faulthandler_timeout=0")
_KIT = ("tests/xen/test_kit.py",)
_OPERATORS_AND_SAVES = ("tests/xen/test_operators.py", "tests/xen/test_differential.py", "tests/xen/test_save.py")
_LINUX = ("tests/xen/test_linux.py",)
_NAMED = (*_KIT, *_OPERATORS_AND_SAVES, *_LINUX)
#: Arguments for pytest: one machine for each, as many at once as there are processors here, what takes longest first;
#: the first has whatever tests there are besides.
PARTS = (
    ("tests/xen", *(f"--ignore={each}" for each in _NAMED), *_OPTIONS),
    (*_KIT, *_OPTIONS),
    (*_LINUX, *_OPTIONS),
    (*_OPERATORS_AND_SAVES, *_OPTIONS),
)

_INIT = """
export PATH=/bin
for applet in $(busybox --list); do busybox ln -s busybox /bin/$applet 2>/dev/null; done
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module; done
mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=1048576 host /host
mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=1048576 xen /tmp
mount -t tmpfs ram /ram
mkdir /ram/upper /ram/work
mount -t overlay -o lowerdir=/tmp:/host,upperdir=/ram/upper,workdir=/ram/work root /root
mount -t proc proc /root/proc
mount -t sysfs sys /root/sys
mount -t devtmpfs dev /root/dev
mkdir -p /root/dev/shm /root/dev/pts /root/proc/xen
mount -t tmpfs shm /root/dev/shm
mount -t devpts pts /root/dev/pts
mount -t tmpfs run /root/run
mount -t tmpfs tmp /root/tmp
mount -t xenfs xenfs /root/proc/xen
ifconfig lo up
chroot /root /bin/sh -c {command} >/dev/ttyS1 2>&1 </dev/null
code=$?
if [ $code -gt {most} ]; then echo "ended by signal $((code - 128))" >/dev/ttyS1; code={most}; fi
printf "\\\\$(printf %o $(({base} + code)))" | dd of=/dev/port bs=1 seek={port} 2>/dev/null
"""

#: What Debian's init script for Xen does: the store, dom0's own entries in it, the consoles; and what sshd wants.
_TOOLSTACK = (
    "export PATH=$PATH:/usr/lib/xen-4.17/bin",
    "mkdir -p /run/xen /run/xenstored /var/lib/xen /var/lib/xenstored /var/log/xen/console /run/lock",
    "xenstored --pid-file /run/xen/xenstored.pid",
    "xen-init-dom0 >/dev/null",
    "xenconsoled --pid-file=/run/xen/xenconsoled.pid --log=guest",
    "mkdir -p /run/sshd",
    "(grep -q ^sshd: /etc/passwd || echo sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin >>/etc/passwd)",
)


def main(arguments: Sequence[str]) -> int:
    """Run the tests; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shell", help="run this command instead of pytest")
    parser.add_argument("--processors", type=int, default=1, help="of each machine; see qemu_command")
    parser.add_argument("tests", nargs="*", help="arguments (after --) for pytest, instead of all of tests/xen")
    asked = parser.parse_args(arguments)
    if missing := [package for tool, package in TOOLS.items() if shutil.which(tool) is None]:
        print(f"test-xen: {', '.join(missing)} not installed: sudo apt-get install {' '.join(missing)}")
        return NOT_RUN
    parts = [asked.tests] if asked.tests or asked.shell else PARTS
    programs = [asked.shell or shlex.join([sys.executable, *_PYTEST, *tests]) for tests in parts]
    try:
        xen, root = unpacked_xen(CACHE)
        images = [
            build_image(
                CACHE / f"part{number}",
                PACKAGES,
                kernel=KERNELS["standard"],
                modules=MODULES,
                init=init_script(program),
                programs={},
            )
            for number, program in enumerate(programs)
        ]
    except (UnsupportedError, NoRootError) as error:
        print(f"test-xen: {error}\n  hint: {getattr(error, 'hint', '')}")
        return NOT_RUN
    # A machine would compile all of it anew, and measure that; it cannot write to these files.
    compileall.compile_dir(PROJECT / "src", quiet=1)
    commands = [
        qemu_command(xen, root, image, kernel_log(CACHE, at), processors=asked.processors)
        for at, image in enumerate(images)
    ]
    return run_machines(commands, CACHE, "test-xen")


def unpacked_xen(cache: Path) -> tuple[Path, Path]:
    """Return the hypervisor's file, and the directory with the files of Xen's packages; made once.

    Raises:
        UnsupportedError: the packages cannot be had.
    """
    xen, root, made_of = cache / "xen", cache / "root", cache / "packages"
    cache.mkdir(parents=True, exist_ok=True)
    names = " ".join(WANTED_PACKAGES)
    if not made_of.exists() or made_of.read_text() != names:
        shutil.rmtree(root, ignore_errors=True)
        for package in needed_packages(WANTED_PACKAGES):
            if _UNPACKED.fullmatch(package):
                unpack(downloaded(package, PACKAGES), root)
        packed = next((root / "boot").glob("xen-*.gz"))
        unready = cache / "xen.part"
        unready.write_bytes(gzip.decompress(packed.read_bytes()))
        unready.rename(xen)
        made_of.write_text(names)
    return xen, root


def init_script(program: str) -> str:
    """Return what dom0's first process does: mount the files, start Xen's store, run a program, end the machine.

    Args:
        program: a command for the shell, in the project's directory.
    """
    settings = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT / "src"), "PAGEFERRY_REQUIRE_XEN": "1"}
    environment = " ".join(f"export {name}={shlex.quote(value)};" for name, value in settings.items())
    steps = [f"{environment} cd {shlex.quote(str(PROJECT))}", *_TOOLSTACK, f"exec /bin/sh -c {shlex.quote(program)}"]
    return _INIT.format(
        command=shlex.quote(" && ".join(steps)),
        base=EXIT_BASE,
        port=EXIT_PORT,
        most=EXIT_BY_SIGNAL,
    )


def qemu_command(xen: Path, root: Path, image: LinuxImage, log: Path, *, processors: int) -> list[str]:
    """Return the emulator's command line.

    The first serial port is Xen's and dom0's console, the second the tests'. The processor has no SMAP and no RDTSCP:
    QEMU 7.2 passes neither on to a guest of nested paging as Xen wants it. With its lazy switching of the FPU, programs
    in dom0 were seen to die of damaged memory while a guest computed: ``eager-fpu`` has Xen switch it each time.

    With two processors QEMU interrupts one for the other's turn. Where that is just after Xen injected an interrupt
    into a guest, QEMU delivers it once more, whether the guest takes interrupts or not: Linux was seen to die of one
    that came twice ("stack guard page was hit"). One processor is faster too: a program starts in two thirds of the
    time, the tests of migrations took 255 s against 276 s.
    """
    return [
        *(QEMU, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-accel", "tcg,thread=single", "-cpu", "max,-smap,-rdtscp"),
        *("-smp", str(processors), "-m", f"{MEMORY_BYTES >> 20}M"),
        *(
            "-kernel",
            str(xen),
            "-append",
            f"xen console=com1 dom0_mem={DOM0_MEMORY},max:{DOM0_MEMORY} noreboot spec-ctrl=eager-fpu",
        ),
        *("-initrd", f"{image.kernel} console=hvc0 panic=-1,{image.initramfs}"),
        *("-serial", f"file:{log}", "-serial", "stdio"),
        *("-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=1"),
        *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
        *("-virtfs", f"local,path={root},mount_tag=xen,security_model=none,readonly=on"),
    ]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(NOT_RUN)
