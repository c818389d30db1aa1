"""The destination's part of the proof that two memories are equal, before the guest may run (law 7).

The source's part is :mod:`pageferry.engine.verify.prove`, the digests themselves are in
:mod:`pageferry.engine.verify.digests`. Every page that the source has is proven equal, now or by an audit that is
remembered here, or it is missing and follows after the switch; whatever else has storage here is zero.
"""

import threading

import numpy as np
from numpy.typing import NDArray

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import RecordError, VerifyError
from pageferry.core.frames import PAGES_PER_2M, GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.engine.verify.digests import (
    DIGEST_BYTES,
    DigestArray,
    digest_runs,
    first_difference,
    first_nonzero,
    page_digests,
)
from pageferry.stream.ferry_frames import Digests, Mismatch, Missing


class AuditMismatchError(VerifyError):
    """A run is not what it is at the source: ``pages`` frames from ``first_gfn``."""

    def __init__(self, first_gfn: int, pages: int) -> None:
        super().__init__("a page is not the source's, which reported no write to it", gfn=None)
        self.first_gfn = first_gfn
        self.pages = pages


class ReceivedPages:
    """The destination's knowledge of each page: arrived, proven equal since, or removed. For threads of any number.

    It knows this from what it received and digested itself; nothing that the source says of it enters. Of 2 MiB
    that come in order it has the digest from when they came, while a processor's cache had them; they are not read
    again for an audit.

    Args:
        memory: the guest's, here; it began as zeros.
        audits: whether the source may audit. If not, what arrived is not noted: that costs 12 ms per GiB.
    """

    def __init__(self, memory: GuestMemory, *, audits: bool) -> None:
        self.memory = memory
        self.audits = audits
        self.arrived_pages = 0
        """How many have arrived so far; one that arrives again counts again."""
        self._lock = threading.Lock()
        self._arrived = DirtyBitmap(memory.gfn_limit) if audits else None
        self._proven: DirtyBitmap | None = None  # made at the first audit
        self._removed: DirtyBitmap | None = None  # made at the first removal
        regions = -(-memory.gfn_limit // PAGES_PER_2M) if audits else 0
        self._digests = np.zeros((regions, DIGEST_BYTES), np.uint8)  # of each whole 2 MiB, as it arrived
        self._is_digested = np.zeros(regions, np.bool_)

    def arrived(self, gfns: GfnArray, run: range | None = None) -> None:
        """These frames have new content: mark them, and take nothing for proven of them.

        Args:
            gfns: uint64[n].
            run: the same, where they are known to be neighbours; that costs less.
        """
        if not gfns.size:
            return
        self.memory.wrote(gfns)
        with self._lock:
            self.arrived_pages += gfns.size
            if self._arrived is not None:
                if run is None:
                    self._arrived.set(gfns)
                    self._is_digested[gfns // np.uint64(PAGES_PER_2M)] = False
                else:
                    self._arrived.set_range(run.start, len(run))
                    self._is_digested[run.start // PAGES_PER_2M : -(-run.stop // PAGES_PER_2M)] = False
            for bitmap in (self._proven, self._removed):
                if bitmap is not None:
                    if run is None:
                        bitmap.clear(gfns)
                    else:
                        bitmap.clear_range(run.start, len(run))

    def digested(self, first_gfn: int, digest: bytes) -> None:
        """Take the digest of a whole 2 MiB that have arrived, as memory has them now; until one of them arrives anew.

        Args:
            first_gfn: a multiple of 512.
            digest: as :func:`~pageferry.engine.verify.digests.digest_runs` makes it.
        """
        region = first_gfn // PAGES_PER_2M
        with self._lock:
            self._digests[region] = np.frombuffer(digest, np.uint8)
            self._is_digested[region] = True

    def remove(self, gfns: GfnArray) -> None:
        """The source has no frame for these (uint64[n]); what was never RAM here is not noted."""
        if not gfns.size:
            return
        with self._lock:
            if self._removed is None:
                self._removed = DirtyBitmap(self.memory.gfn_limit)
            self._removed.set(gfns[self.memory.are_ram(gfns)])

    def removed(self) -> GfnArray:
        """Return the frames of RAM that the source has none for, uint64[n] ascending."""
        return np.empty(0, np.uint64) if self._removed is None else self._removed.gfns()

    def audit(self, first_gfns: GfnArray, pages: GfnArray, digests: NDArray[np.uint8]) -> None:
        """Compare runs that the source digested while the guest ran; they are proven then, until they arrive anew.

        Raises:
            AuditMismatchError: a run differs.
            VmError: a run is not RAM.
        """
        index = first_difference(self._digests_of(first_gfns, pages), digests)
        if index is not None:
            raise AuditMismatchError(int(first_gfns[index]), int(pages[index]))
        with self._lock:
            if self._proven is None:
                self._proven = DirtyBitmap(self.memory.gfn_limit)
            self._proven.set_runs(first_gfns, pages)

    def _digests_of(self, first_gfns: GfnArray, pages: GfnArray) -> DigestArray:
        regions = first_gfns // np.uint64(PAGES_PER_2M)
        whole = (pages == PAGES_PER_2M) & (first_gfns == regions * np.uint64(PAGES_PER_2M))
        whole &= regions < self._is_digested.size
        with self._lock:
            known = np.zeros(whole.size, np.bool_)
            known[whole] = self._is_digested[regions[whole]]
            digests = np.empty((known.size, DIGEST_BYTES), np.uint8)
            digests[known] = self._digests[regions[known]]
        digests[~known] = digest_runs(self.memory, first_gfns[~known], pages[~known])
        return digests

    def all_proven(self, first_gfns: GfnArray, pages: GfnArray) -> bool:
        """Tell whether every frame of the runs is proven, as it is now."""
        return self._proven is not None and self._proven.has_runs(first_gfns, pages)

    def populated(self) -> DirtyBitmap:
        """Return which frames of RAM may hold something; as soon as anything was audited, those that ever arrived."""
        with self._lock:
            if self._arrived is None or self._proven is None:
                populated = DirtyBitmap(self.memory.gfn_limit)
                populated.set_runs(*self.memory.populated())  # takes a while
            else:
                populated = self._arrived.copy()
                populated.clear(self.memory.removed())
            return populated


class Comparison:
    """Compares what the source says of the guest's memory at the pause with the memory here. The guest has not run.

    Args:
        pages: what arrived.
        shared: the two memories are one.
    """

    def __init__(self, pages: ReceivedPages, *, shared: bool) -> None:
        self.missing = DirtyBitmap(pages.memory.gfn_limit)
        """The frames that follow after the switch."""
        self._pages = pages
        self._shared = shared
        self._starts: list[GfnArray] = []
        self._lengths: list[NDArray[np.uint64]] = []
        self._populated = pages.populated()  # found while the source looks for the same there

    @property
    def begun(self) -> bool:
        """Whether a digest was compared: nothing may be said to be missing any more."""
        return bool(self._starts)

    def take_missing(self, frame: Missing) -> None:
        """Note what follows after the switch.

        Raises:
            RecordError: it is not RAM of the guest.
        """
        memory = self._pages.memory
        end = int(frame.first_gfns[-1] + frame.pages[-1])
        if end > memory.gfn_limit:
            raise RecordError(f"gfn {end - 1:#x} is outside the guest", record="MISSING")
        named = DirtyBitmap(memory.gfn_limit)
        named.set_runs(frame.first_gfns, frame.pages)
        if (named - memory.all_ram()).any():
            raise RecordError("a page is not RAM", record="MISSING")
        self.missing |= named

    def compare(self, frame: Digests) -> Mismatch | None:
        """Compare one frame of digests; return what to answer at the first difference, or None.

        Raises:
            VerifyError: a range is said to be audited, and was not since it last arrived.
        """
        starts, lengths, audited = frame.first_gfns, frame.pages.astype(np.uint64), frame.audited
        self._starts.append(starts)
        self._lengths.append(lengths)
        if audited.any() and not self._pages.all_proven(starts[audited], lengths[audited]):
            raise VerifyError("a page was never proven equal", gfn=None)
        return self._difference(starts[~audited], lengths[~audited], frame.digests[~audited])

    def _difference(self, starts: GfnArray, lengths: GfnArray, theirs: DigestArray) -> Mismatch | None:
        memory = self._pages.memory
        index = first_difference(digest_runs(memory, starts, lengths), theirs)
        return None if index is None else mismatch_of(memory, int(starts[index]), int(lengths[index]))

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
        if not self._shared:  # else nothing lies elsewhere: the ends share the memory
            gfn = first_nonzero(self._pages.memory, self._populated - known)
            if gfn is not None:
                raise VerifyError("a page is not zero here that is zero at the source", gfn=gfn)
        return pages


def mismatch_of(memory: GuestMemory, first_gfn: int, pages: int) -> Mismatch:
    """Return what tells the source which page of a run that differs it is."""
    return Mismatch(first_gfn=first_gfn, page_digests=page_digests(memory, first_gfn, pages))
