"""The domains of this host, as ``pageferry xen list`` shows them."""

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pageferry.core.errors import UsageError, XenError
from pageferry.core.frames import PAGE_SIZE
from pageferry.xen import uapi
from pageferry.xen.domain import USERDATA, read_configuration
from pageferry.xen.domctl import Control, DomainInfo
from pageferry.xen.holder import holder_of
from pageferry.xen.store import XenStore
from pageferry.xen.undo_log import DIRECTORY, open_undo_log


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSeen:
    """One domain.

    ``kind`` is ``pv``, ``hvm``, ``pvh``, or ``hvm or pvh`` where Xen's tools keep no configuration. ``paging`` is
    ``hap``, ``shadow`` or ``pv``. ``log_dirty`` is None where it cannot be known: of a PV domain, and of one that
    another pageferry works on. ``by`` says in words who works on it, empty where that is not known. ``dirty_pages`` is
    how many different pages it wrote in the time that was asked for: None where it was not asked or cannot be known.
    """

    domid: int
    name: str
    kind: str
    paging: str
    status: str
    vcpus: int
    memory_bytes: int
    log_dirty: bool | None
    by: str = ""
    dirty_pages: int | None = None


def list_domains(
    control: Control,
    store: XenStore,
    *,
    watch: Callable[[], object] | None = None,
    undo_logs: Path = DIRECTORY,
    userdata: Path = USERDATA,
) -> list[DomainSeen]:
    """Return the domains, by number.

    Whether log-dirty is on is found out by turning it on where it is off, for a moment: Xen does not tell otherwise.

    Args:
        control: Xen.
        store: its store.
        watch: waits as long as the domains' writes are to be counted; None: they are not.
        undo_logs: where the domains' undo logs are.
        userdata: where Xen's tools keep configurations.

    Raises:
        XenError: Xen or its store refused; log-dirty is as it was.
    """
    numbers = sorted(int(name) for name in store.directory("/local/domain") if name.isdecimal())
    found: list[tuple[DomainInfo, bool | None, str]] = []
    dirty_pages: dict[int, int] = {}
    with ExitStack() as tried:
        for domid in numbers:
            try:
                info = control.info(domid)
            except UsageError:  # it has just ended
                continue
            on, by = tried.enter_context(_log_dirty(control, info, undo_logs))
            found.append((info, on, by))
            if watch is None:
                tried.close()  # off again
        if watch is not None:
            watch()
            for info, on, _ in found:
                if on is False:
                    with _unless_ended():
                        counted = control.shadow_op(info.domid, uapi.XEN_DOMCTL_SHADOW_OP_PEEK)
                        dirty_pages[info.domid] = counted.dirty_count
    return [
        DomainSeen(
            domid=info.domid,
            name=store.read(f"/local/domain/{info.domid}/name") or "",
            kind=_kind(info, userdata),
            paging="pv" if not info.is_hvm else "hap" if info.hap else "shadow",
            status=_status(info),
            vcpus=info.vcpus,
            memory_bytes=info.memory_pages * PAGE_SIZE,
            log_dirty=on,
            by=by,
            dirty_pages=dirty_pages.get(info.domid),
        )
        for info, on, by in found
    ]


def _kind(info: DomainInfo, userdata: Path) -> str:
    if not info.is_hvm:
        return "pv"
    try:
        return str(json.loads(read_configuration(info, userdata).rstrip(b"\0"))["c_info"]["type"])
    except (ValueError, KeyError, TypeError):
        return "hvm or pvh"


def _status(info: DomainInfo) -> str:
    if info.dying:
        return "dying"
    if info.shutdown_reason is not None:
        return "suspended" if info.shutdown_reason == uapi.SHUTDOWN_suspend else "shut down"
    return "paused" if info.paused else "running"


@contextmanager
def _log_dirty(control: Control, info: DomainInfo, undo_logs: Path) -> Iterator[tuple[bool | None, str]]:
    """Lend whether log-dirty is on, and who works on the domain. Where it was off it is on meanwhile."""
    if not info.is_hvm or info.dying:
        yield None, ""
        return
    try:
        mine = open_undo_log(control, info, undo_logs)
    except UsageError as error:
        yield None, str(error)
        return
    try:
        mine.note(log_dirty=1)
        try:
            control.shadow_op(info.domid, uapi.XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY)
        except XenError as error:
            mine.note(log_dirty=0)
            if error.errno != errno.EINVAL:
                raise
            yield True, holder_of(info.domid)
            return
        try:
            yield False, ""
        finally:
            with _unless_ended():
                control.shadow_op(info.domid, uapi.XEN_DOMCTL_SHADOW_OP_OFF)
            mine.note(log_dirty=0)
    finally:
        mine.close()


@contextmanager
def _unless_ended() -> Iterator[None]:
    """Pass over what Xen says of a domain that is no more."""
    try:
        yield
    except XenError as error:
        if error.errno != errno.ESRCH:
            raise
