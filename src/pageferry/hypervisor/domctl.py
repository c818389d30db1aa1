"""XEN_DOMCTL_shadow_op: the face of log-dirty that code written against Xen knows.

Numbers, arguments and return codes are Xen's; :class:`~pageferry.core.vm.LogDirty` is the Pythonic face of the same
operators. Where Xen's meaning differs from ours this face follows Xen: CLEAN and PEEK while log-dirty is off return an
empty bitmap, a second OFF is fine, and a missing bitmap buffer asks for the counts only. Differences remain:

* CLEAN over fewer pages than the domain has leaves the bits beyond them set. Xen 4.17 loses bits: it clears all of each
  leaf of its bitmap (32,768 frames) of which it returned a part.
* CLEAN without a buffer clears the bits. Xen's starts its counters again and leaves the bits set.
* ``fault_count`` counts since ENABLE, not since the last CLEAN.
* Frames that others have mapped writable are reported in every round; LOGDIRTY_FINAL asks for them, and is accepted.
* There is no shadow test mode: ENABLE means log-dirty, or is refused.

Source: Xen ``public/domctl.h``; docs/internals/hypervisor.md, "On real Xen".
"""

import errno
from dataclasses import dataclass
from enum import IntEnum

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import LogDirtyError, LogDirtyMemoryError, VmError
from pageferry.hypervisor.domain import Domain

#: Mode flags of ENABLE.
ENABLE_REFCOUNT, ENABLE_LOG_DIRTY, ENABLE_TRANSLATE, ENABLE_EXTERNAL = 1 << 1, 1 << 2, 1 << 3, 1 << 4
#: Mode flag of CLEAN and PEEK: the last round, report frames that others have mapped writable too.
LOGDIRTY_FINAL = 1 << 0

_PAGES_PER_MIB = 256


class ShadowOp(IntEnum):
    """``XEN_DOMCTL_SHADOW_OP_*``."""

    OFF = 0
    ENABLE_TEST = 1
    ENABLE_LOGDIRTY = 2
    CLEAN = 11
    PEEK = 12
    GET_ALLOCATION = 30
    SET_ALLOCATION = 31
    ENABLE = 32


@dataclass(slots=True, kw_only=True)
class ShadowOpArguments:
    """``struct xen_domctl_shadow_op``: filled in by the caller, and by the call.

    ``mode``: flags, of ENABLE, CLEAN and PEEK. ``mb``: MiB of the paging pool, rounded up. ``dirty_bitmap``: bit i of
    byte b is gfn 8b+i; None asks for the counts only. ``pages``: how many gfns the bitmap has room for; afterwards how
    many were written there.
    """

    mode: int = 0
    mb: int = 0
    dirty_bitmap: bytearray | memoryview | None = None
    pages: int = 0
    fault_count: int = 0
    dirty_count: int = 0


def shadow_op(domain: Domain | None, op: int, arguments: ShadowOpArguments | None = None) -> int:
    """Perform one operation and return 0, or a negative errno as the hypercall does; never raises for those.

    -ESRCH: no domain, or one that is closed. -EINVAL: an unknown operation or mode, ENABLE when it is on already.
    -ENOMEM: the paging pool (ENABLE, SET_ALLOCATION), or pages that could not be told apart (CLEAN, PEEK; nothing was
    cleared). -EFAULT: the buffer cannot be written, or is smaller than ``pages`` says; nothing was cleared.
    """
    if domain is None or domain.closed:
        return -errno.ESRCH
    given = ShadowOpArguments() if arguments is None else arguments
    try:
        return _perform(domain, op, given)
    except LogDirtyMemoryError:
        return -errno.ENOMEM
    except LogDirtyError:
        return -errno.EINVAL


def _perform(domain: Domain, op: int, given: ShadowOpArguments) -> int:
    if op == ShadowOp.OFF:
        domain.paging.off()
        return 0
    if op == ShadowOp.ENABLE_LOGDIRTY or (op == ShadowOp.ENABLE and given.mode == ENABLE_LOG_DIRTY):
        domain.paging.enable()
        return 0
    if op in (ShadowOp.CLEAN, ShadowOp.PEEK) and not given.mode & ~LOGDIRTY_FINAL:
        return _report(domain, given, clear=op == ShadowOp.CLEAN)
    if op == ShadowOp.SET_ALLOCATION:
        try:
            domain.set_allocation(given.mb * _PAGES_PER_MIB)
        except VmError:
            return -errno.ENOMEM
    elif op != ShadowOp.GET_ALLOCATION:
        return -errno.EINVAL
    given.mb = -(-domain.get_allocation() // _PAGES_PER_MIB)
    return 0


def _report(domain: Domain, given: ShadowOpArguments, *, clear: bool) -> int:
    """CLEAN and PEEK."""
    limit = domain.memory.gfn_limit
    pages = min(given.pages, limit)
    n_bytes = -(-pages // 8)
    buffer = None if given.dirty_bitmap is None else memoryview(given.dirty_bitmap).cast("B")
    if buffer is not None and (buffer.readonly or len(buffer) < n_bytes):
        return -errno.EFAULT
    if not domain.paging.enabled:
        bitmap, given.fault_count = DirtyBitmap(limit), 0
    else:
        given.fault_count = domain.paging.stats().fault_count or 0
        bitmap = domain.paging.clean() if clear else domain.paging.peek()
    given.dirty_count = bitmap.count()
    if buffer is not None:
        covered = bitmap.copy()
        covered.clear_range(pages, limit - pages)
        buffer[:n_bytes] = covered.words.astype("<u8", copy=False).tobytes()[:n_bytes]
        given.pages = pages
    if clear and buffer is not None and pages < limit and domain.paging.enabled:
        bitmap.clear_range(0, pages)
        domain.paging.mark(bitmap.gfns())
    return 0
