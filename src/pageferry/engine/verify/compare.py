"""Comparison: the destination's part of the proof that two memories are equal, before the guest may run (law 7).

The source's part is :mod:`pageferry.engine.verify.prove`, the digests themselves are in
:mod:`pageferry.engine.verify.digests`. Every page that the source has is proven equal, now or by an audit that is
remembered here, or is said to be missing and follows after the switch; whatever else has storage here is zero.
"""

import threading

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import RecordError, VerifyError
from pageferry.core.frames import GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.engine.verify import digests as verify
from pageferry.stream.ferry import Digests, Mismatch, Missing


class AuditMismatchError(VerifyError):
    """A run is not what it is at the source: ``pages`` frames from ``first_gfn``."""

    def __init__(self, first_gfn: int, pages: int) -> None:
        super().__init__("a page is not the source's, which reported no write to it", gfn=None)
        self.first_gfn = first_gfn
        self.pages = pages


class AuditedPages:
    """Which frames arrived, and which of them were proven since. For threads of any number.

    Args:
        memory: the guest's, here.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._proven = DirtyBitmap(memory.gfn_limit)
        self._any_proven = False
        self._arrived = DirtyBitmap(memory.gfn_limit)

    def arrived(self, gfns: GfnArray) -> None:
        """These frames (uint64[n]) have new content."""
        with self._lock:
            self._arrived.set(gfns)
            if self._any_proven:
                self._proven.clear(gfns)

    def all_arrived(self) -> tuple[GfnArray, GfnArray] | None:
        """Return the runs of RAM that ever arrived; None where nothing was proven yet, so that nobody audits here."""
        with self._lock:
            if not self._any_proven:
                return None
            self._arrived &= self._memory.all_ram()
            return self._arrived.runs()

    def compare(self, first_gfns: GfnArray, pages: GfnArray, digests: NDArray[np.uint8]) -> int | None:
        """Digest the runs here; return the index of the first that differs, or None: then they are proven.

        Raises:
            VmError: a run is not RAM.
        """
        index = verify.first_difference(verify.digest_runs(self._memory, first_gfns, pages), digests)
        if index is None:
            with self._lock:
                self._proven.set_runs(first_gfns, pages)
                self._any_proven = True
        return index

    def all_proven(self, first_gfns: GfnArray, pages: GfnArray) -> bool:
        """Tell whether every frame of the runs is proven, as it is now."""
        wanted = DirtyBitmap(self._proven.nbits)
        if (first_gfns + pages > wanted.nbits).any():
            return False
        wanted.set_runs(first_gfns, pages)
        return not (wanted - self._proven).any()


class Comparison:
    """What one guest's source says of its memory, frame by frame, against what is here. The guest has not run.

    Args:
        memory: what arrived.
        audited: what was proven during pre-copy and has not arrived anew; None: nothing is audited.
        shared: the two memories are one.
    """

    def __init__(self, memory: GuestMemory, audited: AuditedPages | None, *, shared: bool) -> None:
        self.missing = DirtyBitmap(memory.gfn_limit)
        """The frames that are said to follow after the switch."""
        self._memory = memory
        self._audited = audited
        self._shared = shared
        self._starts: list[GfnArray] = []
        self._lengths: list[NDArray[np.uint64]] = []
        # While the source looks for the same there: it takes a while, unless we know what arrived.
        self._populated = (audited and audited.all_arrived()) or memory.populated()

    @property
    def begun(self) -> bool:
        """Whether a digest was compared: nothing may be said to be missing any more."""
        return bool(self._starts)

    def take_missing(self, frame: Missing) -> None:
        """Take in what follows after the switch.

        Raises:
            RecordError: it is no RAM of the guest.
        """
        end = int(frame.first_gfns[-1] + frame.pages[-1])
        if end > self._memory.gfn_limit:
            raise RecordError(f"gfn {end - 1:#x} is outside the guest", record="MISSING")
        named = DirtyBitmap(self._memory.gfn_limit)
        named.set_runs(frame.first_gfns, frame.pages)
        if (named - self._memory.all_ram()).any():
            raise RecordError("a page is not RAM", record="MISSING")
        self.missing |= named

    def compare(self, frame: Digests) -> Mismatch | None:
        """Compare one frame of digests; return what to answer at the first difference, or None.

        Raises:
            VerifyError: a range is said to be audited, and was not since it last arrived.
        """
        self._starts.append(frame.first_gfns)
        self._lengths.append(frame.pages.astype(np.uint64))
        return self._difference(frame)

    def _difference(self, frame: Digests) -> Mismatch | None:
        starts, lengths, audited = frame.first_gfns, frame.pages.astype(np.uint64), frame.audited
        if audited.any() and not (self._audited and self._audited.all_proven(starts[audited], lengths[audited])):
            raise VerifyError("a page was never proven equal", gfn=None)
        starts, lengths = starts[~audited], lengths[~audited]
        index = verify.first_difference(verify.digest_runs(self._memory, starts, lengths), frame.digests[~audited])
        return None if index is None else mismatch_of(self._memory, int(starts[index]), int(lengths[index]))

    def conclude(self) -> int:
        """Check what the frames say together, after the last and no difference; return how many pages are equal.

        Raises:
            VerifyError: a page is both proven and missing, or one that the source does not have is not zero here.
        """
        starts, lengths = np.concatenate(self._starts), np.concatenate(self._lengths)
        known = DirtyBitmap(self.missing.nbits)
        known.set_runs(starts, lengths)
        known |= self.missing
        pages = int(lengths.sum())
        if known.count() != pages + self.missing.count():
            raise VerifyError("a page is proven that is missing", gfn=None)
        if not self._shared:  # else there is no elsewhere: the memory is one
            self._expect_zero_outside(*known.runs())
        return pages

    def _expect_zero_outside(self, starts: GfnArray, lengths: GfnArray) -> None:
        gfn = verify.first_nonzero_outside(self._memory, self._populated, starts, lengths)
        if gfn is not None:
            raise VerifyError("a page is not zero here that is zero at the source", gfn=gfn)


def mismatch_of(memory: GuestMemory, first_gfn: int, pages: int) -> Mismatch:
    """Return what tells the source which page of a run that differs it is."""
    return Mismatch(first_gfn=first_gfn, page_digests=verify.page_digests(memory, first_gfn, pages))
