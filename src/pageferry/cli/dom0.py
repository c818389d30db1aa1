"""Xen as the commands use it."""

from collections.abc import Iterator
from contextlib import contextmanager

from pageferry.cli.stdio import tell
from pageferry.xen.domctl import Control
from pageferry.xen.store import XenStore
from pageferry.xen.undo_log import sweep


@contextmanager
def dom0() -> Iterator[tuple[Control, XenStore]]:
    """Lend Xen and its store; what earlier processes left behind on domains is undone first."""
    with Control() as control, XenStore() as store:
        for domid in sweep(control, tell=tell):
            tell(f"domain {domid}: undone what an earlier process left behind (log-dirty on, or a pause)")
        yield control, store
