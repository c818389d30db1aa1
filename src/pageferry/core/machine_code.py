"""Machine code of our own, run in this process: what Python has no instruction for."""

import mmap
import os
import platform

import numpy as np
from numpy.typing import NDArray


def executable(code: bytes) -> NDArray[np.uint8] | None:
    """Return x86-64 code that may be run, uint8[len(code)]; None if this host cannot run it, or lets no process do so.

    It is written through a file and mapped without permission to write: never both at once.
    """
    if platform.machine() != "x86_64":
        return None
    try:
        fd = os.memfd_create("pageferry-code")
        try:
            os.write(fd, code)
            return np.frombuffer(mmap.mmap(fd, len(code), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC), np.uint8)
        finally:
            os.close(fd)
    except OSError:
        return None
