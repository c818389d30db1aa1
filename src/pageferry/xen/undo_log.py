"""The undo log of a domain: one process at a time works on it, and what it leaves behind is undone by the next.

Xen turns nothing off when the process ends that asked for it: log-dirty stays on, a paused domain paused. So each such
step is written down before it is done, in a file that this process holds a lock on. A file whose lock is free was left
behind by a process that was killed, or that Xen refused to undo a step, and tells what to undo; each step may be undone
although it never happened. A domain that was given to another host is left as it is: it may run there.

A guest that was asked to suspend itself may do so after the process was killed: what undoes it waits for that.
"""

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pageferry.core.errors import PageferryError, UsageError
from pageferry.xen import uapi
from pageferry.xen.domctl import Control, DomainInfo
from pageferry.xen.store import XenStore

DIRECTORY = Path("/run/pageferry")
#: The suffix is older than the word: two releases of pageferry keep each other out, and undo what the other left.
_SUFFIX = ".claim"
_NAME = re.compile(rf"xen-(\d+)-([0-9a-f-]{{36}}){re.escape(_SUFFIX)}")
#: A note is one write of so many bytes, so that a kill leaves either the note before or this one.
_NOTE_BYTES = 4096
#: What the hypercall by which a guest suspends itself returns where that was cancelled.
SUSPEND_CANCELLED = 1
_LOOK_S = 0.01


class GivenAwayError(UsageError):
    """The domain was given to another host, and whether it runs there is not known."""


class UndoLog:
    """The right to work on a domain, and the steps that are to be undone. Made by :func:`open_undo_log`.

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

        ``log_dirty``, ``suspended`` and ``given_away`` are 1 or 0, ``asked`` is the number of seconds that the guest
        has to suspend itself, or 0, ``paused`` is how often this process paused the domain, ``name`` what it was called
        before this process renamed it, or "".
        """
        self._steps |= steps
        data = json.dumps({"pid": os.getpid()} | self._steps).encode()
        os.pwrite(self._fd, data.ljust(_NOTE_BYTES), 0)

    def close(self) -> None:
        """Let others work on the domain. May be called twice.

        A step that could not be undone stays written down, and the next start undoes it; so does a domain that was
        given away without an answer, and the next start says so.
        """
        if self._fd >= 0:
            if not any(self._steps.values()):
                with contextlib.suppress(OSError):
                    self._path.unlink()
            os.close(self._fd)
            self._fd = -1


def open_undo_log(
    control: Control, info: DomainInfo, directory: Path = DIRECTORY, *, given_back: bool = False
) -> UndoLog:
    """Have a domain to work on; what a process left behind that was killed at work on it is undone first.

    Args:
        control: Xen.
        info: which domain.
        directory: where the undo logs are.
        given_back: whether it surely does not run on the host that it was given to, if it was: undo that too.

    Raises:
        GivenAwayError: it was given to another host; nothing was undone.
        UsageError: another process works on it, or the file cannot be made.
        XenError: something could not be undone.
    """
    path = _path(info, directory)
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
            os.close(fd)  # it was closed between the two
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    try:
        steps = _read(fd)
        if steps.get("given_away") and not given_back:
            raise GivenAwayError(
                f"domain {info.domid} was given to another host by a process that had no answer from there",
                hint="see whether it runs there; if so: xl destroy it here; if it surely does not: "
                f"pageferry xen resume {info.domid}",
            )
        _undo(control, info.domid, steps)
        mine = UndoLog(fd, path)
        mine.note()  # what was undone is not undone again, whenever this process ends
    except BaseException:
        os.close(fd)
        raise
    return mine


def sweep(
    control: Control, directory: Path = DIRECTORY, *, tell: Callable[[str], None] = lambda line: None
) -> list[int]:
    """Undo what earlier processes left behind, of all domains; return the domains of which there was something.

    Args:
        control: Xen.
        directory: where the undo logs are.
        tell: hears a line on each domain that was given to another host, and is left as it is.
    """
    swept = []
    for path in sorted(directory.glob(f"xen-*{_SUFFIX}")):
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
        try:
            open_undo_log(control, info, directory).close()
            swept.append(info.domid)
        except GivenAwayError as error:
            tell(f"{error}: {error.hint}")
        except PageferryError:
            continue  # another process works on it, or Xen refuses: the next command on this domain says so
    return swept


def take_back(control: Control, info: DomainInfo, directory: Path = DIRECTORY) -> None:
    """Let a domain go on here that was given to another host without an answer, and surely does not run there.

    Raises:
        UsageError: it was not given away, or another process works on it.
        XenError: something could not be undone.
    """
    if not _path(info, directory).exists():
        raise UsageError(
            f"domain {info.domid} was not given to another host", hint="xl unpause lets a paused one go on"
        )
    open_undo_log(control, info, directory, given_back=True).close()


def _path(info: DomainInfo, directory: Path) -> Path:
    return directory / f"xen-{info.domid}-{info.uuid}{_SUFFIX}"


def _read(fd: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(fd, 16 * _NOTE_BYTES, 0) or b"{}")
    except ValueError:  # no note of a pageferry: it may run elsewhere
        return {"log_dirty": 1}
    return found if isinstance(found, dict) else {}


def _undo(control: Control, domid: int, steps: dict[str, Any]) -> None:
    if steps.get("log_dirty"):
        control.shadow_op(domid, uapi.XEN_DOMCTL_SHADOW_OP_OFF)
    if wait_s := int(steps.get("asked", 0)):
        _await_suspend(control, domid, wait_s)
    if steps.get("suspended") and control.info(domid).shutdown_reason == uapi.SHUTDOWN_suspend:
        if wait_s:
            control.set_rax(domid, 0, SUSPEND_CANCELLED)
        control.resume(domid)
    for _ in range(int(steps.get("paused", 0))):
        control.unpause(domid)
    if name := steps.get("name"):
        with XenStore() as store:
            store.write(f"/local/domain/{domid}/name", str(name))


def _await_suspend(control: Control, domid: int, wait_s: float) -> None:
    """Take back what a guest was asked; one that has taken the request is waited for, until it has suspended itself."""
    path = f"/local/domain/{domid}/control/shutdown"
    with XenStore() as store:
        if store.read(path):
            store.write(path, "")
            return
    until_s = time.monotonic() + wait_s
    while control.info(domid).shutdown_reason is None and time.monotonic() < until_s:
        time.sleep(_LOOK_S)
