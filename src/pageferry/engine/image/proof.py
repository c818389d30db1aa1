"""Proof that a file holds a guest as it was at the pause: digests taken then, compared with what the file gives back.

The stream has no digests of its own. So they are kept here while the guest runs on, and the file is read back as
``restore`` reads it; by then it is on the disk and out of the host's cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap, expand_runs
from pageferry.core.errors import VerifyError
from pageferry.core.frames import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_2M, GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.engine.image.saved_guest import SavedGuest
from pageferry.engine.verify.digests import (
    DigestArray,
    batches,
    digest_runs,
    digest_views,
    first_difference,
    populated_runs,
)
from pageferry.stream.hvm_context import encode_machine_state

#: How much of a file is looked at at once: 32 MiB.
_BATCH_PAGES = 16 * PAGES_PER_2M


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AtPause:
    """A guest at the pause, to be recognised by: ``digests`` of its populated runs, what it gave back, its state.

    ``context`` is the state as an HVM context.
    """

    starts: GfnArray
    lengths: GfnArray
    digests: DigestArray
    removed: GfnArray
    context: bytes

    @classmethod
    def of(cls, memory: GuestMemory, context: bytes) -> "AtPause":
        """Digest a guest that stands still."""
        starts, lengths = populated_runs(memory)
        digests = digest_runs(memory, starts, lengths)
        return cls(starts=starts, lengths=lengths, digests=digests, removed=memory.removed(), context=context)

    @property
    def pages(self) -> int:
        """How many pages were digested."""
        return int(self.lengths.sum())

    def expect_in(self, saved: SavedGuest, check: Callable[[], None]) -> None:
        """Check that a file holds this guest and nothing else.

        Args:
            saved: the file.
            check: called between parts; raises to give up.

        Raises:
            VerifyError: it does not.
            RemoteStreamError, VmError: it cannot be read as it could when it was opened.
        """
        same_state = encode_machine_state(saved.state) == self.context
        if not same_state or not np.array_equal(saved.removed, self.removed):
            raise VerifyError("the file does not hold the state of the guest at the pause", gfn=None)
        buffer = np.empty(_BATCH_PAGES << PAGE_SHIFT, np.uint8)
        for piece in batches(self.lengths, _BATCH_PAGES - PAGES_PER_2M, self.lengths.size):
            check()
            lengths = self.lengths[piece]
            found = saved.content(expand_runs(self.starts[piece], lengths), buffer)
            edges = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64) << PAGE_SHIFT
            views = [found[begin:end] for begin, end in pairwise(edges.tolist())]
            wrong = first_difference(digest_views(views, lengths), self.digests[piece])
            if wrong is not None:
                first, pages = int(self.starts[piece][wrong]), int(lengths[wrong])
                raise VerifyError(f"the file is not the guest at the pause: {pages} pages at gfn {first:#x}", gfn=None)
        self._expect_zero_elsewhere(saved, buffer)

    def _expect_zero_elsewhere(self, saved: SavedGuest, buffer: NDArray[np.uint8]) -> None:
        gfns = saved.data_pages
        if not gfns.size:
            return
        digested = DirtyBitmap(int(max(gfns.max(), (self.starts + self.lengths).max(initial=0))) + 1)
        digested.set_runs(self.starts, self.lengths)
        gfns = gfns[~digested.test_many(gfns)]
        for at in range(0, gfns.size, _BATCH_PAGES):
            some = gfns[at : at + _BATCH_PAGES]
            content = np.frombuffer(saved.content(some, buffer), np.uint64).reshape(-1, PAGE_SIZE // 8)
            if (wrong := content.any(axis=1)).any():
                raise VerifyError("the file has content where the guest had none", gfn=int(some[np.argmax(wrong)]))
