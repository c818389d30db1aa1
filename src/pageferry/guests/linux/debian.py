"""Images made of Debian packages: a kernel, and an initramfs with busybox, some modules and scripts.

Nothing is installed and nothing needs root: ``apt-get download`` fetches the packages and ``dpkg-deb`` opens them.
``python -m pageferry.guests.linux.debian FOLDER`` makes those that ``make linux-image`` wants.
"""

import argparse
import lzma
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path, PurePosixPath

from pageferry.core.errors import UnsupportedError
from pageferry.guests.linux.initramfs import DIRECTORY, FILE, PROGRAM, cpio

#: By the name of the image: the metapackage of its kernel. ``cloud`` and ``standard`` are the release's own.
KERNELS = {
    "cloud": "linux-image-cloud-amd64",
    "standard": "linux-image-amd64",
    "6.12-cloud": "linux-image-6.12-cloud-amd64",
    "6.12-standard": "linux-image-6.12-amd64",
}
REQUIRED = ("cloud", "standard")
#: What a guest here may need; ``crc32c_generic`` is ext4's, which does not name it.
MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "virtio_balloon"),
    *("crc32c_generic", "ext4"),
    *("button", "evdev"),
)
BUSYBOX_PACKAGE = "busybox-static"
#: Empty directories of the initramfs, to mount on.
MOUNT_POINTS = ("dev", "proc", "sys", "tmp", "host", "ram", "root")
_WANTS_DEBIAN = "this needs Debian's package lists (apt-get update) and a network"


class PackageFiles:
    """The files of an opened package. Paths are relative to the root of the file system.

    Args:
        tar: as ``dpkg-deb --fsys-tarfile`` writes it.
    """

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._members = {str(PurePosixPath(member.name)): member for member in tar}

    def find(self, pattern: str) -> list[str]:
        """Return the paths that match a regular expression as a whole."""
        return [path for path in self._members if re.fullmatch(pattern, path)]

    def read(self, path: str) -> bytes:
        """Return what is in a file."""
        file = self._tar.extractfile(self._members[path])
        assert file is not None, path
        return file.read()


class Modules:
    """The modules of a kernel package, by the names that the kernel knows them by (with underscores)."""

    def __init__(self, files: PackageFiles) -> None:
        self._files = files
        self._paths = {_module_name(path): path for path in files.find(r".*\.ko(\.xz)?")}
        self._built_in = {
            _module_name(line)
            for path in files.find(r".*/modules\.builtin")
            for line in files.read(path).decode().splitlines()
        }

    def read(self, name: str) -> bytes:
        """Return a module's ELF file, unpacked."""
        path = self._paths[name]
        content = self._files.read(path)
        return lzma.decompress(content) if path.endswith(".xz") else content

    def needs(self, name: str) -> list[str]:
        """Return the modules that a module names as those which it needs.

        Raises:
            UnsupportedError: there is no such module.
        """
        if name not in self._paths:
            raise UnsupportedError("linux-image", f"the kernel has no module {name}", hint="take another kernel")
        found = re.search(rb"\0depends=([^\0]*)\0", self.read(name))
        return [need.replace("-", "_") for need in found[1].decode().split(",") if need] if found else []

    def load_order(self, names: Iterable[str]) -> list[str]:
        """Return ``names`` and whatever they need, each after what it needs, without what the kernel has built in.

        Raises:
            UnsupportedError: there is no such module.
        """
        return in_order((name for name in names if name not in self._built_in), self.needs)


def _module_name(path: str) -> str:
    return PurePosixPath(path).name.partition(".ko")[0].replace("-", "_")


def in_order(names: Iterable[str], needs: Callable[[str], Sequence[str]]) -> list[str]:
    """Return ``names`` and all that they need, directly or not, each once and after what it needs.

    Args:
        names: where to begin.
        needs: what a name needs directly; without cycles.
    """
    order: dict[str, None] = {}
    for name in names:
        if name not in order:
            order.update(dict.fromkeys((*in_order(needs(name), needs), name)))
    return list(order)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinuxImage:
    """The two files that a guest boots."""

    kernel: Path
    initramfs: Path

    @classmethod
    def of(cls, folder: Path) -> "LinuxImage":
        """Return the image in a directory, as :func:`build_image` writes it."""
        return cls(kernel=folder / "vmlinuz", initramfs=folder / "initramfs")


def build_image(
    folder: Path, packages: Path, *, kernel: str, modules: Iterable[str], init: str, programs: dict[str, str]
) -> LinuxImage:
    """Make an image and write it into a directory.

    Its first process runs the shell script ``init``, which finds busybox and ``programs`` in ``/bin``, the empty
    :data:`MOUNT_POINTS`, and in ``/modules`` the named modules with all that they need, to be loaded in the order of
    their file names.

    Args:
        folder: where to.
        packages: where downloaded packages lie, and stay.
        kernel: the name of the metapackage that depends on the kernel's newest package.
        modules: by name; those that this kernel has built in are left out.
        init: what the first process does, for busybox's shell.
        programs: further shell scripts, by name.

    Raises:
        UnsupportedError: the packages cannot be had, or the kernel has no such module.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packages.mkdir(parents=True, exist_ok=True)
    with _opened(downloaded(BUSYBOX_PACKAGE, packages)) as package:
        busybox = package.read("bin/busybox")
    files = [(name, DIRECTORY, b"") for name in ("bin", "modules", *MOUNT_POINTS)]
    files.append(("bin/busybox", PROGRAM, busybox))
    scripts = {"init": init} | {f"bin/{name}": text for name, text in programs.items()}
    files += [(path, PROGRAM, f"#!/bin/busybox sh\n{text}".encode()) for path, text in scripts.items()]
    image = LinuxImage.of(folder)
    with _opened(downloaded(_newest(kernel), packages)) as package:
        image.kernel.write_bytes(package.read(package.find(r"boot/vmlinuz-.*")[0]))
        available = Modules(package)
        for number, name in enumerate(available.load_order(modules)):
            files.append((f"modules/{number:03}-{name}.ko", FILE, available.read(name)))
    image.initramfs.write_bytes(cpio(files))
    return image


def main(arguments: Sequence[str]) -> int:
    """Make all images that can be had, or the one asked for; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pageferry.guests.linux.debian", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="where to make a directory for each")
    parser.add_argument("--only", choices=KERNELS, help="make this one")
    asked = parser.parse_args(arguments)
    scripts = package_files("pageferry.guests.linux")
    for name in [asked.only] if asked.only else KERNELS:
        try:
            image = build_image(
                asked.folder / name,
                asked.folder / "packages",
                kernel=KERNELS[name],
                modules=MODULES,
                init=scripts.joinpath("init.sh").read_text(),
                programs={"work": scripts.joinpath("work.sh").read_text()},
            )
        except UnsupportedError as error:
            print(f"{name}: {error}\n  hint: {error.hint}", file=sys.stderr)
            if name == asked.only or name in REQUIRED:
                return 1
        else:
            print(f"{name}: {image.kernel}, {image.initramfs}")
    return 0


@contextmanager
def _opened(deb: Path) -> Iterator[PackageFiles]:
    # Through a file without a name, because modules are read in no order.
    with tempfile.TemporaryFile(dir=deb.parent) as unpacked:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], stdout=unpacked, check=True)
        unpacked.seek(0)
        with tarfile.open(fileobj=unpacked) as tar:
            yield PackageFiles(tar)


def needed_packages(packages: Sequence[str]) -> list[str]:
    """Return the names of packages and of all that they depend on, directly or not.

    Raises:
        UnsupportedError: apt does not know them.
    """
    only = ("--no-recommends", "--no-suggests", "--no-conflicts", "--no-breaks", "--no-replaces", "--no-enhances")
    told = _apt("apt-cache", "depends", "--recurse", *only, *packages)
    return [line for line in told.splitlines() if re.fullmatch(r"[a-z0-9][a-z0-9+.-]*", line)]


def _newest(metapackage: str) -> str:
    """Return the name of the package with the kernel that a metapackage stands for today."""
    depends = _apt("apt-cache", "depends", "--important", metapackage)
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        raise UnsupportedError("linux-image", f"apt knows no package {metapackage}", hint=_WANTS_DEBIAN)
    return found[1]


def downloaded(package: str, cache: Path) -> Path:
    """Return the package's file in ``cache``, downloaded if it is not there."""
    if not (found := sorted(cache.glob(f"{package}_*.deb"))):
        print(f"downloading {package}", flush=True)
        _apt("apt-get", "download", "--quiet", f"{package}:amd64", directory=cache)
        found = sorted(cache.glob(f"{package}_*.deb"))
    return found[-1]


def _apt(*command: str, directory: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise UnsupportedError("linux-image", f"{command[0]} is not installed", hint=_WANTS_DEBIAN) from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it says nothing"]
        raise UnsupportedError("linux-image", f"{' '.join(command)} failed: {last[0]}", hint=_WANTS_DEBIAN)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
