"""Interrupting ``KVM_RUN`` from another thread: a signal whose handler does nothing and is not Python.

``signal.signal`` works in the main thread only, and its handler would run Python code there. All that a kick needs is
that *some* handler exists, so that the signal neither kills the process nor is ignored: then the kernel leaves the
guest with EINTR. The handler here is the C library's ``abs``: it takes the signal number as its one argument, touches
no memory and returns.

Source: ``signal(7)``; kernel ``api.rst``, "The kvm_run structure", ``immediate_exit``.
"""

import ctypes
import functools
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pageferry.core.errors import VmError
from pageferry.core.libc import libc

_SA_RESTART = 0x1000_0000
_SIG_DFL = 0


class _Sigaction(ctypes.Structure):
    # struct sigaction of the C library (glibc and musl agree on 64-bit Linux): the handler is kept as an address.
    _fields_ = (
        ("sa_handler", ctypes.c_size_t),
        ("sa_mask", ctypes.c_ulong * 16),
        ("sa_flags", ctypes.c_int),
        ("sa_restorer", ctypes.c_size_t),
    )


_lock = threading.Lock()


def kick_signal() -> int:
    """Return the signal to kick with, installing its handler the first time; from any thread.

    The first real-time signal without a handler is taken, and kept for the life of the process.

    Raises:
        VmError: the process handles every real-time signal already.
    """
    with _lock:
        return _install()


@functools.cache
def _install() -> int:
    handler = ctypes.cast(libc.abs, ctypes.c_void_p).value or 0
    for number in range(signal.SIGRTMIN, signal.SIGRTMAX + 1):
        # SAFETY: both structures are ours and live across the calls; the handler's code is the C library's and is
        # never unloaded.
        old = _Sigaction()
        if libc.sigaction(number, None, ctypes.byref(old)) or old.sa_handler != _SIG_DFL:
            continue
        new = _Sigaction(sa_handler=handler, sa_flags=_SA_RESTART)
        if libc.sigaction(number, ctypes.byref(new), None) == 0:
            return number
    raise VmError("no free real-time signal to interrupt a vCPU with")


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Hold back every signal of this thread for the length of a ``with`` block; what came is delivered after it.

    A kick that is held back is not lost: ``immediate_exit`` is set already.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
