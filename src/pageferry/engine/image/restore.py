"""Restores a guest from a file: reads all of its memory and then lets it run, or lets it run and reads meanwhile.

Postcondition on success: the guest is here, paused. On failure none is here, and none ever ran.
"""

import contextlib
from collections.abc import Callable

from pageferry.core.errors import PageferryError
from pageferry.core.frames import PAGES_PER_2M
from pageferry.core.vm import AnyVm, VmConfig
from pageferry.engine.image.lazy import LazyRestore
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.engine.room import expect_room

#: How much is read between two reports of progress: 64 MiB.
_STEP_PAGES = 32 * PAGES_PER_2M


def _ignore(_: int, __: int) -> None:
    """See nothing."""


def restore(
    saved: SavedGuest, make_vm: Callable[[VmConfig], AnyVm], *, on_progress: Callable[[int, int], None] = _ignore
) -> AnyVm:
    """Make the machine of a saved guest and fill it.

    Args:
        saved: the file; checked when it was opened.
        make_vm: makes the machine, paused; refuses a guest that it cannot hold, as a CPU it has not got.
        on_progress: told how many of how many pages have been read.

    Raises:
        UsageError: the host has no room.
        VmError: no machine here can hold this guest, or the file cannot be read.
        RemoteStreamError: the file has changed since it was opened.
    """
    with contextlib.ExitStack() as undo:
        vm = _machine(saved, make_vm, undo)
        gfns = saved.data_pages
        for at in range(0, gfns.size, _STEP_PAGES):
            saved.load(vm.memory, gfns[at : at + _STEP_PAGES])
            on_progress(min(at + _STEP_PAGES, gfns.size), gfns.size)
        vm.load_state(saved.state)
        vm.memory.advice.end_arrival()
        undo.pop_all()
    return vm


def restore_lazily(
    saved: SavedGuest, make_vm: Callable[[VmConfig], AnyVm], *, on_failure: Callable[[PageferryError], None]
) -> tuple[AnyVm, LazyRestore]:
    """Make the machine of a saved guest, whose memory is read when it is touched.

    The rest is read when :meth:`LazyRestore.read_ahead` says so.

    Args:
        saved: the file; closed when all of it was read.
        make_vm: as for :func:`restore`.
        on_failure: told, on a thread of its own, that a page cannot be read; see :class:`LazyRestore`.

    Raises:
        UnsupportedError: this host or machine cannot wait for pages.
        UsageError, VmError: as for :func:`restore`.
    """
    with contextlib.ExitStack() as undo:
        vm = _machine(saved, make_vm, undo)
        lazy = LazyRestore(saved, vm, on_failure=on_failure)
        undo.callback(lazy.close)
        vm.load_state(saved.state)
        vm.memory.advice.end_arrival()
        undo.pop_all()
    return vm, lazy


def _machine(saved: SavedGuest, make_vm: Callable[[VmConfig], AnyVm], undo: contextlib.ExitStack) -> AnyVm:
    """Return the machine of a saved guest, empty; closed by ``undo``."""
    vm = make_vm(saved.config)
    undo.callback(vm.close)
    expect_room(vm.memory, saved.data_pages.size)
    vm.memory.advice.begin_arrival()
    if (removed := saved.removed).size:
        vm.remove_pages(removed)
    return vm
