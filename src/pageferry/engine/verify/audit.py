"""Proof during pre-copy: digests of pages that lie still, made in the background while the guest runs.

A page whose bit has stayed clear since it was sent has at the destination the content that it has here, if the tracker
tells the truth. So the source digests such pages and the destination must find the same digests: whatever was proven
this way need not be digested at the pause, and a lost dirty bit is found while the guest still runs::

    sender   CLEAN ... send 7,8,9 ... |              | due(): PEEK; 8 was written: dropped; 7 and 9 go out as AUDIT
    auditor                           | digest 7,8,9 |

A digest is of what was sent, for any interleaving, if:

1. when the digest is complete, no write is under way whose mark is still to come;
2. a PEEK after that finds the page clear;
3. no CLEAN since the digest began has taken the page's bit.

The digest begins after the page was last read for sending. So a write after the page was read for sending shows in the
PEEK or in a CLEAN.

The destination does not believe that a page was audited, it remembers:
:class:`~pageferry.engine.verify.compare.ReceivedPages`.
"""

import threading
from collections.abc import Callable

import numpy as np

from pageferry.core.bitmap import DirtyBitmap, split_runs
from pageferry.core.errors import VmError
from pageferry.core.frames import PAGES_PER_2M, GfnArray
from pageferry.core.memory import GuestMemory
from pageferry.engine.accounts import PageAccounts
from pageferry.engine.verify.digests import RunDigests, digest_runs

_PIECE_PAGES = 8192
_MAX_PIECES = 256
_REGION_WORDS = PAGES_PER_2M // 64


def piece_pages(memory_pages: int) -> int:
    """Return how much of a guest is to be digested at once: 32 MiB, on all cores for some milliseconds.

    Of a large guest more, so that it has 256 pieces at the most: each costs two PEEKs, of the whole guest.
    """
    return max(_PIECE_PAGES, memory_pages // _MAX_PIECES)


class Auditor:
    """Digests what lies still, and tells what is proven; the source's half of an audit.

    The sender calls everything; a thread of its own digests.

    Args:
        memory: the guest's.
        accounts: of its pages.
        peek: the tracker's PEEK.
        piece_pages: how much is digested at once; up to twice as much, if that is all.
    """

    def __init__(
        self, memory: GuestMemory, accounts: PageAccounts, peek: Callable[[], DirtyBitmap], *, piece_pages: int
    ) -> None:
        self._memory = memory
        self._accounts = accounts
        self._changed = accounts.changed
        self._peek = peek
        self._piece_pages = piece_pages
        # When a 2 MiB region was last proven, as a number that grows; 0: never.
        self._proven_at = np.zeros(-(-memory.gfn_limit // PAGES_PER_2M), np.uint32)
        self._passes = 0
        self._begun = 0  # sendings that are in a piece, or were when there was nothing to digest
        self._hurried_at: int | None = None  # the sendings when the sender began to wait: what there is makes a piece
        self._cursor = 0  # a word of the bitmaps
        self._piece: tuple[GfnArray, GfnArray] | None = None
        self._ready: RunDigests | None = None
        self._failure: Exception | None = None
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; whatever was sent is audited from now on."""
        self._thread = self._accounts.host.begin(self._main, "audit")

    def close(self) -> None:
        """End the thread; nothing else changes. A second call does nothing."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def due(self) -> RunDigests | None:
        """Return digests that are ready and still those of what was sent, or None; does not wait for any.

        The caller sends them before anything else of these pages.

        Raises:
            Exception: what went wrong on the auditor's thread, or the tracker's failure.
        """
        with self._changed:
            if self._failure is not None:
                raise self._failure
            ready = self._ready
            if ready is None or self._memory.unmarked_writes:
                return None
            moved = self._peek()  # after the line above: the marks of all that was digested are there
            moved |= self._accounts.was_reported
            ready = ready.part(moved.in_runs(ready.first_gfns, ready.pages) == 0)
            self._remember(ready)
            self._ready = self._piece = None
            self._changed.notify_all()
            return ready if ready.first_gfns.size else None

    def idle(self) -> bool:
        """Tell whether there is nothing to do: all that was sent and lies still is proven."""
        with self._changed:
            return self._piece is None and not self._candidates().any()

    def wait(self, timeout_s: float) -> None:
        """Wait until :meth:`due` may have something, the auditor idles, or the time is over.

        The caller sends nothing meanwhile, so what is less than a whole piece is digested, too.
        """
        with self._changed:
            self._hurried_at = self._accounts.sendings
            self._changed.notify_all()
            self._changed.wait_for(self._nothing_more_by_waiting, timeout_s)

    def proven(self) -> DirtyBitmap:
        """Return which frames were proven and not reported since; a copy."""
        return self._accounts.proven()

    def oldest(self, at_most_pages: int) -> DirtyBitmap:
        """Return proven frames, at most so many: those of the 2 MiB regions that were proven longest ago."""
        if at_most_pages < 1:
            return DirtyBitmap(self._memory.gfn_limit)
        chosen = self.proven()
        words = np.zeros((self._proven_at.size, _REGION_WORDS), np.uint64)
        words.reshape(-1)[: chosen.words.size] = chosen.words
        regions = np.flatnonzero(words.any(axis=1))
        regions = regions[np.argsort(self._proven_at[regions], kind="stable")]
        counts = np.bitwise_count(words[regions]).sum(axis=1, dtype=np.int64)
        words[regions[np.cumsum(counts) > at_most_pages]] = 0
        chosen.words[:] = words.reshape(-1)[: chosen.words.size]
        return chosen

    def _nothing_more_by_waiting(self) -> bool:
        return self._ready is not None or not self._hurried or self._failure is not None or self._closing

    @property
    def _hurried(self) -> bool:
        return self._hurried_at == self._accounts.sendings

    def _remember(self, proven: RunDigests) -> None:
        self._passes += 1
        self._accounts.is_proven.set_runs(proven.first_gfns, proven.pages)
        self._proven_at[(proven.first_gfns // np.uint64(PAGES_PER_2M)).astype(np.int64)] = self._passes

    def _candidates(self) -> DirtyBitmap:
        return self._accounts.is_sent - self._accounts.is_proven - self._peek()

    def _main(self) -> None:
        try:
            while self._begin_piece():
                self._digest_piece()
        except Exception as error:  # raised where the sender next asks
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _begin_piece(self) -> bool:
        """Wait for something to digest and choose it; return False when it is over."""
        with self._changed:
            while not self._closing:
                owed_pages = self._accounts.sendings - self._begun
                if self._ready is None and (self._hurried or owed_pages >= self._piece_pages):
                    candidates = self._candidates()
                    if candidates.any():
                        self._piece = self._next(candidates)
                        self._begun += min(owed_pages, int(self._piece[1].sum()))
                        self._accounts.was_reported = DirtyBitmap(self._memory.gfn_limit)
                        return True
                    self._begun, self._hurried_at = self._accounts.sendings, None
                    self._changed.notify_all()
                self._accounts.awaited_sendings = self._begun + self._piece_pages
                self._changed.wait()
            return False

    def _next(self, candidates: DirtyBitmap) -> tuple[GfnArray, GfnArray]:
        """Return the next runs from the cursor on, about a piece; begin again at 0 where nothing follows."""
        words = candidates.words
        if not words[self._cursor :].any():
            self._cursor = 0
        first = self._cursor + int(np.argmax(words[self._cursor :] != 0))
        counts = np.cumsum(np.bitwise_count(words[first : first + self._piece_pages]), dtype=np.int64)
        end = first + int(np.searchsorted(counts, self._piece_pages)) + 1
        self._cursor = min(end, words.size)
        piece = DirtyBitmap(candidates.nbits)
        piece.words[first:end] = words[first:end]
        return _within_regions(*piece.runs())

    def _digest_piece(self) -> None:
        if self._piece is None:
            raise VmError("there is no piece to digest")
        starts, lengths = self._piece
        try:
            digests = digest_runs(self._memory, starts, lengths)
        except VmError:  # the guest gave a frame back meanwhile; it is not RAM, and not a candidate the next time
            with self._changed:
                self._accounts.is_sent &= self._memory.all_ram()
                self._piece = None
                self._changed.notify_all()
            return
        with self._changed:
            self._ready = RunDigests(first_gfns=starts, pages=lengths, digests=digests)
            self._changed.notify_all()


def _within_regions(starts: GfnArray, lengths: GfnArray) -> tuple[GfnArray, GfnArray]:
    """Cut runs at every multiple of 2 MiB, so that each lies in one region."""
    region = np.uint64(PAGES_PER_2M)
    head = np.minimum(lengths, region - starts % region)
    longer = lengths > head
    rest_starts, rest_lengths = split_runs((starts + head)[longer], (lengths - head)[longer], PAGES_PER_2M)
    starts = np.concatenate((starts, rest_starts))
    order = np.argsort(starts, kind="stable")
    return starts[order], np.concatenate((head, rest_lengths))[order]
