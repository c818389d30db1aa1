"""Ledger: which pages each tracker must still report, and so which it has lost.

**What is a loss.** It is not a loss yet if only one of two trackers reports a page: KVM may report a page that was only
read when it was mapped, or that the processor walked. Content decides. A page is read after each CLEAN that reported it
(against ``digests``: all pages with storage are), and its digest is compared with the reading before. If it differs,
the page was written between the two readings, and *every* tracker must report it, whenever the trackers were cleaned
relative to each other. A page that is reported and did not change is *spurious*: counted, no loss.

**When it must be reported** (laws 2 and 4)::

    tracker T       witness                       a write w that the reading d[n] shows and d[n-1] did not
    CLEAN t[n-1]
    .               reading d[n-1]
    .               .                             w before t[n] begins: in t[n]. T reported it: settled.
    CLEAN t[n]      .                             w during t[n]: in t[n] or t[n+1], whichever T likes.
    .               .                             w after t[n]: in t[n+1].
    .               reading d[n]: changed.
    .               Not in t[n]: T *owes* the page.
    CLEAN t[n+1]    .                             begun after d[n], so after w: the page is in it, or T has lost it.

Both trackers are cleaned before the reading, so this holds for each by itself. A page that neither of two trackers
reports is not read; only ``digests`` finds it.

**Writers that mark.** A device's bytes land before its mark, and its thread may rest in between for any time. So a page
that is owed becomes *due* only at an instant with no write under way (``GuestMemory.unmarked_writes``): whatever a
reading before it saw has been marked by then. A kernel that writes guest memory itself is taken to mark within a round.

**At the end** the guest stands still, and what a PEEK shows is all that is left: pages are read after it, and each that
changed since its last reading must be in the PEEK (in a second one, taken after the reading, before it is called a
loss). Nothing is owed any more then.

**What is not decided.** A write between t[n] and d[n], to a page that t[n] reported, shows in d[n] and is settled by
t[n]: it may be the write that t[n] reported. Lost, it is found by the next change of the page, or never. The same
is true of a change that is undone before the next reading, and of bytes written over themselves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pageferry.core.bitmap import DirtyBitmap
from pageferry.core.errors import LostPageError
from pageferry.core.frames import GfnArray
from pageferry.witness import DIGESTS

Reports = Sequence[DirtyBitmap]
"""What each tracker reported, the primary first; without a second tracker there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WitnessCounts:
    """What was compared since ENABLE; kept after OFF.

    ``rounds``: rounds of CLEAN, and PEEKs of a guest that stood still. ``pages``: reported by either, over all rounds.
    ``spurious_primary``, ``spurious_witness``: reported by that one only, and not changed.
    """

    rounds: int = 0
    pages: int = 0
    spurious_primary: int = 0
    spurious_witness: int = 0


class _Debts:
    """The pages that one tracker must still report. ``due`` is the part of ``owed`` that its next CLEAN must have."""

    def __init__(self, tracker: str, nbits: int) -> None:
        self.tracker = tracker
        self.owed = DirtyBitmap(nbits)
        self.due = DirtyBitmap(nbits)

    def mature(self, removed: GfnArray) -> None:
        """No write is under way: all that is owed is due, except frames that are not RAM any more."""
        if removed.size:
            self.owed.clear(removed)
        self.due = self.owed.copy()

    def settle(self, reported: DirtyBitmap, changed: DirtyBitmap) -> None:
        """Take note of a CLEAN, and of what was found changed after it."""
        self.owed |= changed
        self.owed -= reported
        self.due -= reported


class Ledger:
    """The account of one tracking, from ENABLE on.

    Args:
        trackers: their names, the primary first; a single one has digests for a witness.
        nbits: frames of the guest.
    """

    def __init__(self, trackers: Sequence[str], nbits: int) -> None:
        self.counts = WitnessCounts()
        self._debts = tuple(_Debts(tracker, nbits) for tracker in trackers)
        self._changed_in = np.zeros(nbits, np.uint32)  # the round in which a page was last seen to change
        self._round = -1
        self._next_gfn = 0  # where a CLEAN begins that goes on with the round
        self._witnessed_before = DirtyBitmap(nbits)
        self._witness_only = DirtyBitmap(nbits)

    def mature(self, removed: GfnArray) -> None:
        """Take note that no write is under way: all that is owed is due, except frames that are not RAM any more."""
        for debts in self._debts:
            debts.mature(removed)

    def expect_due(self, reports: Reports, gfns: range) -> None:
        """Check that a CLEAN of ``gfns`` reported all that was due there.

        Raises:
            LostPageError: a tracker has lost a page.
        """
        for debts, reported in zip(self._debts, reports, strict=True):
            self._expect_none(debts, debts.due.copy().take(gfns) - reported)

    def settle(self, reports: Reports, changed: DirtyBitmap, gfns: range) -> None:
        """Take note of a CLEAN of ``gfns`` and of what was found changed after it; ranges that ascend are one round."""
        new_round = gfns.start < self._next_gfn or self._round < 0
        self._next_gfn = max(gfns.stop, gfns.start + 1)
        self._round += new_round
        self._note_changed(changed, self._round)
        for debts, reported in zip(self._debts, reports, strict=True):
            debts.settle(reported, changed)
        self._count(reports, changed, gfns, new_round=new_round)

    def settle_last(self, reports: Reports, changed: DirtyBitmap, again: Sequence[Callable[[], DirtyBitmap]]) -> None:
        """Take note of a PEEK at a guest that stands still, and of what was found changed after it.

        Args:
            reports: of all frames.
            changed: since the last CLEAN.
            again: PEEKs once more, for a tracker that seems to lack a page.

        Raises:
            LostPageError: a tracker has lost a page.
        """
        self._note_changed(changed, self._round + 1)
        for debts, reported, look in zip(self._debts, reports, again, strict=True):
            missing = (debts.due | changed) - reported
            if missing.any():
                self._expect_none(debts, missing - look())
        self._count(reports, changed, range(changed.nbits), new_round=True)

    def _expect_none(self, debts: _Debts, lost: DirtyBitmap) -> None:
        if not lost.any():
            return
        gfns = lost.gfns().tolist()
        others = [other for other in self._debts if other is not debts and not other.owed.test(gfns[0])]
        raise LostPageError(
            gfns,
            round_index=int(self._changed_in[gfns[0]]),
            lost_by=debts.tracker,
            seen_by=others[0].tracker if others else DIGESTS,
        )

    def _note_changed(self, changed: DirtyBitmap, round_index: int) -> None:
        self._changed_in[changed.gfns()] = max(0, round_index)

    def _count(self, reports: Reports, changed: DirtyBitmap, gfns: range, *, new_round: bool) -> None:
        # The primary is cleaned first: what it alone reports, the witness may have reported the CLEAN before; what the
        # witness alone reports, the primary may report the next time. Only then has no other seen it.
        primary, witness = reports[0], reports[1] if len(reports) > 1 else changed
        witnessed_before, witness_only = self._witnessed_before.take(gfns), self._witness_only.take(gfns)
        counts = self.counts
        self.counts = WitnessCounts(
            rounds=counts.rounds + new_round,
            pages=counts.pages + (primary | witness).count(),
            spurious_primary=counts.spurious_primary + (primary - witness - witnessed_before - changed).count(),
            spurious_witness=counts.spurious_witness + (witness_only - primary).count(),
        )
        self._witnessed_before |= witness
        self._witness_only |= witness - primary - changed
