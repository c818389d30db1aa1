"""What this process has open, for tests that compare it."""

import gc
import os


def open_descriptors() -> set[str]:
    """Return the numbers, as text; what another test has left to the garbage collector is closed first."""
    gc.collect()
    return set(os.listdir("/proc/self/fd"))
