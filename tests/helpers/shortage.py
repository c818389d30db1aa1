"""A host that has no more threads, really: each is asked for with a stack that no address space has."""

import contextlib
import threading

_TOO_MUCH = 1 << 50


@contextlib.contextmanager
def no_more_threads():
    """Have no thread of this process begin inside a ``with`` block."""
    before = threading.stack_size(_TOO_MUCH)
    try:
        yield
    finally:
        threading.stack_size(before)
