"""P2MAbsentPages: frames that are absent until they are touched, on the software machine.

A TLB miss begins with a walk through the P2M, and the frame that it ends at is not present to it until its content has
come: what hardware reports as a not-present nested fault. So no translation to an absent page is ever in a TLB.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import runs_of
from pageferry.core.frames import PAGE_SHIFT, GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.hypervisor.p2m import P2M


class P2MAbsentPages:
    """The absent frames of a guest; implements :class:`pageferry.core.vm.AbsentPages`.

    Args:
        memory: the guest's.
        p2m: the domain's.
        fetch: brings frames.
    """

    def __init__(self, memory: GuestMemory, p2m: P2M, fetch: Callable[[GfnArray], None]) -> None:
        self._memory = memory
        self._p2m = p2m
        memory.on_touch(fetch)
        p2m.fetch = lambda gfn: fetch(np.array([gfn], np.uint64))

    def install(self, gfns: GfnArray, content: NDArray[np.uint8]) -> None:
        """Give frames their content, by the mapping that is not the vCPUs'; see the protocol."""
        at, view = 0, np.frombuffer(self._memory.mapping.view, np.uint8)
        for start, length in zip(*(part.tolist() for part in runs_of(gfns)), strict=True):
            size_bytes = length << PAGE_SHIFT
            view[start << PAGE_SHIFT :][:size_bytes] = content[at : at + size_bytes]
            at += size_bytes

    def finish(self) -> None:
        """Let all of memory be present."""
        self._p2m.fetch = None
        self._memory.on_touch(None)

    def close(self) -> None:
        """Do nothing: no thread serves this."""
