"""A root file system with Debian's programs in it, on a raw ext4 image: what a guest does real work with.

Nothing is installed on the host and nothing needs root: apt-get downloads the packages with all that they need, their
files are unpacked into a directory, and ``mke2fs -d`` makes the image of it. No package's scripts are run: there are
files, no users, no services.
"""

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

#: Programs that do work and check it themselves.
WORK_PACKAGES = ("memtester", "stress-ng", "fio", "sqlite3", "redis-server", "redis-tools", "iproute2", "e2fsprogs")
#: What must be installed, and the Debian package that has it.
TOOLS = {"apt-get": "apt", "dpkg-deb": "dpkg", "mke2fs": "e2fsprogs"}
#: Since Debian 12 these are links into /usr, whatever path a package names.
_MERGED = ("bin", "sbin", "lib", "lib64")
_UNWANTED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/lintian")
_EMPTY = ("dev", "proc", "sys", "run", "tmp", "mnt", "root", "var/tmp", "var/log")


class NoRootError(Exception):
    """The file system cannot be made here; the message says what is missing."""


def debian_root(cache: Path, *, packages: Sequence[str] = WORK_PACKAGES, size_mib: int = 1024) -> Path:
    """Return a fresh raw image of ``size_mib`` with the packages; made once, and copied from then on.

    Raises:
        NoRootError: a tool or the network is missing.
    """
    if missing := [package for tool, package in TOOLS.items() if shutil.which(tool) is None]:
        raise NoRootError(f"not installed: {', '.join(missing)}")
    cache.mkdir(parents=True, exist_ok=True)
    image = cache / "debian-root.ext4"
    if not image.exists():
        with TemporaryDirectory(dir=cache) as folder:
            root = Path(folder) / "root"
            for deb in _downloaded(cache / "archives", packages):
                unpack(deb, root)
            for name in _EMPTY:
                (root / name).mkdir(parents=True, exist_ok=True)
            unready = Path(folder) / "image"
            with unready.open("wb") as file:
                file.truncate(size_mib << 20)
            _run("mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", "-d", str(root), str(unready))
            unready.rename(image)
    return image


def _downloaded(archives: Path, packages: Sequence[str]) -> list[Path]:
    (archives / "partial").mkdir(parents=True, exist_ok=True)
    nothing_installed = archives / "status"
    nothing_installed.touch()
    options = {"Dir::State::status": nothing_installed, "Dir::Cache::archives": archives, "Debug::NoLocking": "1"}
    settings = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    _run("apt-get", *settings, "--download-only", "--yes", "--no-install-recommends", "install", *packages)
    return sorted(archives.glob("*.deb"))


def unpack(deb: Path, root: Path) -> None:
    """Put the files of a package into a directory."""
    for name in _MERGED:
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        if not (root / name).is_symlink():
            (root / name).symlink_to(f"usr/{name}")
    with _files_of(deb) as tar:
        for member in tar:
            path = PurePosixPath(os.path.normpath(member.name))
            if path.parts[:1] and path.parts[0] in _MERGED:
                path = "usr" / path
            if str(path).startswith(_UNWANTED) or member.isdev():
                continue
            member.name = str(path)
            if member.islnk():
                target = PurePosixPath(os.path.normpath(member.linkname))
                member.linkname = str("usr" / target if target.parts[0] in _MERGED else target)
            if member.isdir() and (root / path).exists():
                continue
            tar.extract(member, root, filter="tar")


@contextmanager
def _files_of(deb: Path) -> Iterator[tarfile.TarFile]:
    done = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        yield tar


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoRootError(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
