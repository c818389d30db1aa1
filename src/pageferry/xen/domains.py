"""The domains of this host, as ``pageferry xen list`` shows them."""

import errno
import json
from dataclasses import dataclass
from pathlib import Path

from pageferry.core.errors import UsageError, XenError
from pageferry.core.frames import PAGE_SIZE
from pageferry.xen import uapi
from pageferry.xen.claim import DIRECTORY, claimed
from pageferry.xen.domain import USERDATA, read_configuration
from pageferry.xen.domctl import Control, DomainInfo
from pageferry.xen.store import XenStore


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainSeen:
    """One domain.

    ``kind`` is ``pv``, ``hvm``, ``pvh``, or ``hvm or pvh`` where Xen's tools keep no configuration. ``paging`` is
    ``hap``, ``shadow`` or ``pv``. ``log_dirty`` is None where it cannot be known: of a PV domain, and of one that
    another pageferry works on (``by``).
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


def list_domains(
    control: Control, store: XenStore, *, claims: Path = DIRECTORY, userdata: Path = USERDATA
) -> list[DomainSeen]:
    """Return the domains, by number.

    Whether log-dirty is on is found out by turning it on where it is off, for a moment: Xen does not tell otherwise.

    Raises:
        XenError: Xen or its store refused.
    """
    numbers = sorted(int(name) for name in store.directory("/local/domain") if name.isdecimal())
    seen = []
    for domid in numbers:
        try:
            info = control.info(domid)
        except UsageError:  # it has just ended
            continue
        on, by = _log_dirty(control, info, claims)
        seen.append(
            DomainSeen(
                domid=domid,
                name=store.read(f"/local/domain/{domid}/name") or "",
                kind=_kind(info, userdata),
                paging="pv" if not info.is_hvm else "hap" if info.hap else "shadow",
                status=_status(info),
                vcpus=info.vcpus,
                memory_bytes=info.memory_pages * PAGE_SIZE,
                log_dirty=on,
                by=by,
            )
        )
    return seen


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


def _log_dirty(control: Control, info: DomainInfo, claims: Path) -> tuple[bool | None, str]:
    if not info.is_hvm or info.dying:
        return None, ""
    try:
        with claimed(control, info, claims) as mine:
            mine.note(log_dirty=1)
            try:
                control.shadow_op(info.domid, uapi.XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY)
            except XenError as error:
                mine.note(log_dirty=0)
                if error.errno != errno.EINVAL:
                    raise
                return True, ""
            control.shadow_op(info.domid, uapi.XEN_DOMCTL_SHADOW_OP_OFF)
            return False, ""
    except UsageError as error:
        return None, str(error)
