"""Claim: one process at a time works on a domain, and what it leaves behind when it is killed is undone by the next.

Xen turns nothing off when the process ends that asked for it: log-dirty stays on, a paused domain paused. So each such
step is written down before it is done, in a file that this process holds a lock on. A file whose lock is free was left
behind, and tells what to undo; each step may be undone although it never happened. A domain that was given to another
host is left as it is: it may run there.
"""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pageferry.core.errors import PageferryError, UsageError
from pageferry.xen import uapi
from pageferry.xen.domctl import Control, DomainInfo
from pageferry.xen.store import XenStore

DIRECTORY = Path("/run/pageferry")
_NAME = re.compile(r"xen-(\d+)-([0-9a-f-]{36})\.claim")


class Claim:
    """The right to work on a domain, and the steps that are to be undone. Made by :func:`claimed`.

    Args:
        fd: of the file, locked; taken over.
        path: of the file.
    """

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self._steps: dict[str, int | str] = {}

    def note(self, **steps: int | str) -> None:
        """Write down steps before they are done, or when they are undone (0).

        ``log_dirty``, ``suspended`` and ``given_away`` are 1 or 0, ``paused`` is how often this process paused the
        domain, ``name`` what it was called before this process renamed it, or "".
        """
        self._steps |= steps
        data = json.dumps({"pid": os.getpid()} | self._steps).encode()
        os.pwrite(self._fd, data, 0)
        os.ftruncate(self._fd, len(data))

    def release(self) -> None:
        """Give it back; nothing is left to be undone. May be called twice.

        What was given away without an answer stays written down: the next start says so.
        """
        if self._fd >= 0:
            if not self._steps.get("given_away"):
                with contextlib.suppress(OSError):
                    self._path.unlink()
            os.close(self._fd)
            self._fd = -1


def claim(control: Control, info: DomainInfo, directory: Path = DIRECTORY) -> Claim:
    """Claim a domain; what a process left behind that was killed at work on it is undone first.

    Raises:
        UsageError: another process works on it, or the file cannot be made.
        XenError: something could not be undone.
    """
    path = directory / f"xen-{info.domid}-{info.uuid}.claim"
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = _read(fd).get("pid")
                os.close(fd)
                by = "another pageferry" if pid is None else f"process {pid}, a pageferry,"
                raise UsageError(
                    f"{by} works on domain {info.domid} already", hint="wait for it, or end it: it undoes what it did"
                ) from None
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(fd).st_ino == path.stat().st_ino:
                    break
            os.close(fd)  # it was released between the two
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    try:
        _undo(control, info.domid, _read(fd))
    except BaseException:
        os.close(fd)
        raise
    return Claim(fd, path)


def sweep(control: Control, directory: Path = DIRECTORY) -> list[int]:
    """Undo what killed processes left behind, of all domains; return the domains of which there was something."""
    swept = []
    for path in sorted(directory.glob("xen-*.claim")):
        found = _NAME.fullmatch(path.name)
        if found is None:
            continue
        try:
            info = control.info(int(found[1]))
            gone = info.uuid != found[2]
        except UsageError:
            gone = True
        if gone:
            with contextlib.suppress(OSError):
                path.unlink()
            continue
        with contextlib.suppress(PageferryError):
            mine = claim(control, info, directory)
            mine.release()
            swept.append(info.domid)
    return swept


@contextlib.contextmanager
def claimed(control: Control, info: DomainInfo, directory: Path = DIRECTORY) -> Iterator[Claim]:
    """Have a claim for the length of a ``with`` block; errors as of :func:`claim`."""
    mine = claim(control, info, directory)
    try:
        yield mine
    finally:
        mine.release()


def _read(fd: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(fd, 4096, 0) or b"{}")
    except ValueError:  # killed while it wrote: then the steps before are not known, and all are undone
        return {"log_dirty": 1, "paused": 1, "suspended": 1}
    return found if isinstance(found, dict) else {}


def _undo(control: Control, domid: int, steps: dict[str, Any]) -> None:
    if steps.get("given_away"):
        raise UsageError(
            f"domain {domid} was given to another host by a process that had no answer from there",
            hint="see whether it runs there; if so: xl destroy it here; if it surely does not: remove its file in "
            f"{DIRECTORY}, then xl unpause",
        )
    if steps.get("log_dirty"):
        control.shadow_op(domid, uapi.XEN_DOMCTL_SHADOW_OP_OFF)
    if steps.get("suspended") and control.info(domid).shutdown_reason == uapi.SHUTDOWN_suspend:
        control.resume(domid)
    for _ in range(int(steps.get("paused", 0))):
        control.unpause(domid)
    if name := steps.get("name"):
        with XenStore() as store:
            store.write(f"/local/domain/{domid}/name", str(name))
