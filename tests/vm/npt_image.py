"""A bootable image made of Debian packages: a kernel, and an initramfs with busybox, some modules and one script.

Nothing is installed and nothing needs root: ``apt-get download`` fetches the packages and ``dpkg-deb`` opens them.
"""

import lzma
import re
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

KERNEL_METAPACKAGE = "linux-image-amd64"
BUSYBOX_PACKAGE = "busybox-static"
#: Empty directories of the initramfs, to mount on.
MOUNT_POINTS = ("dev", "proc", "sys", "host", "ram", "root")


class ImageError(Exception):
    """The image cannot be made; the message says why, ``hint`` what to do."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


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
            ImageError: there is no such module.
        """
        if name not in self._paths:
            raise ImageError(f"the kernel has no module {name}", hint=f"{KERNEL_METAPACKAGE} of Debian 12 has it")
        found = re.search(rb"\0depends=([^\0]*)\0", self.read(name))
        return [need.replace("-", "_") for need in found[1].decode().split(",") if need] if found else []

    def load_order(self, names: Iterable[str]) -> list[str]:
        """Return ``names`` and whatever they need, each after what it needs, without what the kernel has built in.

        Raises:
            ImageError: there is no such module.
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


def cpio(files: Iterable[tuple[str, int, bytes]]) -> bytes:
    """Return an archive in the "newc" format, which a Linux kernel unpacks as its first root file system.

    Args:
        files: path, mode with the file's type, and content of each; a directory before what is in it.

    Source: the kernel's ``Documentation/driver-api/early-userspace/buffer-format.rst``.
    """
    return b"".join(_cpio_entries(files))


def _cpio_entries(files: Iterable[tuple[str, int, bytes]]) -> Iterator[bytes]:
    inode = 0
    for inode, (path, mode, content) in enumerate(files, start=1):
        yield _cpio_entry(inode, path, mode, content)
    yield _cpio_entry(inode + 1, "TRAILER!!!", 0, b"")


def _cpio_entry(inode: int, path: str, mode: int, content: bytes) -> bytes:
    name = path.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device (major, minor), special device (same), name's size, checksum
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
    return _padded(b"070701" + b"".join(b"%08x" % field for field in fields) + name) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def build_image(cache: Path, *, modules: Iterable[str], init: str) -> tuple[Path, Path]:
    """Write an image into the directory ``cache``; return the paths of its kernel and its initramfs.

    Its first process runs the shell script ``init``, which finds ``/bin/busybox``, the empty :data:`MOUNT_POINTS`, and
    in ``/modules`` the named modules with all that they need, to be loaded in the order of their file names. A package
    that lies in ``cache`` already is not downloaded again.

    Raises:
        ImageError: the packages cannot be had, or the kernel has no such module.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with _opened(_downloaded(BUSYBOX_PACKAGE, cache)) as package:
        busybox = package.read("bin/busybox")
    files = [(name, stat.S_IFDIR | 0o755, b"") for name in ("bin", "modules", *MOUNT_POINTS)]
    files.append(("bin/busybox", stat.S_IFREG | 0o755, busybox))
    files.append(("init", stat.S_IFREG | 0o755, f"#!/bin/busybox sh\n{init}".encode()))
    with _opened(_downloaded(_kernel_package(), cache)) as package:
        kernel = package.read(package.find(r"boot/vmlinuz-.*")[0])
        available = Modules(package)
        for number, name in enumerate(available.load_order(modules)):
            files.append((f"modules/{number:03}-{name}.ko", stat.S_IFREG | 0o644, available.read(name)))
    (cache / "vmlinuz").write_bytes(kernel)
    (cache / "initramfs").write_bytes(cpio(files))
    return cache / "vmlinuz", cache / "initramfs"


@contextmanager
def _opened(deb: Path) -> Iterator[PackageFiles]:
    # Through a file without a name, because modules are read in no order.
    with tempfile.TemporaryFile(dir=deb.parent) as unpacked:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], stdout=unpacked, check=True)
        unpacked.seek(0)
        with tarfile.open(fileobj=unpacked) as tar:
            yield PackageFiles(tar)


def _kernel_package() -> str:
    """Return the name of the package with the kernel that Debian recommends today."""
    depends = _apt("apt-cache", "depends", "--important", KERNEL_METAPACKAGE)
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        raise ImageError(
            f"apt knows no package {KERNEL_METAPACKAGE}", hint="this needs the package lists of Debian: apt-get update"
        )
    return found[1]


def _downloaded(package: str, cache: Path) -> Path:
    """Return the package's file in ``cache``, downloaded if it is not there."""
    if not (found := sorted(cache.glob(f"{package}_*.deb"))):
        print(f"downloading {package}", flush=True)
        _apt("apt-get", "download", "--quiet", f"{package}:amd64", directory=cache)
        found = sorted(cache.glob(f"{package}_*.deb"))
    return found[-1]


def _apt(*command: str, directory: Path | None = None) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImageError(f"{' '.join(command)} failed: {done.stderr.strip()}", hint="apt-get update, and a network")
    return done.stdout
