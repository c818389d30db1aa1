"""Makes an initramfs: the archive that a Linux kernel unpacks as its first root file system."""

import stat
from collections.abc import Iterable, Iterator

DIRECTORY, FILE, PROGRAM = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFREG | 0o755


def cpio(files: Iterable[tuple[str, int, bytes]]) -> bytes:
    """Return an archive in the "newc" format. A kernel unpacks several, one after another, as if they were one.

    Args:
        files: path, mode with the file's type, and content of each; a directory before what is in it.

    Source: the kernel's ``Documentation/driver-api/early-userspace/buffer-format.rst``.
    """
    return b"".join(_entries(files))


def _entries(files: Iterable[tuple[str, int, bytes]]) -> Iterator[bytes]:
    inode = 0
    for inode, (path, mode, content) in enumerate(files, start=1):
        yield _entry(inode, path, mode, content)
    yield _entry(inode + 1, "TRAILER!!!", 0, b"")


def _entry(inode: int, path: str, mode: int, content: bytes) -> bytes:
    name = path.encode() + b"\0"
    # inode, mode, uid, gid, links, mtime, size, device (major, minor), special device (same), name's size, checksum
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
    return _padded(b"070701" + b"".join(b"%08x" % field for field in fields) + name) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
